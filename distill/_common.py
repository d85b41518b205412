"""What distillations share: the student's own path, laws of a renoising level, and what a critic
is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.flow import TimeDensity, Uniform, expand, x0_from_velocity
from flux2.rng import Rng
from flux2.samplers import sample_euler, sample_renoise
from flux2.schedule import Grid
from flux2.types import Batch, Condition, Metrics, RoleSpec, Velocity

ROLLOUTS = ("euler", "renoise")
"""How a few-step student is sampled: the flow's Euler steps, as the pipelines do, or x̂0 noised
anew at each step, as a scheduler does with stochastic_sampling (flux2.samplers)."""


@dataclass(frozen=True)
class Renoise:
    """Law of the noise level τ at which an x̂0 is judged: low + (high − low)·p(τ).

    Attributes:
        density: p, on (0, 1].
        low, high: its range; 0 and 1 themselves say nothing of x̂0, or nothing of the image.
        within: all; "cleaner", below the σ that the student's step began at (decoupled DMD's range
            of guidance, arXiv 2511.22677); "noisier", above the σ at which it ended, where what the
            step made is all that later steps see.
    """

    density: TimeDensity = field(default_factory=Uniform)
    low: float = 0.02
    high: float = 0.98
    within: Literal["all", "cleaner", "noisier"] = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise InputError(
                f"a renoising law from {self.low:g} to {self.high:g}: give 0 ≤ low < high ≤ 1"
            )
        if self.within not in ("all", "cleaner", "noisier"):
            raise InputError(
                f"a renoising law within {self.within!r}: choose all, cleaner or noisier"
            )

    def __call__(self, u: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
        """u: b uniform on [0, 1); sigma, after: b, where the student's step began and ended → τ:
        b."""
        low, high = (torch.full_like(sigma, x) for x in (self.low, self.high))
        if self.within == "cleaner":
            high = high.minimum(sigma)
            low = low.minimum(high / 2)
        elif self.within == "noisier":
            low = low.maximum(after)
            high = high.maximum((1 + low) / 2)  # a step that ends near 1 leaves little room
        return low + (high - low) * self.density(u).to(sigma)


@dataclass(frozen=True, eq=False)
class Path:
    """A student's own way from noise to an image.

    Attributes:
        x: i b n c, the inputs of its forwards, at sigmas[i].
        x0: i b n c, what each of them takes the image for.
    """

    x: Tensor
    x0: Tensor


@torch.no_grad()
def simulate(student: Velocity, batch: Batch, grid: Grid, rollout: str, rng: Rng) -> Path:
    """Backward simulation (DMD2, arXiv 2405.14867, section 4.5): the inference sampler itself runs,
    and its forwards are written down. So the student is trained on exactly the inputs that it will
    have."""
    assert batch.cond is not None
    visited: list[Tensor] = []
    found: list[Tensor] = []

    def watched(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        v = student(x, t, cond)
        visited.append(x)
        found.append(x0_from_velocity(x, v, t))
        return v

    device = batch.cond.text.device

    def noise(i: int) -> Tensor:
        return rng("rollout", batch.ids, batch.shape, counter=i).to(device)

    if rollout == "renoise":
        sample_renoise(watched, noise(0), batch.cond, grid, lambda i: noise(i + 1))
    else:
        sample_euler(watched, noise(0), batch.cond, grid)
    return Path(torch.stack(visited), torch.stack(found))


def effective_guidance(
    scale: float, match: Renoise, augment: Renoise | None, grid: Grid, std: float, normalise: bool
) -> float:
    """The guidance that a decoupled gradient amounts to: 1 + (α − 1)·E_CA[w·k] / E_DM[w·k].

    For data of standard deviation s, x̂0 answers a shift of the mean by k(τ) = τ²/C_τ, with
    C_τ = (1 − τ)²s² + τ²; and as long as the guidance moves the image by less than its spread, the
    normaliser w goes as √C_τ/τ.
    augment: None where both terms share one τ: then it is α.
    """
    if augment is None:
        return scale
    sigmas, count = grid.tensor(dtype=torch.float64), 4096
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count

    def answer(law: Renoise) -> float:
        total = 0.0
        for begin, end in pairwise(sigmas):
            tau = law(u, begin.expand(count), end.expand(count))
            c = (1 - tau) ** 2 * std**2 + tau**2
            total += float((tau / c.sqrt() if normalise else tau**2 / c).mean())
        return total

    return 1 + (scale - 1) * answer(augment) / answer(match)


def shorten(pull: Tensor, longest: float) -> Tensor:
    """pull: b n c, each sample's at most `longest` root-mean-square; what is not finite is 0."""
    size = pull.square().mean((1, 2)).sqrt()
    short = pull * expand((longest / size.clamp(min=1e-12)).clamp(max=1.0), pull)
    return torch.where(expand(size.isfinite(), pull), short, 0.0)


class Critic(Protocol):
    """A further judge of the student's images: roles of its own, a term of the student's loss, and
    a loss of its own."""

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """What it trains."""
        ...

    def term(self, roles: Mapping[str, Any], x0: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """x0: b n c, the student's, with gradients → b, to be added to its loss."""
        ...

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over a micro-batch whose extra["x0"] is the student's and x0 the data's."""
        ...


def check_rollout(rollout: str) -> None:
    """Raises InputError for a sampler that no student has."""
    if rollout not in ROLLOUTS:
        raise InputError(f"method.rollout is {rollout!r}: choose from {', '.join(ROLLOUTS)}")


def check_scale(scale: float) -> None:
    """Raises InputError for a guidance that is none."""
    if not 0 <= scale < math.inf:
        raise InputError(f"method.guidance is {scale}: give a number of at least 0 (1: none)")
