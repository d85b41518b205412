"""Attention processors with positions per sample.

diffusers' Flux2Transformer2DModel keeps only the first sample's position ids of a batch, so that
mixed sizes or reference layouts in one batch come out wrong without an error. These processors, and
the position embedder that feeds them, are its own extension points; with equal ids they change
nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from einops import rearrange
from torch import Tensor, nn

from flux2.errors import InputError


class BatchedPosEmbed(nn.Module):
    """Rotary angles for ids s b 1 4: (cos, sin), each s b d. The first axis is the sequence because
    diffusers joins text and image along it."""

    def __init__(self, theta: int, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.theta, self.axes_dim = theta, tuple(axes_dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids: s b 1 4 → cos and sin, s b d."""
        s, b = ids.shape[:2]
        flat = ids.reshape(s * b, -1).float()
        parts = [
            get_1d_rotary_pos_embed(
                dim,
                flat[:, i],  # pyright: ignore[reportArgumentType]  (tensors are taken too)
                theta=self.theta,
                repeat_interleave_real=True,
                use_real=True,
                freqs_dtype=torch.float32 if ids.device.type == "mps" else torch.float64,
            )
            for i, dim in enumerate(self.axes_dim)
        ]
        cos, sin = (torch.cat([p[k] for p in parts], -1) for k in (0, 1))
        return cos.reshape(s, b, -1), sin.reshape(s, b, -1)


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates pairs of features. x: b s heads d; angles: cos and sin, s b d."""
    cos, sin = (rearrange(a, "s b d -> b s 1 d") for a in angles)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


class DoubleProcessor:
    """Joint attention of a double-stream block, text before image."""

    _parallel_config = None

    def __init__(self, backend: AttentionBackendName | None = None) -> None:
        self._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states: b n c, encoder_hidden_states: b s c → both, attended."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))

        text, image = encoder_hidden_states, hidden_states
        q = [
            _norm(attn.norm_added_q, heads(attn.add_q_proj(text))),
            _norm(attn.norm_q, heads(attn.to_q(image))),
        ]
        k = [
            _norm(attn.norm_added_k, heads(attn.add_k_proj(text))),
            _norm(attn.norm_k, heads(attn.to_k(image))),
        ]
        q, k = torch.cat(q, 1), torch.cat(k, 1)
        v = torch.cat([heads(attn.add_v_proj(text)), heads(attn.to_v(image))], 1)
        out = _attend(self, q, k, v, attention_mask, image_rotary_emb)
        text_out, image_out = out.split([text.shape[1], image.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image_out)), attn.to_add_out(text_out)


class SingleProcessor:
    """Attention and MLP of a single-stream block, from one fused projection."""

    _parallel_config = None

    def __init__(self, backend: AttentionBackendName | None = None) -> None:
        self._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states: b (s + n) c → the same shape."""
        fused = attn.to_qkv_mlp_proj(hidden_states)
        qkv, mlp = fused.split(
            [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor], -1
        )
        q, k, v = rearrange(qkv, "b s (k h d) -> k b s h d", k=3, d=attn.head_dim)
        q, k = _norm(attn.norm_q, q), _norm(attn.norm_k, k)
        out = _attend(self, q, k, v, attention_mask, image_rotary_emb)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], -1))


def _norm(norm: Any, x: Tensor) -> Tensor:
    """RMSNorm in the dtype of its weight: under autocast x is bf16, and a mixed call is not
    fused."""
    return norm(x.to(norm.weight.dtype))


def _attend(
    processor: DoubleProcessor | SingleProcessor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
) -> Tensor:
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    out = dispatch_attention_fn(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return out.flatten(2, 3)


def named(backend: str | None) -> AttentionBackendName | None:
    """One of diffusers' attention backends (native, _native_math, _flash_3, …); None is native.

    Raises:
        InputError: diffusers knows no such backend.
    """
    try:
        return None if backend is None else AttentionBackendName(backend)
    except ValueError:
        names = ", ".join(b.value for b in AttentionBackendName)
        raise InputError(f"model.attention is {backend!r}: choose from {names}") from None


def install(transformer: nn.Module, backend: str | None = None) -> None:
    """Gives a Flux2Transformer2DModel positions per sample; backend: see `named`."""
    chosen = named(backend)
    config: Any = transformer.config
    transformer.pos_embed = BatchedPosEmbed(config.rope_theta, tuple(config.axes_dims_rope))
    for block in transformer.transformer_blocks:  # pyright: ignore
        block.attn.set_processor(DoubleProcessor(chosen))
    for block in transformer.single_transformer_blocks:  # pyright: ignore
        block.attn.set_processor(SingleProcessor(chosen))
