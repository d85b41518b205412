"""Packing, normalisation and positions against diffusers' own pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from flux2.latents import LatentCodec, grid_ids, reference_ids, to_float, to_uint8


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
