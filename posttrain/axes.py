"""The axes of online methods, each a small object that Hydra hands in: which steps are trained, how
far a step may drift, and what the policy is held to. (What an advantage is: `advantages`.)

A method names the axes that it has; which of their values make no sense together it refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from flux2.errors import InputError, check_positive
from flux2.flow import Kernel, Transition
from flux2.rng import Rng
from flux2.samplers import guided
from flux2.schedule import Grid
from flux2.types import Condition, RoleSpec, Velocity

# ---------------------------------------------------------------- which steps are noisy and trained


class Window(Protocol):
    """Which of the grid's steps are drawn from the kernel, and trained."""

    def __call__(self, grid: Grid, rng: Rng) -> tuple[int, ...]:
        """Step indices, ascending; the same on all ranks. Raises InputError where they cannot be:
        the last step stays noiseless."""
        ...


@dataclass(frozen=True)
class AllSteps:
    """All steps but the last, as Flow-GRPO was published."""

    def __call__(self, grid: Grid, rng: Rng) -> tuple[int, ...]:
        """See `Window`."""
        return _inside(range(grid.steps - 1), grid)


@dataclass(frozen=True)
class FirstSteps:
    """`count` steps from step `skip` on (Flow-GRPO-Fast).

    Early steps decide content; training them alone costs less, and is the strongest single remedy
    against reward hacking.
    """

    count: int = 3
    skip: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.skip < 0:
            raise InputError("method.window: count must be at least 1 and skip at least 0")

    def __call__(self, grid: Grid, rng: Rng) -> tuple[int, ...]:
        """See `Window`."""
        return _inside(range(self.skip, self.skip + self.count), grid)


@dataclass(frozen=True)
class FirstHalf:
    """The first half of the steps, rounded up."""

    def __call__(self, grid: Grid, rng: Rng) -> tuple[int, ...]:
        """See `Window`."""
        return _inside(range((grid.steps + 1) // 2), grid)


@dataclass(frozen=True)
class RandomSteps:
    """A share of all steps but the last, drawn anew for each training step (DanceGRPO's τ)."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"method.window.share is {self.share}: give a number in (0, 1]")

    def __call__(self, grid: Grid, rng: Rng) -> tuple[int, ...]:
        """See `Window`."""
        of = grid.steps - 1
        count = max(1, round(self.share * of))
        drawn = rng.shared("window").permutation(max(of, 0))[:count]
        return _inside(sorted(drawn.tolist()) or [0], grid)


@dataclass(frozen=True)
class SlidingWindow:
    """`count` steps that move towards the image as training goes on (MixGRPO, arXiv 2507.21802).

    Attributes:
        count: of steps. stride: by which they move.
        every: training steps between two moves.
        rollback: begin again at the first step once the end is reached; else stay there.
    """

    count: int = 3
    stride: int = 1
    every: int = 10
    rollback: bool = True

    def __post_init__(self) -> None:
        if min(self.count, self.stride, self.every) < 1:
            raise InputError("method.window: count, stride and every must be at least 1")

    def __call__(self, grid: Grid, rng: Rng) -> tuple[int, ...]:
        """See `Window`."""
        last = grid.steps - 1 - self.count  # the last place that the window can begin at
        places = [*range(0, last, self.stride), max(last, 0)]
        moves = rng.step // self.every
        at = places[moves % len(places) if self.rollback else min(moves, len(places) - 1)]
        return _inside(range(at, at + self.count), grid)


def _inside(steps: range | list[int], grid: Grid) -> tuple[int, ...]:
    if not len(steps) or steps[-1] > grid.steps - 2:
        raise InputError(
            f"method.window takes steps {list(steps)} of {grid.steps}, and the last one stays "
            "noiseless: change method.window, choose window=all, or add steps"
        )
    return tuple(steps)


def no_kernel() -> Kernel:
    """kernel=ode. Raises InputError."""
    raise InputError(
        "kernel=ode: a step of the ODE is no draw: it has no likelihood, so there is no ratio to "
        "clip; choose kernel=flow, dance or cps, or a method that samples by the ODE (stage=nft, "
        "stage=awm)"
    )


# ---------------------------------------------------------------- how far a step may drift


@dataclass(frozen=True, eq=False)
class Replayed:
    """A recorded step under the new weights.

    Attributes:
        new: its law now; gradients flow through it. mean: b n c, the mean when it was drawn.
        delta: b, log p_new − log p_old of x', averaged over dimensions.
        dt: σ' − σ < 0.
    """

    new: Transition
    mean: Tensor
    delta: Tensor
    dt: float

    @property
    def drift(self) -> Tensor:
        """mean over dimensions of (Δμ/std)²: b. Twice the exact KL per dimension, as both laws have
        one std; its root is how many standard deviations the mean has moved."""
        gap = (self.new.mean - self.mean) / self.new.std
        return gap.square().flatten(1).mean(1)


class Surrogate(Protocol):
    """The loss of a step: −(its ratio, kept near 1) · A."""

    @property
    def limit(self) -> float | None:
        """The smallest |Δ log p| that it cuts at; None where it does not look at that."""
        ...

    def __call__(self, step: Replayed, advantage: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """advantage: b → loss: b, and (b each) `clip_high` and `clip_low`: who was cut, going up or
        down."""
        ...


def clipped(ratio: Tensor, a: Tensor, eps: float) -> tuple[Tensor, dict[str, Tensor]]:
    """−min(r·A, clip(r, 1 − ε, 1 + ε)·A) and who was cut; ratio, a: b → b each (PPO, 1707.06347,
    equation 7)."""
    cut = {
        "clip_high": ((ratio > 1 + eps) & (a > 0)).float(),
        "clip_low": ((ratio < 1 - eps) & (a < 0)).float(),
    }
    return -torch.minimum(ratio * a, ratio.clamp(1 - eps, 1 + eps) * a), cut


@dataclass(frozen=True)
class Clip:
    """−min(r·A, clip(r, 1 − ε, 1 + ε)·A), r = exp(Δ log p) (PPO; Flow-GRPO, arXiv 2505.05470).

    log p is averaged over dimensions, so r is not a likelihood ratio but its D-th root: a mean that
    moves by δ standard deviations has E[Δ log p] = −δ²/2, std δ/√D. With many dimensions the
    clip becomes one-sided, and depends on the resolution.
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        check_positive({"surrogate.eps": self.eps})

    @property
    def limit(self) -> float | None:
        """ε."""
        return self.eps

    def __call__(self, step: Replayed, advantage: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See `Surrogate`."""
        return clipped(step.delta.exp(), advantage, self.eps)


@dataclass(frozen=True)
class Guard:
    """The clip on a ratio without bias, and equal weight for all steps (GRPO-Guard, 2510.22319).

        r = exp((Δ log p + mean (Δμ)²/(2·std²))·std) = exp(mean z·Δμ),   loss = clipped / (−dt)

    z is the noise that was drawn. The added term undoes the bias −δ²/2 of the log-ratio; std and dt
    undo the steps' different scales.
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_positive({"surrogate.eps": self.eps})

    @property
    def limit(self) -> float | None:
        """Not comparable with |Δ log p|: its ratio is scaled by std."""
        return None

    def __call__(self, step: Replayed, advantage: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See `Surrogate`."""
        ratio = ((step.delta + step.drift / 2) * step.new.std).exp()
        loss, cut = clipped(ratio, advantage, self.eps)
        return loss / -step.dt, cut


@dataclass(frozen=True)
class TrustRegion:
    """−r·A where the mean has moved by at most δ standard deviations, or the step moves it back.

    The bound is on the exact divergence (KL = δ²/2 per dimension) and not on a sampled ratio, so it
    means the same at every resolution. Where it cuts, the gradient is 0.
    """

    delta: float = 0.05

    def __post_init__(self) -> None:
        check_positive({"surrogate.delta": self.delta})

    @property
    def limit(self) -> float | None:
        """It does not look at the ratio."""
        return None

    def __call__(self, step: Replayed, advantage: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See `Surrogate`."""
        ratio = step.delta.exp()
        far = step.drift.detach() > self.delta**2
        up = far & (advantage > 0) & (ratio >= 1)
        down = far & (advantage < 0) & (ratio <= 1)
        loss = torch.where(up | down, 0.0, -ratio * advantage)
        return loss, {"clip_high": up.float(), "clip_low": down.float()}


# ---------------------------------------------------------------- what the policy is held to

SPACES: Final = ("mean", "velocity")
ANCHORS: Final = ("reference", "ema")


@dataclass(frozen=True)
class Anchor:
    """A divergence to other weights, added to the loss.

    Attributes:
        weight: β; 0 keeps no anchor.
        space: mean: KL of the step's laws, ‖Δμ‖²/(2·std²) averaged over dimensions, which holds the
            −dt that published code drops, so that β means the same with any number of steps;
            velocity: ‖Δv‖² averaged.
        to: reference: the previous stage's weights; ema: an average of the policy's own.
        decay: of that average.
        guidance: of the anchor's velocity; above 1 the policy is held to the guided reference.
    """

    weight: float = 0.0
    space: str = "mean"
    to: str = "reference"
    decay: float = 0.99
    guidance: float | None = None

    def __post_init__(self) -> None:
        if self.space not in SPACES or self.to not in ANCHORS:
            raise InputError(
                f"method.anchor: space={self.space!r} to={self.to!r}: choose {' or '.join(SPACES)} "
                f"and {' or '.join(ANCHORS)}"
            )
        if self.weight < 0 or not 0 < self.decay < 1:
            raise InputError("method.anchor: weight must be at least 0 and decay in (0, 1)")

    @property
    def roles(self) -> dict[str, RoleSpec]:
        """The role that it needs, under its name in `to`."""
        if not self.weight:
            return {}
        follows = RoleSpec(follows="policy", decay=self.decay)
        return {self.to: follows if self.to == "ema" else RoleSpec()}

    def needs_velocity(self) -> None:
        """For methods without transitions. Raises InputError where the space is another."""
        if self.weight and self.space != "velocity":
            raise InputError(
                "method.anchor.space=mean is the KL of an SDE step, and this method has none: "
                "use space=velocity"
            )

    def velocity(
        self, roles: Mapping[str, Velocity], x: Tensor, t: Tensor, cond: Condition, v: Tensor
    ) -> Tensor:
        """‖v − v_anchor‖² averaged over dimensions; x, v: b n c, t: b → b."""
        scale = 1.0 if self.guidance is None else self.guidance
        with torch.no_grad():
            held = guided(roles[self.to], scale)(x, t, cond)
        return (v - held).square().mean((1, 2))
