"""Which records make a step's batch: a function of (seed, step)."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from flux2.data.sampler import IndexSampler
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
