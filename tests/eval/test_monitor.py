"""The hack monitor in a run: a reward that likes the dark is caught, the run ends, the best weights
come back; a healthy run is left alone; a resume changes nothing."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

import run
from eval.checks import PromptsOnly
from eval.dials import ImageDials
from eval.heldout import HeldOut
from eval.monitor import HackMonitor
from flux2 import train as training
from flux2.checkpoint import latest_checkpoint, load_checkpoint, steps
from flux2.data.loader import Collator, Loader
from flux2.data.signs import SignWorld
from flux2.engine import Engine
from flux2.errors import InputError
from flux2.files import write_json
from flux2.generate import Sampler
from flux2.log import Log
from flux2.model import Flux2
from flux2.monitor import Blind
from flux2.optim import LearningRate, TurnAdamW
from flux2.roles import Roles
from flux2.schedule import EmpiricalShift
from flux2.scorer import Scorer
from flux2.types import Batch, RoleSpec
from posttrain.direct import Direct

ROOT = Path(__file__).resolve().parents[2]
LOGGER = OmegaConf.create(
    {"wandb": "off", "project": "x", "entity": None, "group": None, "tags": [], "show": [],
     "interval": 1e9}
)  # fmt: skip


class Plain:
    """A codec that shows a token's first channels as 16 × 16 pixels of one colour."""

    patch = 16

    def __init__(self, channels: int) -> None:
        self.mean = torch.zeros(channels)

    def decode_float(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = rearrange(x[..., :3], "b (h w) c -> b c h w", h=grid[0], w=grid[1])
        return tokens.repeat_interleave(16, 2).repeat_interleave(16, 3) / 2

    def decode(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return ((self.decode_float(x, grid) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


class Aim:
    """A reward with a gradient: minus the squared distance of an image's mean from `level`."""

    def __init__(self, level: float, engine: str = "aim()") -> None:
        self.level, self.engine = level, engine

    def __call__(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"reward": self.differentiable(images.float() / 255, batch)}

    def differentiable(self, images: Tensor, batch: Batch) -> Tensor:
        return -(images.mean((1, 2, 3)) - self.level).square()


class Light:
    """What is held out: whether an image is neither dark nor light."""

    engine = "light()"

    def __call__(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        mean = images.float().mean((1, 2, 3)) / 255
        return {"light": ((mean - 0.5).abs() < 0.15).float()}


class Toy:
    """A run of the direct gradient on a tiny transformer whose latents are colours."""

    def __init__(self, tiny: Flux2, folder: Path, level: float, lr: float = 2e-2, **keys: Any):
        model = copy.deepcopy(tiny, {id(tiny.text): tiny.text})
        model.codec = Plain(128)
        heldout = HeldOut(
            PromptsOnly(SignWorld("heldout", length=16)), Sampler(steps=2, guidance=1.0),
            {"images": ImageDials(), "light": Light(), "aim": Aim(level)},
            prompts=16, every=2, images=False, shown=2,
        )  # fmt: skip
        options = {"heldout": heldout, "criterion": {"light": 1.0, "reward": 1.0}} | keys
        self.monitor = HackMonitor(**options)
        score = Scorer(Aim(level), model)
        score.tap = self.monitor.tap
        method = Direct(score, samples=2, steps=2, chunk=16)
        self.roles = Roles(method.roles, model, None, None)
        named = {n: self.roles.parameters(n) for n in self.roles.trainable}
        self.engine = Engine(self.roles, TurnAdamW(named, lr), LearningRate(), clip=1.0)
        world = SignWorld("train", length=64)
        data = Loader(world, Collator(model, latents=False), 8, seed=4)
        given = {
            "dataset": world, "rate": LearningRate(), "monitor": self.monitor,
            "reward": score.reward, "score": score, "method": method, "schedule": EmpiricalShift(),
        }  # fmt: skip
        empty = {f.name: None for f in fields(training.Parts)}
        self.parts = training.Parts(**{**empty, **given})
        self.folder, self._data = folder, data
        if not (folder / "manifest.json").exists():
            folder.mkdir(exist_ok=True)
            write_json(folder / "manifest.json", {"id": "toy", "rewards": ["aim()"]})

    def run(self, count: int, save_every: int = 0, **keys: Any) -> dict[str, Any]:
        train = {"steps": count, "save_every": save_every, "keep": 1, "best": None, "budget": None,
                 "export": False} | keys  # fmt: skip
        cfg = OmegaConf.create({"run": {"dir": str(self.folder), "id": "toy"}, "seed": 3,
                                "stage": {"name": "direct"}, "train": train})  # fmt: skip
        found = latest_checkpoint(self.folder / "checkpoints")
        if found is not None:
            training._restore(self.engine, self.parts, self._data, load_checkpoint(found))
        with Log(self.folder, LOGGER, count, self.engine.step) as log:
            return training._fit(cfg, self.parts, self.engine, self._data, log)

    def rows(self) -> list[dict[str, float]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if "time" not in k} for x in lines]

    def same_as(self, checkpoint: Path) -> bool:
        """Whether the roles hold the checkpoint's weights, bit for bit."""
        held, mine = load_checkpoint(checkpoint).weights, dict(self.roles.tensors())
        return set(held) == set(mine) and all(torch.equal(held[k], mine[k]) for k in mine)


@pytest.fixture(scope="module")
def hacked(_tiny, tmp_path_factory) -> tuple[Toy, dict[str, Any], str]:
    """A run whose reward wants black images, and what it said."""
    import contextlib
    import io

    torch.manual_seed(0)
    toy = Toy(_tiny, tmp_path_factory.mktemp("hacked") / "run", level=0.0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        summary = toy.run(30)
    return toy, summary, said.getvalue()


def test_a_reward_that_likes_the_dark_is_flagged(hacked):
    _, summary, said = hacked
    found = summary["monitor"]
    assert found["dials"]["heldout/dark"]["flagged"] is not None
    assert found["dials"]["heldout/light"]["flagged"] is not None
    assert found["dials"]["heldout/dark"]["baseline"] < 0.1
    assert found["dials"]["heldout/dark"]["value"] > 0.9
    lines = [x for x in said.splitlines() if "heldout/dark 0" in x]
    assert len(lines) == 1 and "images turn dark or light; look at the images" in lines[0]
    # What training maximises decides nothing, and is not even measured.
    assert found["criterion"] == {"light": 1.0} and "reward" not in found["heldout"]["0"]


def test_the_run_ends_early_and_says_so_in_one_line(hacked):
    toy, summary, said = hacked
    found = summary["monitor"]
    assert toy.engine.step < 30 and summary["steps"] == toy.engine.step
    assert "in 2 checks in succession" in found["stopped"]
    assert said.count("the run ends early") == 1
    [last] = [x for x in said.splitlines() if x.startswith("monitor: ") and "dials:" in x]
    assert f"ended early; exported step {found['best']} of {toy.engine.step}" in last
    assert Path(found["picture"]).stat().st_size > 10_000


def test_the_result_is_the_best_checkpoint_bit_for_bit(hacked):
    toy, summary, _ = hacked
    found, root = summary["monitor"], toy.folder / "checkpoints"
    light = {int(k): v["light"] for k, v in found["heldout"].items()}
    best = found["exported"]["step"]
    assert best == found["best"] < toy.engine.step and light[best] == max(light.values())
    assert [k for k, _ in steps(root)] == [best, toy.engine.step]  # kept besides keep=1
    assert toy.same_as(root / f"step_{best:06d}")
    assert not toy.same_as(root / f"step_{toy.engine.step:06d}")
    manifest = json.loads((toy.folder / "manifest.json").read_text())
    assert manifest["exported"] == found["exported"]
    assert "the held-out value was" in manifest["exported"]["why"]


def test_a_run_that_was_ended_is_not_gone_on_with(hacked, tiny):
    toy, summary, _ = hacked
    again = Toy(tiny, toy.folder, level=0.0)
    before = toy.rows()
    found = again.run(30)
    assert again.engine.step == toy.engine.step and again.rows() == before
    assert found["monitor"]["exported"] == summary["monitor"]["exported"]
    assert again.same_as(toy.folder / "checkpoints" / f"step_{found['monitor']['best']:06d}")


def test_patience_0_goes_on_with_a_run_that_was_ended(hacked, tiny, tmp_path):
    toy, _, _ = hacked
    folder = shutil.copytree(toy.folder, tmp_path / "run")
    again = Toy(tiny, folder, level=0.0, patience=0)
    found = again.run(toy.engine.step + 2)["monitor"]
    assert again.engine.step == toy.engine.step + 2 and found["stopped"] is None
    assert found["exported"]["step"] == found["best"]  # to which it goes back all the same


def test_a_healthy_run_is_left_alone(tiny, tmp_path, capsys):
    torch.manual_seed(0)
    toy = Toy(tiny, tmp_path / "run", level=0.5, lr=3e-3)
    summary = toy.run(14)
    found = summary["monitor"]
    assert toy.engine.step == 14 and found["stopped"] is None
    assert [n for n, row in found["dials"].items() if row["flagged"] is not None] == []
    assert found["exported"] == {"step": 14, "of": 14, "why": "the last"}
    assert "nothing flagged" in capsys.readouterr().out
    assert toy.same_as(tmp_path / "run" / "checkpoints" / "step_000014")


def test_a_dial_may_end_the_run_and_then_the_last_clean_checkpoint_is_the_result(tiny, tmp_path):
    torch.manual_seed(0)
    toy = Toy(tiny, tmp_path / "run", level=0.0, lr=1e-3, heldout=None, criterion={},
              stop_on=["dark"], patience=0)  # fmt: skip
    found = toy.run(40, save_every=1)["monitor"]
    flagged = found["dials"]["dark"]["flagged"]
    assert toy.engine.step == flagged < 40 and "dark is beyond its limit" in found["stopped"]
    assert found["exported"]["step"] == flagged - 1
    assert toy.same_as(tmp_path / "run" / "checkpoints" / f"step_{flagged - 1:06d}")


def test_a_dial_that_ends_the_run_before_any_save_goes_back_to_the_beginning(tiny, tmp_path):
    torch.manual_seed(0)
    toy = Toy(tiny, tmp_path / "run", level=0.0, lr=1e-3, heldout=None, criterion={},
              stop_on=["dark"], patience=0)  # fmt: skip
    found = toy.run(40)["monitor"]
    assert found["stopped"] and found["exported"]["step"] == 0 < toy.engine.step
    assert toy.same_as(tmp_path / "run" / "checkpoints" / "step_000000")


def test_a_run_that_is_watched_from_a_resume_on_may_go_back_to_where_it_was(tiny, tmp_path):
    torch.manual_seed(0)
    blind = Toy(tiny, tmp_path / "run", level=0.0, lr=1e-6)
    blind.parts = replace(blind.parts, monitor=Blind())
    blind.run(3)
    toy = Toy(tiny, tmp_path / "run", level=0.0)
    found = toy.run(30)["monitor"]
    assert found["stopped"] and found["exported"]["step"] == found["best"] == 3
    assert toy.same_as(tmp_path / "run" / "checkpoints" / "step_000003")


def test_a_flagged_dial_without_a_value_at_the_end_is_told_all_the_same(hacked, tmp_path):
    toy, _, _ = hacked
    monitor = copy.copy(toy.monitor)
    last = max(monitor._means)
    monitor._means = {**monitor._means, last: {**monitor._means[last], "light": float("nan")}}
    with Log(tmp_path, LOGGER, 1) as log:
        monitor._log, monitor._run = log, tmp_path
        log.log(0, {"x": 1.0})
        log.flush(0)
        found = monitor.finish({"step": 0, "of": last, "why": "x"})["monitor"]
    assert "heldout/light" in monitor._watch.flags and "heldout/light" not in found["dials"]


def test_train_best_chooses_the_result_by_an_evaluation(tiny, tmp_path):
    values = {2: 0.1, 4: 0.7, 6: 0.3}
    evaluation = SimpleNamespace(
        start=lambda *_: None, after_step=lambda step: None,
        latest=lambda k: {"x": values.get(k, 0.0)}, finish=lambda step: {"after": step},
        close=lambda: None,
    )  # fmt: skip
    toy = Toy(tiny, tmp_path / "run", level=0.5, lr=1e-3, heldout=None, criterion={})
    toy.parts = replace(toy.parts, evaluation=evaluation)
    summary = toy.run(6, save_every=2, best=["x", "max"])
    assert summary["after"] == 4 == summary["monitor"]["exported"]["step"]
    assert summary["monitor"]["exported"]["why"] == "best x of the checkpoints"
    assert toy.same_as(tmp_path / "run" / "checkpoints" / "step_000004")


def test_a_resumed_run_logs_and_ends_as_an_uninterrupted_one(hacked, tiny, tmp_path):
    whole, summary, _ = hacked
    torch.manual_seed(0)
    folder = tmp_path / "run"
    # Stopped at odd steps too: between two checks.
    for count in (3, 4, 7):
        Toy(tiny, folder, level=0.0).run(count)
    last = Toy(tiny, folder, level=0.0)
    found = last.run(30)
    assert last.rows() == whole.rows()
    same = ("stopped", "best", "exported", "dials", "criterion")
    assert {k: found["monitor"][k] for k in same} == {k: summary["monitor"][k] for k in same}
    assert last.same_as(whole.folder / "checkpoints" / f"step_{found['monitor']['best']:06d}")


def test_a_run_that_fails_in_its_first_step_may_be_started_again(tiny, tmp_path):
    toy = Toy(tiny, tmp_path / "run", level=0.0)
    toy.parts.score.reward.differentiable = lambda images, batch: images.mean((1, 2, 3)) * torch.nan
    with pytest.raises(InputError, match="first step"):
        toy.run(10)
    assert steps(tmp_path / "run" / "checkpoints") == []


def test_a_changed_monitor_is_refused(hacked, tiny, tmp_path):
    Toy(tiny, tmp_path / "run", level=0.5, lr=1e-3).run(4)
    other = Toy(tiny, tmp_path / "run", level=0.5, lr=1e-3)
    other.monitor.heldout.prompts = 12
    with pytest.raises(InputError, match="measured otherwise"):
        other.run(8)


def test_a_run_too_short_for_a_comparison_has_no_checks(tiny, tmp_path, capsys):
    toy = Toy(tiny, tmp_path / "run", level=0.5)
    found = toy.run(1)["monitor"]
    assert found["heldout"] == {} and found["exported"]["why"] == "the last"
    assert not (tmp_path / "run" / "monitor").exists()
    assert "held-out samples every" not in capsys.readouterr().out


def test_a_run_too_short_for_a_comparison_ends_with_corridors_too(tiny, tmp_path):
    toy = Toy(tiny, tmp_path / "run", level=0.5, corridors={"dark": {"max": 0.6}})
    found = toy.run(1)["monitor"]
    assert found["corridors"] == {} and found["exported"]["why"] == "the last"


def test_a_teacher_that_the_method_has_not_is_refused_before_the_weights(tiny, tmp_path):
    rules = {"dark": {"within": 0.5, "of": "teacher"}}
    toy = Toy(tiny, tmp_path / "run", 0.5, teacher={"steps": 2, "guidance": 2.0}, corridors=rules)
    student = RoleSpec(trainable=True)
    toy.monitor.check({"student": student, "teacher": RoleSpec()})
    for others in ({"teacher_a": RoleSpec()}, {"teacher": student}):
        with pytest.raises(InputError, match="set monitor=none"):
            toy.monitor.check({"student": student, **others})
    Blind().check({"student": student})


def test_imitation_is_not_watched_and_a_watch_that_cannot_be_is_refused_at_once(tmp_path):
    def composed(*more):
        with initialize_config_dir(str(run.CONF), version_base="1.3"):
            return compose("config", overrides=["stage=distill", "method=imitation",
                                                f"run.dir={tmp_path}", *more])  # fmt: skip

    plain = composed("evaluation=none")
    assert plain.monitor._target_ is None
    training.assemble(plain).close()
    with pytest.raises(InputError, match="set monitor=none"):
        training.assemble(composed("evaluation=none", "monitor=distillation"))
    ladder = ("evaluation=ladder", "evaluation.ladder.teacher={steps: 8, guidance: 3}")
    with pytest.raises(InputError, match=r"evaluation\.ladder\.teacher=null"):
        training.assemble(composed(*ladder))


def test_a_metric_that_is_not_measured_is_closed(tiny, tmp_path):
    closed = []
    toy = Toy(tiny, tmp_path / "run", level=0.5)
    aim = toy.monitor.heldout.suite.metrics["aim"]
    aim.close = lambda: closed.append("aim")
    toy.run(2)
    assert closed == ["aim"] and "aim" not in toy.monitor.heldout.suite.metrics


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"patience": -1}, "patience is -1"), ({"alpha": 0.0}, "alpha is 0.0"),
        ({"window": 0}, "window is 0"), ({"limits": {"dark": 0.0}}, "limits.dark is 0.0"),
        ({"stop_on": ["darkness"]}, "'darkness'"), ({"criterion": {"light": 0.0}}, "criterion"),
        ({"heldout": SimpleNamespace(every=0)}, "every is 0"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(keys, says):
    with pytest.raises(InputError, match=says):
        HackMonitor(**keys)


def test_no_monitor_does_nothing():
    blind = Blind()
    assert blind.stopped is None and not blind.improved(0) and blind.score(3) is None
    assert blind.probe(1) == {} == blind.finish({}) == blind.state_dict()


# ---------------------------------------------------------------- the nano model, by its command

HACK = (
    "stage=direct", "~reward", "+reward._target_=darkness.Darkness", "launch.threads=1",
    "evaluation=none", "sampler.steps=4", "data.batch_size=4", "method.samples=2",
    "method.chunk=8", "optim.optimizer.lr=4e-4", "train.export_dtype=fp32",
    "monitor.heldout.prompts=16", "monitor.heldout.every=2", "~monitor.heldout.metrics.ocr",
)  # fmt: skip


def command(*arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_nano_model_is_saved_from_the_dark(tmp_path):
    run = tmp_path / "run"
    out = command(*HACK, "train.steps=12", f"run.dir={run}")
    found = json.loads((run / "summary.json").read_text())["monitor"]
    assert found["dials"]["heldout/dark"]["flagged"] is not None and "heldout/dark" in out
    assert found["stopped"] and found["exported"]["of"] < 12
    best = found["exported"]["step"]
    assert best == found["best"] < found["exported"]["of"]
    held = load_checkpoint(run / "checkpoints" / f"step_{best:06d}").weights
    files = sorted((run / "export" / "transformer").glob("*.safetensors"))
    exported = {k: v for file in files for k, v in load_file(file).items()}
    assert {f"policy/{k}" for k in exported} == set(held)
    assert all(torch.equal(v, held[f"policy/{k}"]) for k, v in exported.items())


@pytest.mark.slow
def test_the_nano_model_is_left_alone_by_a_reward_that_is_no_hack(tmp_path):
    run = tmp_path / "run"
    command("stage=nft", "reward=signs", "launch.threads=1", "evaluation=none", "data.batch_size=4",
            "method.group=4", "monitor.heldout.prompts=16", "monitor.heldout.every=2",
            "~monitor.heldout.metrics.ocr", "train.export=false", "train.steps=6",
            f"run.dir={run}")  # fmt: skip
    found = json.loads((run / "summary.json").read_text())["monitor"]
    assert found["stopped"] is None and found["exported"]["of"] == 6
    assert [n for n, row in found["dials"].items() if row["flagged"] is not None] == []


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_ranks_see_what_one_sees(tmp_path, engine):
    short = (*HACK, "train.steps=4", "train.export=false", "model.vae_autocast=fp32",
             "engine.autocast=fp32")  # fmt: skip
    extra = ("engine.precision=fp32",) if engine == "zero3" else ()
    command(*short, f"run.dir={tmp_path / 'one'}")
    command(*short, *extra, f"engine={engine}", "launch.processes=2", f"run.dir={tmp_path / 'two'}")
    one, two = (
        json.loads((tmp_path / name / "summary.json").read_text())["monitor"]
        for name in ("one", "two")
    )
    assert set(one["dials"]) == set(two["dials"]) and len(one["heldout"]) == 3
    assert one["exported"]["step"] == two["exported"]["step"]
    for name in ("dark", "speed", "saturation", "criterion"):
        a, b = ([check[name] for check in run["heldout"].values()] for run in (one, two))
        assert a == pytest.approx(b, abs=5e-3), name
