"""stage=merge, from two runs of a tiny model to one that is opened, evaluated and merged again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from safetensors import safe_open
from safetensors.torch import load_file

import run
from eval.evaluation import Evaluation, find
from eval.merge import Plan, _check_choice
from eval.records import Fingerprint, Results, Score
from flux2.errors import InputError
from flux2.export import export_run
from flux2.formats import read_lora
from flux2.lineage import ancestry
from flux2.merge import parents_of
from flux2.model import load_initial, load_model
from flux2.roles import Roles
from flux2.types import RoleSpec

CPU = torch.device("cpu")
TRAIN = ("stage=sft", "train.steps=2", "train.export=false", "data.batch_size=2",
         "optim.optimizer.lr=0.05", "evaluation=none")  # fmt: skip
LORA = ("adapter=lora", "adapter.targets=[to_q,linear_in]")


def configured(folder: Path, *overrides: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        return compose("config", [*overrides, f"run.dir={folder}", "launch.threads=1"])


def job(folder: Path, *overrides: str) -> dict[str, Any]:
    return run.job(configured(folder, *overrides))


@pytest.fixture(scope="module")
def base(tiny_config, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    model = load_model(tiny_config, CPU)
    roles = Roles({"model": RoleSpec()}, model, None, None)
    return export_run(model, roles, "model", tmp_path_factory.mktemp("b") / "base", torch.float32)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> dict[str, Path]:
    """Two LoRA runs of different ranks and one of all weights, from one base."""
    home = tmp_path_factory.mktemp("runs")
    how = {"a": (*LORA, "adapter.rank=3", "adapter.alpha=5"), "b": (*LORA, "adapter.rank=2"),
           "full": ()}  # fmt: skip
    for seed, (name, more) in enumerate(how.items()):
        job(home / name, *TRAIN, f"model.path={base}", f"seed={seed}", *more)
    return {name: home / name for name in how}


def merged(base: Path, out: Path, names: str, *overrides: str) -> dict[str, torch.Tensor]:
    job(out, "stage=merge", f"model.path={base}", f"runs=[{names}]", "dtype=fp32", *overrides)
    file = "transformer/diffusion_pytorch_model.safetensors"
    return load_file(out / "export" / "diffusers" / file)


def result(path: Path) -> dict[str, torch.Tensor]:
    [parent] = parents_of([str(path)])
    return {k: parent.weights.read(k).float() for k in parent.weights.shapes}


def test_loras_merge_as_their_full_weights_do_and_as_one_adapter(base, runs, tmp_path):
    a, b, out = runs["a"], runs["b"], tmp_path / "out"
    formats = "format=[diffusers,lora-diffusers]"
    got = merged(base, out, f"{a},{b}", "weights=[0.25,0.75]", formats)
    whole = {"a": result(a), "b": result(b), "base": load_file(
        base / "transformer" / "diffusion_pytorch_model.safetensors")}  # fmt: skip
    moved = 0.0
    for key, value in got.items():
        want = 0.25 * whole["a"][key] + 0.75 * whole["b"][key]
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
        moved = max(moved, float((value - whole["base"][key]).abs().max()))
    assert moved > 1e-3  # else the test says nothing
    path = out / "export" / "lora-diffusers" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        adapter = read_lora(load_file(path), file.metadata())
    assert {x.shape[0] for x, _ in adapter.pairs.values()} == {3 + 2}
    for layer in adapter.pairs:
        delta = got[f"{layer}.weight"] - whole["base"][f"{layer}.weight"]
        torch.testing.assert_close(adapter.delta(layer), delta, rtol=1e-4, atol=1e-5)
    # The manifest names both, and the result opens as any run's does.
    manifest = json.loads((out / "manifest.json").read_text())
    assert [(p["weight"], p["id"]) for p in manifest["parents"]] == [
        (w, json.loads((r / "manifest.json").read_text())["id"]) for w, r in ((0.25, a), (0.75, b))
    ]
    inside = json.loads((out / "export" / "diffusers" / "manifest.json").read_text())
    assert inside["parents"] == manifest["parents"]
    assert [x.state for x in ancestry(out)] == ["unchanged", "unchanged"]
    cfg = configured(tmp_path / "eval", "stage=eval", f"model.path={base}", f"init_from={out}")
    opened = load_initial(cfg, CPU).transformer.state_dict()
    assert all(torch.equal(opened[k], got[k]) for k in got)


@pytest.mark.slow
def test_a_merger_is_trained_on_and_merged_again(base, runs, tmp_path):
    out, more = tmp_path / "out", tmp_path / "more"
    first = merged(base, out, f"{runs['a']},{runs['b']}")
    job(more, *TRAIN, *LORA, "adapter.rank=2", f"model.path={base}", f"init_from={out}")
    trained, a = result(more), result(runs["a"])
    key = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(trained[key], first[key])
    again = merged(base, tmp_path / "again", f"{more},{runs['a']}", "weights=[0.5,0.5]")
    torch.testing.assert_close(again[key], (trained[key] + a[key]) / 2, rtol=1e-5, atol=1e-6)
    # Its adapter lies on the merger, and a's on the base: no one adapter is their merger.
    with pytest.raises(InputError, match="lie on different weights"):
        merged(base, tmp_path / "no", f"{more},{runs['a']}", "format=[lora-diffusers]")
    with pytest.raises(InputError, match="started from different weights"):
        merged(base, tmp_path / "no2", f"{more},{runs['a']}", "tasks=true", "weights=[1,1]")


def test_a_model_merged_with_itself_is_itself_bit_for_bit(base, runs, tmp_path):
    full = runs["full"]
    want = result(full)
    got = merged(base, tmp_path / "half", f"{full},{full}")
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    # base + 1·(θ − base) is θ, and half of the way is half of the way.
    got = merged(base, tmp_path / "one", f"{full}", "tasks=true", "weights=[1]")
    assert all(torch.equal(got[k], want[k]) for k in want)
    start = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    got = merged(base, tmp_path / "some", f"{full}", "tasks=true", "weights=[0.5]")
    for key, value in got.items():
        torch.testing.assert_close(value, (want[key] + start[key]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_grid_is_evaluated_and_the_best_is_exported(base, runs, tmp_path, capsys):
    out = tmp_path / "out"
    summary = job(
        out, "stage=merge", f"model.path={base}", f"runs=[{runs['a']},{runs['full']}]", "grid=2",
        "evaluation=signs", "evaluation.prompts=6", "~evaluation.metrics.ocr",
        "~evaluation.metrics.tesseract", "choose=[ground_colour,max]", "sampler.steps=2",
        "dtype=fp32",
    )  # fmt: skip
    rows = summary["points"]
    assert [r["weights"] for r in rows] == [[1, 0], [0.5, 0.5], [0, 1]]
    values = [r["mean"] for r in rows]
    best = values.index(max(values))
    assert summary["weights"] == rows[best]["weights"]
    shots = [Evaluation.load(out / "grid" / f"{k:02d}") for k in range(3)]
    images = [next(iter(sorted((s.folder / "images").iterdir()))).read_bytes() for s in shots]  # pyright: ignore
    assert len(set(images)) == 3  # each point drew images of its own
    chosen = Evaluation.load(find(out)[0])
    assert chosen.identity == shots[best].identity and chosen.results == shots[best].results
    assert (out / "samples" / "merge.png").is_file() and "chosen" in capsys.readouterr().out
    weights = load_file(
        out / "export" / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    a, full = result(runs["a"]), result(runs["full"])
    w = rows[best]["weights"]
    for key in ("x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"):
        want = w[0] * a[key] + w[1] * full[key]
        torch.testing.assert_close(weights[key], want, rtol=1e-5, atol=1e-6)


def test_an_unknown_value_to_choose_by_is_told_after_the_first_point():
    print_ = Fingerprint("exact", "reader(1)", 1, "prompts", "euler8:ab", 3.0)
    shot = Evaluation(Results((Score(0, 0, "exact", 1.0),), {"exact": print_}), {0: "a sign"}, {})
    plan = Plan([], [(1.0, 0.0), (0.0, 1.0)], ["diffusers"], ("exact", "max"), None)
    _check_choice(plan, shot)
    _check_choice(plan, None)  # on ranks other than 0
    with pytest.raises(InputError, match="choose names 'exakt': choose from exact"):
        _check_choice(replace(plan, choose=("exakt", "max")), shot)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("weights=[0.9,0.9]",), "sum to 1.8"),
        (("grid=2",), "nothing to choose by"),
        (("grid=2", "evaluation=signs"), "choose= names"),
        (("grid=2", "evaluation=signs", "choose=[a,best]"), "choose= names"),
        (("format=[lora-diffusers]",), "full has no adapter"),
        (("format=[]",), "format= names nothing"),
        (("dtype=fp8",), "choose from"),
        (("model.quantise=nf4",), "quantise=null"),
        (("sampler.schedule._target_=flux2.schedule.Linear",), "add allow=.schedule."),
    ],
)
def test_wrong_input_is_refused_before_weights_are_read(
    overrides, says, base, runs, tmp_path, monkeypatch
):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("flux2.model.load_model", read)
    names = f"runs=[{runs['a']},{runs['full']}]"
    with pytest.raises(InputError, match=says):
        job(tmp_path / "out", "stage=merge", f"model.path={base}", names, *overrides)
