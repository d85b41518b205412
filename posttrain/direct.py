"""The reward's own gradient, through the sampler: ReFL, DRaFT and Direct-Align.

    L = −R(x̂0) + β·‖v_θ − v_anchor‖²,   x̂0 by `through`:
    DRaFT-K (arXiv 2309.17400)   the sampler's result; its last K steps are differentiated
    ReFL (arXiv 2304.05977)      x_t of the sampler at a random step, then x̂0 = x_t − σ·v_θ
    Direct-Align (SRPO, 2509.06942)   the sampler's x0, noised by a known ε to a random t, moved one
                                 step by v_θ, the rest of the noise taken out as it was put in

It needs a reward with a gradient (its card says so), no groups and no likelihoods; and it finds a
reward's weaknesses faster than anything else, so look at what is not rewarded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flux2.errors import InputError, check_positive
from flux2.flow import interpolate
from flux2.losses import weighted
from flux2.rng import Rng
from flux2.samplers import guided, sample_euler
from flux2.schedule import EmpiricalShift, Grid, Schedule
from flux2.types import Batch, Condition, DirectScore, Memoryless, Metrics, RoleSpec, Turn, Velocity
from posttrain.axes import Anchor


class Through(Protocol):
    """How an image that the loss sees comes from the policy."""

    def __call__(self, policy: Velocity, x: Tensor, batch: Batch, grid: Grid, rng: Rng) -> Tensor:
        """x: b n c, noise at sigmas[0] → x̂0: b n c, with gradients."""
        ...


def _euler(policy: Velocity, x: Tensor, cond: Condition, grid: Grid, steps: range) -> Tensor:
    """Euler's steps of those numbers: b n c."""
    for i in steps:
        sigma, after = grid.sigmas[i : i + 2]
        x = x + (after - sigma) * policy(x, x.new_full(x.shape[:1], sigma), cond)
    return x


@dataclass(frozen=True)
class LastSteps:
    """DRaFT-K: the last `count` steps are differentiated, all those before are not."""

    count: int = 1

    def __post_init__(self) -> None:
        check_positive({"through.count": self.count})

    def __call__(self, policy: Velocity, x: Tensor, batch: Batch, grid: Grid, rng: Rng) -> Tensor:
        """See `Through`."""
        assert batch.cond is not None
        first = max(0, grid.steps - self.count)
        with torch.no_grad():
            x = _euler(policy, x, batch.cond, grid, range(first))
        return _euler(policy, x, batch.cond, grid, range(first, grid.steps))


@dataclass(frozen=True)
class OneStep:
    """ReFL: one forward with gradients, at a step drawn from the part [low, high) of the path.

    Early predictions are blurred and late ones are decided: the published range is the last third
    but its end.
    """

    low: float = 0.6
    high: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise InputError("method.through: 0 ≤ low < high ≤ 1 are parts of the path")

    def __call__(self, policy: Velocity, x: Tensor, batch: Batch, grid: Grid, rng: Rng) -> Tensor:
        """See `Through`."""
        assert batch.cond is not None
        choices = range(int(self.low * grid.steps), max(1, int(self.high * grid.steps)))
        at = int(rng.shared("through").choice(list(choices) or [int(self.low * grid.steps)]))
        with torch.no_grad():
            x = _euler(policy, x, batch.cond, grid, range(at))
        sigma = grid.sigmas[at]
        return x - sigma * policy(x, x.new_full(x.shape[:1], sigma), batch.cond)


@dataclass(frozen=True)
class DirectAlign:
    """SRPO's: t uniform in [low, high]; the policy takes `step` of the noise, and what is left is
    known: x̂0 = (x_t − step·v_θ − (t − step)·ε) / (1 − t + step).

    A reward can be followed at any noise level without blur, and without a chain of steps.
    """

    low: float = 0.1
    high: float = 0.7
    step: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.step <= self.low <= self.high < 1:
            raise InputError("method.through: 0 < step ≤ low ≤ high < 1")

    def __call__(self, policy: Velocity, x: Tensor, batch: Batch, grid: Grid, rng: Rng) -> Tensor:
        """See `Through`."""
        assert batch.cond is not None
        with torch.no_grad():
            x0 = sample_euler(policy, x, batch.cond, grid)
        u = rng.uniform("through", batch.ids).to(x0)
        t = self.low + (self.high - self.low) * u  # b
        eps = rng("align", batch.ids, batch.shape).to(x0)
        v = policy(interpolate(x0, eps, t), t, batch.cond)
        wide = t[:, None, None]
        rest = interpolate(x0, eps, t) - self.step * v - (wide - self.step) * eps
        return rest / (1 - wide + self.step)


@dataclass
class Direct(Memoryless):
    """Method of stage=direct.

    Attributes:
        score: reward after the decoder; it must have a gradient.
        samples: of a prompt.
        steps: of the sampler. guidance: of every velocity here; 1 is none.
        chunk: samples at a time.
        bound: the longest gradient of a sample's reward with respect to its latents; longer ones
            are shortened to it, as the autoencoder and the reward make some very long.
    """

    score: DirectScore
    samples: int = 1
    steps: int = 8
    guidance: float = 1.0
    chunk: int = 8
    bound: float = 1.0
    through: Through = field(default_factory=LastSteps)
    anchor: Anchor = field(default_factory=lambda: Anchor(space="velocity"))
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_positive({"samples": self.samples, "chunk": self.chunk, "bound": self.bound})
        self.anchor.needs_velocity()
        self.schedule(self.steps, 1)
        self.score.check_gradient()

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and what it is held to."""
        return {"policy": RoleSpec(trainable=True), **self.anchor.roles}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("policy", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the prompts; the loss draws the samples, whose graph it needs."""
        drawn = batch.repeat(self.samples)
        yield replace(drawn, weight=torch.ones(len(drawn))).split(self.chunk)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the chunk; a sample without a score counts 0."""
        assert batch.weight is not None and batch.cond is not None
        grid, policy = self.schedule(self.steps, batch.shape[0]), roles["policy"]
        noise = rng("rollout", batch.ids, batch.shape).to(batch.cond.text.device)
        x0 = self.through(guided(policy, self.guidance), noise, batch, grid, rng)
        weight = batch.weight.to(x0.device)
        x0.register_hook(lambda grad: self._shorten(grad, weight))
        reward = self.score.differentiable(x0, batch)  # b
        missing = reward.isnan()
        term = -torch.where(missing, 0.0, reward)
        metrics: dict[str, float | Tensor] = {
            "reward": reward.detach().nanmean(),
            "rewards_missing": missing.float().mean(),
        }
        if self.anchor.weight:
            t = rng.uniform("anchor", batch.ids).to(x0.device)
            x = interpolate(x0.detach(), rng("anchor", batch.ids, batch.shape).to(x0.device), t)
            v = policy(x, t, batch.cond)
            divergence = self.anchor.velocity(roles, x, t, batch.cond, v)
            metrics["kl"] = divergence.mean()
            term = term + self.anchor.weight * divergence
        return weighted(batch, term, metrics)

    def _shorten(self, grad: Tensor, weight: Tensor) -> Tensor:
        """∂L/∂x̂0, b n c, each sample's at most `bound` times its weight long."""
        length = grad.flatten(1).norm(dim=1).clamp(min=1e-12)
        short = grad * (self.bound * weight / length).clamp(max=1.0)[:, None, None]
        # A length that is not finite has no direction: that sample is left out, and no other.
        return torch.where(length.isfinite()[:, None, None], short, 0.0)
