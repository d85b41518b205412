"""What methods share besides their axes: draws of a noise level, rollouts, scores, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flux2.distributed import gather
from flux2.errors import InputError
from flux2.flow import TimeDensity, interpolate, target_velocity
from flux2.rng import Rng
from flux2.samplers import sample_euler
from flux2.schedule import Grid
from flux2.types import Batch, Metrics, Score, Scores, Velocity
from posttrain.advantages import Advantage, Advantages


def check_group(group: int) -> None:
    """A group of one has no spread. Raises InputError."""
    if group < 2:
        raise InputError(f"method.group is {group}: a group needs at least 2 samples to compare")


def check_positive(values: Mapping[str, float]) -> None:
    """values: names within method → numbers. Raises InputError for one that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"method.{name} is {value}: it must be positive")


@dataclass(frozen=True, eq=False)
class Noised:
    """Images on their way to noise, x_t = (1 − t)·x0 + t·ε. x0, eps: b n c; t: b."""

    x0: Tensor
    eps: Tensor
    t: Tensor

    @classmethod
    def draw(cls, batch: Batch, density: TimeDensity, rng: Rng, counter: int = 0) -> Noised:
        """One t ~ p(t) and one ε a sample; the same for the same counter."""
        assert batch.x0 is not None
        t = density(rng.uniform("time", batch.ids, counter=counter))
        eps = rng("noise", batch.ids, batch.shape, counter=counter)
        return cls(batch.x0, eps.to(batch.x0.device), t.to(batch.x0.device))

    @property
    def x(self) -> Tensor:
        """x_t: b n c."""
        return interpolate(self.x0, self.eps, self.t)

    def matching(self, v: Tensor) -> Tensor:
        """ℓ = ‖v − (ε − x0)‖², averaged over dimensions; v: b n c → b."""
        return (v - target_velocity(self.x0, self.eps)).square().mean((1, 2))


class Scoring:
    """Scores samples as they are drawn, whole groups at a time: what a reward says of a sample may
    depend on its group, and must not depend on the size of chunks.

    samples: all of them, groups in succession; group: how many share a prompt.
    """

    def __init__(self, score: Score, samples: Batch, group: int) -> None:
        self._score, self._samples, self._group = score, replace(samples, cond=None), group
        self._drawn: list[Tensor] = []
        self._waits: list[Callable[[], Scores]] = []
        self._done = 0

    def add(self, x0: Tensor) -> None:
        """The next samples, b n c; scoring of the groups that are whole begins."""
        self._drawn.append(x0)
        whole = sum(map(len, self._drawn)) // self._group * self._group
        if not whole:
            return
        x = torch.cat(self._drawn)
        rows = torch.arange(self._done, self._done + whole)
        self._waits.append(self._score(x[:whole], self._samples.select(rows)))
        self._drawn, self._done = [x[whole:]], self._done + whole

    def result(self) -> dict[str, Tensor]:
        """Waits; name → b, all samples in order."""
        return join_scores([dict(wait()) for wait in self._waits])


def join_scores(scores: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The chunks' scores in one, by name."""
    names = scores[0] if scores else {}
    return {n: torch.cat([s[n] for s in scores]) for n in names}


@dataclass(frozen=True)
class Rollout:
    """Samples of the ODE, and what they gain on each other.

    Attributes:
        chunks: each with its samples in x0. advantages: of all, in the chunks' order.
        metrics: for the log.
    """

    chunks: Sequence[Batch]
    advantages: Advantages
    metrics: dict[str, float | Tensor]


def rollout(
    policy: Velocity,
    prompts: Batch,
    group: int,
    size: int,
    grid: Grid,
    rng: Rng,
    score: Score,
    advantage: Advantage,
) -> Rollout:
    """`group` samples of each prompt by Euler's method, `size` at a time; a chunk is scored while
    the next one is drawn."""
    samples, chunks = prompts.repeat(group), []
    scoring = Scoring(score, samples, group)
    for chunk in samples.split(size):
        assert chunk.cond is not None
        with torch.no_grad():
            noise = rng("rollout", chunk.ids, chunk.shape).to(chunk.cond.text.device)
            x0 = sample_euler(policy, noise, chunk.cond, grid)
        scoring.add(x0)
        chunks.append(replace(chunk, x0=x0))
    scores = scoring.result()
    found = advantage(scores, samples.groups)
    return Rollout(chunks, found, {**told(scores), **found.metrics})


def told(scores: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """For the log: means over all samples, of all ranks, that have a score, and the reward's
    standard deviation."""
    means = {name: gather(values).nanmean() for name, values in scores.items()}
    return {**means, "reward_std": spread(gather(scores["reward"]))}


def spread(rewards: Tensor) -> Tensor:
    """Standard deviation (with n below) of the rewards that are not NaN; NaN where none is."""
    return (rewards - rewards.nanmean()).square().nanmean().sqrt()


def weighted(batch: Batch, term: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
    """A micro-batch's loss, the weighted sum of its samples' terms (b); and, before the metrics,
    their weighted mean."""
    assert batch.weight is not None
    weight = batch.weight.to(term.device)
    loss = (weight * term).sum()
    return loss, {"loss": loss.detach() / weight.sum(), **metrics}


def weigh(batch: Batch, valid: Tensor) -> Tensor:
    """Weights of a micro-batch's samples, b: 1 where valid, else 0; the engine scales an update's
    to sum to 1."""
    return valid.to(batch.ids.device, torch.float32)
