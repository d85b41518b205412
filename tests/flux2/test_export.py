"""What we write, diffusers opens, and gives the same images; what differs is not written."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from einops import rearrange
from PIL import Image

from flux2 import folders, verify
from flux2.adapters import LoRA, Switch
from flux2.data.loader import Collator
from flux2.data.record import Record
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.export import (
    FORMATS,
    Target,
    check_target,
    expected,
    export_autoencoder,
    export_run,
    export_weights,
    measure_statistics,
    tensors_of,
)
from flux2.folders import replacing
from flux2.formats import Part
from flux2.generate import Sampler
from flux2.latents import LatentCodec
from flux2.lineage import schedule_hash
from flux2.model import check_model, load_model
from flux2.rng import Rng
from flux2.roles import Roles, VelocityRole
from flux2.schedule import EmpiricalShift, Grid, Linear, StaticShift
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
    return export_run(tiny, roles, "model", folder / "export", dtype)


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
    for name, velocity in (("policy", want), ("reference", base)):
        folder = export_run(tiny, roles, name, tmp_path / name, torch.float32)
        moved = open_pipeline(folder).transformer
        with torch.no_grad():
            got = moved(
                hidden_states=x, encoder_hidden_states=batch.cond.text, timestep=t,
                img_ids=batch.cond.ids, txt_ids=batch.cond.text_ids, return_dict=False,
            )[0]  # fmt: skip
        torch.testing.assert_close(got, velocity, atol=1e-5, rtol=1e-4)
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

    x = LatentCodec(AutoencoderKLFlux2.from_pretrained(folder / "vae")).encode(images)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(128), atol=1e-3, rtol=0)


def test_a_failed_export_leaves_the_old_one(tmp_path):
    folder = tmp_path / "export"
    with replacing(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(OSError), replacing(folder) as temporary:
        (temporary / "a").write_text("new")
        raise OSError("disk full")
    assert (folder / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


# ---------------------------------------------------------------- every format


def adapted(model, rank: int = 3, alpha: float = 5.0):
    """The model with a LoRA that is not zero: (weights, adapter)."""
    specs = {"policy": RoleSpec(trainable=True), "reference": RoleSpec()}
    roles = Roles(specs, model, LoRA(rank, alpha), None)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in roles.parameters("policy").values():
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return tensors_of(model.transformer, "policy")


def want_of(model, adapter: str | None = "policy") -> torch.Tensor:
    return expected(model, model.transformer, adapter)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name != "manifest.json"  # it has an id and a time of its own
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_trained_role(tiny, tmp_path, name, dtype):
    weights, adapter = adapted(tiny)
    parent = {"path": "here", "id": "abc", "hash": "x"}
    target = Target(name, dtype, source={"stage": "sft", "trained": ["policy"]}, parent=parent)
    report = export_weights(tiny, weights, adapter, tmp_path / "x", target, want_of(tiny))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert 0 < report.differences["velocity"] < limit
    assert (want_of(tiny) - want_of(tiny, None)).norm() > 0.1 * want_of(tiny).norm()
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["parents"] == [parent] and manifest["stage"] == "sft" and manifest["versions"]
    assert (manifest["format"], manifest["model_role"]) == (name, "base")
    assert manifest["dtype"] == str(dtype).removeprefix("torch.")
    assert manifest["schedule_hash"] == schedule_hash(EmpiricalShift())
    assert manifest["adapter"] == ("apart" if name.startswith("lora") else "merged")
    assert manifest["differences"] == dict(report.differences)
    found = hashes(tmp_path / "x")
    assert manifest["files"] and all(found[k] == v for k, v in manifest["files"].items())
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_and_a_lora_together_are_the_trained_role(tiny, tmp_path):
    """merge=false: opened by diffusers alone, the two files a user has."""
    weights, adapter = adapted(tiny)
    base, lora = tmp_path / "base", tmp_path / "lora"
    whole = Target("diffusers", torch.float32, merge=False)
    export_weights(tiny, weights, adapter, base, whole, want_of(tiny, None))
    export_weights(
        tiny, weights, adapter, lora, Target("lora-original", torch.float32), want_of(tiny)
    )
    pipeline = open_pipeline(base)
    before = verify.bare(pipeline.transformer)(*verify.probe(tiny))
    torch.testing.assert_close(before, want_of(tiny, None), atol=1e-4, rtol=1e-4)
    pipeline.load_lora_weights(lora, weight_name="tiny-lora.safetensors")
    got = verify.bare(pipeline.transformer)(*verify.probe(tiny))
    torch.testing.assert_close(got, want_of(tiny), atol=1e-4, rtol=1e-4)
    assert json.loads((base / "manifest.json").read_text())["adapter"] == "apart"


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_tensors_give_the_same_bytes(tiny, tmp_path, name):
    """Also in another order, as another number of ranks would gather them."""
    weights, adapter = adapted(tiny)
    target = Target(name, torch.bfloat16)
    want = want_of(tiny)
    export_weights(tiny, weights, adapter, tmp_path / "a", target, want)
    shuffled = {k: weights[k].clone() for k in sorted(weights, reverse=True)}
    other = type(adapter)(dict(reversed(adapter.pairs.items())), adapter.scale)
    export_weights(tiny, shuffled, other, tmp_path / "b", target, want)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_large_files_are_split(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("flux2.folders.MAX_SHARD", "300KB")
    weights, _ = tensors_of(tiny.transformer, None)
    target = Target("diffusers", torch.float32)
    report = export_weights(tiny, weights, None, tmp_path / "x", target, want_of(tiny, None))
    assert len(list((tmp_path / "x" / "transformer").glob("*.safetensors"))) > 2
    assert report.differences["weights"] == 0


def test_large_models_are_opened_in_their_own_dtype(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "SMALL", 0)
    monkeypatch.setattr(verify, "ENCODER_LIMIT", 0)  # and without their text encoder
    weights, adapter = adapted(tiny)
    for name in FORMATS:
        target = Target(name, torch.bfloat16)
        report = export_weights(tiny, weights, adapter, tmp_path / name, target, want_of(tiny))
        assert 1e-4 < report.differences["velocity"] < 5e-2


# ---------------------------------------------------------------- what is not written


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_that_differs_is_an_error_and_leaves_nothing(tiny, tmp_path, name):
    weights, adapter = adapted(tiny)
    wrong = want_of(tiny, None)  # the role was another one
    with pytest.raises(RuntimeError, match=r"not what was trained.*velocity"):
        export_weights(
            tiny, weights, adapter, tmp_path / "x", Target(name, torch.bfloat16), wrong
        )
    assert list(tmp_path.iterdir()) == []


def test_each_comparison_notices_its_own_fault(tiny, tmp_path, monkeypatch):
    weights, _ = tensors_of(tiny.transformer, None)
    want = want_of(tiny, None)

    def failed(**changes: torch.Tensor) -> set[str]:
        """Names of the differences that are too large."""
        target = Target("diffusers", torch.float32)
        with pytest.raises(RuntimeError, match="off by") as error:
            export_weights(tiny, {**weights, **changes}, None, tmp_path / "x", target, want)
        found = re.findall(r"(\w+) (\S+) \(allowed (\S+)\)", str(error.value))
        assert {name for name, *_ in found} == {"weights", "velocity", "sigmas", "image"}
        return {name for name, off, limit in found if float(off) > float(limit)}

    name = "norm_out.linear.weight"
    assert failed(**{name: weights[name].flip(0)}) == {"velocity"}
    with monkeypatch.context() as patch:
        shift = {"use_dynamic_shifting": False, "shift": 3.0}
        patch.setattr("flux2.folders.scheduler_config", lambda *_: shift)
        assert "sigmas" in failed()
    with monkeypatch.context() as patch:  # an autoencoder that is not the run's
        stale = copy.deepcopy(tiny.vae)
        stale.bn.running_mean += 1
        patch.setattr(verify, "LatentCodec", lambda vae: LatentCodec(stale))
        assert failed() == {"image"}
    with monkeypatch.context() as patch:  # a file that is not what was meant
        write = folders.write

        def noisy(path, parts, metadata):
            if "transformer" in str(path):
                parts = {k: Part(p.shape, p.dtype, lambda p=p: p.make() * 1.001)
                         for k, p in parts.items()}  # fmt: skip
            return write(path, parts, metadata)

        patch.setattr(folders, "write", noisy)
        assert "weights" in failed()


def test_a_role_that_moved_on_is_not_exported(tiny, tmp_path, monkeypatch):
    """Through the training stages' function, over an older export, which stays."""
    folder = export(tiny, tmp_path)
    before = hashes(folder)
    monkeypatch.setattr("flux2.export.expected", lambda *a: 2 * expected(*a))
    with pytest.raises(RuntimeError, match="velocity"):
        export(tiny, tmp_path)
    assert hashes(folder) == before and [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("target", "layers", "says"),
    [
        (Target("gguf", torch.float32), None, "choose from diffusers, single"),
        (Target("lora-diffusers", torch.float32), None, "no adapter was trained"),
        (Target("lora-original", torch.float32), None, "no adapter was trained"),
        (Target("single", torch.float32, merge=False), None, "merge=false"),
        (Target("lora-original", torch.float32), ["norm_out.linear"], "lora-diffusers"),
    ],
)
def test_what_cannot_be_written_is_refused(target, layers, says):
    with pytest.raises(InputError, match=says):
        check_target(target, layers)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("schedule", [EmpiricalShift(), StaticShift(5.0), Linear()])
def test_the_scheduler_gives_our_grid(tiny, tmp_path, schedule):
    roles = Roles({"model": RoleSpec()}, tiny, None, None)
    folder = export_run(
        tiny, roles, "model", tmp_path / "x", torch.float32, schedule=schedule
    )
    pipeline = open_pipeline(folder)
    seen = []
    pipeline(
        prompt="a sign", height=64, width=64, num_inference_steps=5, guidance_scale=1.0,
        max_sequence_length=tiny.text.max_length, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kw: seen.append(float(t) / 1000) or kw,
    )  # fmt: skip
    assert seen == pytest.approx(schedule(5, 16).sigmas[:-1], abs=1e-6)


def test_other_schedules_are_refused():
    def fixed(steps: int, tokens: int) -> Grid:
        return Grid((1.0, 0.5, 0.0))

    with pytest.raises(InputError, match="cannot hold"):
        check_target(Target("diffusers", torch.float32, schedule=fixed), None)
    check_target(Target("single", torch.float32, schedule=fixed), None)  # says nothing of it


# ---------------------------------------------------------------- roles, sources


@pytest.mark.parametrize("role", ["base", "distilled"])
def test_a_model_is_refused_in_the_others_place(tiny, tiny_config, tmp_path, role):
    roles = Roles({"model": RoleSpec()}, tiny, None, None)
    folder = export_run(tiny, roles, "model", tmp_path / role, torch.float32, role=role)
    assert open_pipeline(folder).config.is_distilled is (role == "distilled")
    cfg = tiny_config.copy()
    cfg.path, cfg.architecture, cfg.role = str(folder), None, role
    check_model(cfg)
    cfg.role = {"base": "distilled", "distilled": "base"}[role]
    with pytest.raises(InputError, match=f"distilled, but model.role is {cfg.role}"):
        check_model(cfg)


def test_the_text_encoder_of_a_folder_is_copied(tiny, tiny_config, tmp_path):
    """Whatever is in memory, which may be cut after the last layer that is used."""
    first = export(tiny, tmp_path)
    cfg = tiny_config.copy()
    cfg.path, cfg.architecture = str(first), None
    model = load_model(cfg, torch.device("cpu"))
    (first / "text_encoder" / "note.txt").write_text("of the source alone")
    roles = Roles({"model": RoleSpec()}, model, None, None)
    second = export_run(model, roles, "model", tmp_path / "second", torch.float32)
    for part in ("text_encoder", "tokenizer", "transformer", "vae", "scheduler"):
        assert hashes(first / part) == hashes(second / part)
    assert (first / "model_index.json").read_text() == (second / "model_index.json").read_text()
    base = json.loads((second / "manifest.json").read_text())["base"]
    assert base == {"source": str(first), "hash": model.info.hash} and base["hash"]


def test_a_student_that_is_noised_anew_exports_its_sampler(tiny, tmp_path: Path):
    """The scheduler's configuration says so, and the opened pipeline gives our images."""
    weights, _ = tensors_of(tiny.transformer, None)
    want = expected(tiny, tiny.transformer, None)
    target = Target("diffusers", torch.float32, renoise=True)
    report = export_weights(tiny, weights, None, tmp_path / "export", target, want)
    assert report.differences["image"] < 1e-3
    config = json.loads((tmp_path / "export/scheduler/scheduler_config.json").read_text())
    assert config["stochastic_sampling"] is True
