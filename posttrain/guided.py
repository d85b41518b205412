"""Finetuning on the guided distribution, for models that have classifier-free guidance distilled
into them: a target of `posttrain.sft.FlowMatching`.

    v* = ε − x0,   g ~ U[low, high],   v_u = sg[v_θ(x_t, t, ∅, g)]
    error = ‖v_θ(x_t, t, c, g) − [v_u + g·(v* − v_u)]‖² / (g²·dim)

Trained on v* such a model forgets its guidance: v* averages to v_c, which it then answers at every
strength. v_u is the network's own answer to the empty prompt at the same g, without a gradient. As
E[v* | x_t, c] is v_c, the fixed point is v_u + g·(v_c − v_u), which at the empty prompt is v_u for
every g: so the empty prompt asks such a network for the unconditional velocity. FLUX.1 Krea was
finetuned on a guided distribution, too (krea.ai/blog/flux-krea-open-source-release); its formula is
not published, and this one is ours.

The target's noise is g times that of v*, and 1/g² weighs each g by its inverse variance (least
squares with unequal noise). It also makes the error that of v_u + (v_θ − v_u)/g, the conditional
velocity that the answer stands for, so that losses of different g, and plain ones, compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flux2.errors import BatchError, InputError
from flux2.flow import guide
from flux2.types import Condition, RoleSpec


@dataclass(frozen=True)
class Guided:
    """v_u + g·(v* − v_u), for networks that answer with guidance in one forward.

    Attributes:
        scale: (low, high) of g, which reaches the network through its embedder; two equal numbers
            where it has none and one strength is baked in.
        unconditional: whose v_u: "self", the network's own, which dropped captions go on training;
            or "reference", that of the network as it was, to which dropped captions then hold it.
        role: of the model (conf/model). A base gets the one strength baked in, and is distilled
            afterwards.
    """

    scale: Sequence[float] = (1.0, 6.0)
    unconditional: str = "self"
    role: str = "guidance-distilled"

    def __post_init__(self) -> None:
        low, high = self.scale if len(self.scale) == 2 else (math.nan, math.nan)
        if not 0 < low <= high < math.inf:
            raise InputError(
                f"method.target.scale is {list(self.scale)}: give [low, high], 0 < low ≤ high"
            )
        if self.unconditional not in ("self", "reference"):
            raise InputError(
                f"method.target.unconditional is {self.unconditional!r}: choose self or reference"
            )
        if self.role != "guidance-distilled" and low < high:
            raise InputError(
                f"target=guided draws strengths and a {self.role} model has no embedder to tell "
                "them apart: bake one in, e.g. method.target.scale=[3,3]"
            )

    @property
    def accepts(self) -> tuple[str, ...]:
        """All."""
        return ("guidance-distilled", "distilled", "base")

    @property
    def result(self) -> str | None:
        """A base becomes a distilled model."""
        return "distilled" if self.role == "base" else None

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The network as it was, where v_u is its."""
        return {"reference": RoleSpec()} if self.unconditional == "reference" else {}

    def __call__(
        self, roles: Mapping[str, Any], x: Tensor, t: Tensor, cond: Condition, v: Tensor, u: Tensor
    ) -> tuple[Condition, Tensor, Tensor]:
        """See `posttrain.sft.Target`. Raises InputError without the empty prompt's condition."""
        if cond.null is None:
            raise BatchError(
                "target=guided needs the empty prompt's condition: set data.collate.unconditional"
            )
        low, high = self.scale
        g = low + (high - low) * u.to(t)
        embedded = None if cond.guidance is None else g
        empty = replace(cond.null, guidance=embedded)
        frozen = self.unconditional == "reference"
        with torch.no_grad():
            v_u = roles["reference" if frozen else "model"](x, t, empty)
            target = guide(v, v_u, g)
            if frozen:
                # An empty prompt has no condition to push towards: v_u itself, at every strength.
                said, none = cond.text, cond.null.text.to(cond.text)  # a cache may keep fewer bits
                dropped = (said == none).flatten(1).all(1)
                target = torch.where(dropped[:, None, None], v_u, target)
        return replace(cond, guidance=embedded), target, g**-2.0
