"""Every file of conf/ and every recipe: it composes, and what it names can be built so.

Nothing is built here. A `_target_` is imported, and the keys beside it are bound to its signature,
so that a key that its class does not know fails in seconds and without weights.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

import run
from flux2.data.loader import Collator

CONF = run.CONF
STAGES = sorted(p.stem for p in (CONF / "stage").glob("*.yaml"))
RECIPES = [str(p.relative_to(CONF / "experiment").with_suffix(""))
           for p in sorted((CONF / "experiment").rglob("*.yaml"))]  # fmt: skip
PLUMBING = ("_target_", "_partial_", "_convert_", "_recursive_")  # Hydra's own keys
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("stage", "experiment", "comparison")  # the last: for recipes only
    and (path.parent.name, path.stem) != ("plan", "plan")  # conf/plan is a link to conf/stage
]


@functools.cache
def composed(*overrides: str) -> DictConfig:
    """The configuration as run.py composes it, with Hydra's own part. Not to be changed."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def own(cfg: DictConfig, said: str | None = None) -> dict[str, Any]:
    """The configuration without Hydra's part, interpolations resolved, nothing missing.

    said: what the user gives for the values that a file leaves to the user (`???`); None: nothing.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    OmegaConf.set_readonly(cfg, False)
    del cfg["hydra"]
    if said is not None:
        for key in OmegaConf.missing_keys(cfg):
            OmegaConf.update(cfg, key, said)
    content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted path, node) of every mapping that names a `_target_`."""
    if isinstance(node, Mapping):
        if node.get("_target_") is not None:  # null: nothing, as in evaluation=none
            yield path, dict(node)
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{path}.{index}")


def misfit(function: Any, keys: Mapping[str, Any], *given: str) -> str | None:
    """Why `function` cannot be called with these keys and what the code itself gives; None: it can.

    A function that takes any keyword is a misfit too: no misspelling could be told there.
    """
    if not callable(function):
        return "is not callable"
    signature = inspect.signature(function)
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return "takes any keyword"
    arguments = [k for k in keys if k not in PLUMBING]
    try:
        signature.bind(**dict.fromkeys([*arguments, *given]))
    except TypeError as error:
        return str(error)
    return None


def problems(cfg: Mapping[str, Any]) -> list[str]:
    """What building a configuration would stumble over."""
    # What a stage adds to what is configured (flux2/train.py).
    given = {"optim.optimizer": ("roles",)}
    if cfg.get("reward") is not None:
        given["method"] = ("score",)
    found: list[str] = []
    for path, node in targets(cfg):
        why = misfit(get_object(node["_target_"]), node, *given.get(path, ()))
        found += [] if why is None else [f"{path}: {node['_target_']}: {why}"]
    if not callable(get_object(cfg["stage"]["run"])):
        found.append(f"stage.run: {cfg['stage']['run']} is not callable")
    if "collate" in cfg.get("data", {}):
        why = misfit(Collator, cfg["data"]["collate"], "model", "cache")
        found += [] if why is None else [f"data.collate: {why}"]
    return found


def choose(stage: str, group: str, option: str) -> str | None:
    """The override that gives the stage this option; None where it cannot take it."""
    if group in composed(f"stage={stage}").hydra.runtime.choices:
        return f"{group}={option}"
    return None


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage: str):
    cfg = own(composed(f"stage={stage}"))
    assert cfg["stage"]["name"] == stage
    assert problems(cfg) == []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option(group: str, option: str):
    tried = 0
    for stage in STAGES:
        override = choose(stage, group, option)
        if override is not None:
            cfg = own(composed(f"stage={stage}", override), said="folder")
            assert cfg.get(group) or cfg["method"][group], override  # an axis lies in its method
            assert problems(cfg) == [], f"stage={stage} {override}"
            tried += 1
            if tried == 3:  # composing takes a second, and an option is the same in all stages
                break
    assert tried, f"no stage takes {group}={option}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str):
    cfg = own(composed(f"experiment={recipe}"))
    assert cfg["recipe"]["stage"] == cfg["stage"]["name"]
    assert problems(cfg) == []
    # It opens with the command that runs it.
    assert f"python run.py experiment={recipe} " in (CONF / f"experiment/{recipe}.yaml").read_text()


def test_the_default_is_the_demo():
    cfg = composed()
    assert (cfg.stage.name, cfg.model.name, cfg.seed) == ("nft", "nano", 0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_key_of_a_file_is_found(stage: str):
    cfg = own(composed(f"stage={stage}"))
    count = 0
    for path, _ in targets(cfg):
        wrong = OmegaConf.create(cfg)
        OmegaConf.update(wrong, path, {"misspelt": 1}, force_add=True)
        content = OmegaConf.to_container(wrong)
        assert isinstance(content, dict)
        [problem] = problems({str(k): v for k, v in content.items()})
        assert problem.startswith(f"{path}: ") and "misspelt" in problem
        count += 1
    assert count or stage in ("export", "pipeline")  # which is made of no parts


def test_a_missing_key_and_an_unknown_target_are_found():
    cfg = own(composed("stage=autoencoder"))
    lr = cfg["optim"]["optimizer"].pop("lr")
    [problem] = problems(cfg)
    assert problem.startswith("optim.optimizer: ") and "'lr'" in problem
    cfg["optim"]["optimizer"]["lr"] = lr
    cfg["data"]["collate"]["txet"] = True
    [problem] = problems(cfg)
    assert problem.startswith("data.collate: ") and "'txet'" in problem
    del cfg["data"]["collate"]["txet"]
    cfg["method"]["_target_"] += "X"
    with pytest.raises(Exception, match="AutoencoderTrainingX"):
        problems(cfg)


@pytest.mark.parametrize(
    "override",
    ["method.klip=1", "optim.optimizer.lrr=1", "data.dataset.lenght=3", "train.step=3", "sed=1"],
)
def test_a_misspelt_key_of_the_command_line_is_refused(override: str):
    with pytest.raises(ConfigCompositionException):
        composed("stage=grpo", override)


def test_help_describes_stages_that_exist():
    # Not all: Hydra lists the rest among the choices, so that a new method edits no old file.
    template = composed().hydra.help.template
    block = template.split("Stages\n")[1].split("\n\n")[0]
    described = re.findall(r"^  (\w+)  ", block, re.MULTILINE)
    assert {"grpo", "nft", "sft", "eval"} <= set(described) <= set(STAGES)
    assert "$APP_CONFIG_GROUPS" in template


def test_shipped_paths_do_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = Path(composed("stage=sample").model.path)
    assert path.is_absolute() and path.is_relative_to(CONF.parent)
