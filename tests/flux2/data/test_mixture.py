"""Mixtures: every part its share, ids of their own, one bucket a batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from flux2.data.mixture import Mixture, Reconstruction
from flux2.data.order import describe, identity, law_of, report
from flux2.data.record import UnreadableRecord
from flux2.data.sampler import IndexSampler
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from tests.flux2.data.toys import Notes, Told, drawn, numbered


def mixed(**parts: tuple[object, float]) -> Mixture:
    return Mixture({n: {"dataset": d, "weight": w} for n, (d, w) in parts.items()})


def test_records_keep_their_order_and_get_ids_of_their_own():
    data = mixed(a=(Notes([{"x": 1}, {"x": 2}]), 1), b=(Notes([{"x": 3}]), 2))
    records = [data[i] for i in range(3)]
    assert [r.id for r in records] == [0, 1, 2]  # caches and noise are keyed by them
    assert [(r.meta["x"], r.meta["part"]) for r in records] == [(1, "a"), (2, "a"), (3, "b")]
    assert records[2].prompt == "note 0"
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            data[wrong]


def test_buckets_and_descriptions_are_told_without_images():
    metas = [{"x": 1}] * 4
    data = mixed(a=(Told(metas, (16, 32), sealed=True), 1), b=(Told(metas, sealed=True), 1))
    assert [data.bucket_of(i)[0] for i in range(8)] == [16, 32, 16, 32, 16, 16, 16, 16]
    assert describe(data, 5).id == 5 and describe(data, 5).meta == {"x": 1, "part": "b"}


def test_the_shares_are_the_weights_whatever_the_sizes():
    data = mixed(a=(numbered(40), 7), b=(numbered(500), 2), c=(numbered(3), 1))
    sampler = IndexSampler(data, 10, seed=0)
    for step in range(200):
        parts = Counter(data[i].meta["part"] for i in sampler(step))
        assert parts == {"a": 7, "b": 2, "c": 1}, step  # of every batch


def test_fractional_shares_are_exact_over_an_epoch_and_near_in_a_batch():
    data = mixed(a=(numbered(64), 0.55), b=(numbered(64), 0.32), c=(numbered(64), 0.13))
    sampler = IndexSampler(data, 8, seed=3)
    epochs = 5
    total = Counter()
    for step in range(24 * epochs):
        parts = Counter(data[i].meta["part"] for i in sampler(step))
        for name, share in (("a", 0.55), ("b", 0.32), ("c", 0.13)):
            assert abs(parts[name] - 8 * share) < 2
        total.update(parts)
    for name, share in (("a", 0.55), ("b", 0.32), ("c", 0.13)):
        assert abs(total[name] - 192 * epochs * share) <= epochs


def test_a_part_is_seen_evenly():
    data = mixed(a=(numbered(50), 1), b=(numbered(450), 1))
    seen = drawn(data, 10, 100)  # two epochs: 500 of each
    assert {seen[i] for i in range(50)} == {10}
    assert {seen[i] for i in range(50, 500)} <= {0, 1, 2} and len(seen) > 450


def test_a_batch_is_of_one_bucket_and_buckets_come_by_weight():
    edits = SignWorld(length=300, tasks={"move": 1.0})
    again = Reconstruction(SignWorld(length=100))
    data = mixed(t2i=(SignWorld(length=600), 0.6), edit=(edits, 0.3), again=(again, 0.1))
    sampler, parts = IndexSampler(data, 8, seed=0), Counter()
    for step in range(125):
        batch = sampler(step)
        assert len({data.bucket_of(i) for i in batch}) == 1
        names = Counter("t2i" if i < 600 else "edit" if i < 900 else "again" for i in batch)
        assert set(names) in ({"t2i"}, {"edit", "again"})
        if "edit" in names:
            assert names["edit"] in (5, 6, 7) and names["again"] in (1, 2, 3)
        parts.update(names)
    assert parts == {"t2i": 600, "edit": 300, "again": 100}


def test_the_step_is_the_whole_state():
    def sampler() -> IndexSampler:
        data = mixed(a=(numbered(30, (16, 32)), 3), b=(numbered(7), 1))
        return IndexSampler(data, 4, seed=5)

    forwards = sampler()
    want = [forwards(step) for step in range(60)]
    backwards = sampler()
    assert [backwards(step) for step in reversed(range(60))][::-1] == want
    assert sampler()(47) == want[47]
    assert IndexSampler(forwards.dataset, 4, seed=6)(47) != want[47]


def test_a_part_of_weight_0_never_comes_and_mixtures_nest():
    inner = mixed(x=(numbered(10), 1), y=(numbered(10), 3))
    data = mixed(a=(inner, 1), b=(numbered(10), 1), c=(numbered(10), 0))
    law = law_of(data, 0)
    assert law.weights.sum() == pytest.approx(1)
    assert [law.weights[k : k + 10].sum() for k in (0, 10, 20, 30)] == pytest.approx(
        [1 / 8, 3 / 8, 1 / 2, 0]
    )
    assert not any(i >= 30 for i in drawn(data, 8, 40))
    assert data[12].meta["part"] == "a"
    sampler = IndexSampler(data, 8, seed=0)
    for step in range(12):  # every level of parts is composed in every batch
        assert Counter(min(2, i // 10) for i in sampler(step)) == {0: 1, 1: 3, 2: 4}


def test_an_unreadable_record_is_the_parts():
    data = mixed(a=(numbered(2), 1), b=(Notes([{}] * 3, broken=frozenset({1})), 1))
    with pytest.raises(UnreadableRecord):
        data[3]
    assert data[4].id == 4


def test_identity_is_of_the_records_not_of_the_weights():
    world = SignWorld(length=8)
    one = mixed(a=(world, 1), b=(SignWorld(length=9), 1))
    assert identity(one) == identity(mixed(a=(world, 5), b=(SignWorld(length=9), 1)))
    assert identity(one) != identity(mixed(a=(world, 1), b=(SignWorld(length=10), 1)))
    assert identity(one) != identity(mixed(b=(world, 1), a=(SignWorld(length=9), 1)))
    assert repr(one) == repr(mixed(a=(world, 5), b=(SignWorld(length=9), 1)))


def test_it_tells_its_shares():
    lines = report(mixed(small=(numbered(10), 1), large=(numbered(90), 1)))
    assert lines[1].split() == ["small", "10", "50.0%", "5.00"]
    assert lines[2].split() == ["large", "90", "50.0%", "0.56"]


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({}, "empty"),
        ({"a": {"dataset": numbered(1)}}, "a weight"),
        ({"a": {"dataset": numbered(1), "weight": 1, "wait": 2}}, "wait"),
        ({"a": {"dataset": numbered(1), "weight": -1}}, "at least 0"),
        ({"a": {"dataset": numbered(1), "weight": "much"}}, "much"),
        ({"a": {"dataset": numbered(1), "weight": 0}}, "above 0"),
        ({"a": {"dataset": numbered(1), "weight": float("nan")}}, "nan"),
        ({"a": {"dataset": numbered(1), "weight": float("inf")}}, "finite"),
        ({"a": {"dataset": numbered(0), "weight": 1}}, "no record"),
    ],
)
def test_wrong_parts_are_refused(parts, why):
    with pytest.raises(InputError, match=why):
        Mixture(parts)


def test_reconstruction_asks_for_the_target_itself():
    world = SignWorld(length=5, tasks={"move": 1.0})
    data = Reconstruction(world, "copy image 1")
    record, original = data[3], world[3]
    assert record.prompt == "copy image 1" and record.id == 3
    assert np.array_equal(record.target, original.target)
    assert len(record.references) == 1
    assert np.array_equal(record.references[0], original.target)
    assert not record.mask.any() and record.mask.shape == (64, 64)
    assert record.meta["task"] == "reconstruct" and record.meta["text"] == original.meta["text"]
    assert data.bucket_of(3) == record.bucket == (64, 64, 1)
    assert describe(data, 3).prompt == "copy image 1"
    assert identity(data) != identity(Reconstruction(world))
    with pytest.raises(InputError, match="prompt"):
        Reconstruction(world, " ")
