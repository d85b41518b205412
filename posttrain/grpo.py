"""Flow-GRPO (Liu et al., arXiv 2505.05470) and its family.

    for each prompt: G samples; the window's steps are drawn from the kernel, the others by ODE
    A_i = (R_i − mean R) / std R                                      within the prompt's group
    r   = exp(log p_θ(x'|x) − log p_old(x'|x))                        log p averaged over dimensions
    L   = surrogate(r, A) + β·D(p_θ ‖ p_anchor)

`window` (all steps, the first ones, a random share, MixGRPO's sliding window), `kernel` (Flow-SDE,
Dance-SDE, CPS), `surrogate` (clip, guard, trust region), `anchor` (KL) and `advantage` combine
freely. An ODE has no likelihood and is no kernel: stage=nft and stage=awm need none.

Guidance is an axis of its own: `guidance` is the rollout's, `train_guidance` that of the velocity
whose likelihood is the ratio's. Where they are equal, guidance is part of the policy; with
train_guidance=1 the samples come from the guided policy, and the plain one is trained to make them.
Old and new likelihoods are always those of one velocity, so that the first ratio is 1 up to the
arithmetic's noise, which is measured before the first update.

Left out: reward models inside the loss, value functions, and per-token ratios: a flow has no
tokens. Log-probabilities keep their constants; chunks are the micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.flow import FlowSDE, Kernel, Transition
from flux2.losses import weighted
from flux2.rng import Rng
from flux2.samplers import guided, sample_sde
from flux2.schedule import EmpiricalShift, Grid, Schedule
from flux2.types import Batch, Condition, Metrics, RoleSpec, Score, Turn, Velocity
from posttrain._common import GroupFilter, check_group, rollout
from posttrain.advantages import Advantage, GroupRelative
from posttrain.axes import Anchor, Clip, FirstSteps, Replayed, Surrogate, Window


@dataclass
class GRPO:
    """Method of stage=grpo.

    Attributes:
        score: reward after the decoder.
        group: G, samples a prompt.
        steps: of the sampler.
        guidance: of the rollout; 1 is none. train_guidance: of the velocity that is trained; None:
            the rollout's.
        chunk: samples sampled, and trained, at a time.
        updates: optimizer updates a rollout; later ones are off-policy, which the ratio corrects.
    """

    score: Score
    group: int = 8
    steps: int = 8
    guidance: float = 1.0
    train_guidance: float | None = None
    chunk: int = 32
    updates: int = 1
    window: Window = field(default_factory=FirstSteps)
    kernel: Kernel = field(default_factory=FlowSDE)
    surrogate: Surrogate = field(default_factory=Clip)
    anchor: Anchor = field(default_factory=Anchor)
    advantage: Advantage = field(default_factory=GroupRelative)
    filter: GroupFilter = field(default_factory=GroupFilter)
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_group(self.group)
        if self.train_guidance is None:
            self.train_guidance = self.guidance
        for name, value, least in (
            ("guidance", self.guidance, 0.0), ("train_guidance", self.train_guidance, 0.0),
            ("chunk", self.chunk, 1), ("updates", self.updates, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"method.{name} is {value}: it must be at least {least:g}")
        self.window(self.schedule(self.steps, 1), Rng(0, 0))
        self._floor: float | None = None
        self._metrics: dict[str, float | Tensor] = {}

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy; with β > 0 also what it is held to."""
        return {"policy": RoleSpec(trainable=True), **self.anchor.roles}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("policy", self.loss),)

    def _trained(self, role: Velocity) -> Velocity:
        """The velocity whose likelihood is trained."""
        assert self.train_guidance is not None
        return guided(role, self.train_guidance)

    # ------------------------------------------------------------ the rollout

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """Samples, scores and centres; yields the updates' micro-batches."""
        grid = self.schedule(self.steps, batch.shape[0])
        window = self.window(grid, rng)

        def draw(chunk: Batch) -> tuple[Tensor, list[Batch]]:
            return self._draw(roles["policy"], chunk, grid, window, rng)

        drawn = rollout(
            draw, batch, self.group, self.chunk, self.score, self.advantage, self.filter
        )
        if self._floor is None:
            self._measure_floor(self._trained(roles["policy"]), drawn.chunks[0].micro[0], grid)
        self._metrics = {**drawn.metrics, "window": float(window[0])}
        for k in range(self.updates):
            yield [
                replace(s, extra={**s.extra, "advantage": c.advantage})
                for c in drawn.chunks[k :: self.updates]
                for s in c.weighed()
            ]

    def _draw(
        self, role: Velocity, batch: Batch, grid: Grid, window: tuple[int, ...], rng: Rng
    ) -> tuple[Tensor, list[Batch]]:
        """One chunk's samples, b n c, and its noisy steps as micro-batches."""
        assert batch.cond is not None
        device, ids = batch.cond.text.device, batch.ids
        x = rng("rollout", ids, batch.shape).to(device)
        x0, steps = sample_sde(
            guided(role, self.guidance), x, batch.cond, grid, self.kernel, window,
            lambda i: rng("sde", ids, batch.shape, counter=i).to(device),
        )  # fmt: skip
        micro = []
        for s in steps:
            log_prob, mean = s.log_prob, s.mean
            if self.train_guidance != self.guidance:
                law = self._law(self._trained(role), s.x, batch.cond, grid, s.i)[1]
                log_prob, mean = law.log_prob(s.x_next), law.mean
            extra = {"x": s.x, "x_next": s.x_next, "mean": mean, "log_prob": log_prob,
                     "i": torch.full_like(ids, s.i)}  # fmt: skip
            micro.append(replace(batch, extra=extra))
        return x0, micro

    def _law(
        self, velocity: Velocity, x: Tensor, cond: Condition, grid: Grid, i: int
    ) -> tuple[Tensor, Transition]:
        """The velocity at step i, b n c, and the step's law."""
        v = velocity(x, x.new_full(x.shape[:1], grid.sigmas[i]), cond)
        return v, self.kernel(x, v, grid, i)

    # ------------------------------------------------------------ the loss

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over one chunk's samples at one step."""
        e, cond, i = batch.extra, batch.cond, int(batch.extra["i"][0])
        assert cond is not None and batch.weight is not None
        grid = self.schedule(self.steps, batch.shape[0])
        v, law = self._law(self._trained(roles["policy"]), e["x"], cond, grid, i)
        delta = law.log_prob(e["x_next"]) - e["log_prob"]  # b
        dt = grid.sigmas[i + 1] - grid.sigmas[i]
        step = Replayed(law, e["mean"], delta, dt)
        term, cut = self.surrogate(step, e["advantage"].to(delta.device))
        valid = batch.weight.to(delta.device) > 0
        metrics: dict[str, float | Tensor] = {
            **{name: share[valid].mean() for name, share in cut.items()},
            f"dlogp/{i}": delta.abs().mean(),
        }
        if self.anchor.weight:
            divergence = self._divergence(roles, e["x"], cond, grid, i, v, law)  # b
            metrics["kl"] = divergence.mean()
            term = term + self.anchor.weight * divergence
        return weighted(batch, term, metrics)

    def _divergence(
        self, roles: Mapping[str, Any], x: Tensor, cond: Condition, grid: Grid, i: int,
        v: Tensor, law: Transition,
    ) -> Tensor:  # fmt: skip
        """To the anchor, in its space: b."""
        scale = self.train_guidance if self.anchor.guidance is None else self.anchor.guidance
        assert scale is not None
        with torch.no_grad():
            held, anchor = self._law(guided(roles[self.anchor.to], scale), x, cond, grid, i)
        space = self.anchor.space
        return law.kl(anchor) if space == "mean" else (v - held).square().mean((1, 2))

    def _measure_floor(self, policy: Velocity, batch: Batch, grid: Grid) -> None:
        """|Δ log p| of a chunk replayed under unchanged weights, as training replays it: what the
        arithmetic alone does to the ratio. Refuses a clip that lies below."""
        e, cond, i = batch.extra, batch.cond, int(batch.extra["i"][0])
        assert cond is not None
        with torch.enable_grad():
            _, law = self._law(policy, e["x"], cond, grid, i)
        floor = float((law.log_prob(e["x_next"]) - e["log_prob"]).detach().abs().max())
        limit = self.surrogate.limit
        told = "" if limit is None else f", clip {limit:.2g}"
        print(f"noise floor of |Δ log p|: {floor:.2g}{told}", flush=True)
        if limit is not None and limit <= floor:
            raise InputError(
                f"method.surrogate.eps is {limit:g}, below the noise of the log-probabilities "
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
