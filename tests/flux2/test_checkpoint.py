"""Checkpoints are whole or absent; lineage; interrupts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from flux2 import checkpoint
from flux2.checkpoint import (
    Interrupt,
    Interrupted,
    Run,
    jsonable,
    latest_checkpoint,
    load_checkpoint,
    read_safetensors,
    resolve_init,
    resolve_resume,
    write_checkpoint,
    write_json,
)
from flux2.errors import InputError


def write(root: Path, step: int, keep: int | None = None) -> Path:
    weights = {"a.weight": torch.full((2, 3), float(step)), "b": torch.arange(4).bfloat16()}
    state = {"exp_avg": {0: torch.ones(2)}, "step": step, "window": [1, (2.5, None)]}
    return write_checkpoint(root, step, weights, state, {"loss": 0.5}, keep)


def config(path: Path, **more: object):
    return OmegaConf.create(
        {
            "run": {"dir": str(path), "id": None}, "stage": {"name": "sft"}, "seed": 4,
            "init_from": None, "resume": None, "model": {"name": "nano"}, "twice": "${seed}",
            **more,
        }
    )  # fmt: skip


def test_round_trip(tmp_path):
    path = write(tmp_path, 12)
    assert path == tmp_path / "step_000012"
    assert {p.name for p in path.iterdir()} == {"weights.safetensors", "state.pt", "meta.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["step_000012"]  # nothing temporary remains
    got = load_checkpoint(path)
    assert got.step == 12 and got.meta == {"loss": 0.5}
    assert torch.equal(got.weights["a.weight"], torch.full((2, 3), 12.0))
    assert got.weights["b"].dtype == torch.bfloat16 and got.weights["b"].tolist() == [0, 1, 2, 3]
    assert torch.equal(got.state["exp_avg"][0], torch.ones(2))
    assert got.state["window"] == [1, (2.5, None)]


def test_meta_holds_the_sha256_of_each_file(tmp_path):
    path = write(tmp_path, 1)
    stored = json.loads((path / "meta.json").read_text())["sha256"]
    for name in ("weights.safetensors", "state.pt"):
        assert stored[name] == hashlib.sha256((path / name).read_bytes()).hexdigest()


def test_tensors_that_share_memory_and_views_survive(tmp_path):
    table = torch.randn(4, 6)
    path = write_checkpoint(tmp_path, 1, {"in": table, "out": table, "view": table.T}, {}, {})
    got = load_checkpoint(path).weights
    assert torch.equal(got["in"], table) and torch.equal(got["out"], table)
    assert torch.equal(got["view"], table.T)


def test_the_newest_n_are_kept(tmp_path):
    for step in (1, 2, 3, 1000000):
        write(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000003", "step_1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_1000000"


def test_damaged_later_checkpoints_do_not_push_out_good_ones(tmp_path):
    write(tmp_path, 10)
    (write(tmp_path, 20) / "state.pt").write_bytes(b"torn")
    write(tmp_path, 12, keep=1)  # resumed from 10
    assert latest_checkpoint(tmp_path) == tmp_path / "step_000012"
    write(tmp_path, 20, keep=1)  # and comes to 20 again
    assert [p.name for p in tmp_path.iterdir()] == ["step_000020"]
    assert load_checkpoint(tmp_path / "step_000020").step == 20


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_damage_is_found_told_and_skipped(tmp_path, capsys, name, damage):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / name
    content = bytearray(file.read_bytes())
    if damage == "byte":
        place = content.find(b'"step": 2') + 8 if name == "meta.json" else len(content) // 2
        content[place] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    assert latest_checkpoint(tmp_path) == good
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "skipped checkpoint" in err and name in err
    with pytest.raises(InputError, match=name) as caught:
        load_checkpoint(bad)
    assert "\n" not in str(caught.value)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    write(tmp_path, 1).rename(tmp_path / "step_000009")
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("crash", ["replace", "fsync"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_crash_leaves_the_old_checkpoint_and_nothing_half(tmp_path, monkeypatch, crash, after):
    write(tmp_path, 1)
    real, calls = getattr(os, crash), []

    def fail(*arguments):
        if len(calls) >= after:
            raise OSError("power cut")
        calls.append(arguments)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, crash, fail)
        try:
            write(tmp_path, 2)
            crashed = False
        except OSError:
            crashed = True
    assert crashed == (after < {"replace": 2, "fsync": 5}[crash])
    for step, path in checkpoint._steps(tmp_path):  # whatever is visible is whole
        assert load_checkpoint(path).step == step
    assert load_checkpoint(tmp_path / "step_000001").step == 1
    assert load_checkpoint(write(tmp_path, 2)).step == 2  # what was left is no hindrance


def test_a_killed_writer_leaves_no_checkpoint(tmp_path):
    (tmp_path / ".step_000005.tmp").mkdir(parents=True)
    (tmp_path / ".step_000005.tmp" / "weights.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    assert load_checkpoint(write(tmp_path, 5)).step == 5


def test_state_that_could_not_be_read_back_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"state\['method'\]\[1\] is a float32"):
        write_checkpoint(tmp_path, 1, {}, {"method": [1.0, np.float32(1)]}, {})
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="keep"):
        write(tmp_path, 1, keep=0)


def test_json_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_jsonable():
    value = {"nan": math.nan, "inf": [math.inf, 1.5], 3: Path("a"), "t": torch.tensor(2.0)}
    assert jsonable(value) == {"nan": None, "inf": [None, 1.5], "3": "a", "t": 2.0}
    assert jsonable(np.array([1, 2])) == [1, 2] and jsonable(np.float64("nan")) is None
    with pytest.raises(TypeError, match="set"):
        jsonable({1})


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_corrupt_safetensors_are_one_line(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="absent"):
        read_safetensors(tmp_path / "absent.safetensors")


def test_run_directory(tmp_path):
    cfg = config(tmp_path / "deep" / "run")
    run = Run.create(cfg)
    assert cfg.run.id == run.manifest["id"] and len(cfg.run.id) == 8
    stored = OmegaConf.load(run.path / "config.yaml")
    assert stored.twice == 4 and stored.run.id == cfg.run.id  # resolved
    wanted = {
        "id", "parents", "stage", "model", "model_role", "seed", "versions", "git_commit",
        "schedule_hash", "status", "started", "finished",
    }  # fmt: skip
    assert set(run.manifest) == wanted
    assert run.manifest["status"] == "running" and run.manifest["finished"] is None
    assert run.manifest["versions"]["torch"] == torch.__version__.split("+")[0] or (
        run.manifest["versions"]["torch"] == torch.__version__
    )
    run.update(schedule_hash="abc")
    run.finish("done", {"after": {"ocr": float("nan")}})
    assert run.manifest["schedule_hash"] == "abc" and run.manifest["status"] == "done"
    assert json.loads((run.path / "summary.json").read_text()) == {"after": {"ocr": None}}
    with pytest.raises(InputError, match="already holds a run"):
        Run.create(config(run.path))


def test_resume(tmp_path):
    path = tmp_path / "run"
    assert resolve_resume(config(path)) is None
    assert resolve_resume(config(path, resume="auto")) is None
    with pytest.raises(InputError, match="no undamaged checkpoint"):
        resolve_resume(config(path, resume=str(path)))
    first = Run.create(config(path))
    first.update(schedule_hash="abc")
    newest = [write(first.checkpoints, s) for s in (1, 2)][-1]
    for resume in ("auto", str(path)):
        cfg = config(path, resume=resume)
        assert resolve_resume(cfg) == newest
        again = Run.create(cfg)
        assert again.manifest["id"] == first.manifest["id"] == cfg.run.id
        assert again.manifest["schedule_hash"] == "abc"
    with pytest.raises(InputError, match="holds no run"):
        Run.create(config(tmp_path / "other", resume=str(tmp_path / "other")))


def test_init_from_a_run_its_checkpoint_or_its_export(tmp_path):
    run = Run.create(config(tmp_path / "run"))
    with pytest.raises(InputError, match="neither"):
        resolve_init(run.path)
    (run.path / "export" / "vae").mkdir(parents=True)
    (run.path / "export" / "vae" / "config.json").write_text("{}")
    export = resolve_init(run.path)
    assert export.is_export and export.weights == run.path / "export"
    before = export.parent()["hash"]
    (run.path / "export" / "vae" / "config.json").write_text("{} ")
    assert resolve_init(run.path).parent()["hash"] != before

    one, two = (write(run.checkpoints, s) for s in (1, 2))
    newest, named = resolve_init(run.path), resolve_init(one)
    assert (newest.weights, named.weights, named.run) == (two, one, run.path)
    assert not newest.is_export and newest.manifest["id"] == run.manifest["id"]
    assert newest.parent()["hash"] != named.parent()["hash"]
    child = Run.create(config(tmp_path / "child", init_from=str(run.path)))
    assert child.manifest["parents"] == [newest.parent()]

    (one / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"state\.pt was altered"):
        resolve_init(one)
    with pytest.raises(InputError, match="is no run"):
        resolve_init(tmp_path)


def test_interrupt_waits_once_and_then_no_more(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM  # noted; the step goes on
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()  # not reached: the second raises
        assert caught.value.signum == signal.SIGINT
        with pytest.raises(Interrupted) as caught:
            stop.abort()
        assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err.count("stopping after this step") == 1
