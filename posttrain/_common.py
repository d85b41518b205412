"""What online methods share besides their axes: rollouts, scores, which groups are trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux2 import distributed
from flux2.distributed import gather
from flux2.errors import InputError
from flux2.rng import Rng
from flux2.samplers import sample_euler
from flux2.schedule import Grid
from flux2.types import Batch, Score, Scores, Velocity
from posttrain.advantages import FLAT, Advantage


def check_group(group: int) -> None:
    """A group of one has no spread. Raises InputError."""
    if group < 2:
        raise InputError(f"method.group is {group}: a group needs at least 2 samples to compare")


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
class GroupFilter:
    """Which prompts' groups are trained on: those whose rewards differ, and as many as asked for.

    With `oversample` = k > 1 (dynamic sampling: DAPO, arXiv 2503.14476) an update is made of B
    prompts of the batch's k·B. They are drawn in up to k waves of B, until B groups are
    informative; the first B of these are trained on. Wave w is the rows of the global batch whose
    number is w modulo k, so that neither waves nor choice depend on the number of ranks, and all
    ranks draw as many.

    Attributes:
        min_range: the least max − min of a group's rewards, in the reward's unit; 0: any but none.
        oversample: k.
        prompts: of the global batch, for the check that it can be cut so; None: it is not checked.
    """

    min_range: float = 0.0
    oversample: int = 1
    prompts: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_range < math.inf:
            raise InputError(f"method.filter.min_range is {self.min_range}: give at least 0")
        if self.oversample < 1:
            raise InputError(f"method.filter.oversample is {self.oversample}: give at least 1")
        parts = self.oversample * distributed.size()
        if self.prompts is not None and self.oversample > 1 and self.prompts % parts:
            raise InputError(
                f"method.filter.oversample={self.oversample} cuts a batch into waves of equal "
                f"size on each rank: make data.batch_size={self.prompts} a multiple of {parts}"
            )

    @property
    def on(self) -> bool:
        """Whether it leaves out anything that advantages do not."""
        return self.min_range > 0 or self.oversample > 1

    def waves(self, prompts: Batch) -> list[Batch]:
        """The prompts in the order in which they are drawn."""
        if self.oversample == 1:
            return [prompts]
        wave = prompts.ids % self.oversample
        return [prompts.select((wave == w).nonzero()[:, 0]) for w in range(self.oversample)]

    def informative(self, rewards: Tensor) -> Tensor:
        """rewards: p g, NaN where unscored → p bool: two scores or more, that differ."""
        missing = rewards.isnan()
        low = rewards.masked_fill(missing, math.inf).amin(1)
        high = rewards.masked_fill(missing, -math.inf).amax(1)
        # −∞ without a score, 0 with one; 0.3 − 0.1 is less than 0.2 by rounding.
        return high - low >= max(self.min_range - 1e-6, FLAT)


@dataclass
class _Tally:
    """The waves' informative groups, of all ranks."""

    want: int = 0
    drawn: int = 0
    found: list[int] = field(default_factory=list)  # prompts' ids, in the order of the waves

    def add(self, ids: Tensor, informative: Tensor) -> None:
        """ids, informative: of this rank's prompts of a wave; all ranks call it together."""
        parts = distributed.gather_objects((ids.tolist(), informative.tolist()))
        rows = sorted(row for ids, good in parts for row in zip(ids, good, strict=True))
        self.want = self.want or len(rows)
        self.drawn += len(rows)
        self.found += [i for i, good in rows if good]

    @property
    def full(self) -> bool:
        return len(self.found) >= self.want

    @property
    def kept(self) -> list[int]:
        return self.found[: self.want]

    @property
    def metrics(self) -> dict[str, float]:
        """Share of the drawn groups that are informative, and of the places that are filled."""
        return {
            "groups_informative": len(self.found) / self.drawn,
            "groups_trained": len(self.kept) / self.want,
        }


@dataclass(frozen=True)
class Chunk:
    """Samples that were drawn together.

    Attributes:
        micro: what was recorded of them, each with all of them; without weights.
        advantage: b. valid: b; False where the filter leaves a sample out.
    """

    micro: Sequence[Batch]
    advantage: Tensor
    valid: Tensor

    def weighed(self) -> list[Batch]:
        """The micro-batches with their samples' weights."""
        return [replace(m, weight=weigh(m, self.valid)) for m in self.micro]


@dataclass(frozen=True)
class Rollout:
    """Samples, and what they gain on each other. metrics: for the log."""

    chunks: Sequence[Chunk]
    metrics: dict[str, float | Tensor]


Draw = Callable[[Batch], tuple[Tensor, Sequence[Batch]]]
"""A chunk of prompts → its samples, b n c, and what is recorded of them."""


def rollout(
    draw: Draw,
    prompts: Batch,
    group: int,
    size: int,
    score: Score,
    advantage: Advantage,
    chosen: GroupFilter,
) -> Rollout:
    """`group` samples of each prompt, `size` at a time; a chunk is scored while the next one of its
    wave is drawn. What the filter leaves out stays, without weight: every rank has as many chunks,
    and each chunk is trained as it was drawn."""
    tally, scores, groups, drawn = _Tally(), [], [], []
    for wave in chosen.waves(prompts):
        samples = wave.repeat(group)
        scoring = Scoring(score, samples, group)
        for chunk in samples.split(size):
            with torch.no_grad():
                x0, micro = draw(chunk)
            scoring.add(x0)
            drawn.append((chunk.ids // group, micro))
        found = scoring.result()
        scores.append(found)
        groups.append(samples.ids // group)  # a prompt that comes twice may be on two ranks
        if chosen.on:
            rewards = found["reward"].unflatten(0, (len(wave), group))
            tally.add(wave.ids, chosen.informative(rewards))
            if tally.full:
                break
    every = join_scores(scores)
    gained = advantage(every, torch.cat(groups))  # a group is whole on its rank
    metrics = {**told(every), **gained.metrics, **(tally.metrics if chosen.on else {})}
    ids = torch.cat([ids for ids, _ in drawn])
    valid = gained.valid
    if chosen.on:
        valid = valid & torch.isin(ids.cpu(), torch.tensor(tally.kept)).to(valid.device)
    sizes = [len(ids) for ids, _ in drawn]
    parts = zip(drawn, gained.value.split(sizes), valid.split(sizes), strict=True)
    return Rollout([Chunk(micro, a, v) for (_, micro), a, v in parts], metrics)


def draw_euler(policy: Velocity, grid: Grid, rng: Rng) -> Draw:
    """Samples of the ODE by Euler's method, recorded as x0."""

    def draw(chunk: Batch) -> tuple[Tensor, Sequence[Batch]]:
        assert chunk.cond is not None
        noise = rng("rollout", chunk.ids, chunk.shape).to(chunk.cond.text.device)
        x0 = sample_euler(policy, noise, chunk.cond, grid)
        return x0, [replace(chunk, x0=x0)]

    return draw


def told(scores: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """For the log: means over all samples, of all ranks, that have a score, and the reward's
    standard deviation."""
    means = {name: gather(values).nanmean() for name, values in scores.items()}
    return {**means, "reward_std": spread(gather(scores["reward"]))}


def spread(rewards: Tensor) -> Tensor:
    """Standard deviation (with n below) of the rewards that are not NaN; NaN where none is."""
    return (rewards - rewards.nanmean()).square().nanmean().sqrt()


def weigh(batch: Batch, valid: Tensor) -> Tensor:
    """Weights of a micro-batch's samples, b: 1 where valid, else 0; the engine scales an update's
    to sum to 1."""
    return valid.to(batch.ids.device, torch.float32)
