"""An adversarial term on the frozen teacher's features, after LADD (arXiv 2403.12015).

    D(x0; τ) = head(h(x_τ, τ, c)), a number of each token,  x_τ = (1 − τ)·x0 + τ·ε
    h: hidden states of a block of the teacher;  losses are means over tokens
    L_head = [1 − D(data)]₊ + [1 + D(made)]₊,  or softplus(−D(data)) + softplus(D(made))
             + λ_R1·(D(data) − D(data + s·η))²   η ~ N(0, I), both at the same τ and ε
    L_student += weight·(−D(made)),  or weight·softplus(−D(made))

The last term of L_head is the R1 penalty by differences (APT, arXiv 2501.08316), which needs no
second derivative of the transformer; λ_R1 is not divided by s². It needs data: a batch with x0.
Left out of LADD: heads on several blocks, and conditioning on τ and the prompt beside what h knows
of both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from distill._common import Renoise
from flux2.errors import BatchError, InputError
from flux2.flow import LogitNormal, interpolate
from flux2.losses import weighted
from flux2.rng import Rng
from flux2.types import Batch, Metrics, RoleSpec


@dataclass(frozen=True)
class Adversarial:
    """A `distill._common.Critic`.

    Attributes:
        weight: of the student's term.
        block: whose hidden states the head sees; the first is 1.
        loss: hinge or softplus.
        r1: λ_R1; 0: none. r1_std: s.
        law: of τ.
    """

    weight: float = 0.1
    block: int = 2
    loss_kind: str = "hinge"
    r1: float = 0.0
    r1_std: float = 0.01
    law: Renoise = field(default_factory=lambda: Renoise(LogitNormal(mean=1.0)))

    def __post_init__(self) -> None:
        if self.loss_kind not in ("hinge", "softplus"):
            raise InputError(
                f"method.critic.loss_kind is {self.loss_kind!r}: choose hinge or softplus"
            )
        if not (self.weight > 0 and 0 <= self.r1 < math.inf and self.r1_std > 0):
            raise InputError("method.critic: weight and r1_std must be above 0, r1 at least 0")

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The head: three layers to one number a token."""
        return {"head": RoleSpec(trainable=True, kind="projector", out=1, block=self.block)}

    def term(self, roles: Mapping[str, Any], x0: Tensor, batch: Batch, rng: Rng) -> Tensor:
        """See `Critic`."""
        verdict = self._verdict(roles, x0, batch, rng, "judge")
        term = -verdict if self.loss_kind == "hinge" else softplus(-verdict)
        return self.weight * term.mean(1)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """See `Critic`. Raises InputError for a batch without data."""
        if batch.x0 is None:
            raise BatchError(
                "method.critic compares with data, and the batch has none: set "
                "data.collate.latents=true with a dataset of images"
            )
        data = self._verdict(roles, batch.x0, batch, rng, "head")
        made = self._verdict(roles, batch.extra["x0"], batch, rng, "head")
        rise = relu if self.loss_kind == "hinge" else softplus
        margin = 1.0 if self.loss_kind == "hinge" else 0.0
        term = rise(margin - data) + rise(margin + made)
        if self.r1:
            nudge = rng("r1", batch.ids, batch.shape).to(batch.x0.device)
            near = self._verdict(roles, batch.x0 + self.r1_std * nudge, batch, rng, "head")
            term = term + self.r1 * (data - near).square()
        term = term.mean(1)  # b
        loss, _ = weighted(batch, term, {})
        return loss, {
            "head/loss": term.detach().mean(),
            "head/data": data.detach().mean(),
            "head/student": made.detach().mean(),
        }

    def _verdict(
        self, roles: Mapping[str, Any], x0: Tensor, batch: Batch, rng: Rng, stream: str
    ) -> Tensor:
        """D: b n."""
        u = rng.uniform(stream, batch.ids).to(x0.device)
        tau = self.law(u, batch.extra["sigma"], batch.extra["after"])
        x = interpolate(x0, rng(stream, batch.ids, batch.shape).to(x0.device), tau)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x0.requires_grad):
            _, states = roles["teacher"].features(x, tau, batch.cond, self.block)
        return roles["head"](states)[..., 0]
