"""Held-out losses by time: paired, by their own sum, and the same for any number of chunks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from eval.matching import FILE, MatchingLoss
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.flow import Uniform, guide
from flux2.log import Log
from flux2.rng import Rng
from flux2.types import Condition

WORLD = SignWorld("heldout", length=12, seed=1)
CONF = Path(__file__).parents[2] / "conf" / "logger" / "default.yaml"


class Off:
    """v = shift·x, and what it was called with."""

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.seen = shift, []

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.seen.append((x, t, cond))
        return self.shift * x


class Roles(dict):
    trainable = ("model",)


@pytest.fixture
def hook(tiny, tmp_path):
    """(velocity, step, settings) → the hook of a run in tmp_path, begun at that step."""
    cfg = OmegaConf.create({"run": {"dir": str(tmp_path)}})
    with Log(tmp_path, OmegaConf.load(CONF), 10) as log:

        def start(velocity: Any, step: int = 0, **kwargs: Any) -> MatchingLoss:
            made = MatchingLoss(WORLD, **{"samples": 5, "bins": 3, "chunk": 2, **kwargs})
            made.start(cfg, tiny, Roles(model=velocity), log, step)
            return made

        yield start


def test_the_loss_of_each_part_is_that_of_its_draws(tiny):
    """Against the sum written out: v = 0 leaves ‖ε − x0‖²."""
    velocity = Off()
    got = MatchingLoss(WORLD, samples=5, bins=3, chunk=5).measure(tiny, velocity)
    batch = Collator(tiny)([WORLD[i] for i in range(5)], torch.arange(5))
    assert batch.x0 is not None
    for k in range(3):
        eps = Rng(1234, 0)("heldout", batch.ids, batch.shape, counter=k)
        want = (eps - batch.x0).square().mean((1, 2)).double()
        torch.testing.assert_close(got[:, k], want)
        x, t, _ = velocity.seen[k]
        assert (t >= k / 3).all() and (t < (k + 1) / 3).all() and len(set(t.tolist())) == 5
        torch.testing.assert_close(x, (1 - t)[:, None, None] * batch.x0 + t[:, None, None] * eps)


def test_it_does_not_depend_on_the_chunks(tiny):
    one, two = (MatchingLoss(WORLD, samples=5, bins=2, chunk=c) for c in (1, 4))
    torch.testing.assert_close(one.measure(tiny, Off(0.3)), two.measure(tiny, Off(0.3)))


@pytest.mark.parametrize("embedder", [True, False])
def test_guidance_is_undone(tiny, embedder: bool):
    """A network whose answer is guided has the loss of what it stands for; the embedder is given
    the same strength at both prompts."""
    g = 3.0

    def guided(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        said = not torch.equal(cond.text, tiny.text([""], tiny.device).expand_as(cond.text))
        if embedder:
            assert cond.guidance is not None and bool((cond.guidance == g).all())
        else:
            assert cond.guidance is None
        free = -0.5 * x
        return guide(0.2 * x, free, torch.full_like(t, g)) if said else free

    tiny.info = replace(tiny.info, guidance=2.0 if embedder else None)
    got = MatchingLoss(WORLD, samples=3, bins=2, guidance=g).measure(tiny, guided)
    tiny.info = replace(tiny.info, guidance=None)
    want = MatchingLoss(WORLD, samples=3, bins=2).measure(tiny, Off(0.2))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_a_run_measures_before_now_and_then_and_after(hook, tmp_path, capsys):
    velocity = Off()
    made = hook(velocity, every=2)
    assert made.probe(1) == {}
    velocity.shift = 0.1
    row = made.probe(2)
    assert set(row) == {"heldout/loss", "heldout/t0", "heldout/t1", "heldout/t2"}
    parts = [row[f"heldout/t{k}"] for k in range(3)]
    assert row["heldout/loss"] == pytest.approx(sum(parts) / 3)
    calls = len(velocity.seen)
    found = made.finish(2)["heldout_loss"]
    assert len(velocity.seen) == calls  # what is known is not measured again
    assert found["after"] == pytest.approx(parts) and len(found["change"]) == 4
    stored = json.loads((tmp_path / FILE).read_text())
    assert sorted(stored["losses"]) == ["0", "2"]
    gain = torch.tensor(stored["losses"]["2"]) - torch.tensor(stored["losses"]["0"])
    assert found["change"][1]["mean"] == pytest.approx(float(gain[:, 1].mean()), rel=1e-5)
    low, high = found["change"][1]["low"], found["change"][1]["high"]
    assert low < found["change"][1]["mean"] < high
    assert "0.33 … 0.67" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_what_it_measured(hook):
    velocity = Off()
    first = hook(velocity, every=1)
    first.probe(1)
    first.probe(2)
    calls = len(velocity.seen)
    again = hook(velocity, step=1, every=1)
    assert len(velocity.seen) == calls
    assert again.probe(1) == first.probe(1)
    assert again.probe(2) == first.probe(2)
    assert len(velocity.seen) > calls  # step 2 was after the checkpoint
    assert "before" in again.finish(2)["heldout_loss"]
    with pytest.raises(InputError, match="was measured with") as caught:
        hook(velocity, step=1, bins=4)
    assert "\n" not in str(caught.value)


def test_a_run_that_begins_anew_takes_nothing_from_one_that_failed_at_once(hook):
    old, new = (hook(Off(k)).finish(0)["heldout_loss"]["before"] for k in (0.3, 0.0))
    assert len(new) == 3 and new != old
    assert len(hook(Off(), bins=2).finish(0)["heldout_loss"]["before"]) == 2


def test_wrong_settings_are_refused():
    for wrong in ({"samples": 1}, {"samples": 13}, {"bins": 0}, {"chunk": 0}, {"every": -1},
                  {"guidance": 0.0}):  # fmt: skip
        with pytest.raises(InputError, match=f"heldout.{next(iter(wrong))}"):
            MatchingLoss(WORLD, **{"samples": 5, **wrong})
    assert MatchingLoss(WORLD, samples=12, density=Uniform(3.0)).records()[11].id == 11
