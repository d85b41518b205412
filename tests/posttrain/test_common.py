"""Groups, advantages and windows, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from flux2.analytic import toy_condition
from flux2.errors import InputError
from flux2.types import Batch
from posttrain._common import GroupFilter, Scoring, check_group, rollout, spread, told, weigh
from posttrain.advantages import GroupRelative, group_advantages

NAN = math.nan


def test_advantages_by_hand():
    """Group 7 scores 1, 2, 3; group 4 has no spread; group 9 one score; group 0 scores 0, 10."""
    groups = torch.tensor([7, 4, 9, 0, 7, 4, 9, 0, 7, 0])
    rewards = torch.tensor([1.0, 5.0, NAN, 0.0, 2.0, 5.0, 4.0, 10.0, 3.0, NAN])
    adv = group_advantages(rewards, groups, eps=1e-4)
    high = 1 / (math.sqrt(2 / 3) + 1e-4)  # ddof 0: the variance of 1, 2, 3 is 2/3
    fifth = 5 / (5 + 1e-4)
    want = torch.tensor([-high, 0, 0, -fifth, 0, 0, 0, fifth, high, 0])
    torch.testing.assert_close(adv.value, want)
    assert adv.valid.tolist() == [True, False, False, True, True, False, False, True, True, False]
    assert adv.flat == 2 / 4
    assert adv.missing == pytest.approx(2 / 10)


def test_advantages_go_by_group_id_and_not_by_order():
    rewards, groups = torch.tensor([0.3, 0.9, 0.1, 0.8, 0.4, 0.2]), torch.tensor([1, 1, 1, 2, 2, 2])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    straight = group_advantages(rewards, groups)
    mixed = group_advantages(rewards[order], groups[order])
    torch.testing.assert_close(mixed.value, straight.value[order])


def test_advantages_are_bounded():
    """One winner among 50 has (n − 1)/√(n − 1) = 7 and each loser −1/7."""
    rewards, groups = torch.zeros(50), torch.zeros(50, dtype=torch.int64)
    rewards[3] = 1
    high = group_advantages(rewards, groups, eps=1e-9).value
    assert high[3] == 5
    torch.testing.assert_close(high[0], torch.tensor(-1 / 7))
    assert group_advantages(-rewards, groups).value[3] == -5
    assert group_advantages(rewards, groups, bound=2.0).value[3] == 2
    torch.testing.assert_close(
        group_advantages(rewards, groups, bound=9.0, eps=1e-9).value[3], torch.tensor(7.0)
    )


def test_spread_below_eps_says_nothing():
    groups = torch.zeros(4, dtype=torch.int64)
    assert not group_advantages(torch.tensor([0.5, 0.5, 0.5, 0.50005]), groups).valid.any()
    assert group_advantages(torch.tensor([0.5, 0.5, 0.5, 0.5003]), groups).valid.all()


def test_without_any_score_all_is_masked_and_finite():
    adv = group_advantages(torch.full((4,), NAN), torch.tensor([0, 0, 1, 1]))
    assert not adv.valid.any() and not adv.value.any()
    assert (adv.flat, adv.missing) == (1.0, 1.0)


def test_what_is_told_skips_what_was_not_scored():
    found = told({"reward": torch.tensor([1.0, NAN, 4.0]), "x": torch.tensor([NAN] * 3)})
    assert found["reward"] == 2.5 and found["reward_std"] == 1.5 and found["x"].isnan()


def test_a_prompt_that_comes_twice_is_two_groups():
    """As it would be on two ranks: rewards 0, 1 and 1, 1 of one prompt are no group of four."""
    ids, same = torch.arange(2), torch.tensor([7, 7])
    batch = Batch(ids, ("a", "a"), toy_condition(2, 1), same, ({},) * 2, (1, 1), 1)
    found = rollout(
        lambda chunk: (torch.zeros(len(chunk), 1, 1), [chunk]), batch, 2, 4,
        lambda x, part: lambda: {"reward": (part.ids > 0).float()}, GroupRelative(), GroupFilter(),
    )  # fmt: skip
    [chunk] = found.chunks
    assert chunk.advantage.tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-3)
    assert chunk.valid.tolist() == [True, True, False, False]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 12])
def test_groups_are_scored_whole_whatever_the_chunks(size):
    ids = torch.arange(3)
    batch = Batch(ids, ("a", "b", "c"), toy_condition(3, 2), ids, ({},) * 3, (1, 2), 1)
    samples, seen = batch.repeat(4), []

    def score(x, part):
        seen.append((x[:, 0, 0].tolist(), part.groups.tolist()))
        value = x[:, 0, 0] + part.groups
        return lambda: {"reward": value}

    scoring = Scoring(score, samples, 4)
    for part in torch.arange(12.0).split(size):
        scoring.add(part[:, None, None])
    want = torch.arange(12.0) + torch.arange(3).repeat_interleave(4)
    assert scoring.result()["reward"].tolist() == want.tolist()
    assert all(len(groups) % 4 == 0 for _, groups in seen)
    assert [v for values, _ in seen for v in values] == list(range(12))


def test_spread_is_that_of_the_scored():
    """Of 1, 2 and 6: mean 3, variance 14/3."""
    rewards = torch.tensor([1.0, NAN, 2.0, 6.0])
    torch.testing.assert_close(spread(rewards), torch.tensor(math.sqrt(14 / 3)))
    assert spread(torch.tensor([NAN, NAN])).isnan()


def test_weights_are_one_where_valid():
    ids = torch.arange(3)
    batch = Batch(ids, ("a",) * 3, toy_condition(3, 1), ids, ({},) * 3, (1, 1))
    valid = torch.tensor([True, False, True])
    assert weigh(batch, valid).tolist() == [1, 0, 1]


def test_a_group_of_one_is_refused():
    check_group(2)
    for group in (1, 0, -3):
        with pytest.raises(InputError, match=f"method.group is {group}"):
            check_group(group)
