"""Packing, normalisation and positions against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from flux2 import attention
from flux2.adapters import Switch
from flux2.latents import (
    LatentCodec,
    cast,
    grid_ids,
    join,
    reference_ids,
    separate,
    to_float,
    to_uint8,
)
from flux2.roles import VelocityRole
from flux2.text import attention_mask, text_ids
from flux2.types import Condition, cat_conditions


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def pipeline_encode(vae, images: torch.Tensor) -> torch.Tensor:
    """b n c by the pipeline's unbound methods."""

    class Holder:
        _patchify_latents = staticmethod(Flux2KleinPipeline._patchify_latents)

    holder = Holder()
    holder.vae = vae
    with torch.no_grad():
        z = Flux2KleinPipeline._encode_vae_image(holder, images, None)
    return Flux2KleinPipeline._pack_latents(z)


def test_encoding_equals_the_pipelines(tiny):
    images = pixels(2, 3, 32, 64)
    want = pipeline_encode(tiny.vae, to_float(images))
    got = tiny.codec.encode(images)
    assert got.shape == (2, 2 * 4, 128)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_decoding_equals_the_pipelines(tiny):
    x = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(1))
    ids = grid_ids((2, 4)).expand(2, -1, -1)
    z = Flux2KleinPipeline._unpack_latents_with_ids(x, ids, 2, 4)
    bn = tiny.vae.bn
    std = torch.sqrt(bn.running_var + tiny.vae.config.batch_norm_eps)[:, None, None]
    z = Flux2KleinPipeline._unpatchify_latents(z * std + bn.running_mean[:, None, None])
    torch.testing.assert_close(tiny.codec.denormalise(x, (2, 4)), z, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        want = tiny.vae.decode(z).sample
    torch.testing.assert_close(tiny.codec.decode_float(x, (2, 4)), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(tiny.codec.decode(x, (2, 4), chunk=1), to_uint8(want))


def test_denormalise_inverts_normalise(tiny):
    z = torch.randn(2, 32, 4, 8, generator=torch.Generator().manual_seed(2))
    back = tiny.codec.denormalise(tiny.codec.normalise(z), (2, 4))
    torch.testing.assert_close(back, z, atol=1e-5, rtol=0)


def test_buffers_stay_in_train_mode_though_the_module_would_change_them(tiny):
    """The trap that the codec avoids: vae.bn called in train mode overwrites its statistics."""
    bn = tiny.vae.bn
    before = bn.running_mean.clone(), bn.running_var.clone()
    tiny.vae.train()
    x = tiny.codec.encode(pixels(2, 3, 32, 32))
    tiny.codec.decode(x, (2, 2))
    assert torch.equal(bn.running_mean, before[0]) and torch.equal(bn.running_var, before[1])
    bn(torch.randn(2, 128, 2, 2))
    assert not torch.equal(bn.running_mean, before[0])


def test_statistics_are_held_in_fp32_when_the_vae_is_cast(tiny):
    mean = tiny.vae.bn.running_mean.clone()
    tiny.vae.bfloat16()
    assert torch.equal(tiny.codec.mean, mean)
    assert not torch.equal(LatentCodec(tiny.vae).mean, mean)  # too late by then


def test_a_cast_autoencoder_keeps_its_statistics(tiny):
    mean, variance = tiny.vae.bn.running_mean.clone(), tiny.vae.bn.running_var.clone()
    assert not torch.equal(mean.bfloat16().float(), mean)
    vae = cast(tiny.vae, torch.bfloat16)
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    assert torch.equal(vae.bn.running_mean, mean) and torch.equal(vae.bn.running_var, variance)
    codec = LatentCodec(vae)
    assert torch.equal(codec.mean, tiny.codec.mean) and torch.equal(codec.std, tiny.codec.std)
    images = pixels(1, 3, 32, 32)
    assert codec.encode(images).dtype == torch.float32
    assert codec.decode(codec.encode(images), (2, 2)).shape == images.shape


def test_the_decoder_has_gradients_and_the_encoder_none(tiny):
    x = torch.randn(1, 4, 128, requires_grad=True)
    tiny.codec.decode_float(x, (2, 2)).square().mean().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    assert not tiny.codec.encode(pixels(1, 3, 32, 32)).requires_grad


def test_target_ids_equal_the_pipelines():
    want = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 128, 3, 5))[0]
    assert torch.equal(grid_ids((3, 5)), want)


def test_reference_ids_equal_the_pipelines():
    latents = [torch.zeros(1, 128, 3, 5), torch.zeros(1, 128, 2, 2), torch.zeros(1, 128, 1, 4)]
    want = Flux2KleinPipeline._prepare_image_ids(latents)[0]
    got = reference_ids([(3, 5), (2, 2), (1, 4)])
    assert torch.equal(got, want) and got[0, 0] == 10 and got[-1, 0] == 30


def test_pixels_convert_as_the_image_processor_does():
    images = pixels(1, 3, 64, 64)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    want = Flux2ImageProcessor(vae_scale_factor=16).preprocess(picture, height=64, width=64)
    torch.testing.assert_close(to_float(images), want, atol=1e-6, rtol=0)
    assert torch.equal(to_uint8(to_float(images)), images)  # all 256 values survive
    x = torch.linspace(-1.2, 1.2, 3 * 64).reshape(1, 3, 8, 8)
    want_pil: Any = Flux2ImageProcessor(vae_scale_factor=16).postprocess(x, output_type="pil")
    assert np.array_equal(to_uint8(x)[0].permute(1, 2, 0).numpy(), np.asarray(want_pil[0]))


# ---------------------------------------------------------------- mixed sizes in a batch

# Targets and references of one sample each; the last has none.
LAYOUTS = [((2, 3), [(2, 2)]), ((3, 2), [(1, 2), (2, 3)]), ((4, 4), []), ((1, 2), [])]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(layout, d: int, seed: int, guidance: float | None = None, rows: int = 1):
    """x and its condition, of `rows` samples of one layout; texts of 5 tokens."""
    grid, references = layout
    m = sum(h * w for h, w in references)
    cond = Condition(
        text=draw(rows, 5, d, seed=seed),
        text_ids=text_ids(rows, 5),
        ids=grid_ids(grid).expand(rows, -1, -1),
        ref=draw(rows, m, 128, seed=seed + 50) if m else None,
        ref_ids=reference_ids(references).expand(rows, -1, -1) if m else None,
        guidance=None if guidance is None else torch.full((rows,), guidance),
    )
    return draw(rows, grid[0] * grid[1], 128, seed=seed + 100), cond


@torch.no_grad()
def stock_alone(stock, x, t, cond: Condition) -> torch.Tensor:
    """diffusers' own transformer on one sample, its own way: [text | target | references], cut."""
    tokens = [x] if cond.ref is None else [x, cond.ref]
    ids = [cond.ids[0]] if cond.ref_ids is None else [cond.ids[0], cond.ref_ids[0]]
    out = stock(
        hidden_states=torch.cat(tokens, 1), encoder_hidden_states=cond.text, timestep=t,
        img_ids=torch.cat(ids), txt_ids=cond.text_ids[0], guidance=cond.guidance,
        return_dict=False,
    )[0]  # fmt: skip
    return out[:, : x.shape[1]]


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True])
def test_mixed_sizes_and_references_in_a_batch_equal_single_samples_of_the_stock(tiny, guided):
    body: Any = tiny.transformer
    if guided:  # dev's kind
        torch.manual_seed(0)
        body = Flux2Transformer2DModel.from_config(body.config, guidance_embeds=True).eval()
    stock = Flux2Transformer2DModel.from_config(body.config).eval()
    stock.load_state_dict(body.state_dict())
    attention.install(body)
    scale = 4.0 if guided else None
    parts = [sample(k, tiny.text.dim, i, scale) for i, k in enumerate(LAYOUTS)]
    t = torch.tensor([0.1, 0.4, 0.7, 0.95])
    x, cond = join(parts)
    assert x.shape == (4, 16, 128) and cond.ref.shape == (4, 8, 128)
    assert cond.mask.shape == (4, 5 + 16 + 8)
    assert cond.mask.sum(1).tolist() == [5 + 6 + 4, 5 + 6 + 8, 5 + 16, 5 + 2]
    got = separate(VelocityRole(body, Switch(body), None, None)(x, t, cond), parts)
    for i, (one, its) in enumerate(parts):
        want = stock_alone(stock, one, t[i : i + 1], its)
        assert want.std() > 0.05 and got[i].shape == want.shape
        torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_join_keeps_masks_nulls_and_rows(tiny):
    """Parts of several rows, with text of which some is masked, and their unconditional branch."""
    from dataclasses import replace

    parts = []
    for i, layout in enumerate(LAYOUTS[:3]):
        x, cond = sample(layout, tiny.text.dim, i, rows=2)
        text = torch.arange(5)[None] < torch.tensor([[5 - i], [3]])
        mask = attention_mask(text, x.shape[1] + (0 if cond.ref is None else cond.ref.shape[1]))
        null = replace(cond, text=draw(2, 5, tiny.text.dim, seed=77), mask=mask)
        parts.append((x, replace(cond, mask=mask, null=null)))
    role = VelocityRole(tiny.transformer, Switch(tiny.transformer), None, None)
    x, cond = join(parts)
    t = torch.linspace(0.1, 0.9, 6)
    for whole, alone in ((cond, [c for _, c in parts]), (cond.null, [c.null for _, c in parts])):
        got = separate(role(x, t, whole), parts)
        for i, its in enumerate(alone):
            want = role(parts[i][0], t[2 * i : 2 * i + 2], its)
            torch.testing.assert_close(got[i], want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="for every part"):
        join([parts[0], (parts[1][0], replace(parts[1][1], null=None))])


def test_join_of_equal_layouts_is_a_plain_batch():
    parts = [sample(LAYOUTS[0], 8, seed) for seed in (0, 1)]
    x, cond = join(parts)
    want = cat_conditions([c for _, c in parts])
    assert torch.equal(x, torch.cat([p for p, _ in parts])) and cond.mask is None
    for name in ("text", "text_ids", "ids", "ref", "ref_ids"):
        assert torch.equal(getattr(cond, name), getattr(want, name))
