"""Supervised flow matching: pretraining from scratch, and finetuning.

    t ~ p(t),  ε ~ N(0, I),  x_t = (1 − t)·x0 + t·ε,  v* = ε − x0
    loss = w(t) · ‖v_θ(x_t, t, c) − v*‖² / dim

(Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003.) Captions are dropped to the empty
prompt by the data, so that classifier-free guidance has something to push away from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.flow import (
    LogitNormal,
    TimeDensity,
    TimeWeighting,
    Unweighted,
    target_velocity,
)
from flux2.losses import Noised
from flux2.rng import Rng
from flux2.types import Batch, Condition, Memoryless, Metrics, RoleSpec, Turn


class Target(Protocol):
    """What the network's velocity is held to."""

    @property
    def accepts(self) -> tuple[str, ...]:
        """See `flux2.types.Method`."""
        ...

    @property
    def result(self) -> str | None:
        """See `flux2.types.Method`."""
        ...

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """Those that it needs besides `model`."""
        ...

    def __call__(
        self, roles: Mapping[str, Any], x: Tensor, t: Tensor, cond: Condition, v: Tensor, u: Tensor
    ) -> tuple[Condition, Tensor, Tensor]:
        """x: b n c at t: b, v: ε − x0, u: b uniform on [0, 1) → the condition to ask the network
        with, its target b n c, and the factor of the squared error, b."""
        ...


class Align(Protocol):
    """A further loss on the network's hidden states (`posttrain.alignment`)."""

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """Those that it needs besides `model`."""
        ...

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Those that it needs after the model's."""
        ...

    def begin(self) -> None:
        """A step begins."""
        ...

    def __call__(
        self, roles: Mapping[str, Any], x: Tensor, t: Tensor, cond: Condition, batch: Batch
    ) -> tuple[Tensor, Tensor, Metrics]:
        """→ the model's velocity at x, b n c, what the loss adds for each sample, b, and what is
        told of it."""
        ...


@dataclass(frozen=True)
class Plain:
    """v* itself."""

    @property
    def accepts(self) -> tuple[str, ...]:
        """Bases: others would lose their guidance."""
        return ("base",)

    @property
    def result(self) -> str | None:
        """What it was given."""
        return None

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """None."""
        return {}

    def __call__(
        self, roles: Mapping[str, Any], x: Tensor, t: Tensor, cond: Condition, v: Tensor, u: Tensor
    ) -> tuple[Condition, Tensor, Tensor]:
        """See `Target`."""
        return cond, v, torch.ones_like(t)


@dataclass(frozen=True)
class FlowMatching(Memoryless):
    """Method of stage=pretrain and stage=sft.

    Attributes:
        density: p(t).
        micro: samples a micro-batch.
        ema: decay of an averaged copy of the weights; 0 keeps none.
        weighting: w(t).
        target: plain, or guided (`posttrain.guided`).
        align: a loss on hidden states; None: no such loss.
    """

    density: TimeDensity = field(default_factory=LogitNormal)
    micro: int = 64
    ema: float = 0.0
    weighting: TimeWeighting = field(default_factory=Unweighted)
    target: Target = field(default_factory=Plain)
    align: Align | None = None

    def __post_init__(self) -> None:
        if self.micro < 1:
            raise InputError(f"method.micro is {self.micro}: it must be at least 1")
        if not 0 <= self.ema < 1:
            raise InputError(f"method.ema is {self.ema}: give 0 to below 1")

    @property
    def accepts(self) -> tuple[str, ...]:
        """The target's."""
        return self.target.accepts

    @property
    def result(self) -> str | None:
        """The target's."""
        return self.target.result

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The model, its average where there is one, and what target and alignment need."""
        roles = {"model": RoleSpec(trainable=True), **self.target.roles}
        if self.align is not None:
            roles |= self.align.roles
        if self.ema:
            roles["ema"] = RoleSpec(follows="model", decay=self.ema)
        return roles

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The model's, and then what the alignment needs."""
        return (Turn("model", self.loss), *(() if self.align is None else self.align.turns))

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the batch."""
        if self.align is not None:
            self.align.begin()
        yield batch.split(self.micro)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch."""
        at, cond, weight = Noised.draw(batch, self.density, rng), batch.cond, batch.weight
        assert cond is not None and weight is not None
        x, t, v = at.x, at.t, target_velocity(at.x0, at.eps)  # b n c, b, b n c
        u = rng.uniform("guidance", batch.ids).to(t)  # b
        asked, target, factor = self.target(roles, x, t, cond, v, u)
        found: dict[str, float | Tensor] = {}
        extra: Tensor | float = 0.0
        if self.align is None:
            answer = roles["model"](x, t, asked)
        else:
            answer, extra, told = self.align(roles, x, t, asked, batch)
            found |= told
        error = factor * (answer - target).square().mean((1, 2))  # b
        term = self.weighting(t) * error
        loss = (weight.to(error.device) * (term + extra)).sum()
        found["loss" if cond.ref is None else "loss_edit"] = error.mean()
        if not isinstance(self.weighting, Unweighted):
            found["weighted"] = term.mean()
        return loss, found
