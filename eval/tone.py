"""Saturation and contrast of images: what few steps, and too strong a guidance, first move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from eval.dials import luma
from flux2.types import Batch


@dataclass(frozen=True)
class Tone:
    """The metric: neither side of its values is better; their distance from true images counts.

    hsv_saturation  mean over pixels of HSV's S, (max − min) / max over R, G and B; black has 0
    contrast        standard deviation of luma over pixels (RMS contrast), of 1
    """

    @property
    def engine(self) -> str:
        """See `rewards.base.Scorer`."""
        return "tone(hsv, luma, 1)"

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """images: b 3 h w uint8 → values, each b fp32 on the CPU."""
        rgb = images.float() / 255
        high, low = rgb.amax(1), rgb.amin(1)
        saturation = (high - low) / high.clamp(min=1 / 255)
        contrast = luma(rgb).flatten(1).std(1, correction=0)
        return {
            "hsv_saturation": saturation.mean((1, 2)).cpu(),
            "contrast": contrast.cpu(),
        }
