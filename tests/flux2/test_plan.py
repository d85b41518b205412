"""stage=plan: what it recommends, prints and writes; the line at a start."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import run  # noqa: F401  (registers what conf/ interpolates)
from flux2.errors import BatchError, InputError
from flux2.footprint import Engine, Footprint, Prediction
from flux2.plan import GIB, Choice, fits, line, plan, recommend

CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def choice(engine: Engine, gib: float, checkpointing: bool = False, ranks: int = 8) -> Choice:
    found = Prediction({"weights": int(gib * GIB)}, {"update": 0}, {"process": GIB})
    return Choice(engine, ranks, checkpointing, found)


DDP, ONE, THREE = Engine("ddp"), Engine("deepspeed", 1, True), Engine("deepspeed", 3, True)
HOST = Engine("deepspeed", 2, True, offload=True)


def test_a_gpu_keeps_something_for_itself() -> None:
    assert fits(choice(DDP, 75).found, 80)
    assert not fits(choice(DDP, 76).found, 80)


def test_copies_come_before_shards_and_shards_before_recomputation() -> None:
    ways = [choice(HOST, 5), choice(THREE, 10), choice(ONE, 20, True), choice(ONE, 30),
            choice(DDP, 40)]  # fmt: skip
    assert recommend(ways, 8, 80) is ways[4]
    assert recommend(ways, 8, 36) is ways[3]
    assert recommend(ways, 8, 24) is ways[2]
    assert recommend(ways, 8, 16) is ways[1]
    assert recommend(ways, 8, 8) is ways[0]
    assert recommend(ways, 8, 4) is None
    few = [choice(DDP, 10, ranks=2), choice(THREE, 10, ranks=4)]
    assert recommend(few, 8, 80) is few[1]  # a batch of 4 keeps 4 of 8 GPUs at work
    assert few[1].command == "engine=zero3 launch.processes=4"


def test_the_stage_prints_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = composed("stage=plan", "plan=grpo", "adapter=lora", "plan.gpus=2", "plan.gpu_memory=4",
                   f"run.dir={tmp_path}", "method.chunk=4", "adapter.targets=[to_q]")  # fmt: skip
    cfg.evaluation = None
    assert cfg.stage.name == "plan" and cfg.method._target_.endswith("GRPO")
    summary = plan(cfg)
    out = capsys.readouterr().out
    assert "GRPO on nano: LoRA of rank 16" in out and "zero3" in out and "frozen base" in out
    # Copies on both GPUs: nothing of a nano model needs to be sharded.
    assert "Run with engine=ddp launch.processes=2:" in out.splitlines()[-1]
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(summary))
    chosen = summary["chosen"]
    total = sum(chosen["stays"].values()) + max(chosen["passing"].values())
    assert chosen["peak"] == total and summary["recommended"]["fits"]
    assert {c["ranks"] for c in summary["choices"]} == {1, 2}


class Sized(Footprint):
    """A footprint of 10 GiB for each sample of a micro-batch, whatever the engine."""

    def predict(self, engine: Engine, ranks: int, checkpointing: bool) -> Prediction:
        return Prediction({"weights": 10 * GIB}, {"pass": self.cfg.method.micro * 10 * GIB}, {})


@pytest.mark.parametrize(
    ("overrides", "last"),
    [
        (("plan.gpu_memory=80",), "With method.micro=1 run engine=none: 20.0 GiB of 80 on each"),
        (("plan.gpu_memory=16",), "Nothing fits: try adapter=lora, data.cache=<folder> "),
        (("plan.gpu_memory=16", "adapter=lora"), "Nothing fits: try model.quantise=nf4, "),
        (("plan.gpu_memory=80", "method.micro=2"), "Run with engine=none: 30.0 GiB of 80 on "),
    ],
)
def test_it_says_what_to_run_or_what_to_change(
    overrides: tuple[str, ...], last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("flux2.plan.Footprint", Sized)
    plan(composed("stage=plan", "plan.gpus=1", "plan.height=64", f"run.dir={tmp_path}",
                  "method.micro=16", *overrides))  # fmt: skip
    assert last in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("plan=eval",), "nothing to plan"),
        (("plan.gpus=0",), "plan.gpus"),
        (("plan.device=tpu",), "choose cuda or cpu"),
        (("plan.height=100",), "multiples of 16"),
        (("data=folder",), "plan.height"),
        (("model.quantise=nf4",), "adapter=lora"),
    ],
)
def test_wrong_input_is_one_line(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says) as refused:
        plan(composed("stage=plan", *overrides))
    assert "\n" not in str(refused.value)


class Flat(Footprint):
    """A footprint of 10 GiB whatever is asked."""

    def predict(self, engine: Engine, ranks: int, checkpointing: bool) -> Prediction:
        return Prediction({"weights": 10 * GIB}, {"pass": 0}, {})


def test_what_is_not_counted_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux2.plan.Footprint", Flat)
    summary = plan(composed("stage=plan", "plan=direct", "plan.gpus=1", f"run.dir={tmp_path}"))
    out = capsys.readouterr().out
    assert "  not counted: networks of the reward (SpellingReward) and their graph" in out
    assert "SpellingReward" in summary["not_counted"] and summary["method"] == "Direct"
    summary = plan(composed("stage=plan", "plan.gpus=1", f"run.dir={tmp_path}"))
    assert "not counted" not in capsys.readouterr().out and summary["not_counted"] is None


def test_the_line_at_a_start_says_that_rewards_come_to_it() -> None:
    text = line(composed("stage=direct", "adapter=lora", "evaluation=none"))
    assert text.startswith("memory: ") and text.endswith(", the reward's networks aside")
    assert "for the pass of policy" in text


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (("stage=distill", "critic=ladd", "data.collate.latents=false"), "compares with data"),
        (("stage=distill", "method=phased", "data.collate.latents=false"), "prompts alone"),
        (("stage=guidance", "data.collate.unconditional=false"), "empty prompt's condition"),
        (
            (
                "stage=sft", "target=guided", "method.target.scale=[3,3]",
                "data.collate.unconditional=false",
            ),
            "empty prompt",
        ),
    ],
    ids=lambda x: x[1] if isinstance(x, tuple) else "",
)
def test_batches_that_lack_what_the_method_needs_are_refused_before_weights(
    stage: tuple[str, ...], says: str
) -> None:
    with pytest.raises(BatchError, match=says):
        line(composed(*stage, "evaluation=none"))
    fitting = [word for word in stage if not word.startswith("data.")]
    assert line(composed(*fitting, "evaluation=none")).startswith("memory: ")


def test_a_recipe_is_planned_as_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its overrides win over the stage's defaults, and stage=plan over its own stage."""
    monkeypatch.setattr("flux2.plan.Footprint", Sized)
    cfg = composed("stage=plan", "plan=dpo", "experiment=klein/dpo-full", f"run.dir={tmp_path}")
    assert (cfg.stage.name, cfg.recipe.stage) == ("plan", "dpo")
    assert cfg.engine.name == "zero2" and cfg.adapter is None and cfg.method.micro == 8
    assert plan(cfg)["size"] == [512, 512, 0]  # of pairs that are not made yet


def test_data_without_a_path_can_be_planned_by_size(tmp_path: Path) -> None:
    cfg = composed("stage=plan", "data=folder", "plan.height=64", "plan.gpus=1",
                   f"run.dir={tmp_path}", "data.batch_size=2")  # fmt: skip
    cfg.evaluation = None
    assert plan(cfg)["size"] == [64, 64, 0]


def test_the_line_at_a_start_is_cheap_and_needs_no_weights() -> None:
    cfg = composed("stage=sft", "model=klein-4b-base", "adapter=lora", "engine.device=cpu")
    line(cfg)  # imports
    begun = time.process_time()
    text = line(cfg)
    assert time.process_time() - begun < 5  # about one second; a whole forward would take minutes
    assert text.startswith("memory: ") and "GiB a rank predicted" in text and "\n" not in text


def test_a_failed_forecast_is_told_and_ends_nothing() -> None:
    cfg = composed("stage=sft")
    cfg.method = {"_target_": "builtins.dict"}  # no method: it has no roles
    text = line(cfg)
    assert text.startswith("memory: not predicted (AttributeError: ") and "\n" not in text


def test_the_line_says_when_a_gpu_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 2 * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    cfg = composed("stage=sft", "model=klein-4b-base", "adapter=lora")
    assert "the GPU has 2.0: too little; python run.py stage=plan" in line(cfg)
