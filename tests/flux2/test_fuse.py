"""flux2.fuse: LoRA files of several layouts, folded in; and the stage, by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import run
from eval import merge, shorten
from flux2 import fuse
from flux2.checkpoint import Best, write_checkpoint
from flux2.errors import InputError
from flux2.formats import Adapter, lora_diffusers, lora_original
from flux2.lineage import same_init
from flux2.model import load_initial

ROOT = Path(__file__).resolve().parents[2]


def adapter_for(network: torch.nn.Module, scale: float = 0.5) -> Adapter:
    """A random LoRA of rank 3 on every attention projection."""
    g, pairs = torch.Generator().manual_seed(0), {}
    for name, weight in network.named_parameters():
        path = name.removesuffix(".weight")
        if ".attn.to_" in name and weight.ndim == 2:
            a, b = torch.randn(3, weight.shape[1], generator=g), torch.randn(weight.shape[0], 3)
            pairs[path] = (a, 0.1 * b)
    assert len(pairs) > 3
    return Adapter(pairs, scale)


def written(adapter: Adapter, path: Path, layout: str) -> Path:
    if layout == "diffusers":
        tensors, metadata = lora_diffusers(adapter)
    elif layout == "original":
        tensors, metadata = lora_original(adapter), None
    else:  # as peft saves it: no scale
        named = [(p, zip("AB", pair, strict=True)) for p, pair in adapter.pairs.items()]
        tensors = {f"transformer.{p}.lora_{n}.weight": t for p, ab in named for n, t in ab}
        metadata = None
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(("layout", "factor"), [("diffusers", 1), ("original", 1), ("plain", 2)])
def test_a_file_is_added_exactly(tiny, tmp_path, layout, factor):
    """W + scale·ΔW; without metadata a file's own scale is 1, here twice the adapter's."""
    adapter = adapter_for(tiny.transformer)
    before = {k: v.clone() for k, v in tiny.transformer.named_parameters()}
    found = fuse.read(written(adapter, tmp_path / "lora.safetensors", layout))
    fuse.add(tiny.transformer, found, 0.7)
    for name, weight in tiny.transformer.named_parameters():
        path = name.removesuffix(".weight")
        moved = 0.7 * factor * adapter.delta(path) if path in adapter.pairs else 0
        torch.testing.assert_close(weight, before[name] + moved, rtol=1e-5, atol=1e-6)


def test_alphas_of_single_layers_count(tmp_path):
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    tensors = {f"transformer.{p}.lora_{n}.weight": t.clone() for p in ("x", "y")
               for n, t in (("A", a), ("B", b))}  # fmt: skip
    config = {"transformer.lora_alpha": 4, "transformer.r": 2,
              "transformer.alpha_pattern": {"y": 1}}  # fmt: skip
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    found = fuse.read(file)
    assert torch.equal(found.delta("x"), 2.0 * b @ a) and torch.equal(found.delta("y"), 0.5 * b @ a)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("transformer.x.lora_magnitude_vector.dora_scale", "dora_scale"),
        ("lora_te1_text_model.lora_down.weight", "lora_te"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1", "lokr_"),
        ("transformer.x.weight", "is no weight of a LoRA"),
        ("diffusion_model.nothing.lora_A.weight", "no LoRA of FLUX.2 that diffusers reads"),
        ("diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight", "norm_out"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path, key, says):
    tensors = {key: torch.ones(2, 2)}
    if "adaLN" in key:
        tensors[key.replace("lora_A", "lora_B")] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=says):
        fuse.read(tmp_path / "lora.safetensors")


def test_a_file_is_named_or_alone_in_its_folder(tiny, tmp_path):
    with pytest.raises(InputError, match=r"no \.safetensors file and no run"):
        fuse.file_of(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match=r"holds 0 \.safetensors files"):
        fuse.file_of(tmp_path)
    one = written(adapter_for(tiny.transformer), tmp_path / "a.safetensors", "plain")
    assert fuse.file_of(tmp_path) == fuse.file_of(one) == one
    written(adapter_for(tiny.transformer), tmp_path / "b.safetensors", "plain")
    with pytest.raises(InputError, match="holds 2"):
        fuse.file_of(tmp_path)
    other = Adapter({"transformer_blocks.0.attn.to_q": (torch.ones(1, 3), torch.ones(4, 1))}, 1.0)
    with pytest.raises(InputError, match="for another model"):
        fuse.add(tiny.transformer, other, 1.0)


def trained(path: Path, **facts: object) -> Path:
    """A run directory whose result is one checkpoint."""
    best: Best = ("reward", 1.0, "max")
    write_checkpoint(path / "checkpoints", 1, {"model/w": torch.ones(2)}, {}, {}, best=best)
    told = {"id": "1", "stage": "sft", "status": "done", "parents": [], "trained": ["model"]}
    (path / "manifest.json").write_text(json.dumps({**told, "model": "nano", **facts}))
    return path


def asked(*words: str):
    return run._compose(["stage=fuse", *words])[0]


def test_a_runs_checkpoints_are_taken_as_the_run(tmp_path):
    sft = trained(tmp_path / "sft")
    step = sft / "checkpoints" / "step_000001"
    for lora in (sft, step, sft / "checkpoints" / "best"):
        plan = fuse.planned(asked(f"lora={lora}"))
        assert plan.file is None and plan.init is not None and plan.init.weights == step


def test_a_fuse_of_a_run_is_resumed_without_init_from(tiny, tmp_path):
    sft = trained(tmp_path / "sft")
    cfg = asked(f"lora={sft}")
    [parent] = found = fuse.parents_of(fuse.planned(cfg))
    assert parent["path"].startswith(str(sft)) and parent["hash"]
    assert same_init(cfg, tmp_path / "fuse", found) is None
    # That of a file on a run began there.
    file = written(adapter_for(tiny.transformer), tmp_path / "lora.safetensors", "plain")
    cfg = asked(f"lora={file}", f"init_from={sft}")
    init = same_init(cfg, tmp_path / "fuse", fuse.parents_of(fuse.planned(cfg)))
    assert init is not None and init.run == sft


def test_a_policy_student_is_not_fused(tiny, tmp_path):
    student = trained(tmp_path / "student", policy={"components": 2}, result_role="distilled")
    file = written(adapter_for(tiny.transformer), tmp_path / "lora.safetensors", "plain")
    for words in ([f"lora={student}"], [f"lora={file}", f"init_from={student}"]):
        with pytest.raises(InputError, match="is a policy student"):
            fuse.planned(asked(*words, "model.role=distilled"))


def test_model_role_is_of_the_result_that_is_started_from(tiny, tmp_path):
    """And not of the base under it: here, and in the other stages that ask early."""
    student = trained(tmp_path / "student", result_role="distilled")
    file = written(adapter_for(tiny.transformer), tmp_path / "lora.safetensors", "plain")
    for words in ([f"lora={student}"], [f"lora={file}", f"init_from={student}"]):
        assert fuse.planned(asked(*words, "model.role=distilled")).init is not None
    with pytest.raises(InputError, match="is not distilled"):
        fuse.planned(asked(f"lora={file}", "model.role=distilled"))
    (student / "config.yaml").write_text("adapter: null\ninit_from: null\n")
    given = f"init_from={student}", "model.role=distilled", "method.blocks=[[0],[0]]"
    with pytest.raises(InputError) as refused:  # of its checkpoint, which has no blocks
        shorten.asked(run._compose(["stage=size", *given])[0])
    assert "is not distilled" not in str(refused.value)
    merged = run._compose(["stage=merge", f"runs=[{student},{student}]", "weights=[0.5,0.5]",
                           "model.role=distilled"])[0]  # fmt: skip
    with pytest.raises(InputError) as refused:
        merge.planned(merged)
    assert "is not distilled" not in str(refused.value)


def test_an_exports_role_is_its_manifests(tmp_path):
    """Weights of a run that are started from bring their role by its manifest, not by model.role:
    an export of a base is loaded where model.role says distilled, under allow=[role]."""
    folder = tmp_path / "fuse" / "export" / "diffusers"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(ROOT / "experiments" / "nano" / "base")
    told = {"id": "1", "stage": "fuse", "status": "done", "parents": [], "trained": ["fused"]}
    (tmp_path / "fuse" / "manifest.json").write_text(json.dumps({**told, "model": "nano"}))
    cfg = asked("lora=x", f"init_from={tmp_path / 'fuse'}", "model.role=distilled")
    assert load_initial(cfg, torch.device("cpu")).info.role == "distilled"
    cfg.init_from = None
    with pytest.raises(InputError, match="is not distilled"):
        load_initial(cfg, torch.device("cpu"))


@pytest.mark.slow
def test_a_run_and_its_exported_lora_give_the_same_model(tmp_path):
    """stage=fuse of a run with adapter=lora, and of the file that stage=export made of it."""

    def command(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "run.py", *arguments, "launch.threads=1"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    sft, weights = tmp_path / "sft", "transformer/diffusion_pytorch_model.safetensors"
    command("stage=sft", "adapter=lora", "evaluation=none", "heldout=none", "data.batch_size=2",
            "train.steps=3", "optim.optimizer.lr=0.01", f"run.dir={sft}")  # fmt: skip
    command("stage=export", f"init_from={sft}", "format=[lora-diffusers,lora-original]",
            "dtype=fp32", f"run.dir={tmp_path / 'out'}")  # fmt: skip
    given = {"run": sft, "diffusers": tmp_path / "out/export/lora-diffusers",
             "original": tmp_path / "out/export/lora-original"}  # fmt: skip
    found = {}
    for name, lora in given.items():
        command("stage=fuse", f"lora={lora}", "dtype=fp32", f"run.dir={tmp_path / name}")
        found[name] = load_file(tmp_path / name / "export/diffusers" / weights)
        command(f"resume={tmp_path / name}")
        told = json.loads((tmp_path / name / "manifest.json").read_text())
        assert told["trained"] == ["fused"] and told["result_role"] == "base"
        assert len(told["parents"]) == (name == "run")
    plain = load_file(
        ROOT / "experiments/nano/base/transformer/diffusion_pytorch_model.safetensors"
    )
    moved = [k for k, v in plain.items() if not torch.equal(v.float(), found["run"][k])]
    assert moved
    for name in ("diffusers", "original"):
        for key, want in found["run"].items():
            torch.testing.assert_close(found[name][key], want, rtol=1e-5, atol=1e-6)
    out = command("stage=fuse", f"lora={sft}", "scale=0.5", f"run.dir={tmp_path / 'half'}", code=2)
    assert "stage=merge" in out and "Traceback" not in out
    command("stage=sample", f"init_from={tmp_path / 'run'}", "count=1", "sampler.steps=2",
        f"run.dir={tmp_path / 'sample'}")  # fmt: skip
