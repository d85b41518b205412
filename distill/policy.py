"""Policy imitation, π-ID: Chen et al., "pi-Flow: Policy-Based Few-Step Generation via Imitation
Distillation" (arXiv 2510.14974), with the Gaussian-mixture policy of GMFlow (arXiv 2504.05304).

    x_s from the student's own earlier segments, from noise on
    π = student(x_s, s, c): a mixture over x0, that gives a velocity at every t < s by itself
    x_t on π's own path from x_s, at random times of the segment, without gradients
    loss = ‖π(x_t, t) − sg[v_u + g·(v_c − v_u)](x_t, t)‖² / dim

The student imitates the teacher where it itself goes, so that its errors are corrected where they
lead; it learns a velocity, as the teacher has one, and needs no critic, no derivative and no data.
Components left out of the path now and then (GM dropout) show it its neighbours. Left out: the
paper's start from the teacher's own paths, and its averages of velocity over small windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill._common import check_scale
from flux2.errors import InputError, check_positive
from flux2.losses import weighted
from flux2.rng import Rng
from flux2.samplers import guided, sample_policy, substates
from flux2.schedule import EmpiricalShift, Schedule
from flux2.types import (
    Batch,
    Condition,
    Law,
    Memoryless,
    Metrics,
    Policy,
    PolicyShape,
    RoleSpec,
    Turn,
)


class _Watched:
    """A policy that writes down where it was asked."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.asked = policy, list[Tensor]()

    @property
    def shape(self) -> PolicyShape:
        return self._policy.shape

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> Law:
        self.asked.append(x)
        return self._policy.policy(x, t, cond)


@dataclass(frozen=True)
class PolicyImitation(Memoryless):
    """Method of stage=distill.

    Attributes:
        guidance: g, of the teacher.
        steps: segments, each one forward of the student. schedule: their grid.
        components: of each token's mixture. substeps: Euler steps of a segment.
        times: at which a segment is matched, for one forward of the student.
        dropout: probability that a component is left out of the path.
        ema: decay of an average of the student's weights; 0: none.
        micro: samples a micro-batch, of one segment.
    """

    guidance: float = 3.0
    steps: int = 4
    components: int = 8
    substeps: int = 32
    times: int = 2
    dropout: float = 0.1
    ema: float = 0.0
    micro: int = 32
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = "distilled"

    def __post_init__(self) -> None:
        check_scale(self.guidance)
        counts = ("components", "substeps", "times", "micro")
        check_positive({name: getattr(self, name) for name in counts})
        for name in ("dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"method.{name} is {getattr(self, name)}: give 0 to below 1")
        self.schedule(self.steps, 1)

    def describe(self) -> str:
        """How the student is sampled."""
        return (
            f"policy: {self.steps} forwards, after each {self.substeps} steps of a mixture of "
            f"{self.components} Gaussians a token"
        )

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The student's transformer starts as the teacher's."""
        shape = PolicyShape(self.components, self.steps, self.substeps)
        average = RoleSpec(kind="policy", policy=shape, follows="student", decay=self.ema)
        return {
            "student": RoleSpec(trainable=True, kind="policy", policy=shape),
            "teacher": RoleSpec(),
            **({"ema": average} if self.ema else {}),
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("student", self.loss),)

    @torch.no_grad()
    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """The sampler's own path from noise, cut into its segments; one update on all of them."""
        grid, update = self.schedule(self.steps, batch.shape[0]), []
        for part in batch.split(self.micro):
            assert part.cond is not None
            noise = rng("rollout", part.ids, part.shape).to(part.cond.text.device)
            watched = _Watched(roles["student"])
            sample_policy(watched, noise, part.cond, grid, self.substeps)
            for i, x in enumerate(watched.asked):
                extra = {"x": x, "segment": torch.full_like(part.ids, i)}
                update.append(replace(part, weight=torch.ones(len(part)), extra=extra))
        yield update

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch; batch.cond.null is the empty prompt."""
        assert batch.cond is not None
        i, x = int(batch.extra["segment"][0]), batch.extra["x"]
        sigma, after = self.schedule(self.steps, batch.shape[0]).sigmas[i : i + 2]
        law = roles["student"].policy(x, x.new_full(x.shape[:1], sigma), batch.cond)
        teacher, errors, speeds = guided(roles["teacher"], self.guidance), [], []
        for x_t, t in self._visited(law, batch, rng, i, sigma, after):
            with torch.no_grad():
                target = teacher(x_t, t, batch.cond)
            errors.append((law.velocity(x_t, t) - target).square().mean((1, 2)))
            speeds.append(target.square().mean())
        term = torch.stack(errors).mean(0)  # b
        error = term.detach().mean()
        return weighted(batch, term, {"speed": torch.stack(speeds).mean(), f"error_{i + 1}": error})

    @torch.no_grad()
    def _visited(
        self, law: Law, batch: Batch, rng: Rng, i: int, sigma: float, after: float
    ) -> list[tuple[Tensor, Tensor]]:
        """(x_t: b n c, t: b) on the law's own path, at `times` of its substeps a sample."""
        x = batch.extra["x"]
        u = rng.uniform("time", batch.ids, (self.times,), counter=i)
        at = (u * self.substeps).long().clamp(max=self.substeps - 1).to(x.device)  # b j
        dropped = rng.uniform("dropout", batch.ids, (self.components,), counter=i) < self.dropout
        path = law.detach().without(dropped.to(x.device))
        states = [torch.zeros_like(x) for _ in range(self.times)]
        times = x.new_zeros(self.times, len(x))
        for m, (t, state) in enumerate(substates(path, x, sigma, after, self.substeps)):
            for j, kept in enumerate(states):
                here = at[:, j] == m
                states[j] = torch.where(here[:, None, None], state, kept)
                times[j] = times[j].masked_fill(here, t)
        return list(zip(states, times, strict=True))
