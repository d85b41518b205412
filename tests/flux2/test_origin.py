"""stage=export, from runs of a tiny model to the files that diffusers opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file

import run
from flux2.errors import InputError
from flux2.export import FORMATS, expected, export_run
from flux2.formats import read_lora
from flux2.lineage import result_role
from flux2.model import load_model
from flux2.roles import Roles
from flux2.types import RoleSpec

QUICK = ("launch.threads=1",)
TRAIN = (
    "stage=sft", "train.steps=2", "data.batch_size=2", "train.export=false",
    "optim.optimizer.lr=0.05", *QUICK,
)  # fmt: skip


def job(folder: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, f"run.dir={folder}"])
    if "evaluation" in cfg:
        cfg.evaluation = None
    return run.job(cfg)


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory) -> Path:
    """The tiny model as a folder."""
    torch.set_num_threads(1)
    model = load_model(tiny_config, torch.device("cpu"))
    roles = Roles({"model": RoleSpec()}, model, None, None)
    folder = tmp_path_factory.mktemp("base") / "folder"
    return export_run(model, roles, "model", folder, torch.float32)


@pytest.fixture(scope="module")
def lora_run(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    job(folder, *TRAIN, f"model.path={base}", "adapter=lora", "adapter.rank=3", "adapter.alpha=5")
    return folder


@pytest.fixture(scope="module")
def full_run(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "full"
    job(folder, *TRAIN, f"model.path={base}", "method.ema=0.5")
    return folder


def test_a_lora_run_in_every_format(lora_run, base, tiny_config, tmp_path, capsys):
    out = tmp_path / "out"
    summary = job(
        out, "stage=export", f"init_from={lora_run}", f"format=[{','.join(FORMATS)}]",
        "dtype=fp32", *QUICK,
    )  # fmt: skip
    printed = capsys.readouterr().out
    [parent] = json.loads((out / "manifest.json").read_text())["parents"]
    assert parent["id"] == json.loads((lora_run / "manifest.json").read_text())["id"]
    for name in FORMATS:
        manifest = json.loads((out / "export" / name / "manifest.json").read_text())
        assert manifest["parents"] == [parent] and manifest["stage"] == "sft"
        differences = summary["exports"][name]["differences"]
        assert manifest["differences"] == differences
        assert f"velocity {differences['velocity']:.1e}" in printed
    # All four are one model, and it is not the base.
    cfg = tiny_config.copy()
    cfg.architecture, cfg.path = None, str(out / "export" / "diffusers")
    merged = load_model(cfg, torch.device("cpu"))
    cfg.path = str(base)
    plain = load_model(cfg, torch.device("cpu"))
    want, before = (expected(m, m.transformer, None) for m in (merged, plain))
    assert (want - before).norm() > 3e-3 * before.norm()
    lora = read_lora(load_file(out / "export" / "lora-original" / "nano-lora.safetensors"), {})
    weights = plain.transformer.state_dict()
    for path in lora.pairs:
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + lora.delta(path)
    plain.transformer.load_state_dict(weights)
    got = expected(plain, plain.transformer, None)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (out / "export" / "single" / "nano.safetensors").is_file()


def test_unmerged_is_the_base(lora_run, base, tmp_path):
    job(
        tmp_path / "out", "stage=export", f"init_from={lora_run}", "merge=false", "dtype=fp32",
        "format=[diffusers,lora-diffusers]", *QUICK,
    )  # fmt: skip
    name = "diffusion_pytorch_model.safetensors"
    got = load_file(tmp_path / "out/export/diffusers/transformer" / name)
    want = load_file(base / "transformer" / name)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_full_run_and_its_average(full_run, base, tmp_path):
    found = {}
    for role in ("null", "ema"):
        out = tmp_path / role
        job(out, "stage=export", f"init_from={full_run}", f"role={role}", "format=single",
            "dtype=fp32", *QUICK)  # fmt: skip
        found[role] = load_file(out / "export/single/nano.safetensors")["img_in.weight"]
    name = "x_embedder.weight"
    start = load_file(base / "transformer/diffusion_pytorch_model.safetensors")[name]
    assert 0 < (found["ema"] - start).norm() < (found["null"] - start).norm()


def test_a_model_as_it_is(base, tmp_path):
    summary = job(
        tmp_path / "out", "stage=export", "model=nano", f"model.path={base}", "format=single",
        *QUICK,
    )  # fmt: skip
    assert summary["exports"]["single"]["differences"]["weights"] == 0
    config = json.loads((tmp_path / "out/export/single/transformer/config.json").read_text())
    assert config["num_layers"] == 1 and "_name_or_path" not in config


def test_distilling_guidance_gives_a_distilled_folder(base, tmp_path):
    """The whole way: a student is trained, exported, and refused in a base's place."""
    run_dir = tmp_path / "student"
    job(run_dir, "stage=guidance", *TRAIN[1:], f"model.path={base}")
    assert result_role(json.loads((run_dir / "manifest.json").read_text())) == "distilled"
    job(tmp_path / "out", "stage=export", f"init_from={run_dir}", *QUICK)
    folder = tmp_path / "out/export/diffusers"
    assert json.loads((folder / "model_index.json").read_text())["is_distilled"] is True
    assert json.loads((folder / "manifest.json").read_text())["model_role"] == "distilled"
    with pytest.raises(InputError, match=r"distilled, but model\.role is base"):
        job(tmp_path / "no", "stage=sample", f"model.path={folder}", *QUICK)
    job(tmp_path / "yes", "stage=sample", f"model.path={folder}", "model.role=distilled",
        "sampler.steps=1", "sampler.guidance=1", "count=1", "prompts=['a sign']",
        *QUICK)  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model=nano",), "brings its own model"),
        (("format=gguf",), "choose from diffusers"),
        (("format=[single,single]",), "at most once"),
        (("format=[]",), "at most once"),
        (("dtype=fp8",), "choose from fp32"),
        (("merge=false",), "add lora-diffusers"),
        (("role=teacher",), "has policy|has model"),
        (("schedule={_target_: flux2.schedule.Grid, sigmas: [1, 0]}",), "cannot hold"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_wrong_input_is_refused_before_weights(lora_run, tmp_path, monkeypatch, overrides, says):
    monkeypatch.setattr("flux2.origin.load_initial", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=says):
        job(tmp_path / "out", "stage=export", f"init_from={lora_run}", *overrides)


def test_formats_that_a_run_cannot_have_are_refused(full_run, tmp_path, monkeypatch):
    monkeypatch.setattr("flux2.origin.load_initial", lambda *_: pytest.fail("weights were read"))
    for name in ("lora-diffusers", "lora-original"):
        with pytest.raises(InputError, match="no adapter was trained"):
            job(tmp_path / name, "stage=export", f"init_from={full_run}", f"format=[{name}]")
    with pytest.raises(InputError, match="nothing to export"):
        job(tmp_path / "nothing", "stage=export")


def test_a_checkpoint_that_does_not_fit_is_refused(lora_run, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(lora_run, changed)
    cfg = OmegaConf.load(changed / "config.yaml")
    cfg.adapter.rank = 2
    OmegaConf.save(cfg, changed / "config.yaml")
    with pytest.raises(InputError, match="do not fit"):
        job(tmp_path / "out", "stage=export", f"init_from={changed}", *QUICK)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("adapter", [(), ("adapter=lora",)], ids=["full", "lora"])
def test_a_sharded_run_exports_the_same_bytes(base, tmp_path, adapter):
    """One step on one process; two ranks of ZeRO-3 take up its checkpoint, and export."""
    one, two = tmp_path / "one", tmp_path / "two"
    common = (
        "stage=sft", f"model.path={base}", *adapter, "train.steps=1", "seed=3",
        "data.batch_size=2", "optim.optimizer.lr=0.05", "train.export_dtype=fp32",
        "evaluation.prompts=1", "evaluation.shown=1", "~evaluation.metrics.ocr",
        "~evaluation.metrics.tesseract", "evaluation.headline=[place]", *QUICK,
    )  # fmt: skip

    def launch(folder: Path, *more: str) -> None:
        command = [sys.executable, "run.py", *common, f"run.dir={folder}", *more]
        done = subprocess.run(
            command, cwd=run.CONF.parent, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    launch(one)
    shutil.copytree(one, two)
    shutil.rmtree(two / "export")
    launch(two, "resume=auto", "engine=zero3", "engine.precision=fp32", "engine.device=cpu",
           "launch.processes=2")  # fmt: skip
    name = "export/transformer/diffusion_pytorch_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    start = (base / "transformer/diffusion_pytorch_model.safetensors").read_bytes()
    assert (one / name).read_bytes() != start
