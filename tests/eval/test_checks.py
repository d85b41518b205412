"""A held-out value from check to check: what ends a run, what is its best, and what is noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.checks import (
    DECIDES,
    Metered,
    PromptsOnly,
    Trend,
    changed,
    mean,
    measured,
    metered,
    table_of,
)
from eval.records import Fingerprint, Results, Score
from flux2.analytic import toy_condition
from flux2.data.signs import SignWorld
from flux2.generate import Sampler
from flux2.policy import TokenMixture
from flux2.types import Batch, Condition, PolicyShape

N = 48


def check(values: np.ndarray) -> dict[tuple[int, int], float]:
    return {(i, 0): float(v) for i, v in enumerate(values)}


def noisy(rng: np.random.Generator, level: float, skill: np.ndarray) -> dict:
    """Each prompt's share of letters read, at a level that all prompts share."""
    x = skill + level + 0.2 * rng.normal(size=N)
    return check(np.clip(np.round(x * 4) / 4, 0, 1))


def trend(levels, seed: int = 0, patience: int = 2) -> tuple[Trend, int | None]:
    """The trend of these levels, and the check at which it was over."""
    rng, found = np.random.default_rng(seed), Trend(patience, 0.01)
    skill = rng.beta(4, 2, N)
    for k, level in enumerate(levels):
        found.add(10 * k, noisy(rng, level, skill))
        if found.over:
            return found, k
    return found, None


def test_noise_ends_no_run():
    ended = [trend([0.0] * 8, seed)[1] for seed in range(12)]
    assert sum(e is not None for e in ended) <= 1


def test_a_run_that_gets_better_is_not_ended_and_keeps_its_last():
    for seed in range(10):
        found, ended = trend([0.05 * k for k in range(6)], seed)
        assert ended is None and not found.back and found.best[0] >= 40


def test_a_fall_ends_the_run_after_its_patience_and_goes_back():
    for patience in (1, 2, 3):
        found, ended = trend([0.0, 0.1, 0.2, -0.3, -0.4, -0.4, -0.4], patience=patience)
        assert ended == 2 + patience and found.best[0] == 20 and found.back
    assert trend([0.2, -0.4, -0.4, -0.4, -0.4], patience=0)[1] is None  # 0 never ends a run


def test_one_bad_check_is_forgiven():
    assert trend([0.2, -0.4, 0.2, -0.4, 0.2, -0.4, 0.2])[1] is None


def test_a_check_that_may_not_count_is_not_the_best():
    found = Trend(2, 0.01)
    found.add(0, check(np.zeros(N)), counts=False)
    assert found.best is None
    found.add(1, check(np.full(N, 0.2)))
    found.add(2, check(np.full(N, 0.9)), counts=False)
    assert found.best[0] == 1 and not found.back


def test_of_equals_the_older_is_best_and_what_was_not_scored_says_nothing():
    found = Trend(2, 0.01)
    for step in (0, 1, 2):
        found.add(step, check(np.full(N, 0.5)))
    assert found.best[0] == 0 and not found.back
    found.add(3, check(np.full(N, math.nan)))
    assert found.worse == 0 and found.best[0] == 0


def results(**values: np.ndarray) -> Results:
    scores = [
        Score(i, 0, name, float(v)) for name, row in values.items() for i, v in enumerate(row)
    ]
    prints = {name: Fingerprint(name, "e", N, "r", "g", 1.0) for name in values}
    return Results(tuple(scores), prints)


def test_the_value_that_decides_is_the_mean_of_what_is_measured():
    half, odd = np.full(N, 0.5), np.full(N, math.nan)
    odd[:2] = (1.0, 0.0)
    found = results(a=half, b=odd, c=np.full(N, math.nan))
    weights = measured(found, {"a": 1.0, "b": 3.0, "c": 1.0, "absent": 1.0})
    assert weights == {"a": 1.0, "b": 3.0}
    table = table_of(found, weights)
    assert table[DECIDES][0, 0] == 0.875 and table[DECIDES][1, 0] == 0.125
    assert math.isnan(table[DECIDES][2, 0]) and mean(table[DECIDES]) == 0.5
    assert DECIDES not in table_of(found, {})


def test_held_out_dials_are_flagged_in_pairs():
    rng = np.random.default_rng(0)
    spread = rng.uniform(0, 0.9, N)  # prompts differ more than the change
    before = {"dark": spread, "signs_ink_colour": np.ones(N), "signs_shape": np.ones(N)}
    some = np.ones(N)
    some[:3] = 0  # 3 of 48 are no proof
    after = {"dark": spread + 0.2, "signs_ink_colour": (rng.random(N) > 0.4) * 1.0,
             "signs_shape": some}  # fmt: skip
    old, new = (table_of(results(**x), {}) for x in (before, after))
    found = changed(old, new, {}, 30)
    assert set(found) == {"heldout/dark", "heldout/signs_ink_colour"}
    assert found["heldout/dark"].step == 30
    assert found["heldout/dark"].value - found["heldout/dark"].baseline == pytest.approx(0.2)
    assert set(changed(old, new, {"dark": 0.3}, 30)) == {"heldout/signs_ink_colour"}
    assert set(changed(old, new, {"signs_ink_colour": None}, 30)) == {"heldout/dark"}
    # A value that rises is no loss, and small steps may be sure and harmless.
    assert changed(new, old, {"dark": None}, 30) == {}
    small = table_of(results(**{**before, "dark": spread + 0.05}), {})
    assert changed(old, small, {}, 30) == {}


def test_speed_is_the_mean_length_of_what_was_returned():
    meter = Metered(lambda x, t, cond: x)
    x = torch.ones(2, 3, 4)
    assert torch.equal(meter(2 * x, torch.zeros(2), None), 2 * x)
    meter(torch.zeros(1, 3, 4), torch.zeros(1), None)
    meter(6 * x[:1], torch.zeros(1), None)
    assert meter.speed() == pytest.approx((2 + 2 + 0 + 6) / 4)


def test_prompts_without_targets_keep_their_truth_and_size():
    world = SignWorld("heldout", length=3)
    blank = PromptsOnly(world)
    assert len(blank) == 3 and blank.bucket_of(1) == world.bucket_of(1)
    assert blank[1].prompt == world[1].prompt and blank[1].meta == world[1].meta
    assert blank[1].target.shape == world[1].target.shape and not blank[1].target.any()


class Bent:
    """A policy whose velocity bends within a segment, so that its own integration shows."""

    shape = PolicyShape(1, 3, 16)

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> TokenMixture:
        zero = torch.zeros(len(x), 4, 1)
        return TokenMixture(x, t, zero, 0.3 * x[:, :, None] + 0.7, zero)

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.policy(x, t, cond).velocity(x, t)


def test_a_policy_that_is_measured_is_sampled_as_the_policy_that_it_is() -> None:
    policy, sampler = Bent(), Sampler(steps=3, guidance=1.0)
    ids = torch.arange(5)
    batch = Batch(ids, ("p",) * 5, toy_condition(5, 4), ids, ({},) * 5, (1, 4), 3)
    meter = metered(policy)
    drawn = sampler(meter, batch, 7)
    assert torch.equal(drawn, sampler(policy, batch, 7))
    assert not torch.equal(drawn, sampler(Metered(policy), batch, 7))
    assert meter.speed() > 0
    assert type(metered(lambda x, t, cond: x)) is Metered
