"""Advantage-weighted matching (Xue et al., arXiv 2509.25050): RL with pretraining's own loss.

    x0 ~ π_old by any sampler,  A = group advantage,  x_t = (1 − t)·x0 + t·ε
    ℓ_θ = ‖v_θ(x_t) − (ε − x0)‖²,   r = exp(ℓ_old − ℓ_θ)        the same t and ε for old and new
    L = −min(r·A, clip(r, 1 − ε, 1 + ε)·A) + β·‖v_θ − v_anchor‖²

ℓ is averaged over dimensions and is minus a log-likelihood up to a constant, so r is the ratio of
a policy gradient: at r = 1 the gradient is that of A·ℓ_θ. No SDE and no likelihood of a
trajectory: the sampler may be any ODE solver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.errors import check_positive
from flux2.flow import LogitNormal, TimeDensity
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.samplers import guided
from flux2.schedule import EmpiricalShift, Schedule
from flux2.types import Batch, Memoryless, Metrics, RoleSpec, Score, Turn
from posttrain._common import GroupFilter, check_group, draw_euler, rollout
from posttrain.advantages import Advantage, GroupRelative
from posttrain.axes import Anchor, clipped


@dataclass
class AWM(Memoryless):
    """Method of stage=awm.

    Attributes:
        score: reward after the decoder.
        group: samples a prompt.
        steps: of the sampler. guidance: of the rollout; 1 is none. What is trained is the plain
            velocity, which learns to make what the guided one made.
        eps: of the clip.
        chunk: samples sampled, and trained, at a time.
        times: noise levels each sample is trained at.
        updates: optimizer updates a rollout; later ones are off-policy, which the ratio corrects.
    """

    score: Score
    group: int = 8
    steps: int = 8
    guidance: float = 1.0
    eps: float = 0.2
    chunk: int = 32
    times: int = 1
    updates: int = 1
    density: TimeDensity = field(default_factory=LogitNormal)
    anchor: Anchor = field(default_factory=lambda: Anchor(space="velocity"))
    advantage: Advantage = field(default_factory=GroupRelative)
    filter: GroupFilter = field(default_factory=GroupFilter)
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_group(self.group)
        check_positive({"eps": self.eps, "chunk": self.chunk, "times": self.times,
                        "updates": self.updates})  # fmt: skip
        self.anchor.needs_velocity()
        self.schedule(self.steps, 1)
        self._metrics: dict[str, float | Tensor] = {}

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
        """Samples, scores and centres; yields the updates' micro-batches."""
        policy = guided(roles["policy"], self.guidance)
        grid = self.schedule(self.steps, batch.shape[0])
        drawn = rollout(draw_euler(policy, grid, rng), batch, self.group, self.chunk, self.score,
                        self.advantage, self.filter)  # fmt: skip
        self._metrics = drawn.metrics
        micro = [
            self._at(roles, replace(m, extra={"advantage": c.advantage}), k, rng)
            for c in drawn.chunks
            for m in c.weighed()
            for k in range(self.times)
        ]
        for k in range(self.updates):
            yield micro[k :: self.updates]

    def _at(self, roles: Mapping[str, Any], batch: Batch, k: int, rng: Rng) -> Batch:
        """The chunk at its k-th noise level, with the old policy's ℓ where it is needed."""
        batch = replace(batch, extra={**batch.extra, "k": torch.full_like(batch.ids, k)})
        if self.updates == 1:
            return batch
        with torch.no_grad():
            at = Noised.draw(batch, self.density, rng, k)
            old = at.matching(roles["policy"](at.x, at.t, batch.cond))
        return replace(batch, extra={**batch.extra, "old": old})

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over one chunk at one draw of noise levels."""
        assert batch.weight is not None and batch.cond is not None
        at = Noised.draw(batch, self.density, rng, int(batch.extra["k"][0]))
        v = roles["policy"](at.x, at.t, batch.cond)
        error = at.matching(v)
        old, a = batch.extra.get("old", error.detach()), batch.extra["advantage"].to(error.device)
        term, cut = clipped((old - error).exp(), a, self.eps)
        valid = batch.weight.to(error.device) > 0
        metrics: dict[str, float | Tensor] = {
            "matching": error[valid].mean(),
            **{name: share[valid].mean() for name, share in cut.items()},
            "speed": v.square().mean(),
        }
        if self.anchor.weight:
            divergence = self.anchor.velocity(roles, at.x, at.t, batch.cond, v)
            metrics["kl"] = divergence.mean()
            term = term + self.anchor.weight * divergence
        return weighted(batch, term, metrics)

    def metrics(self) -> Metrics:
        """Of the last rollout."""
        return self._metrics
