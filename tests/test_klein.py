"""The klein recipes: their commands compose, what they name can be built, and the plan's figures
beside the commands are the plan's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig

import run
from flux2.footprint import Footprint, Prediction, engine_of
from flux2.plan import GIB, fits

FOLDER = run.CONF / "experiment" / "klein"
RECIPES = sorted(FOLDER.glob("*.yaml"))
MEMORY = 80
"""GiB of the GPUs that the recipes are for."""
PICKSCORE = 986_000_000 * 4
"""Bytes of PickScore_v1 in fp32, about: CLIP ViT-H/14 with its text half."""


@dataclass(frozen=True)
class Command:
    """A line of a recipe's head: what it overrides, on how many GPUs, and the GiB it promises of
    each and of the host (None: not said)."""

    overrides: tuple[str, ...]
    gpus: int
    gib: float
    host: float | None


LINE = re.compile(
    r"#   python run\.py (\S.*?)  # (\d+) × ([\d.]+) GiB(?:, host ([\d.]+))?$", re.MULTILINE
)


def commands(recipe: Path) -> list[Command]:
    """Those of the recipe itself; what comes before them (stage=pairs) promises nothing."""
    return [
        Command(tuple(words.split()), int(gpus), float(gib), float(host) if host else None)
        for words, gpus, gib, host in LINE.findall(recipe.read_text())
    ]


def composed(overrides: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        return compose("config", list(overrides))


def predicted(command: Command) -> Prediction:
    """As stage=plan predicts it, without weights."""
    cfg = composed(command.overrides)
    footprint = Footprint(cfg)
    return footprint.predict(engine_of(cfg.engine), command.gpus, cfg.engine.checkpointing)


def test_the_documents_table_has_the_same_figures():
    text = (run.CONF.parent / "docs" / "klein.md").read_text()
    for recipe in RECIPES:
        gib = {c.gpus: c.gib for c in commands(recipe)}
        method, _, how = recipe.stem.partition("-")
        [row] = [x for x in text.splitlines() if x.startswith(f"| `{method}-lora`")]
        cell = row.split("|")[3 if how == "lora" else 4].strip()
        assert cell == f"{gib[1]} / {gib[8]}", recipe.stem


def test_every_method_has_lora_and_full_on_one_gpu_and_on_eight():
    names = {p.stem for p in RECIPES}
    methods = ("sft", "dpo", "grpo", "nft", "awm", "direct", "distill")
    assert names == {f"{m}-{how}" for m in methods for how in ("lora", "full")}
    for recipe in RECIPES:
        found = commands(recipe)
        assert sorted(c.gpus for c in found) == [1, 8], recipe
        for command in found:
            assert command.overrides[0] == f"experiment=klein/{recipe.stem}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_what_a_recipe_says_of_itself_is_what_is_composed(recipe: Path):
    method, _, how = recipe.stem.partition("-")
    for command in commands(recipe):
        cfg = composed(command.overrides)
        assert cfg.model.name == "klein-4b-base" and cfg.stage.name == cfg.recipe.stage == method
        assert (cfg.adapter is None) == (how == "full")
        assert cfg.launch.processes == command.gpus
        wanted = {("lora", 1): "none", ("lora", 8): "ddp", ("full", 1): "zero2-offload",
                  ("full", 8): "zero2"}  # fmt: skip
        assert cfg.engine.name == wanted[how, command.gpus]
        assert cfg.data.batch_size % command.gpus == 0
        # Every sample that is drawn is guided: klein-base needs it, and its student has it in it.
        student = method == "distill"
        assert cfg.method.get("guidance", 4.0) == 4.0
        assert cfg.sampler.guidance == (1.0 if student else 4.0)
        assert instantiate(cfg.sampler, _convert_="all").steps == (4 if student else 50)
        # No prompt is trained on and evaluated.
        assert cfg.data.dataset.path != cfg.evaluation.dataset.path
        assert Path(cfg.evaluation.dataset.path).is_file()
        assert cfg.train.save_every % cfg.evaluation.every == 0


def _near(command: Command) -> None:
    found = predicted(command)
    assert found.peak / GIB == pytest.approx(command.gib, rel=0.02, abs=0.06), command
    if command.host is not None:
        assert found.host_peak / GIB == pytest.approx(command.host, rel=0.02, abs=0.6), command
    assert fits(found, MEMORY - PICKSCORE / GIB), command


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_figures_of_all_recipes_are_the_plans(recipe: Path):
    for command in commands(recipe):
        _near(command)


def test_a_recipe_is_planned_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        place = f"run.dir={tmp_path / 'run'}"
        monkeypatch.setattr("sys.argv", ["run.py", *arguments, place])
        code = run.main()
        out, err = capfd.readouterr()
        return code, out, err

    code, out, _ = call("stage=plan", "experiment=klein/dpo-full")
    assert code == 0 and "klein-4b-base" in out and "GiB" in out
    for wrong, message in (
        (["stage=sft", "experiment=klein/dpo-full"], "dpo"),
        (["stage=plan", "plan=sft", "experiment=klein/dpo-full"], "leave out plan=sft"),
    ):
        code, _, err = call(*wrong)
        assert code == 2 and message in err and len(err.splitlines()) == 1
