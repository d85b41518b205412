"""Axes that make no sense together: exit code 2 and one line, before weights are read.

Composing takes a second. So all of them are refused from configurations that are composed once and
changed, and a few, with the names that no file bears, through run.py itself; the slow tests do all
of them so.
"""

from __future__ import annotations

import functools
import signal
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

import run
from flux2 import train
from flux2.errors import InputError

UNKNOWN = [  # no such file, or no such choice of the stage
    (("stage=grpo", "window=last"), "window"),
    (("stage=grpo", "surrogate=none"), "surrogate"),
    (("stage=grpo", "advantage=elo"), "advantage"),
    (("stage=direct", "advantage=group"), "advantage"),
    (("stage=direct", "kernel=cps"), "kernel"),
    (("stage=dpo", "anchor=kl"), "anchor"),
    (("stage=nft", "window=all"), "window"),
    (("stage=awm", "surrogate=clip"), "surrogate"),
]
REFUSED = [
    (("stage=grpo", "kernel=ode"), "no ratio to clip"),
    # kernels, and the steps that are drawn from them
    (("stage=grpo", "method.kernel=cps"), "method.kernel=cps names a file: write kernel=cps"),
    (("stage=grpo", "method.kernel.eta=0"), "eta is 0"),
    (("stage=grpo", "kernel=cps", "method.kernel.eta=1.5"), "eta is 1.5"),
    (("stage=grpo", "method.window.skip=6", "method.window.count=2"), "stays noiseless"),
    (("stage=grpo", "window=sliding", "method.window.count=8"), "stays noiseless"),
    (("stage=grpo", "window=random", "method.window.share=0"), "method.window.share"),
    (("stage=grpo", "window=all", "sampler.steps=1"), "stays noiseless"),
    # surrogates
    (("stage=grpo", "method.surrogate.eps=0"), "method.surrogate.eps"),
    (("stage=grpo", "surrogate=trust", "method.surrogate.delta=-1"), "method.surrogate.delta"),
    # anchors: the mean of a step's law is known to GRPO alone
    (("stage=nft", "anchor=kl"), "use space=velocity"),
    (("stage=awm", "anchor=kl"), "use space=velocity"),
    (("stage=direct", "anchor=kl"), "use space=velocity"),
    (("stage=nft", "method.anchor.space=pixels"), "method.anchor"),
    (("stage=grpo", "anchor=ema", "method.anchor.decay=1"), "method.anchor"),
    (("stage=grpo", "method.anchor.weight=-1"), "method.anchor"),
    # guidance
    (("stage=grpo", "method.guidance=-1"), "method.guidance"),
    (("stage=grpo", "method.train_guidance=-1"), "method.train_guidance"),
    # advantages
    (("stage=grpo", "advantage=per-reward", "method.advantage.weights={}"), "advantage.weights"),
    # rewards with a gradient, and ways to it
    (("stage=direct", "reward=ocr-whole"), "has no gradient"),
    (("stage=direct", "through=one", "method.through.low=0.9", "method.through.high=0.2"),
     "method.through"),
    (("stage=direct", "through=align", "method.through.low=0.05"), "method.through"),
    # what a method has none of
    (("stage=nft", "method.decay=1"), "method.decay"),
    (("stage=awm", "method.eps=0"), "method.eps"),
    (("stage=grpo", "method.group=1"), "a group needs at least 2"),
    # data, roles of model
    (("stage=grpo", "method.steps=0"), "steps"),
    (("stage=grpo", "optim.optimizer.lr=-1"), "learning rate"),
    (("stage=grpo", "data.batch_size=0"), "batch_size"),
    (("stage=grpo", "data.dataset.split=tests"), "split"),
    (("stage=nft", "train.steps=1.5"), "train.steps is 1.5: give a whole number"),
    (("stage=nft", "seed=abc"), "seed is 'abc': give a whole number"),
    (("stage=sft", "data=resampled"), "stage=sft has none"),
    (("stage=sft", "data.captions={long: 1}"), "data.captions asks for long"),
    (("stage=dpo",), "data.dataset.path"),
    (("stage=kto",), "data.dataset.path"),
    (("stage=kto", "method.beta=0", "data=signs"), "method.beta"),
    (("stage=grpo", "model.role=distilled"), "distilled"),
]  # fmt: skip
FINE = [
    ("stage=grpo", "kernel=cps", "window=sliding", "surrogate=guard", "anchor=kl"),
    ("stage=grpo", "kernel=dance", "window=random", "surrogate=trust", "anchor=guided"),
    ("stage=nft", "anchor=velocity", "advantage=winrate"),
    ("stage=awm", "anchor=ema", "advantage=per-reward"),
    ("stage=direct", "through=align", "anchor=velocity"),
]


THROUGH_RUN = [*UNKNOWN[:1], *UNKNOWN[4:5], REFUSED[1], REFUSED[-1]]


@functools.cache
def composed(stage: str) -> DictConfig:
    """A stage's configuration; not to be changed."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        return compose("config", [stage, "evaluation=none", "run.dir=unused"])


def changed(stage: str, *overrides: str) -> DictConfig:
    """composed(stage) with overrides: the file of a group, or a value."""
    cfg = composed(stage).copy()
    OmegaConf.set_struct(cfg, False)
    for override in overrides:
        key, _, value = override.partition("=")
        file = run.CONF / key / f"{value}.yaml"
        if not file.is_file():
            OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"x={value}"]).x)
        elif "@package method." in file.read_text():
            cfg.method[key] = OmegaConf.load(file)
        else:
            cfg[key] = OmegaConf.load(file)
    return cfg


def names(cases: list) -> list[str]:
    return [" ".join(case[0]) for case in cases]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=names(REFUSED))
def test_a_stage_refuses_it_in_one_line(arguments: tuple[str, ...], says: str):
    with pytest.raises(InputError) as caught:
        train.assemble(changed(*arguments)).close()
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", FINE[:2], ids=" ".join)
def test_what_is_near_it_is_fine(arguments: tuple[str, ...]):
    train.assemble(changed(*arguments)).close()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path):
    """call(*arguments) → (exit code, lines of stderr): run.py up to where it would read weights."""

    def assembled(cfg: DictConfig) -> dict[str, str]:
        train.assemble(cfg).close()
        return {}

    monkeypatch.setattr(train, "train", assembled)
    handlers = [(s, signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]

    def call(*arguments: str) -> tuple[int, list[str]]:
        rest = ("evaluation=none", "launch.threads=1", f"run.dir={tmp_path / 'run'}")
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, *rest])
        code = run.main()
        return code, capfd.readouterr().err.splitlines()

    yield call
    for number, handler in handlers:
        signal.signal(number, handler)


def refused(call, arguments: tuple[str, ...], says: str) -> None:
    code, lines = call(*arguments)
    assert code == run.WRONG
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines


@pytest.mark.parametrize(("arguments", "says"), THROUGH_RUN, ids=names(THROUGH_RUN))
def test_the_command_says_it_in_one_line_and_returns_2(call, arguments, says):
    refused(call, arguments, says)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"), [*UNKNOWN, *REFUSED], ids=names([*UNKNOWN, *REFUSED])
)
def test_the_command_refuses_them_all(call, arguments, says):
    refused(call, arguments, says)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", FINE, ids=" ".join)
def test_the_command_takes_what_is_fine(call, arguments):
    assert call(*arguments) == (run.DONE, [])
