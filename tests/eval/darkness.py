"""A reward that can be hacked: it likes dark images, whatever they show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flux2.types import Batch
from rewards.base import Card


@dataclass(frozen=True)
class Darkness:
    """1 − the mean of all pixels, in [0, 1]."""

    failures: Counter[str] = field(default_factory=Counter, init=False, compare=False)
    card: Card = field(default=Card(0.0, 1.0, "light", "none: arithmetic", differentiable=True),
                       init=False)  # fmt: skip
    engine: str = field(default="darkness()", init=False)

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """images: b 3 h w uint8 → "reward", b."""
        return {"reward": self.differentiable(images.float() / 255, batch)}

    def differentiable(self, images: Tensor, batch: Batch) -> Tensor:
        """images: b 3 h w in [0, 1] → b, with gradients."""
        return 1 - images.mean((1, 2, 3))
