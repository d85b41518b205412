"""Which records make a step's batch: a function of (seed, step)."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from flux2.data.order import Law
from flux2.data.sampler import IndexSampler, systematic
from flux2.data.signs import SignWorld
from flux2.errors import InputError


class Buckets:
    """Records that are only their buckets."""

    def __init__(self, *sizes: int) -> None:
        self._of = [(64, 64, k) for k, n in enumerate(sizes) for _ in range(n)]
        self._of = self._of[::2] + self._of[1::2]  # interleaved

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index: int):
        raise AssertionError("the sampler must not read records")

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        return self._of[index]


def epoch(sampler: IndexSampler, k: int = 0) -> list[list[int]]:
    n = sampler.batches_per_epoch
    return [sampler(k * n + i) for i in range(n)]


def test_every_record_once_an_epoch_where_batches_fit():
    sampler = IndexSampler(Buckets(12, 8, 4), 4, seed=0)
    assert sampler.batches_per_epoch == 6
    for k in range(3):
        seen = Counter(i for batch in epoch(sampler, k) for i in batch)
        assert seen == Counter(range(24))


def test_a_short_batch_is_filled_and_nothing_left_out():
    data = Buckets(5, 3, 9)
    sampler = IndexSampler(data, 4, seed=0)
    seen = Counter(i for batch in epoch(sampler) for i in batch)
    assert set(seen) == set(range(17)) and seen.total() == 4 * (2 + 1 + 3)
    assert max(seen.values()) <= 2


def test_a_bucket_smaller_than_a_batch():
    sampler = IndexSampler(Buckets(2), 5, seed=0)
    assert Counter(sampler(0)) in ({0: 3, 1: 2}, {0: 2, 1: 3}) and sampler.batches_per_epoch == 1


def test_a_batch_is_of_one_bucket():
    data = Buckets(13, 7, 4)
    sampler = IndexSampler(data, 4, seed=1)
    for step in range(3 * sampler.batches_per_epoch):
        assert len({data.bucket_of(i) for i in sampler(step)}) == 1


def test_the_order_of_calls_does_not_matter():
    data = Buckets(13, 7, 4)
    forwards = IndexSampler(data, 4, seed=1)
    want = [forwards(step) for step in range(40)]
    backwards = IndexSampler(data, 4, seed=1)
    assert [backwards(step) for step in reversed(range(40))][::-1] == want
    assert IndexSampler(data, 4, seed=1)(39) == want[39]


def test_epochs_and_seeds_differ():
    data = Buckets(40)
    sampler = IndexSampler(data, 4, seed=1)
    assert epoch(sampler, 0) != epoch(sampler, 1)
    assert epoch(sampler, 0) != epoch(IndexSampler(data, 4, seed=2), 0)


def test_buckets_are_mixed_within_an_epoch():
    data = Buckets(80, 80)
    order = [data.bucket_of(b[0])[2] for b in epoch(IndexSampler(data, 4, seed=0))]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes > 8  # of 39; sorted buckets would change once


def test_sign_world_batches_are_pure():
    world = SignWorld("train", length=50, tasks={"t2i": 1.0, "move": 1.0, "compose": 1.0})
    sampler = IndexSampler(world, 4, seed=0)
    for step in range(sampler.batches_per_epoch):
        assert len({world[i].bucket for i in sampler(step)}) == 1


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="batch_size"):
        IndexSampler(Buckets(3), 0, seed=0)
    with pytest.raises(InputError, match="no record"):
        IndexSampler(Buckets(), 2, seed=0)


# ---------------------------------------------------------------- by weight


class Weighty(Buckets):
    """Records with weights."""

    def __init__(self, *sizes: int, weights: np.ndarray, since: int = 0, parts=None) -> None:
        super().__init__(*sizes)
        self._law, self._before = Law(since, weights, parts), Law()

    def law(self, step: int) -> Law:
        return self._law if step >= self._law.since else self._before


def test_systematic_sampling_rounds_each_and_keeps_the_sum_and_the_expectation():
    expected = np.array([0.3, 2.5, 0.0, 0.7, 1.25, 3.25, 0.0])
    offsets = (np.arange(4000) + 0.5) / 4000
    drawn = np.stack([systematic(expected, u) for u in offsets])
    assert (drawn.sum(1) == 8).all()
    assert (drawn >= np.floor(expected)).all() and (drawn <= np.ceil(expected)).all()
    assert drawn.mean(0) == pytest.approx(expected, abs=1e-3)


def test_systematic_sampling_never_takes_what_is_expected_0_times():
    rng = np.random.default_rng(0)
    for _ in range(200):
        expected = rng.random(50) * (rng.random(50) < 0.5)
        expected[-1] = 0.0
        expected *= 7 / expected.sum()
        drawn = systematic(expected, float(rng.random()))
        assert drawn.sum() == 7 and not drawn[expected == 0].any() and (drawn >= 0).all()


def counts(sampler: IndexSampler, steps: range) -> np.ndarray:
    return np.bincount([i for s in steps for i in sampler(s)], minlength=len(sampler.dataset))


def test_records_come_as_often_as_they_weigh_over_seeds_and_over_time():
    weights = np.random.default_rng(1).random(60) ** 3
    data = Weighty(41, 12, 7, weights=weights)
    want = weights / weights.sum()
    one = counts(IndexSampler(data, 4, seed=0), range(3000)) / 12000
    assert one == pytest.approx(want, abs=0.001)
    many = sum(counts(IndexSampler(data, 4, seed=k), range(15)) for k in range(300)) / (300 * 60)
    assert many == pytest.approx(want, abs=0.003)


def test_weighted_batches_are_of_one_bucket_and_functions_of_the_step():
    data = Weighty(13, 7, 4, weights=np.linspace(0, 1, 24))
    forwards = IndexSampler(data, 4, seed=1)
    want = [forwards(step) for step in range(40)]
    assert all(len({data.bucket_of(i) for i in batch}) == 1 for batch in want)
    assert not any(0 in batch for batch in want)  # its weight
    backwards = IndexSampler(data, 4, seed=1)
    assert [backwards(step) for step in reversed(range(40))][::-1] == want
    assert want != [IndexSampler(data, 4, seed=2)(step) for step in range(40)]
    assert want[:6] != want[6:12]  # another epoch


def test_copies_of_a_record_lie_apart():
    weights = np.ones(40)
    weights[7] = 10.0
    sampler = IndexSampler(Weighty(40, weights=weights), 4, seed=0)
    batches = [sampler(s) for s in range(10)]
    assert sum(7 in b for b in batches) >= 7  # of 8.2 copies, nearly all in batches of their own


def test_a_law_begins_at_its_step():
    weights = np.ones(20)
    weights[:8] = 0.0
    data = Weighty(20, weights=weights, since=5)
    sampler = IndexSampler(data, 4, seed=0)
    assert {i for s in range(5) for i in sampler(s)} == set(range(20))
    late = counts(sampler, range(5, 44))  # 13 epochs of 3 batches
    assert late[:8].sum() == 0 and set(late[8:]) == {13}


def test_a_law_for_one_step_is_asked_for_each_time():
    class Changing(Buckets):
        turn = 0

        def law(self, step: int) -> Law:
            return Law(step, np.eye(12)[self.turn], once=True)

    data = Changing(12)
    sampler = IndexSampler(data, 3, seed=0)
    assert sampler(4) == [0, 0, 0]
    data.turn = 5
    assert sampler(4) == [5, 5, 5]


# ---------------------------------------------------------------- by length


def test_prompts_of_like_length_come_together_and_each_record_once():
    lengths = np.random.default_rng(0).integers(5, 60, 256)
    data = Buckets(200, 56)
    plain = IndexSampler(data, 8, seed=0)
    grouped = IndexSampler(data, 8, seed=0, lengths=lambda: lengths)
    assert grouped.batches_per_epoch == plain.batches_per_epoch == 32

    def padding(sampler: IndexSampler) -> float:
        batches = [lengths[b] for b in epoch(sampler)]
        return 1 - sum(b.sum() for b in batches) / sum(8 * b.max() for b in batches)

    assert Counter(i for b in epoch(grouped) for i in b) == Counter(range(256))
    assert all(len({data.bucket_of(i) for i in b}) == 1 for b in epoch(grouped))
    assert padding(grouped) < 0.1 < 0.35 < padding(plain)
    assert epoch(grouped, 0) != epoch(grouped, 1)
    order = [lengths[b].max() for b in epoch(grouped)]
    assert sum(a > b for a, b in itertools.pairwise(order)) > 8  # short ones do not come first


def test_lengths_are_not_asked_for_before_they_are_needed():
    def never() -> np.ndarray:
        raise AssertionError

    IndexSampler(Buckets(4), 2, seed=0, lengths=never)
    with pytest.raises(InputError, match="window"):
        IndexSampler(Buckets(4), 2, seed=0, lengths=never, window=0)
