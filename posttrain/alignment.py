"""Representation alignment (REPA, Yu et al., arXiv 2410.06940): a further loss of
`posttrain.sft.FlowMatching`.

    y = features of the clean image, one for each token;   h = hidden states of x_t after block k
    L = −λ · mean over tokens of cos(y, P(h))

P is a small network that is trained beside the model and thrown away after it. A turn updates one
role, so P has one of its own, after the model's and on the same h, which costs no further forward.
Left out: several feature networks at once, and the paper's other similarity, NT-Xent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flux2.errors import BatchError, InputError
from flux2.rng import Rng
from flux2.types import Batch, Condition, Metrics, RoleSpec, Turn


class PatchFeatures(Protocol):
    """A frozen network that says what is where in an image (`rewards.nets.patches`).

    Attributes:
        dim: d, the length of a feature.
    """

    dim: int

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """images: b 3 h w uint8, grid: (rows, columns) → b (rows columns) d fp32, row by row."""
        ...


@dataclass
class Alignment:
    """L above.

    Attributes:
        features: y.
        block: k; the first block is 1. The paper takes 8 of 28.
        weight: λ.
    """

    features: PatchFeatures
    block: int = 2
    weight: float = 0.5
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise InputError(f"method.align.block is {self.block}: the first block is 1")
        if not self.weight > 0:
            raise InputError(
                f"method.align.weight is {self.weight}: it must be above 0 (align=null: no loss)"
            )

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """P."""
        out = self.features.dim
        return {"projector": RoleSpec(trainable=True, kind="projector", out=out, block=self.block)}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """P's."""
        return (Turn("projector", self.projector),)

    def begin(self) -> None:
        """A step begins: nothing is kept of the one before."""
        self._kept = []

    def __call__(
        self, roles: Mapping[str, Any], x: Tensor, t: Tensor, cond: Condition, batch: Batch
    ) -> tuple[Tensor, Tensor, Metrics]:
        """The model's velocity, λ·L of each sample, b, and the mean cosine for the log.

        Raises:
            InputError: the batch has no pixels.
        """
        if batch.images is None:
            raise BatchError("align needs the images' pixels: set data.collate.images=true")
        v, h = roles["model"].features(x, t, cond, self.block)
        with torch.no_grad():
            y = self.features(batch.images, batch.grid).to(h)
        if y.shape[:2] != h.shape[:2]:
            raise InputError(
                f"method.align.features gives {tuple(y.shape[:2])} features for "
                f"{tuple(h.shape[:2])} tokens: it must give one for each"
            )
        self._kept.append((h.detach(), y))
        cosine = _cosine(roles["projector"](h), y)
        return v, -self.weight * cosine, {"alignment": cosine.mean()}

    def projector(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """P's loss on the micro-batch, whose h the model's turn has left."""
        h, y = self._kept.pop(0)
        assert batch.weight is not None and len(h) == len(batch)
        cosine = _cosine(roles["projector"](h), y)
        return -(batch.weight.to(cosine.device) * cosine).sum(), {}


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean over tokens of the cosine: b."""
    return cosine_similarity(a, b, dim=-1).mean(1)
