"""DiffusionNFT (Zheng et al., arXiv 2509.16117): online RL on the forward process.

    x0 ~ π_old by any sampler,  A = group advantage,  r̃ = clip(A / (2·A_max) + ½, 0, 1)
    x_t = (1 − t)·x0 + t·ε,   v⁺ = β·v_θ + (1 − β)·v_old,   v⁻ = (1 + β)·v_old − β·v_θ
    L = r̃·‖x̂0⁺ − x0‖²/w⁺ + (1 − r̃)·‖x̂0⁻ − x0‖²/w⁻,   x̂0 = x_t − t·v,   w = sg mean|x̂0 − x0|
    π_old ← decay·π_old + (1 − decay)·π_θ after every update

No likelihoods and no SDE: the sampler may be any ODE solver, and guidance in the rollout is
absorbed into the policy, which is trained, and should be sampled, without it unless `guidance` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.errors import InputError, check_positive
from flux2.flow import LogitNormal, TimeDensity, x0_from_velocity
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.samplers import guided
from flux2.schedule import EmpiricalShift, Schedule
from flux2.types import Batch, Memoryless, Metrics, RoleSpec, Score, Turn
from posttrain._common import GroupFilter, check_group, draw_euler, rollout
from posttrain.advantages import Advantage, GroupRelative
from posttrain.axes import Anchor


@dataclass
class NFT(Memoryless):
    """Method of stage=nft.

    Attributes:
        score: reward after the decoder.
        group: samples a prompt.
        steps: of the sampler. guidance: of the rollout; 1 is none.
        beta: how far v⁺ and v⁻ lie from v_old.
        decay: of the old policy.
        chunk: samples sampled, and trained, at a time.
        times: noise levels each sample is trained at.
    """

    score: Score
    group: int = 8
    steps: int = 8
    guidance: float = 1.0
    beta: float = 1.0
    decay: float = 0.5
    chunk: int = 32
    times: int = 1
    density: TimeDensity = field(default_factory=LogitNormal)
    anchor: Anchor = field(default_factory=lambda: Anchor(space="velocity"))
    advantage: Advantage = field(default_factory=GroupRelative)
    filter: GroupFilter = field(default_factory=GroupFilter)
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_group(self.group)
        check_positive({"beta": self.beta, "chunk": self.chunk, "times": self.times})
        self.anchor.needs_velocity()
        if not 0 <= self.decay < 1:
            raise InputError(f"method.decay is {self.decay}: give 0 to below 1")
        self.schedule(self.steps, 1)
        self._metrics: dict[str, float | Tensor] = {}

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, the old policy that follows it, and what it is held to."""
        return {
            "policy": RoleSpec(trainable=True),
            "old": RoleSpec(follows="policy", decay=self.decay),
            **self.anchor.roles,
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("policy", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """Samples from the old policy, scores and centres; one update."""
        old, grid = guided(roles["old"], self.guidance), self.schedule(self.steps, batch.shape[0])
        drawn = rollout(draw_euler(old, grid, rng), batch, self.group, self.chunk, self.score,
                        self.advantage, self.filter)  # fmt: skip
        self._metrics, bound = drawn.metrics, self.advantage.bound
        yield [
            replace(m, extra={"r": (c.advantage / (2 * bound) + 0.5).clamp(0, 1),
                              "k": torch.full_like(m.ids, k)})
            for c in drawn.chunks
            for m in c.weighed()
            for k in range(self.times)
        ]  # fmt: skip

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over one chunk at one draw of noise levels."""
        cond, at = batch.cond, Noised.draw(batch, self.density, rng, int(batch.extra["k"][0]))
        assert cond is not None
        x, t, x0 = at.x, at.t, at.x0
        v = roles["policy"](x, t, cond)
        with torch.no_grad():
            v_old = roles["old"](x, t, cond)
        r = batch.extra["r"].to(x0.device)
        positive = self._error(x, self.beta * v + (1 - self.beta) * v_old, t, x0)
        negative = self._error(x, (1 + self.beta) * v_old - self.beta * v, t, x0)
        term = r * positive + (1 - r) * negative  # b
        metrics: dict[str, float | Tensor] = {
            "drift": (v - v_old).square().mean(),
            "speed": v.square().mean(),
        }
        if self.anchor.weight:
            divergence = self.anchor.velocity(roles, x, t, cond, v)
            metrics["kl"] = divergence.mean()
            term = term + self.anchor.weight * divergence
        return weighted(batch, term, metrics)

    @staticmethod
    def _error(x: Tensor, v: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """‖x̂0 − x0‖²/w, averaged over dimensions: b."""
        gap = x0_from_velocity(x, v, t) - x0
        w = gap.detach().abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
        return (gap.square() / w).mean((1, 2))

    def metrics(self) -> Metrics:
        """Of the last rollout."""
        return self._metrics
