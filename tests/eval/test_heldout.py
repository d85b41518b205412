"""Held-out evaluation beside a run: what is measured once, what a resume takes up, its table."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from eval.heldout import HeldOut
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.files import write_json
from flux2.generate import Sampler
from flux2.lineage import MANIFEST
from flux2.log import Log
from flux2.model import Flux2
from flux2.roles import velocity_of
from flux2.types import Batch

PROMPTS = 3


class Red:
    """How red images are; counts the calls."""

    def __init__(self, name: str = "red") -> None:
        self.name, self.engine, self.calls = name, f"{name}(v=1)", 0

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        self.calls += 1
        return {self.name: images[:, 0].float().mean((1, 2)) / 255}


class Alone(dict[str, Any]):
    """Roles of one name, as HeldOut sees them."""

    trainable = ("model",)


def held_out(*metrics: Red, **settings: Any) -> HeldOut:
    world = SignWorld("heldout", length=PROMPTS)
    sampler = Sampler(steps=1, guidance=1.0)
    return HeldOut(world, sampler, {m.name: m for m in metrics}, **settings)


def config(run: Path, **rewards: Any) -> Any:
    run.mkdir(exist_ok=True)
    write_json(run / MANIFEST, {"id": "1", "parents": [], **rewards})
    logger = {"wandb": "off", "project": "p", "entity": None, "group": None, "tags": [],
              "show": [], "interval": 10.0}  # fmt: skip
    return OmegaConf.create(
        {"run": {"dir": str(run), "id": "1"}, "stage": {"name": "sft"}, "logger": logger}
    )


def begin(held: HeldOut, model: Flux2, run: Path, step: int = 0, **rewards: Any) -> Log:
    cfg = config(run, **rewards)
    log = Log(run, cfg.logger, 2, step)
    held.start(cfg, model, Alone(model=velocity_of(model)), log, step)
    return log


def test_a_metric_that_is_null_is_left_out() -> None:
    sampler = Sampler(steps=1, guidance=1.0)
    held = HeldOut(SignWorld("heldout", length=1), sampler, {"red": Red(), "second": None})
    assert list(held.suite.present) == ["red"]
    with pytest.raises(InputError, match="'second', which is no metric"):
        HeldOut(SignWorld("heldout", length=1), sampler, {"second": None}, trained_on=["second"])


def test_the_ceiling_is_measured_once(tiny, tmp_path: Path) -> None:
    """It does not depend on what is trained: of two evaluations the second scores samples only."""
    metric = Red()
    held = held_out(metric, shown=1)
    with begin(held, tiny, tmp_path / "run"):
        assert metric.calls == 2  # samples, and targets
        with torch.no_grad():
            for p in tiny.transformer.parameters():
                p.mul_(1.01)
        held.after_step(1)  # every=0: nothing
        assert metric.calls == 2
        summary = held.finish(1)
    assert metric.calls == 3 and summary["change"]["red"]["gain"] != 0
    ceiling = held._ceilings(tiny)
    assert summary["ceiling"] == ceiling and 0 < ceiling["red"] < 1
    assert held._history[0].ceilings == held._history[1].ceilings == ceiling


def test_runs_of_a_sweep_share_their_ceilings(tiny, tmp_path: Path) -> None:
    """Kept for what is alike in all that they depend on, and for nothing else."""
    cache = str(tmp_path / "cache")

    def calls(name: str, metric: Red, prompts: int = 3, model: Flux2 = tiny) -> int:
        held = held_out(metric, shown=1, cache=cache, prompts=prompts)
        with begin(held, model, tmp_path / name):
            first = held._history[0].ceilings
        assert first == held._ceilings(model)
        return metric.calls - 1  # less the line above

    assert calls("first", Red()) == 2 and calls("alike", Red()) == 1
    assert calls("metric", Red("second")) == 2 and calls("prompts", Red(), prompts=2) == 2
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        next(other.vae.decoder.parameters()).mul_(1.5)
    assert calls("autoencoder", Red(), model=other) == 2
    for file in Path(cache).iterdir():
        file.write_text("{")
    assert calls("torn", Red()) == 2 and calls("again", Red()) == 1


def test_a_resumed_run_takes_up_its_ceiling(tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with begin(held_out(Red(), shown=1), tiny, run):
        pass
    again = Red()
    later = held_out(again, shown=1)
    with begin(later, tiny, run, step=1):
        assert again.calls == 0
        later.finish(2)
    assert again.calls == 1  # the samples of step 2
    assert later._history[2].ceilings == later._history[0].ceilings
    # With a metric more there is no ceiling of it yet: all are measured anew.
    red, second = Red(), Red("second")
    more = held_out(red, second, shown=1, every=3)
    with begin(more, tiny, run, step=3):
        assert red.calls == second.calls == 2
        assert set(more._history[3].ceilings) == {"red", "second"}
        assert set(more.finish(3)["change"]) == {"red"}  # the other has no before


def test_a_ceiling_of_other_prompts_is_not_taken_up(tiny, tmp_path: Path) -> None:
    with begin(held_out(Red(), shown=1), tiny, tmp_path / "run"):
        pass
    held = held_out(Red(), shown=1)
    held.dataset = SignWorld("heldout", length=PROMPTS, seed=8)
    with begin(held, tiny, tmp_path / "run", step=1):
        assert held._known is None


def test_the_table_is_written_as_all_of_them(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = held_out(Red(), Red("blue"), shown=1, control={"red": 0.25})
    with begin(held, tiny, tmp_path / "run", rewards=["red(v=1)"]):
        held.finish(1)
    text = (tmp_path / "run" / "evaluation" / "table.txt").read_text()
    head, red, blue, *_, note = text.splitlines()
    assert head.split()[:4] == ["held-out", "before", "after", "gain"]
    # Nothing was trained.
    assert red.split()[:2] == ["red", "*"] and "±0.000  ±0.000 to ±0.000" in red
    assert red.split()[-1] == "+0.250" and blue.split()[-1] == "-" and "*" not in blue
    assert "* training maximised" in note and text in capsys.readouterr().out
