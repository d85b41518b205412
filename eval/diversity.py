"""How much the images of one prompt differ from each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from flux2.errors import InputError
from flux2.types import Batch
from rewards.colour import lab


def lab_pixels(images: Tensor) -> Tensor:
    """images: b 3 h w uint8 → b (h w 3) fp32, in CIE L*a*b*.

    Scaled so that two images' Euclidean distance is the root mean square of their pixels' ΔE76.
    """
    points = torch.from_numpy(lab(rearrange(images, "b c h w -> b h w c").cpu().numpy()))
    pixels = images.shape[-2] * images.shape[-1]
    return rearrange(points, "b h w c -> b (h w c)") / pixels**0.5


def mean_distances(features: Tensor, groups: Tensor) -> Tensor:
    """Each sample's mean Euclidean distance to the others of its group.

    Its mean over a group is the group's mean pairwise distance, so that this is a value per sample.

    Args:
        features: b d.
        groups: b, the prompt of each sample.

    Returns:
        b, NaN for a sample that is alone in its group.
    """
    x = features.double()
    out = torch.full((len(x),), float("nan"), dtype=torch.float64)
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero().flatten().cpu()
        if len(rows) > 1:
            out[rows] = _distances(x[rows]).sum(1).cpu() / (len(rows) - 1)
    return out.float()


def vendi(kernel: Tensor) -> float:
    """The Vendi score of n samples: the number of samples all different that would be as diverse.

    exp(−Σ λ log λ) over the eigenvalues λ of K / n (Friedman and Dieng 2023, arXiv 2210.02410,
    definition 3.1). 1 where all are the same, n where all are different.

    Args:
        kernel: n n, similarities: symmetric, positive semi-definite, 1 on the diagonal.

    Raises:
        InputError: the kernel is empty, not square, not symmetric, or has no unit diagonal.
    """
    k = kernel.double()
    if k.ndim != 2 or k.shape[0] != k.shape[1] or not len(k):
        raise InputError(f"a Vendi kernel is n n with n > 0, not {tuple(kernel.shape)}")
    unit = torch.allclose(k.diagonal(), torch.ones_like(k.diagonal()), atol=1e-4)
    if not unit or not torch.allclose(k, k.T, atol=1e-4):
        raise InputError("a Vendi kernel is symmetric with 1 on its diagonal: normalise features")
    # fp64: small eigenvalues are rounding errors, and 0 log 0 is 0.
    values = torch.linalg.eigvalsh(k / len(k)).clamp(min=0)
    return float(torch.special.entr(values).sum().exp())


def cosine_kernel(features: Tensor) -> Tensor:
    """features: n d, none of them 0 → n n cosines, fp64. For embeddings."""
    x = torch.nn.functional.normalize(features.double(), dim=1)
    return x @ x.T


def gaussian_kernel(features: Tensor, scale: float) -> Tensor:
    """features: n d → n n similarities exp(-d² / (2 · scale²)) of Euclidean distances d, fp64."""
    return torch.exp(-((_distances(features.double()) / scale) ** 2) / 2)


def _distances(x: Tensor) -> Tensor:
    # The shortcut by inner products loses small distances to rounding.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class Diversity:
    """The metric: `diversity` (mean distance to the prompt's other images) and `vendi`.

    All images of a prompt must be in one batch. NaN for a prompt with a single image.

    Attributes:
        features: images (b 3 h w uint8) → b d.
        scale: the distance of features at which images begin to count as different (the scale of
            vendi's `gaussian_kernel`); for pixels, in ΔE76.
    """

    features: Callable[[Tensor], Tensor] = lab_pixels
    scale: float = 10.0

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """images: b 3 h w uint8 → values, each b fp32; vendi is the same for all of a prompt."""
        x = self.features(images).cpu()
        groups = batch.groups.cpu()
        scores = torch.full((len(x),), float("nan"))
        for group in groups.unique().tolist():
            rows = (groups == group).nonzero().flatten()
            if len(rows) > 1:
                scores[rows] = vendi(gaussian_kernel(x[rows], self.scale))
        return {"diversity": mean_distances(x, groups), "vendi": scores}
