"""kill -9 at any moment, and a full disk: what is resumed ends as if nothing had happened.

Two kinds of moments. Before each single operation on files, one after the other, for the functions
that write; and, for whole stages, seeded random ones. The stages run as processes of their own,
forked from one that has imported everything, so that a kill costs a second and not ten; the slow
tests start run.py afresh.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flux2.checkpoint import latest_checkpoint, load_checkpoint
from flux2.data.signs import SignWorld

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# ---------------------------------------------------------------- before each operation on files

EACH = """
    import os, random, shutil, signal, sys
    from pathlib import Path
    import torch
    from omegaconf import OmegaConf
    from flux2 import checkpoint, files, runs
    from flux2.checkpoint import find_best, find_latest, load_checkpoint, write_checkpoint
    from flux2.runs import Run

    WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
    left = None                       # operations until the kill; None: not counting

    def operation(*_):
        global left
        if left is not None:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(lambda event, _: operation() if event in WATCHED else None)
    os.fsync = lambda handle: operation()     # what a kill leaves needs no disk to see it
    runs.provenance = lambda: {"versions": {}, "git_commit": None}     # asks git each time

    def killed(function, after):
        global left
        pid = os.fork()
        if pid == 0:
            left = after
            try:
                function()
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        return status != 0

    def write(root, step, value, keep=1, score=None):
        tensors = {f"m/{i}": torch.full((8,), float(value)) for i in range(3)}
        best = None if score is None else ("ocr", score, "max")
        write_checkpoint(root, step, tensors, {"value": value}, {}, keep, best, max_bytes=64)

    def held(path):
        got = load_checkpoint(path)
        values = {float(v) for t in got.tensors.values() for v in t} | {float(got.state["value"])}
        assert len(got.tensors) == 3 and len(values) == 1, values
        return got.step, values.pop()

    def every_moment(make, function, check):
        moments = 0
        while True:
            shutil.rmtree(here, ignore_errors=True)
            make()
            if not killed(function, moments):
                check()
                print(f"{make.__qualname__.split(chr(46))[0]}: {moments} moments")
                return
            check()
            moments += 1

    here = Path(sys.argv[1])
    root = here / "checkpoints"

    def a_new_step():                     # the only older one is deleted at the end
        every_moment(lambda: write(root, 1, 10), lambda: write(root, 2, 20),
                     lambda: after({(1, 10), (2, 20)}))

    def after(expected):
        assert held(find_latest(root)) in expected
        write(root, 3, 30)                # and the run goes on
        assert held(find_latest(root)) == (3, 30)
        assert [p.name for p in root.iterdir()] == ["step_000003"]

    def the_same_step():                  # there is no other
        every_moment(lambda: write(root, 1, 10), lambda: write(root, 1, 11),
                     lambda: after({(1, 10), (1, 11)}))

    def with_a_best():
        def make():
            for step, score in ((1, 0.9), (2, 0.1), (3, 0.2)):
                write(root, step, step, keep=1, score=score)
        def check():
            assert held(find_best(root)) == (1, 1)
            assert held(find_latest(root)) in {(3, 3), (4, 4)}
        every_moment(make, lambda: write(root, 4, 4, keep=1, score=0.3), check)

    def twice():                          # killed, and killed again while it goes on
        chance = random.Random(0)
        for _ in range(40):
            shutil.rmtree(here, ignore_errors=True)
            write(root, 1, 10)
            killed(lambda: write(root, 2, 20), chance.randrange(40))
            before = held(find_latest(root))
            killed(lambda: write(root, 2, 21), chance.randrange(40))
            assert held(find_latest(root)) in {before, (2, 21)}
            after({before, (2, 21)})
        print("twice: 40 moments")

    def config(resume):
        return OmegaConf.create({
            "run": {"dir": str(here), "id": None}, "stage": {"name": "sft"}, "seed": 4,
            "init_from": None, "resume": resume, "model": {"name": "nano", "role": "base"}})

    def a_run():
        def life(resume):
            run = Run.create(config(resume))
            run.update(schedule_hash="abc")
            files.write_text(here / "metrics.jsonl", "{}")
            run.finish("done", {"steps": 1})
        def check():
            identity = Run(here).manifest["id"] if (here / "manifest.json").exists() else None
            life("auto")
            found = Run(here).manifest
            assert found["status"] == "done" and identity in (None, found["id"])
            assert OmegaConf.load(here / "config.yaml").run.id == found["id"]
            names = {"config.yaml", "manifest.json", "metrics.jsonl", "summary.json"}
            assert {p.name for p in here.iterdir()} == names
        every_moment(lambda: None, lambda: life(None), check)
        every_moment(lambda: life(None), lambda: life("auto"), check)

    for case in (a_new_step, the_same_step, with_a_best, twice, a_run):
        case()
"""


def test_killed_before_each_operation_on_files(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EACH), tmp_path / "here"],
        env=ENV, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    moments = [int(n) for n in re.findall(r"(\d+) moments", done.stdout)]
    assert len(moments) == 6 and min(moments) >= 25, done.stdout
    print(done.stdout)


# ---------------------------------------------------------------- whole stages, at random moments

BARE = (
    "launch.threads=1", "data.batch_size=2", "data.dataset.length=64", "train.save_every=1",
)  # fmt: skip
TINY = (
    *BARE, "sampler.steps=2", "evaluation.prompts=2", "evaluation.shown=1", "evaluation.every=2",
    "~evaluation.metrics.ocr", "~evaluation.metrics.tesseract",
)  # fmt: skip
JUDGED = (
    *(a for a in TINY if not a.startswith("data.dataset.")), "data.dataset.path={pairs}",
)  # fmt: skip
RL = (*TINY, "evaluation.trained_on=[]", "method.group=2", "reward.workers=0")
STAGES = {
    "sft": ("stage=sft", *TINY),
    "nft-lora": ("stage=nft", *RL, "adapter=lora"),
    "sft-ema": ("stage=sft", *TINY, "method.ema=0.9"),
    "nft": ("stage=nft", *RL),
    "grpo": ("stage=grpo", *RL, "method.window.count=1", "method.window.skip=0"),
    "awm": ("stage=awm", *RL, "anchor=ema", "method.updates=2", "adapter=lora"),
    "direct": ("stage=direct", *TINY, "evaluation.trained_on=[]", "anchor=velocity"),
    "distill": (
        "stage=distill", *TINY, "data.batch_size=2", "method.every=2", "critic=ladd",
        "reward=spelling", "evaluation.trained_on=[]", "monitor=none",
    ),
    "dpo": ("stage=dpo", *JUDGED),
    "kto-lora": ("stage=kto", *JUDGED, "adapter=lora"),
    "pretrain": ("stage=pretrain", *BARE, "data.cache={cache}"),
    "autoencoder": ("stage=autoencoder", *BARE, "train.statistics_batches=1"),
}

FORKS = """
    import json, os, resource, sys
    import torch
    torch.set_num_threads(1)
    import run, flux2.train, flux2.generate, eval.heldout
    import posttrain.sft, posttrain.nft, posttrain.grpo, posttrain.autoencoder, rewards.ocr
    import distill.dmd, distill.adversarial
    import posttrain.awm, posttrain.direct, posttrain.dpo, posttrain.kto, rewards.spelling
    import accelerate, peft, matplotlib.figure
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler
    from diffusers import Flux2Transformer2DModel
    from transformers import AutoTokenizer, Qwen3ForCausalLM
    print("ready", flush=True)
    for line in sys.stdin:
        arguments, log, limit = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                sys.argv = ["run.py", *arguments]
                code = run.main()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Started:
    """A run.py that runs: its process, and a wait for its exit code (-9 if killed)."""

    pid: int
    wait: Any


class Forks:
    """Starts run.py by forking a process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(FORKS)], env=ENV, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __call__(self, arguments: tuple[str, ...], log: Path, limit: int | None = None) -> Started:
        """limit: bytes a file may have, as if the disk ended there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([arguments, str(log), limit]) + "\n")
        self._process.stdin.flush()
        return Started(int(self._line()), lambda: int(self._line()))

    def close(self) -> None:
        self._process.communicate(timeout=30)


def afresh(arguments: tuple[str, ...], log: Path) -> Started:
    """Starts run.py as a user does."""
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "run.py", *arguments], cwd=ROOT, env=ENV, stdout=out, stderr=out
        )
    return Started(process.pid, process.wait)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


def lines(folder: Path) -> list[str]:
    """metrics.jsonl without times: the very digits."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if not k.startswith("time/")}) for row in rows]


def same_result(one: Path, two: Path) -> None:
    """The last checkpoints and the exports hold the same bits."""
    a, b = (latest_checkpoint(path / "checkpoints") for path in (one, two))
    assert a is not None and b is not None and a.name == b.name
    x, y = load_checkpoint(a), load_checkpoint(b)
    assert set(x.tensors) == set(y.tensors) and len(x.tensors) > 0
    assert all(torch.equal(x.tensors[name], y.tensors[name]) for name in x.tensors)
    exports = [sorted((path / "export").rglob("*.safetensors")) for path in (one, two)]
    assert [p.relative_to(one) for p in exports[0]] == [p.relative_to(two) for p in exports[1]]
    assert all(p.read_bytes() == q.read_bytes() for p, q in zip(*exports, strict=True))


def done(path: Path) -> int:
    """Steps that metrics.jsonl has so far; a line that is being written counts."""
    metrics = path / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def write_pairs(folder: Path) -> None:
    """Eight pairs of signs, as stage=pairs writes them."""
    folder.mkdir()
    world = SignWorld("train", length=16)
    rows = []
    for k in range(8):
        names = [f"{k}-{name}.png" for name in ("winner", "loser")]
        for name, record in zip(names, (world[k], world[k + 8]), strict=True):
            Image.fromarray(record.target).save(folder / name)
        row = {"prompt": world[k].prompt, "winner": names[0], "loser": names[1], "margin": 1.0}
        rows.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(rows))


def survive(
    start: Any, stage: str, tmp_path: Path, kills: int, seed: int, *extra: str, steps: int = 4
) -> list[str]:
    """Run the stage whole, and again with kills; their results must be the same. Half of the kills
    come at some moment of a session, half within a random step or the save after it."""
    whole, torn, log = tmp_path / "whole", tmp_path / "torn", tmp_path / "log"
    began = time.monotonic()
    places = {"cache": tmp_path / "cache", "pairs": tmp_path / "pairs"}
    if any("{pairs}" in a for a in STAGES[stage]):
        write_pairs(places["pairs"])
    common = tuple(a.format(**places) for a in STAGES[stage])
    common += (f"train.steps={steps}", *extra)
    assert start((*common, f"run.dir={whole}"), log).wait() == 0, log.read_text()
    seconds = time.monotonic() - began
    chance, moments = random.Random(seed), []
    assert len(lines(whole)) == steps
    arguments = (*common, f"run.dir={torn}", "resume=auto")
    for k in range(kills):
        session = start(arguments, log)
        began, wanted = time.monotonic(), chance.randrange(1, steps + 1) if k % 2 else None
        pause = chance.random() * (seconds if wanted is None else seconds / steps / 2)
        while wanted is not None and done(torn) < wanted and _runs(session.pid):
            time.sleep(0.002)
        time.sleep(pause)
        if _runs(session.pid):
            os.kill(session.pid, signal.SIGKILL)
        code = session.wait()
        assert code in (0, -signal.SIGKILL), log.read_text()
        held = latest_checkpoint(torn / "checkpoints")
        after = f"{held.name if held else 'nothing'}, {done(torn)} lines"
        moments.append(f"{time.monotonic() - began:.2f} s: exit {code}, {after}")
        if code == 0 and k < kills - 1:  # quicker than the whole one: begin anew, to be killed
            shutil.rmtree(torn)
    assert start(arguments, log).wait() == 0, log.read_text()
    assert sum("exit -9" in m for m in moments) >= kills / 2, moments
    assert lines(torn) == lines(whole), moments
    same_result(whole, torn)
    manifest = json.loads((torn / "manifest.json").read_text())
    assert manifest["status"] == "done" and not (torn / ".lock").exists()
    return moments


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("stage", ["sft", pytest.param("nft-lora", marks=pytest.mark.slow)])
def test_a_stage_that_is_killed_again_and_again_ends_as_one_that_is_not(
    stage: str, tmp_path: Path, forks: Forks
) -> None:
    print(*survive(forks, stage, tmp_path, 4, 1, "train.export=false"), sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stage", list(STAGES))
def test_every_stage_survives_many_kills(
    stage: str, seed: int, tmp_path: Path, forks: Forks
) -> None:
    print(*survive(forks, stage, tmp_path, 12, 10 + seed, steps=10), sep="\n")
    assert list((tmp_path / "torn" / "export").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "nft"])
def test_the_command_itself_survives_kills(stage: str, tmp_path: Path) -> None:
    print(*survive(afresh, stage, tmp_path, 4, 2), sep="\n")


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path: Path, forks: Forks) -> None:
    """The limit on the size of files stands for the disk's end: the system refuses the write in the
    middle of it."""
    whole, half, log, said = (tmp_path / name for name in ("whole", "half", "log", "said"))
    two, one = ((*STAGES["sft"], "train.export=false", f"train.steps={n}") for n in (2, 1))
    assert forks((*two, f"run.dir={whole}"), log).wait() == 0, log.read_text()
    assert forks((*one, f"run.dir={half}"), log).wait() == 0, log.read_text()
    again = (*two, f"run.dir={half}", "resume=auto")
    assert forks(again, said, limit=1 << 20).wait() == 1, said.read_text()
    errors = [line for line in said.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in said.read_text(), said.read_text()
    assert "cannot write checkpoint" in errors[0] and "File too large" in errors[0]
    assert [p.name for p in (half / "checkpoints").iterdir()] == ["step_000001"]
    assert json.loads((half / "manifest.json").read_text())["status"] == "failed"
    assert forks(again, log).wait() == 0, log.read_text()
    assert lines(half) == lines(whole)
    same_result(whole, half)
