"""What we write, diffusers opens, and gives the same images."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import Flux2KleinPipeline
from einops import rearrange
from PIL import Image

from flux2.adapters import LoRA, Switch
from flux2.data.loader import Collator
from flux2.data.record import Record
from flux2.data.signs import SignWorld
from flux2.export import _replacing, export_autoencoder, export_pipeline, measure_statistics
from flux2.generate import Sampler
from flux2.model import load_model
from flux2.rng import Rng
from flux2.roles import Roles, VelocityRole
from flux2.types import RoleSpec

STEPS, GUIDANCE = 3, 2.5


def open_pipeline(folder) -> Flux2KleinPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(tiny, folder, dtype=torch.float32):
    roles = Roles({"model": RoleSpec()}, tiny, None, None)
    return export_pipeline(tiny, roles, "model", folder / "export", dtype)


def images_of(tiny, pipeline, records, guidance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, the pipeline's), b 3 h w in [−1, 1], from the same noise."""
    batch = Collator(tiny, latents=False, unconditional=True)(records, torch.arange(len(records)))
    sampler = Sampler(steps=STEPS, guidance=guidance)
    role = VelocityRole(tiny.transformer, Switch(tiny.transformer), None, None)
    latents = sampler(role, batch, seed=5)
    ours = tiny.codec.decode_float(latents, batch.grid).detach()
    noise = Rng(5, 0)("sample", batch.ids, batch.shape)
    noise = rearrange(noise, "b (h w) c -> b c h w", h=batch.grid[0])
    out = []
    for record, start in zip(records, noise, strict=True):
        result = pipeline(
            image=[Image.fromarray(r) for r in record.references] or None,
            prompt=record.prompt,
            height=record.target.shape[0],
            width=record.target.shape[1],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=start[None],
            max_sequence_length=tiny.text.max_length,
            output_type="pt",
        ).images
        out.append(result * 2 - 1)
    return ours, torch.cat(out)


@pytest.mark.parametrize(
    ("task", "guidance"),
    [("t2i", 1.0), ("t2i", GUIDANCE), ("recolour", 1.0), ("compose", GUIDANCE)],
)
def test_whole_images_equal_the_pipelines(tiny, tmp_path, task, guidance):
    pipeline = open_pipeline(export(tiny, tmp_path))
    world = SignWorld("train", length=10, tasks={task: 1.0})
    ours, theirs = images_of(tiny, pipeline, [world[0], world[1]], guidance)
    assert theirs.std() > 0.05 and (theirs[0] - theirs[1]).abs().max() > 0.05
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, atol=1e-4, rtol=0)


def test_oblong_images_equal_the_pipelines(tiny, tmp_path):
    """Height and width must not be mistaken for each other, of the target or of a reference."""
    pipeline = open_pipeline(export(tiny, tmp_path))
    sign = SignWorld("train", length=1)[0].target
    target, reference = sign[:32, :], sign[:, :48].copy()
    reference = Image.fromarray(reference).resize((80, 64))  # diffusers wants sides of 64 or more
    import numpy as np

    record = Record(0, "make the word red", target, (np.asarray(reference).copy(),))
    ours, theirs = images_of(tiny, pipeline, [record], GUIDANCE)
    assert theirs.shape[-2:] == (32, 64)
    torch.testing.assert_close(ours.clamp(-1, 1), theirs, atol=1e-4, rtol=0)


def test_a_lora_policy_is_merged(tiny, tmp_path):
    specs = {"policy": RoleSpec(trainable=True), "reference": RoleSpec()}
    roles = Roles(specs, tiny, LoRA(4), None)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in roles.parameters("policy").values():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    world = SignWorld("train", length=1)
    batch = Collator(tiny, latents=False)([world[0]], torch.arange(1))
    x, t = torch.randn(1, 16, 128, generator=g), torch.tensor([0.7])
    assert batch.cond is not None
    with torch.no_grad():
        want, base = (roles[n](x, t, batch.cond) for n in ("policy", "reference"))
    for name, expected in (("policy", want), ("reference", base)):
        folder = export_pipeline(tiny, roles, name, tmp_path / name, torch.float32)
        moved = open_pipeline(folder).transformer
        with torch.no_grad():
            got = moved(
                hidden_states=x, encoder_hidden_states=batch.cond.text, timestep=t,
                img_ids=batch.cond.ids, txt_ids=batch.cond.text_ids, return_dict=False,
            )[0]  # fmt: skip
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (want - base).abs().max() > 1e-2
    # Exporting changes nothing of the run.
    with torch.no_grad():
        assert torch.equal(roles["policy"](x, t, batch.cond), want)


def test_a_bf16_export_keeps_latent_statistics_exact(tiny, tmp_path):
    before = tiny.vae.bn.running_var.clone()
    folder = export(tiny, tmp_path, torch.bfloat16)
    from diffusers import AutoencoderKLFlux2
    from safetensors.torch import load_file

    vae = AutoencoderKLFlux2.from_pretrained(folder / "vae")
    assert torch.equal(vae.bn.running_var.float(), before)
    assert torch.equal(vae.bn.running_mean.float(), tiny.vae.bn.running_mean)
    (file,) = (folder / "transformer").glob("*.safetensors")
    assert {w.dtype for w in load_file(file).values()} == {torch.bfloat16}
    assert next(tiny.transformer.parameters()).dtype == torch.float32  # the run's own is untouched


def test_the_export_loads_as_a_model(tiny, tiny_config, tmp_path):
    folder = export(tiny, tmp_path)
    cfg = tiny_config.copy()
    cfg.path, cfg.architecture = str(folder), None
    back = load_model(cfg, torch.device("cpu"))
    for part in ("transformer", "vae"):
        want = getattr(tiny, part).state_dict()
        got = getattr(back, part).state_dict()
        assert want.keys() == got.keys() and all(torch.equal(got[k], want[k]) for k in want)
    torch.testing.assert_close(back.text(["a sign"]), tiny.text(["a sign"]), atol=1e-6, rtol=0)
    assert back.info.hash and back.info.source == str(folder)
    assert json.loads((folder / "model_index.json").read_text())["is_distilled"] is False


def test_statistics_are_those_of_all_latents(tiny):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=g).to(torch.uint8)
    with torch.no_grad():
        z = tiny.vae.encode(images.float() / 127.5 - 1).latent_dist.mode()
    tokens = rearrange(z, "b c (h p) (w q) -> (b h w) (c p q)", p=2, q=2)
    measure_statistics(tiny.vae, images.split([4, 2]))
    torch.testing.assert_close(tiny.vae.bn.running_mean, tokens.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tiny.vae.bn.running_var, tokens.var(0), atol=1e-5, rtol=1e-3)


def test_an_autoencoder_export_normalises_its_latents(tiny, tmp_path):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=g).to(torch.uint8)
    folder = export_autoencoder(tiny, [images], tmp_path / "export")
    from diffusers import AutoencoderKLFlux2

    from flux2.latents import LatentCodec

    x = LatentCodec(AutoencoderKLFlux2.from_pretrained(folder / "vae")).encode(images)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(128), atol=1e-3, rtol=0)


def test_a_failed_export_leaves_the_old_one(tmp_path):
    folder = tmp_path / "export"
    with _replacing(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(OSError), _replacing(folder) as temporary:
        (temporary / "a").write_text("new")
        raise OSError("disk full")
    assert (folder / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
