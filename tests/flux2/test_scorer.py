"""What a training run asks of its reward: scores, failures, gradients, and what it waits for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from flux2.errors import InputError
from flux2.files import read_json
from flux2.log import Log
from flux2.scorer import Scorer, calibrate, close
from flux2.types import Batch


class Codec:
    """Latents are the images."""

    def decode(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x

    def decode_float(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x


class Given:
    """A reward that gives what it was told to give."""

    engine = "given(v=1)"
    card = SimpleNamespace(differentiable=True, cost="light", licence="none")

    def __init__(self, *values: float) -> None:
        self.values, self.failures = values, Counter[str]()

    def __call__(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        found = torch.tensor(self.values)
        self.failures["odd"] += int(found.isnan().sum())
        return {"reward": found}

    def differentiable(self, images: Tensor, batch: Batch) -> Tensor:
        return images.mean((1, 2)) + torch.tensor(self.values)


IDS = torch.arange(2)
BATCH = Batch(IDS, ("p",) * 2, None, IDS, ({},) * 2, (1, 1))
NAN = float("nan")


def scorer(*values: float) -> Scorer:
    return Scorer(Given(*values), SimpleNamespace(codec=Codec()))


def test_failures_of_a_step_are_counted_once():
    score = scorer(1.0, NAN)
    assert score(torch.zeros(2, 1, 1), BATCH)()["reward"][0] == 1
    found = score.probe()
    assert found["failures/odd"] == 1 and found["time/reward"] >= 0
    assert set(score.probe()) == {"time/reward"}  # nothing new
    score(torch.zeros(2, 1, 1), BATCH)()
    assert score.probe()["failures/odd"] == 1


def test_a_first_step_without_any_score_is_refused_and_a_later_one_is_masked():
    score = scorer(NAN, NAN)
    score(torch.zeros(2, 1, 1), BATCH)()
    with pytest.raises(InputError, match=r"no sample of the first step \(odd × 2\)"):
        score.probe()
    # One chunk of several is no reason: another, or another rank's, has scores.
    score.reward.values = (1.0, NAN)
    score(torch.zeros(2, 1, 1), BATCH)()
    score.probe()
    score.reward.values = (NAN, NAN)
    score(torch.zeros(2, 1, 1), BATCH)()
    assert score.probe()["failures/odd"] == 2


def test_steps_that_ask_for_no_reward_are_no_failure():
    """As those in which the fake score is trained alone."""
    score = scorer(NAN, NAN)
    for _ in range(2):
        assert set(score.probe()) == {"time/reward"}
    score(torch.zeros(2, 1, 1), BATCH)()
    with pytest.raises(InputError, match="first step"):
        score.probe()


def test_the_gradients_way_is_watched_as_well():
    score = scorer(NAN, NAN)
    score.check_gradient()
    score.differentiable(torch.zeros(2, 1, 1), BATCH)
    with pytest.raises(InputError, match="first step"):
        score.probe()
    score = scorer(0.0, 0.5)
    x = torch.zeros(2, 1, 1, requires_grad=True)
    score.differentiable(x, BATCH).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0.5, 0.5]  # images are (x + 1)/2
    ids, scores = score.noted()  # for data that resample
    assert ids.tolist() == BATCH.groups.tolist() and scores.tolist() == pytest.approx([0.5, 1.0])
    assert "time/reward" in score.probe()
    with pytest.raises(InputError, match="has no gradient"):
        Scorer(object()).check_gradient()


def test_without_a_reward_there_is_nothing_to_tell():
    assert Scorer(None).probe() == {} and Scorer(None).engines == []
    assert scorer(1.0).engines == ["given(v=1)"] and "given" in (scorer(1.0).describe() or "")


class Curious(Given):
    """A reward that measures the policy first."""

    wants: tuple[int, int] | None = (5, 3)

    def calibrate(self, chunks: Any) -> Mapping[str, Mapping[str, float]]:
        self.seen = [(images.flatten().tolist(), batch) for images, batch in chunks]
        return {"one": {"*": 0.5, "": 0.25}, "two": {"*": 0.125}}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.wants = None


def test_a_reward_measures_what_it_wants_of_the_policy(tmp_path: Path, capsys):
    """5 prompts by 2 a batch are three batches, each drawn three times; shown, and kept."""
    curious = Curious(1.0)
    score = Scorer(curious, SimpleNamespace(codec=Codec()))  # pyright: ignore[reportArgumentType]
    asked: list[tuple[int, int]] = []

    def draw(k: int, times: int) -> tuple[Tensor, Batch]:
        asked.append((k, times))
        return torch.full((6, 1, 1), float(k)), BATCH.repeat(times)

    cfg = OmegaConf.create({"wandb": "off", "show": [], "interval": 10.0})
    with Log(tmp_path, cfg, 1) as log:
        calibrate(score, draw, 2, log, tmp_path / "calibration.json")
        assert asked == [(0, 3), (1, 3), (2, 3)] and len(curious.seen) == 3
        images, batch = curious.seen[1]
        assert images == [1.0] * 6 and batch.prompts == ("p",) * 6
        assert read_json(tmp_path / "calibration.json")["one"] == {"*": 0.5, "": 0.25}
        said = capsys.readouterr().out
        assert "calibrated on 5 prompts × 3" in said
        assert said.splitlines()[-1].split() == ["two", "-", "0.1250"]
        # A resumed run knows it already.
        score.load_state_dict({})
        assert score.wants is None and Scorer(None).wants is scorer(1.0).wants is None
        calibrate(score, draw, 2, log, tmp_path / "none.json")
    assert len(asked) == 3 and not (tmp_path / "none.json").exists()


def test_what_has_processes_is_closed():
    closed: list[str] = []
    close(None, object(), SimpleNamespace(close=lambda: closed.append("a")), Given(1.0))
    assert closed == ["a"]
