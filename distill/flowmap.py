"""What flow-map distillation chooses from: where a jump ends, and what its error counts. Each is
handed to distill.consistency by its configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from flux2.errors import InputError, check_positive
from flux2.flow import TimeDensity
from flux2.schedule import EmpiricalShift, Schedule

# -- the law of (t, r): see distill.consistency.Interval -------------------------------------------


@dataclass(frozen=True)
class ToData:
    """r = 0: a consistency model."""

    told: ClassVar[bool] = False

    def __call__(self, density: TimeDensity, u: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """See `distill.consistency.Interval`."""
        t = density(u[:, 0])
        return t, torch.zeros_like(t)


@dataclass(frozen=True)
class ToPhase:
    """r is the largest σ of the N-step grid below t: a phased consistency model.

    Attributes:
        steps, schedule: of the student's sampler.
        begin: share of the samples whose t is moved up to the σ where its phase begins. Only there
            is the student asked when it samples, and just above lies another phase.
    """

    steps: int = 4
    begin: float = 0.5
    schedule: Schedule = field(default_factory=EmpiricalShift)
    told: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.schedule(self.steps, 1)
        if not 0 <= self.begin <= 1:
            raise InputError(f"method.interval.begin is {self.begin}: it is a share, from 0 to 1")

    def __call__(self, density: TimeDensity, u: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """See `distill.consistency.Interval`."""
        t = density(u[:, 0])
        edges = self.schedule(self.steps, tokens).tensor(t.device, t.dtype).flip(0)
        above = torch.searchsorted(edges, t.contiguous())  # the first edge at or above t
        top = edges[above.clamp(max=self.steps)]
        t = torch.where(u[:, 1] < self.begin, torch.maximum(t, top), t)
        return t, edges[above - 1]


@dataclass(frozen=True)
class ToAnywhere:
    """r and t both drawn from the density, the larger one is t: MeanFlow.

    Attributes:
        equal: share of the samples with r = t, which learn the velocity itself; the paper's 0.75.
    """

    equal: float = 0.75
    told: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.equal < 1:
            raise InputError(
                f"method.interval.equal is {self.equal}: give a share from 0 to below 1"
            )

    def __call__(self, density: TimeDensity, u: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """See `distill.consistency.Interval`."""
        one, two = density(u[:, 0]), density(u[:, 1])
        t = torch.maximum(one, two)
        return t, torch.where(u[:, 2] < self.equal, t, torch.minimum(one, two))


# -- D: see distill.consistency.Distance -----------------------------------------------------------


@dataclass(frozen=True)
class Squared:
    """The mean square."""

    def __call__(self, delta: Tensor) -> Tensor:
        """See `distill.consistency.Distance`."""
        return delta.square().mean((1, 2))


@dataclass(frozen=True)
class Adaptive:
    """sg[w]·‖Δ‖² with w = 1/(‖Δ‖² + floor)^power, ‖Δ‖² the sum of squares (MeanFlow)."""

    power: float = 1.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check_positive({"distance.floor": self.floor})
        if not 0 <= self.power <= 1:
            raise InputError(f"method.distance.power is {self.power}: give 0 to 1")

    def __call__(self, delta: Tensor) -> Tensor:
        """See `distill.consistency.Distance`."""
        squared = delta.square().sum((1, 2))
        return squared / (squared.detach() + self.floor) ** self.power


@dataclass(frozen=True)
class Normalised:
    """sCM's tangent normalisation: its gradient is that of the mean square towards u − Δ/(|Δ| + c).
    |Δ| is the root mean square, so that the size of an image does not matter; the paper's is the
    length, for which its c = 0.1 is another number."""

    floor: float = 0.1

    def __post_init__(self) -> None:
        check_positive({"distance.floor": self.floor})

    def __call__(self, delta: Tensor) -> Tensor:
        """See `distill.consistency.Distance`."""
        squared = delta.square().mean((1, 2))
        return squared / (squared.detach().sqrt() + self.floor)
