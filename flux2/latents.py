"""Pixels ↔ the 128-channel tokens that the transformer works on, and where each token stands.

FLUX.2 has no scaling factor: latents are patchified 2×2 (channel order c, pi, pj) and normalised by
the running statistics of `vae.bn`. The buffers are read, and the module is never called: in train
mode a call would overwrite them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flux2.types import Condition

AT_ONCE = 1 << 18
"""Pixels that the autoencoder is given at a time: 64 images of 64×64, one of 512×512."""
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


def join(parts: Sequence[tuple[Tensor, Condition]]) -> tuple[Tensor, Condition]:
    """Samples of different sizes and reference layouts as one batch: padded to the longest, with a
    mask that hides the padding, so that each sample comes out as it does alone.

    parts: x b n c and its condition; within a part all rows are of one layout.

    Returns:
        x and the condition of all rows, in order. Where nothing was padded there is no mask.
    """
    longest = max(x.shape[1] for x, _ in parts)
    x = torch.cat([_pad(x, longest) for x, _ in parts])
    return x, _join([c for _, c in parts])


def separate(v: Tensor, parts: Sequence[tuple[Tensor, Condition]]) -> list[Tensor]:
    """The inverse of join for what the model returns: v B N c → b n c for each part."""
    rows = v.split([len(x) for x, _ in parts])
    return [r[:, : x.shape[1]] for r, (x, _) in zip(rows, parts, strict=True)]


def _join(conditions: Sequence[Condition]) -> Condition:
    lengths = [(c.text.shape[1], c.ids.shape[1], _references(c)) for c in conditions]
    s, n, m = (max(x) for x in zip(*lengths, strict=True))
    columns: dict[str, Tensor | None] = {}
    for name, length in (("text", s), ("text_ids", s), ("ids", n), ("ref", m), ("ref_ids", m)):
        values = [getattr(c, name) for c in conditions]
        given = next((v for v in values if v is not None), None)
        columns[name] = None if given is None else torch.cat(
            [_pad(given.new_zeros(len(c.text), 0, given.shape[2]) if v is None else v, length)
             for v, c in zip(values, conditions, strict=True)]
        )  # fmt: skip
    mask = None
    if len(set(lengths)) > 1 or any(c.mask is not None for c in conditions):
        masks = [_mask(c, k, (s, n, m)) for c, k in zip(conditions, lengths, strict=True)]
        mask = torch.cat(masks)
    guidance = [c.guidance for c in conditions if c.guidance is not None]
    nulls = [c.null for c in conditions if c.null is not None]
    for found in (guidance, nulls):
        if len(found) not in (0, len(conditions)):
            raise ValueError("guidance and null must be given for every part, or for none")
    return Condition(
        **columns,  # pyright: ignore[reportArgumentType]
        mask=mask,
        guidance=torch.cat(guidance) if guidance else None,
        null=_join(nulls) if nulls else None,
    )


def _references(condition: Condition) -> int:
    return 0 if condition.ref is None else condition.ref.shape[1]


def _mask(
    condition: Condition, lengths: tuple[int, int, int], padded: tuple[int, int, int]
) -> Tensor:
    """The part's own mask, or all True, with False where it was padded: b (s + n + m)."""
    mask = condition.mask
    if mask is None:
        shape = (len(condition.text), sum(lengths))
        mask = torch.ones(shape, dtype=torch.bool, device=condition.text.device)
    pieces = zip(mask.split(lengths, 1), padded, strict=True)
    return torch.cat([_pad(piece, length) for piece, length in pieces], 1)


def _pad(x: Tensor, length: int) -> Tensor:
    """b k … → b length …, with zeros (False) after the end."""
    return torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], 1)


def to_float(images: Tensor) -> Tensor:
    """uint8 → fp32 in [−1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[−1, 1] → uint8, rounded as diffusers' image processor rounds."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def cast(vae: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An autoencoder in `dtype`, in place, whose latent statistics stay fp32: rounded to bf16 they
    would move every latent."""
    bn: Any = vae.bn
    mean, variance = bn.running_mean.float().clone(), bn.running_var.float().clone()
    vae.to(dtype)
    bn.running_mean, bn.running_var = mean, variance
    return vae


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
        """uint8 b 3 H W → tokens b n c, fp32: the posterior's mode, not a sample. As many images at
        a time as `decode` takes."""
        chunk = max(1, AT_ONCE // (images.shape[-2] * images.shape[-1]))
        return torch.cat([self._encode(part) for part in images.split(chunk)])

    def _encode(self, images: Tensor) -> Tensor:
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
    def decode(self, x: Tensor, grid: tuple[int, int], chunk: int | None = None) -> Tensor:
        """Tokens → uint8 b 3 H W, `chunk` images at a time; by default as many as have AT_ONCE
        pixels, but one at least."""
        if chunk is None:
            chunk = max(1, AT_ONCE // (grid[0] * grid[1] * self.patch**2))
        return torch.cat([to_uint8(self.decode_float(p, grid)) for p in x.split(chunk)])
