"""run.py on a configuration of the test's own: exit codes, the one line, sweeps, resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import run

ROOT = Path(run.__file__).parent
STAGES = """
import os, pathlib, signal, sys, time
from flux2.checkpoint import write_checkpoint
from flux2.errors import InputError
from flux2.runs import Interrupt, resolve_resume

def fine(cfg):
    time.sleep(1.1 if cfg.seed == 99 else 0)
    return {"seed": cfg.seed, "group": cfg.logger.group, "lr": cfg.optim.lr, "dir": cfg.run.dir}

def refuse(cfg):
    raise InputError("the data has no images; name a folder that has")

def crash(cfg):
    raise RuntimeError("boom")

def second(cfg):
    return crash(cfg) if cfg.seed == 2 else fine(cfg)

def train(cfg):
    import torch
    root = pathlib.Path(cfg.run.dir, "checkpoints")
    old = resolve_resume(cfg)
    start = int(old.name[5:]) if old else 0
    with Interrupt() as stop:
        for step in range(start, start + 3):
            if cfg.kill and step == start + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.signum:
                write_checkpoint(root, step, {"w": torch.zeros(2)}, {}, {})
                stop.abort()
    return {"start": start, "steps": step + 1, "lr": cfg.optim.lr}

def sleep(cfg):
    print("asleep", flush=True)
    time.sleep(60)

class Picky:
    def __init__(self, group=2):
        if group == 1: raise InputError("group=1 has no spread; use at least 2")
        if group == 0: raise RuntimeError("boom")

def build(cfg):
    import hydra.utils
    hydra.utils.instantiate({"_target_": "tiny_stages.Picky", **cfg.arguments})
    return {}
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A copy of conf/'s shared part, with stages and recipes of the test's own, as run's CONF."""
    conf = tmp_path / "conf"
    for part in ("logger", "launch"):
        shutil.copytree(ROOT / "conf" / part, conf / part)
    shutil.copy(ROOT / "conf" / "config.yaml", conf)
    for name in ("stage", "optim", "experiment/family"):
        (conf / name).mkdir(parents=True)
    for name in ("fine", "refuse", "crash", "second", "train", "sleep", "build"):
        (conf / "stage" / f"{name}.yaml").write_text(
            "# @package _global_\ndefaults: [{/optim: adam}]\n"
            f"stage: {{name: {name}, run: tiny_stages.{name}}}\n"
            "kill: false\narguments: {}\nneeded: 1\nmodel: {name: tiny}\nlogger: {interval: 5.0}\n"
        )
    (conf / "stage" / "nft.yaml").symlink_to("fine.yaml")
    (conf / "optim" / "adam.yaml").write_text("lr: 0.1\n")
    (conf / "optim" / "muon.yaml").write_text("lr: 0.02\n")
    recipe = "# @package _global_\ndefaults: [{override /stage: fine}, {override /optim: muon}]\n"
    (conf / "experiment/family/good.yaml").write_text(recipe + "recipe: {stage: fine}\nseed: 7\n")
    (conf / "experiment/family/silent.yaml").write_text(recipe)
    (tmp_path / "tiny_stages.py").write_text(STAGES)
    monkeypatch.setattr(run, "CONF", conf)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    yield conf
    sys.modules.pop("tiny_stages", None)
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def call(conf, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """call("stage=…", …) → (exit code, stdout, lines of stderr)."""

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        code = run.main()
        out, err = capfd.readouterr()
        return code, out, err.splitlines()

    return call


def manifest(path: str | Path):
    return json.loads(Path(path, "manifest.json").read_text())


def test_a_run_leaves_its_directory(call, tmp_path):
    code, _, err = call("stage=fine", "seed=3")
    assert (code, err) == (0, [])
    [path] = (tmp_path / "outputs").iterdir()
    assert path.name.endswith("-fine-tiny")
    assert {p.name for p in path.iterdir()} == {"config.yaml", "manifest.json", "summary.json"}
    assert json.loads((path / "summary.json").read_text()) == {
        "seed": 3, "group": None, "lr": 0.1, "dir": str(path),
    }  # fmt: skip
    written = manifest(path)
    assert written["status"] == "done" and written["stage"] == "fine" and written["seed"] == 3
    assert written["finished"] >= written["started"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sede=1"], ["no key 'sede'", "did you mean 'seed'"]),
        (["stage=fine", "optim.lrr=1"], ["no key 'optim.lrr'", "'optim.lr'"]),
        (["stage=fine", "lr=1"], ["no key 'lr'", "'optim.lr'"]),
        (["~sed"], ["'sed'", "'seed'"]),
        (["optimm=muon"], ["optimm", "did you mean 'optim'"]),
        (["stage=refues"], ["no stage 'refues'", "did you mean 'refuse'"]),
        (["stage=fine", "optim=zzz"], ["no optim 'zzz'", "known: adam, muon"]),
        (["experiment=family/god"], ["no recipe 'family/god'", "'family/good'"]),
        (["experiment=nothing"], ["no recipe 'nothing'", "family/good"]),
        (["experiment=family/good", "stage=crash"], ["for stage=fine, not stage=crash"]),
        (["experiment=family/silent"], ["family/silent", "does not say its stage"]),
        (["seed=[1"], ["cannot read 'seed=[1'"]),
        (["needed=???"], ["needed", "needed=…"]),
        (["seed=${nowhere}"], ["nowhere"]),
        (["arguments={group: 1}"], ["arguments has no 'group'", "write +arguments.group="]),
        (["--stage=fine"], ["unknown option --stage", "write stage=fine"]),
        (["seed=1", "-m", "stage=fine"], ["'stage=fine' comes after an option"]),
        (["-m", "stage=fine,refues"], ["no stage 'refues'"]),
        (["stage=refuse"], ["the data has no images; name a folder that has"]),
        (["init_from=nowhere"], ["init_from=", "nowhere is no run"]),
        (["resume=nowhere"], ["resume=nowhere holds no run"]),
        (["logger.wandb"], ["cannot read 'logger.wandb'"]),
        (["stage=build", "+arguments.group=1"], ["group=1 has no spread"]),
        (["stage=build", "+arguments.grup=3"], ["unexpected keyword argument 'grup'"]),
        (["run.dir=file/x"], ["cannot write", "file", "run.dir"]),
        (["run.dir=file"], ["cannot write", "file", "run.dir"]),
        (["-m", "run.dir=file/x", "seed=1,2"], ["cannot write", "file", "run.dir"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(call, tmp_path, arguments, words):
    (tmp_path / "file").write_text("")  # where a directory is wanted: refused to root as well
    code, _, err = call(*arguments)
    assert code == 2
    assert len(err) == 1, "\n".join(err)
    assert err[0].startswith("error: ")
    for word in words:
        assert word in err[0]


def test_a_mismatch_that_cannot_even_be_composed_is_called_a_mismatch(call, conf):
    (conf / "stage" / "bare.yaml").write_text(
        "# @package _global_\nstage: {name: bare, run: tiny_stages.fine}\n"
    )
    code, _, err = call("experiment=family/good", "stage=bare")  # bare has no /optim to override
    assert code == 2 and len(err) == 1 and "for stage=fine, not stage=bare" in err[0]


def test_half_a_launcher_is_refused(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = call("stage=fine")
    assert (code, out) == (2, "") and len(err) == 1
    assert err[0].startswith("error: WORLD_SIZE=2 is in the environment, but not RANK")


def test_a_recipe_brings_its_stage_and_choices_and_the_command_line_wins(call):
    assert call("experiment=family/good", "run.dir=a")[0] == 0
    first = json.loads(Path("a/summary.json").read_text())
    assert (first["seed"], first["lr"], manifest("a")["stage"]) == (7, 0.02, "fine")
    assert call("experiment=family/good", "stage=fine", "seed=8", "run.dir=b")[0] == 0
    assert json.loads(Path("b/summary.json").read_text())["seed"] == 8


@pytest.mark.parametrize("arguments", [["stage=crash"], ["stage=build", "+arguments.group=0"]])
def test_a_crash_is_a_traceback_and_exit_1(call, arguments):
    code, _, err = call(*arguments, "run.dir=here")
    assert code == 1
    assert err[0].startswith("Traceback") and any("RuntimeError: boom" in line for line in err)
    assert manifest("here")["status"] == "failed"


def test_a_sweep_survives_a_failing_job(call):
    code, out, err = call("-m", "stage=second", "seed=1,2,3", "run.dir=sweep")
    assert code == 1
    assert [manifest(f"sweep/{i}")["status"] for i in range(3)] == ["done", "failed", "done"]
    assert [manifest(f"sweep/{i}")["seed"] for i in range(3)] == [1, 2, 3]
    summaries = [json.loads(Path(f"sweep/{i}/summary.json").read_text()) for i in (0, 2)]
    assert [s["group"] for s in summaries] == ["sweep", "sweep"]
    assert [Path(s["dir"]).name for s in summaries] == ["0", "2"]
    assert "1 of 3 jobs failed" in err[-1] and "seed=2" in err[-1]
    assert out.splitlines()[0].startswith("job 0: ")


def test_a_sweep_with_nothing_but_wrong_input_is_exit_2(call):
    code, _, err = call("-m", "stage=fine,refuse", "run.dir=sweep")
    assert code == 2
    assert len(err) == 2 and "has no images" in err[0] and "1 of 2 jobs failed" in err[1]


def test_jobs_of_a_sweep_share_their_time_stamp(call, tmp_path):
    assert call("-m", "stage=fine", "seed=99,2")[0] == 0
    [sweep] = (tmp_path / "outputs").iterdir()
    assert {p.name for p in sweep.iterdir()} == {"0", "1", "multirun.yaml"}


def test_a_directory_that_holds_a_run_is_not_overwritten(call):
    assert call("stage=fine", "run.dir=here")[0] == 0
    code, _, err = call("stage=fine", "run.dir=here")
    assert code == 2 and len(err) == 1 and "already holds a run (done)" in err[0]
    code, _, err = call("stage=crash", "run.dir=here", "resume=auto")
    assert code == 2 and "holds a run of stage=fine, not crash" in err[0]


def test_a_failed_run_without_checkpoint_may_be_repeated(call):
    assert call("stage=refuse", "run.dir=here")[0] == 2
    assert call("stage=fine", "run.dir=here")[0] == 0


def test_an_interrupted_run_goes_on(call):
    code, _, err = call("stage=train", "kill=true", "run.dir=here", "optim=muon")
    assert code == 143
    assert manifest("here")["status"] == "interrupted"
    assert any("python run.py resume=" in line for line in err)
    identity = manifest("here")["id"]

    # By its directory alone: the stored configuration, with a key changed.
    code, _, err = call("resume=here", "kill=false", "optim.lr=0.5")
    assert (code, err) == (0, [])
    assert json.loads(Path("here/summary.json").read_text()) == {"start": 1, "steps": 4, "lr": 0.5}
    assert manifest("here")["id"] == identity and manifest("here")["status"] == "done"

    assert call("resume=here", "launch.threads=1")[0] == 0
    for wrong, word in [
        ("launch=local", "leave out launch=local"),
        ("launch.processes=2", "choose engine=ddp"),
        ("launch.proceses=1", "did you mean 'launch.processes'"),
        ("optim=adam", "leave out optim=adam"),
        ("stage=fine", "leave out stage=fine"),
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("seed=1,2", "not seed=1,2"),
    ]:
        code, _, err = call("resume=here", wrong)
        assert code == 2 and len(err) == 1 and word in err[0]

    # By the whole command; here the configuration is composed anew.
    assert call("stage=train", "run.dir=here", "resume=auto")[0] == 0
    assert json.loads(Path("here/summary.json").read_text())["lr"] == 0.1


@pytest.mark.parametrize(
    ("logger", "mode"), [("default", "off"), ("offline", "offline"), ("wandb", "online")]
)
def test_loggers_compose(call, logger, mode):
    assert call("stage=fine", f"logger={logger}", "logger.show=[loss]", "run.dir=here")[0] == 0
    stored = OmegaConf.load("here/config.yaml").logger
    assert (stored.wandb, stored.project, stored.show) == (mode, "flux2-posttrain", ["loss"])
    assert stored.interval == 5  # a stage may set what the logger's file sets


def test_resume_auto_starts_where_there_is_nothing(call):
    assert call("stage=train", "run.dir=fresh", "resume=auto")[0] == 0
    assert json.loads(Path("fresh/summary.json").read_text())["start"] == 0


def test_a_run_that_is_done_is_not_done_again(call):
    """A sweep asked for again does what is missing, and only that."""
    sweep = ("-m", "stage=train", "resume=auto", "run.dir=all")
    assert call(*sweep, "seed=1,2")[0] == 0
    before = [manifest(f"all/{n}") for n in (0, 1)]
    code, out, _ = call(*sweep, "seed=1,2,3")
    assert code == 0 and out.count("is done already") == 2
    assert [manifest(f"all/{n}") for n in (0, 1)] == before
    assert manifest("all/2")["seed"] == 3
    assert call("stage=train", "kill=true", "run.dir=parent")[0] == 143  # it leaves a checkpoint
    child = ("stage=fine", "init_from=parent", "run.dir=child", "resume=auto")
    assert call(*child)[0] == 0
    shutil.rmtree("parent/checkpoints")
    assert "is done already" in call(*child)[1]
    assert call(*child[:1], "run.dir=child", "resume=auto")[0] == 2  # from other weights
    assert call("stage=train", "resume=auto", "run.dir=all/0", "seed=1", "optim.lr=0.5")[0] == 0
    assert json.loads(Path("all/0/summary.json").read_text())["lr"] == 0.5


def test_lineage_names_the_parent_and_its_weights(call):
    assert call("stage=train", "kill=true", "run.dir=parent")[0] == 143
    assert call("stage=fine", "init_from=parent", "run.dir=child")[0] == 0
    [parent] = manifest("child")["parents"]
    assert parent["id"] == manifest("parent")["id"]
    assert parent["path"].endswith("parent/checkpoints/step_000001") and len(parent["hash"]) == 64


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_a_loop_ends_the_run_at_once(conf, tmp_path, number, code):
    program = (
        f"import run, sys, pathlib; run.CONF = pathlib.Path({str(conf)!r}); sys.exit(run.main())"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    process = subprocess.Popen(
        [sys.executable, "-c", program, "stage=sleep", "run.dir=here"],
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "asleep\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert err.splitlines() == [f"interrupted; to go on: python run.py resume={tmp_path / 'here'}"]
    assert manifest(tmp_path / "here")["status"] == "interrupted"


def test_help_is_quick_and_imports_nothing_heavy(conf, tmp_path):
    program = (
        f"import run, sys, pathlib; run.CONF = pathlib.Path({str(conf)!r})\n"
        "try: run.main()\n"
        "finally: print(*[m for m in ('torch', 'diffusers', 'wandb') if m in sys.modules], 'end')"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    seconds = time.monotonic() - began
    print(f"--help took {seconds:.2f} s")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == "end"  # none of the three
    stages = ("autoencoder", "pretrain", "sft", "grpo", "nft", "sample", "eval")
    for word in (*stages, "-m stage=grpo"):
        assert word in done.stdout
    assert seconds < 5
