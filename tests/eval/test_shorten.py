"""stage=size on a tiny model: measured once, trained, exported, and taken up by other stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file

import eval.shorten
import run
from flux2 import depth
from flux2.checkpoint import latest_checkpoint, load_checkpoint
from flux2.errors import InputError
from flux2.export import export_run
from flux2.footprint import Footprint
from flux2.model import initial_depth, load_initial, load_model
from flux2.roles import Roles
from flux2.runs import Run
from flux2.types import RoleSpec

CPU = torch.device("cpu")
SMALL = ("data.batch_size=2", "optim=adamw", "optim.optimizer.lr=0.01", "evaluation=none",
         "train.save_every=1")  # fmt: skip
SIZE = ("stage=size", *SMALL, "sampler.steps=2", "importance.samples=2", "importance.times=1")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def configured(folder: Path, *overrides: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        return compose("config", [*overrides, f"run.dir={folder}", "launch.threads=1"])


def job(folder: Path, *overrides: str) -> dict[str, Any]:
    return run.job(configured(folder, *overrides))


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    shape = {"num_layers": 2, "num_single_layers": 3}
    model = load_model(OmegaConf.merge(tiny_config, {"architecture": {"transformer": shape}}), CPU)
    roles = Roles({"model": RoleSpec()}, model, None, None)
    return export_run(model, roles, "model", tmp_path_factory.mktemp("b") / "base", torch.float32)


@pytest.fixture(scope="module")
def sized(base, tmp_path_factory) -> Path:
    """A run of two steps, one double-stream and two single-stream blocks kept of 2 + 3."""
    folder = tmp_path_factory.mktemp("sized") / "run"
    job(folder, *SIZE, f"model.path={base}", "train.steps=2", "train.export_dtype=fp32")
    return folder


def state_of(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """What init_from=folder loads."""
    cfg = configured(folder / "unused", "stage=eval", *overrides, f"init_from={folder}")
    model = load_initial(cfg, CPU)
    assert model.info.parameters == sum(p.numel() for p in model.transformer.parameters())
    assert depth.depth_of(model.transformer) == initial_depth(cfg)
    return model.transformer.state_dict()


def rows(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_the_run_says_what_it_kept_and_exports_it(base, sized):
    found = json.loads((sized / "importance" / "importance.json").read_text())
    kept = found["blocks"]
    assert [len(kind) for kind in kept] == [1, 2] and found["depth"] == [2, 3]
    assert found["by"] == "greedy" and len(found["rows"]) == 5
    assert [r["number"] for r in found["rows"] if r["kind"] == "single" and not r["removed"]] == (
        kept[1]
    )
    manifest = json.loads((sized / "manifest.json").read_text())
    assert manifest["blocks"] == kept and manifest["result_role"] == "base"
    summary = json.loads((sized / "summary.json").read_text())
    whole, mine = load_file(base / WEIGHTS), load_file(sized / "export" / WEIGHTS)
    assert summary["parameters"] == {
        "parent": sum(v.numel() for v in whole.values()),
        "student": sum(v.numel() for v in mine.values()),
    }
    assert summary["seconds"]["samples"] == 2 and summary["seconds"]["student"] > 0
    text = (sized / "importance" / "table.txt").read_text()
    assert "double 1" in text and "a forward of 2" in text
    assert (sized / "samples" / "importance.png").stat().st_size > 1000
    config = json.loads((sized / "export" / "transformer" / "config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == (1, 2)
    # Near the kept block's weights, and not at them: two steps have been made.
    key = f"single_transformer_blocks.{kept[1][1]}.attn.to_out.weight"
    moved = mine["single_transformer_blocks.1.attn.to_out.weight"] - whole[key]
    assert 1e-4 < float(moved.abs().max()) < 0.05
    assert rows(sized)[0]["output"] > 0 and rows(sized)[0]["features"] > 0


def test_a_resumed_run_does_not_measure_again_and_ends_as_one_that_was_not(
    base, sized, tmp_path, monkeypatch
):
    half = tmp_path / "half"
    common = (*SIZE, f"model.path={base}", "train.export_dtype=fp32")
    job(half, *common, "train.steps=1")

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(eval.shorten.Importance, "measure", never)
    monkeypatch.setattr(eval.shorten, "_seconds", never)
    # Composed anew, so that the choice can come from the run's directory alone.
    job(half, *common, "train.steps=2", "resume=auto")
    assert rows(half) == rows(sized)
    ours, theirs = (load_checkpoint(latest_checkpoint(f / "checkpoints")) for f in (half, sized))
    assert set(ours.tensors) == set(theirs.tensors)
    assert all(torch.equal(ours.tensors[k], theirs.tensors[k]) for k in theirs.tensors)
    # Finished, it is not done again at all; asked for otherwise, it is refused.
    monkeypatch.setattr(eval.shorten, "asked", never)
    job(half, *common, "train.steps=2", "resume=auto")
    monkeypatch.undo()
    with pytest.raises(InputError, match="another keep"):
        job(half, *common, "train.steps=3", "keep=0.4", "resume=auto")


def trained_of(folder: Path) -> dict[str, torch.Tensor]:
    """The student in the newest checkpoint."""
    found = load_checkpoint(latest_checkpoint(folder / "checkpoints")).tensors
    return {k.removeprefix("student/"): v for k, v in found.items() if k.startswith("student/")}


def test_init_from_reads_it_from_the_run_and_from_its_export(base, sized):
    path, student = f"model.path={base}", trained_of(sized)
    exported = load_file(sized / "export" / WEIGHTS)
    for found in (state_of(sized, path), state_of(sized / "export", path), exported):
        assert found.keys() == student.keys()
        assert all(torch.equal(found[k], student[k]) for k in student)


@pytest.mark.slow
def test_the_result_is_what_other_stages_start_from(base, sized, tmp_path):
    """Sampling, sft of all weights and of LoRA, merge, export."""
    path, student = f"model.path={base}", trained_of(sized)
    out = job(tmp_path / "sample", "stage=sample", path, f"init_from={sized}", "count=1",
              "sampler.steps=1", "prompts=[a]")  # fmt: skip
    assert out["images"] == 1
    sft = ("stage=sft", *SMALL, "heldout=none", path, f"init_from={sized}", "train.steps=1")
    job(tmp_path / "full", *sft, "train.export_dtype=fp32")
    job(tmp_path / "lora", *sft, "adapter=lora", "adapter.rank=2", "train.export=false")
    full, lora = (state_of(tmp_path / n, path) for n in ("full", "lora"))
    assert full.keys() == lora.keys() == student.keys() and not torch.equal(
        full["proj_out.weight"], student["proj_out.weight"]
    )
    assert torch.equal(load_file(tmp_path / "full" / "export" / WEIGHTS)["proj_out.weight"],
                       full["proj_out.weight"])  # fmt: skip
    job(tmp_path / "merged", "stage=merge", path, "dtype=fp32", "weights=[0.5,0.5]",
        f"runs=[{tmp_path / 'full'},{sized}]")  # fmt: skip
    merged = load_file(tmp_path / "merged" / "export" / "diffusers" / WEIGHTS)
    key = "proj_out.weight"
    torch.testing.assert_close(merged[key], (full[key] + student[key]) / 2)
    job(tmp_path / "single", "stage=export", f"init_from={sized}", "format=[diffusers]",
        "dtype=fp32")  # fmt: skip
    again = load_file(tmp_path / "single" / "export" / "diffusers" / WEIGHTS)
    assert all(torch.equal(again[k], student[k]) for k in student)


@pytest.mark.slow
def test_a_small_one_is_made_smaller_and_planned_as_what_it_is(base, sized, tmp_path):
    common = (*SIZE, f"model.path={base}", f"init_from={sized}")
    with pytest.raises(InputError, match="2 double blocks of 1"):
        job(tmp_path / "no", *common, "keep={double: 2, single: 1}")
    folder = tmp_path / "smaller"
    job(folder, *common, "keep={double: 1, single: 1}", "train.steps=1", "train.export=false")
    state = state_of(folder, f"model.path={base}")
    assert depth.depth_in(state) == (1, 1)
    cfg = configured(tmp_path, *common, "keep={double: 1, single: 1}")
    found = Footprint(cfg, cuda=False, size=(64, 64, 0))
    assert found.trainable == sum(v.numel() for v in state.values())
    assert depth.depth_of(found.parts["transformer"]) == (1, 2)


@pytest.mark.slow
def test_blocks_that_are_given_are_not_measured(base, tmp_path, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(eval.shorten.Importance, "measure", never)
    folder = tmp_path / "given"
    out = job(folder, *SIZE, f"model.path={base}", "method.blocks=[[1],[0,2]]", "train.steps=1",
              "train.export=false")  # fmt: skip
    assert out["blocks"] == [[1], [0, 2]]
    found = json.loads((folder / "importance" / "importance.json").read_text())
    assert found["by"] == "given" and found["rows"] == []
    assert Run(folder).manifest["blocks"] == [[1], [0, 2]]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("adapter=lora",), "leave out adapter="),
        (("keep=1.0",), "keeps all"),
        (("keep=0",), "share above 0"),
        (("keep={double: 1, single: 9}",), "9 single blocks of 3"),
        (("method.blocks=[[0,1],[0,1,2]]",), "keeps all"),
        (("method.blocks=[[],[0]]",), "no double"),
        (("method.blocks=[[0],[3]]",), "single block 3"),
        (("method.match=first",), "method.match"),
        (("importance.by=size",), "importance.by"),
        (("importance.samples=65",), "its data have 64"),
        (("train.steps=0",), "train.steps"),
        (("model.path=/nowhere",), "/nowhere"),
        (("init_from=/nowhere",), "/nowhere"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_wrong_input_is_refused_before_a_weight_is_read(base, wrong, says, tmp_path, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("flux2.model.load_initial", never)
    monkeypatch.setattr("flux2.train.load_initial", never)
    with pytest.raises(InputError, match=says) as refused:
        job(tmp_path / "run", *SIZE, f"model.path={base}", *wrong)
    assert "\n" not in str(refused.value)


def test_the_command_says_it_in_one_line(base, tmp_path, monkeypatch, capfd):
    arguments = ["run.py", *SIZE, f"model.path={base}", "adapter=lora", f"run.dir={tmp_path / 'r'}"]
    monkeypatch.setattr("sys.argv", arguments)
    assert run.main() == 2
    err = capfd.readouterr().err
    assert err.startswith("error: stage=size trains all weights") and len(err.splitlines()) == 1
