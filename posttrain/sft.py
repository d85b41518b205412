"""Supervised flow matching: pretraining from scratch, and finetuning.

    t ~ p(t),  ε ~ N(0, I),  x_t = (1 − t)·x0 + t·ε,  loss = ‖v_θ(x_t, t, c) − (ε − x0)‖² / dim

(Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003.) Captions are dropped to the empty
prompt by the data, so that classifier-free guidance has something to push away from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from flux2.errors import InputError
from flux2.flow import LogitNormal, TimeDensity, interpolate, target_velocity
from flux2.rng import Rng
from flux2.types import Batch, Metrics, RoleSpec, Turn


@dataclass(frozen=True)
class FlowMatching:
    """Method of stage=pretrain and stage=sft.

    Attributes:
        density: p(t).
        micro: samples a micro-batch.
        ema: decay of an averaged copy of the weights; 0 keeps none.
    """

    density: TimeDensity = field(default_factory=LogitNormal)
    micro: int = 64
    ema: float = 0.0
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.micro < 1:
            raise InputError(f"method.micro is {self.micro}: it must be at least 1")
        if not 0 <= self.ema < 1:
            raise InputError(f"method.ema is {self.ema}: give 0 to below 1")

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The model, and its average where there is one."""
        roles = {"model": RoleSpec(trainable=True)}
        if self.ema:
            roles["ema"] = RoleSpec(follows="model", decay=self.ema)
        return roles

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("model", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the batch."""
        yield batch.split(self.micro)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch."""
        x0, cond, weight = batch.x0, batch.cond, batch.weight
        assert x0 is not None and cond is not None and weight is not None
        t = self.density(rng.uniform("time", batch.ids)).to(x0.device)  # b
        eps = rng("noise", batch.ids, tuple(x0.shape[1:])).to(x0.device)  # b n c
        v = roles["model"](interpolate(x0, eps, t), t, cond)
        error = (v - target_velocity(x0, eps)).square().mean((1, 2))  # b
        loss = (weight.to(error.device) * error).sum()
        kind = "loss" if cond.ref is None else "loss_edit"
        return loss, {kind: error.mean()}

    def metrics(self) -> Metrics:
        """None: the loss says it all."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep: all state is in the roles and the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
