"""Guidance distillation, one fixed strength baked in: the first stage of Meng et al., "On
Distillation of Guided Diffusion Models" (CVPR 2023, arXiv 2210.03142), eq. 3 to 5, for velocities.

    t ~ p(t),  ε ~ N(0, I),  x_t = (1 − t)·x0 + t·ε
    target = sg[v_u + g·(v_c − v_u)],  v_c = v_teacher(x_t, t, c),  v_u = v_teacher(x_t, t, ∅)
    loss = ‖v_student(x_t, t, c) − target‖² / dim

The student never sees the empty prompt: one forward of it does what two of the teacher's do, and it
is sampled with guidance 1. Left out: the strength as an input (the paper's w), and fewer steps (its
second stage).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.flow import LogitNormal, TimeDensity, interpolate
from flux2.rng import Rng
from flux2.samplers import guided
from flux2.types import Batch, Metrics, RoleSpec, Turn


@dataclass(frozen=True)
class BakedGuidance:
    """Method of stage=guidance.

    Attributes:
        scale: g, the teacher's classifier-free guidance; 1 copies the teacher's conditional branch.
        density: p(t).
        micro: samples a micro-batch; the teacher's forward is twice that.
        accepts, result: a base becomes a distilled model (flux2.types.Method).
    """

    scale: float = 3.0
    density: TimeDensity = field(default_factory=LogitNormal)
    micro: int = 64
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = "distilled"

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise InputError(f"method.scale is {self.scale}: give a number of at least 0 (1: none)")
        if self.micro < 1:
            raise InputError(f"method.micro is {self.micro}: it must be at least 1")

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The student starts as the teacher."""
        return {"student": RoleSpec(trainable=True), "teacher": RoleSpec()}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("student", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the batch."""
        yield batch.split(self.micro)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch; batch.cond.null is the empty prompt."""
        x0, cond, weight = batch.x0, batch.cond, batch.weight
        assert x0 is not None and cond is not None and weight is not None
        t = self.density(rng.uniform("time", batch.ids)).to(x0.device)  # b
        eps = rng("noise", batch.ids, batch.shape).to(x0.device)  # b n c
        x = interpolate(x0, eps, t)
        with torch.no_grad():
            target = guided(roles["teacher"], self.scale)(x, t, cond)
        v = roles["student"](x, t, cond)
        error = (v - target).square().mean((1, 2))  # b
        loss = (weight.to(error.device) * error).sum()
        return loss, {"loss": error.mean(), "speed": target.square().mean()}

    def metrics(self) -> Metrics:
        """None: the loss says it all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: all state is in the roles and the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
