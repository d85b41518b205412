"""Flow-GRPO (Liu et al., arXiv 2505.05470), in its Fast form.

    for each prompt: G samples; the window's steps are drawn from the SDE kernel, the others by ODE
    A_i = (R_i − mean R) / std R                                      within the prompt's group
    r   = exp(log p_θ(x'|x) − log p_old(x'|x))                        log p averaged over dimensions
    L   = −min(r A, clip(r, 1 − ε, 1 + ε) A) + β KL(p_θ(·|x) ‖ p_ref(·|x))

Guidance, where there is any, is part of the policy: rollout, old, new and reference
log-probabilities are all those of the guided velocity v_u + g (v_c − v_u).

Left out: reward models inside the loss, value functions, and per-token ratios: a flow has no
tokens. Log-probabilities keep their constants; chunks are the micro-batches, so that the first
ratio is 1 up to the arithmetic's noise, which is measured before the first update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.distributed import gather
from flux2.errors import InputError
from flux2.flow import FlowSDE, Kernel
from flux2.rng import Rng
from flux2.samplers import guided, replay, sample_sde
from flux2.schedule import EmpiricalShift, Grid, Schedule
from flux2.types import Batch, Metrics, RoleSpec, Score, Turn, Velocity
from posttrain._common import (
    FirstSteps,
    check_group,
    group_advantages,
    mean_scores,
    spread,
    weigh,
)


@dataclass
class GRPO:
    """Method of stage=grpo.

    Attributes:
        score: reward after the decoder.
        group: G, samples a prompt.
        steps: of the sampler. guidance: g; 1 is none.
        clip: ε. kl: β; 0 keeps no reference.
        chunk: samples sampled, and trained, at a time.
        updates: optimizer updates a rollout; later ones are off-policy, which the ratio corrects.
    """

    score: Score
    group: int = 8
    steps: int = 8
    guidance: float = 1.0
    clip: float = 1e-3
    kl: float = 0.0
    chunk: int = 32
    updates: int = 1
    window: FirstSteps = field(default_factory=FirstSteps)
    kernel: Kernel = field(default_factory=FlowSDE)
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_group(self.group)
        for name, value, least in (
            ("clip", self.clip, 1e-12), ("kl", self.kl, 0.0),
            ("guidance", self.guidance, 0.0),
            ("chunk", self.chunk, 1), ("updates", self.updates, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"method.{name} is {value}: it must be at least {least:g}")
        self.window(self.schedule(self.steps, 1))
        self._floor: float | None = None
        self._metrics: dict[str, float | Tensor] = {}

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy; with β > 0 also the previous stage's weights."""
        roles = {"policy": RoleSpec(trainable=True)}
        if self.kl > 0:
            roles["reference"] = RoleSpec()
        return roles

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("policy", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """Samples, scores and centres; yields the updates' micro-batches."""
        grid = self.schedule(self.steps, batch.shape[0])
        policy = guided(roles["policy"], self.guidance)
        rollouts = [
            self._rollout(policy, chunk, grid, rng)
            for chunk in batch.repeat(self.group).split(self.chunk)
        ]
        scores = [dict(wait()) for _, wait in rollouts]
        rewards = torch.cat([s["reward"] for s in scores])
        groups = torch.cat([steps[0].groups for steps, _ in rollouts])
        adv = group_advantages(rewards, groups)  # a prompt's group is whole on its rank
        if self._floor is None:
            self._measure_floor(policy, rollouts[0][0][0], grid)
        self._metrics = {
            **mean_scores(scores),
            "reward_std": spread(gather(rewards)),
            "groups_flat": adv.flat,
            "rewards_missing": adv.missing,
        }
        parts = zip(
            adv.value.split(self.chunk), adv.valid.split(self.chunk), rollouts, strict=True
        )
        chunks = [(a, v, steps) for a, v, (steps, _) in parts]
        for k in range(self.updates):
            yield [
                replace(s, weight=weigh(s, v), extra={**s.extra, "advantage": a})
                for a, v, steps in chunks[k :: self.updates]
                for s in steps
            ]

    @torch.no_grad()
    def _rollout(self, policy: Velocity, batch: Batch, grid: Grid, rng: Rng) -> tuple[Any, Any]:
        """One chunk's noisy steps as micro-batches, and its scores to come."""
        assert batch.cond is not None
        device, ids = batch.cond.text.device, batch.ids
        x = rng("rollout", ids, batch.shape).to(device)
        x0, steps = sample_sde(
            policy, x, batch.cond, grid, self.kernel, self.window(grid),
            lambda i: rng("sde", ids, batch.shape, counter=i).to(device),
        )  # fmt: skip
        micro = [
            replace(
                batch,
                extra={
                    "x": s.x, "x_next": s.x_next, "log_prob": s.log_prob,
                    "i": torch.full_like(ids, s.i),
                },
            )
            for s in steps
        ]  # fmt: skip
        return micro, self.score(x0, batch)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over one chunk's samples at one step."""
        e, cond, i = batch.extra, batch.cond, int(batch.extra["i"][0])
        assert cond is not None and batch.weight is not None
        grid = self.schedule(self.steps, batch.shape[0])
        policy = guided(roles["policy"], self.guidance)
        step = replay(policy, e["x"], cond, grid, self.kernel, i)
        delta = step.log_prob(e["x_next"]) - e["log_prob"]  # b
        ratio, a = delta.exp(), e["advantage"].to(delta.device)
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - self.clip, 1 + self.clip) * a)
        valid = batch.weight > 0
        metrics: dict[str, float | Tensor] = {
            "clip_high": ((ratio > 1 + self.clip) & (a > 0))[valid].float().mean(),
            "clip_low": ((ratio < 1 - self.clip) & (a < 0))[valid].float().mean(),
            f"dlogp/{i}": delta.abs().mean(),
        }
        term = -surrogate
        if self.kl > 0:
            with torch.no_grad():
                reference = guided(roles["reference"], self.guidance)
                anchor = replay(reference, e["x"], cond, grid, self.kernel, i)
            divergence = step.kl(anchor)  # b
            metrics["kl"] = divergence.mean()
            term = term + self.kl * divergence
        loss = (batch.weight.to(term.device) * term).sum()
        return loss, {"loss": loss, **metrics}

    def _measure_floor(self, policy: Velocity, batch: Batch, grid: Grid) -> None:
        """|Δ log p| of a chunk replayed under unchanged weights, as training replays it: what the
        arithmetic alone does to the ratio. Refuses a clip that lies below."""
        e, cond, i = batch.extra, batch.cond, int(batch.extra["i"][0])
        assert cond is not None
        with torch.enable_grad():
            step = replay(policy, e["x"], cond, grid, self.kernel, i)
        floor = float((step.log_prob(e["x_next"]) - e["log_prob"]).detach().abs().max())
        print(f"noise floor of |Δ log p|: {floor:.2g}, clip {self.clip:.2g}", flush=True)
        if self.clip <= floor:
            raise InputError(
                f"method.clip is {self.clip:g}, below the noise of the log-probabilities "
                f"({floor:.2g}): every ratio would be clipped by rounding; set it above "
                f"{2 * floor:.1g}, or engine.autocast=fp32"
            )
        self._floor = floor

    def metrics(self) -> Metrics:
        """Of the last rollout."""
        return self._metrics

    def state_dict(self) -> dict[str, Any]:
        """The measured floor."""
        return {"floor": self._floor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        self._floor = state["floor"]
