"""Pixels ↔ the 128-channel tokens that the transformer works on, and where each token stands.

FLUX.2 has no scaling factor: latents are patchified 2×2 (channel order c, pi, pj) and normalised by
the running statistics of `vae.bn`. The buffers are read, and the module is never called: in train
mode a call would overwrite them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

REFERENCE_STRIDE = 10
"""Reference i stands at t = 10 + 10·i."""


def grid_ids(grid: tuple[int, int], t: int = 0, device: torch.device | None = None) -> Tensor:
    """Positions (t, h, w, 0) of a grid of tokens: n 4 int64."""
    h, w = grid
    return torch.cartesian_prod(
        torch.tensor([t], device=device),
        torch.arange(h, device=device),
        torch.arange(w, device=device),
        torch.tensor([0], device=device),
    )


def reference_ids(
    grids: Sequence[tuple[int, int]], device: torch.device | None = None
) -> Tensor:
    """Positions of the references of one sample, one after the other: m 4."""
    parts = [
        grid_ids(g, REFERENCE_STRIDE * (i + 1), device) for i, g in enumerate(grids)
    ]
    return torch.cat(parts)


def to_float(images: Tensor) -> Tensor:
    """uint8 → fp32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[−1, 1] → uint8, rounded as diffusers' image processor rounds."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class LatentCodec:
    """Encodes and decodes with an AutoencoderKLFlux2; its statistics are held in fp32."""

    def __init__(self, vae: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.vae = vae
        self.autocast = autocast
        self.mean = vae.bn.running_mean.detach().float().clone()  # pyright: ignore
        variance = vae.bn.running_var.detach().float()  # pyright: ignore
        self.std = torch.sqrt(variance + vae.config.batch_norm_eps)  # pyright: ignore
        self.patch = 2 ** len(vae.config.block_out_channels)  # pyright: ignore
        """Pixels a token: 16 for FLUX.2 (8 of the encoder, 2 of the patch)."""

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents b c/4 2h 2w → tokens b (h w) c."""
        tokens = rearrange(z.float(), "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        return (tokens - self.mean.to(z.device)) / self.std.to(z.device)

    def denormalise(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of normalise."""
        tokens = x.float() * self.std.to(x.device) + self.mean.to(x.device)
        return rearrange(
            tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=2, q=2
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 b 3 H W → tokens b n c, fp32: the posterior's mode, not a sample."""
        weight = next(self.vae.parameters())
        with torch.autocast(weight.device.type, self.autocast, enabled=self.autocast is not None):
            posterior = self.vae.encode(to_float(images).to(weight)).latent_dist  # pyright: ignore
        return self.normalise(posterior.mode())

    def decode_float(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens → b 3 H W in about [−1, 1], with gradients."""
        weight = next(self.vae.parameters())
        z = self.denormalise(x, grid).to(weight)
        with torch.autocast(weight.device.type, self.autocast, enabled=self.autocast is not None):
            return self.vae.decode(z).sample.float()  # pyright: ignore

    @torch.no_grad()
    def decode(self, x: Tensor, grid: tuple[int, int], chunk: int = 64) -> Tensor:
        """Tokens → uint8 b 3 H W."""
        return torch.cat([to_uint8(self.decode_float(p, grid)) for p in x.split(chunk)])
