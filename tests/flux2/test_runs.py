"""Run directories: their facts, who holds them, resuming, interrupts."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from flux2 import runs
from flux2.checkpoint import write_checkpoint
from flux2.errors import InputError
from flux2.runs import Interrupt, Interrupted, Run, hold, release, resolve_resume

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _let_go():
    yield
    for path in list(runs._held):
        release(path)


def config(path: Path, **more: object):
    return OmegaConf.create(
        {
            "run": {"dir": str(path), "id": None}, "stage": {"name": "sft"}, "seed": 4,
            "init_from": None, "resume": None, "model": {"name": "nano", "role": "base"},
            "allow": [], "twice": "${seed}", **more,
        }
    )  # fmt: skip


def write(run: Run, step: int) -> Path:
    return write_checkpoint(run.checkpoints, step, {"m/w": torch.full((2,), float(step))}, {}, {})


def test_run_directory(tmp_path):
    cfg = config(tmp_path / "deep" / "run")
    run = Run.create(cfg)
    assert cfg.run.id == run.manifest["id"] and len(cfg.run.id) == 8
    stored = OmegaConf.load(run.path / "config.yaml")
    assert stored.twice == 4 and stored.run.id == cfg.run.id  # resolved
    wanted = {
        "id", "parents", "stage", "model", "model_role", "result_role", "seed", "versions",
        "git_commit", "schedule_hash", "status", "started", "finished",
    }  # fmt: skip
    assert set(run.manifest) == wanted
    assert run.manifest["status"] == "running" and run.manifest["finished"] is None
    assert run.manifest["model_role"] == "base"
    assert torch.__version__.startswith(run.manifest["versions"]["torch"].split("+")[0])
    run.update(schedule_hash="abc")
    run.finish("done", {"after": {"ocr": float("nan")}})
    assert run.manifest["schedule_hash"] == "abc" and run.manifest["status"] == "done"
    assert json.loads((run.path / "summary.json").read_text()) == {"after": {"ocr": None}}
    assert {p.name for p in run.path.iterdir()} == {"config.yaml", "manifest.json", "summary.json"}
    with pytest.raises(InputError, match=r"already holds a run \(done\)"):
        Run.create(config(run.path))


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    run = Run.create(config(tmp_path / "run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run.update(stage="other")
    run.finish("done", {})
    assert run.manifest["stage"] == "sft" and run.manifest["status"] == "running"
    cfg = config(tmp_path / "new")
    assert Run.create(cfg).path == tmp_path / "new" and not (tmp_path / "new").exists()


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    run = Run.create(config(tmp_path / "run"))
    torn = run.path / ".manifest.json.123.tmp"
    torn.write_text("{")
    release(run.path)
    with pytest.raises(InputError, match=r"already holds a run \(killed\)"):
        Run.create(config(run.path))
    assert torn.exists()
    Run.create(config(run.path, resume="auto"))
    assert not torn.exists()


def test_a_run_that_failed_at_once_leaves_no_measurements_to_the_next(tmp_path):
    run = Run.create(config(tmp_path / "run"))
    (run.path / "evaluation").mkdir()
    run.finish("interrupted")
    Run.create(config(run.path, resume="auto")).finish("failed")
    assert (run.path / "evaluation").exists()
    Run.create(config(run.path))
    assert not (run.path / "evaluation").exists()


def test_a_run_that_failed_at_once_makes_room_for_another_stage(tmp_path):
    other = {"name": "dpo"}
    for resume in (None, "auto"):
        Run.create(config(tmp_path / "run", resume="auto")).finish("failed")
        run = Run.create(config(tmp_path / "run", resume=resume, stage=other))
        assert run.manifest["stage"] == "dpo"
        run.finish("interrupted")
        with pytest.raises(InputError, match="holds a run of stage=dpo, not sft"):
            Run.create(config(run.path, resume="auto"))
        shutil.rmtree(run.path)


@pytest.mark.parametrize("status", ["failed", "interrupted", "done"])
def test_a_full_disk_does_not_hide_what_a_run_failed_of(tmp_path, monkeypatch, capsys, status):
    run = Run.create(config(tmp_path / "run"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_json", full)
        if status == "done":
            with pytest.raises(OSError, match="No space"):
                run.finish(status, {})
        else:
            run.finish(status)
            assert f"does not say {status}" in capsys.readouterr().err
    assert run.manifest["status"] == "running"
    hold(run.path)  # it was let go all the same


# ---------------------------------------------------------------- one process at a time

HOLDER = """
import sys, time
from omegaconf import OmegaConf
from flux2.runs import Run
Run.create(OmegaConf.create({
    "run": {"dir": sys.argv[1], "id": None}, "stage": {"name": "sft"}, "seed": 4,
    "init_from": None, "resume": "auto", "model": {"name": "nano", "role": "base"}}))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
        for resume in (None, "auto", str(tmp_path / "run")):
            with pytest.raises(InputError, match=f"in use by process {holder.pid} on ") as caught:
                Run.create(config(tmp_path / "run", resume=resume))
            assert "\n" not in str(caught.value)
        assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / "run" / ".lock").exists()  # and no hindrance
    Run.create(config(tmp_path / "run", resume="auto"))
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_holding_twice_is_once_and_releasing_leaves_nothing(tmp_path):
    hold(tmp_path)
    hold(tmp_path)
    release(tmp_path)
    release(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_taken_away_meanwhile_is_no_lock(tmp_path, monkeypatch):
    """Its holder lets go, and removes it, between our opening it and our locking it."""
    (tmp_path / ".lock").write_text("1 on here\n")
    real, calls = runs.fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    hold(tmp_path)
    assert len(calls) == 2 and (tmp_path / ".lock").exists()


# ---------------------------------------------------------------- going on


def test_resume(tmp_path):
    path = tmp_path / "run"
    assert resolve_resume(config(path)) is None
    assert resolve_resume(config(path, resume="auto")) is None
    with pytest.raises(InputError, match="no undamaged checkpoint"):
        resolve_resume(config(path, resume=str(path)))
    first = Run.create(config(path))
    first.update(schedule_hash="abc")
    newest = [write(first, s) for s in (1, 2)][-1]
    for resume in ("auto", str(path)):
        cfg = config(path, resume=resume)
        assert resolve_resume(cfg) == newest
        again = Run.create(cfg)
        assert again.manifest["id"] == first.manifest["id"] == cfg.run.id
        assert again.manifest["schedule_hash"] == "abc"
    with pytest.raises(InputError, match="holds no run"):
        Run.create(config(tmp_path / "other", resume=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_a_wrong_parent_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="is no run"):
        Run.create(config(tmp_path / "run", init_from=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_to_the_weights_it_started_from(tmp_path):
    parent = Run.create(config(tmp_path / "parent"))
    first = write(parent, 1)
    cfg = config(tmp_path / "child", init_from=str(parent.path))
    child = Run.create(cfg)
    assert cfg.init_from == str(first) == OmegaConf.load(child.path / "config.yaml").init_from
    [entry] = child.manifest["parents"]
    assert entry["path"] == str(first) and entry["id"] == parent.manifest["id"]

    write(parent, 2)  # the parent goes on
    for again in (str(parent.path), str(first)):
        cfg = config(child.path, init_from=again, resume="auto")
        assert Run.create(cfg).manifest["parents"] == [entry]
        assert cfg.init_from == str(first)

    with pytest.raises(InputError, match=r"was started from .*add init_from="):
        Run.create(config(child.path, resume="auto"))
    with pytest.raises(InputError, match="was started from no run"):
        Run.create(config(parent.path, init_from=str(parent.path), resume="auto"))

    # Once they are gone, others are taken only where that is meant.
    first.rename(tmp_path / "parent" / "checkpoints" / "kept")
    with pytest.raises(InputError, match="have changed or are gone"):
        Run.create(config(child.path, init_from=str(parent.path), resume="auto"))
    cfg = config(child.path, init_from=str(parent.path), resume="auto", allow=["base"])
    assert Run.create(cfg).manifest["parents"][0]["path"].endswith("step_000002")


# ---------------------------------------------------------------- interrupts


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
