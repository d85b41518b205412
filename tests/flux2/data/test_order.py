"""What datasets over datasets share, and that those of conf/data are built and drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from flux2.data.filters import Filtered
from flux2.data.mixture import Mixture, Reconstruction
from flux2.data.order import (
    Law,
    describe,
    describe_all,
    field_of,
    identity,
    judges,
    law_of,
    table,
    tags_of,
    walk,
)
from flux2.data.record import Record
from flux2.data.sampler import IndexSampler
from flux2.data.signs import SignWorld
from flux2.train import build
from tests.flux2.data.toys import Notes, Told, numbered

DATA = Path(__file__).parents[3] / "conf" / "data"


def small(node: Any) -> Any:
    """The configuration with small worlds."""
    if isinstance(node, dict):
        return {k: 256 if k == "length" else small(v) for k, v in node.items()}
    return [small(v) for v in node] if isinstance(node, list) else node


@pytest.mark.parametrize(
    "name", ["mixture", "balanced", "topped-up", "curriculum", "filtered", "resampled"]
)
def test_each_of_conf_is_built_and_drawn_from(name):
    cfg = OmegaConf.to_container(OmegaConf.load(DATA / f"{name}.yaml"))
    dataset = build(OmegaConf.create(small(cfg["dataset"])))
    sampler = IndexSampler(dataset, 8, seed=0)
    for step in (0, 70, 150):
        batch = sampler(step)
        assert len({dataset[i].bucket for i in batch}) == 1
        assert [dataset[i].id for i in batch] == batch


def test_a_record_is_described_without_images():
    record = describe(Notes([{"a": 1}]), 0)
    assert record.target is None and record.meta == {"a": 1}
    assert describe(Told([{"a": 1}], sealed=True), 0).meta == {"a": 1}
    world = describe(SignWorld(length=2, tasks={"move": 1.0}), 1)
    assert world.references == () and world.mask is None and "text" in world.meta
    found = describe_all(Notes([{}] * 3, broken=frozenset({1})))
    assert [r is None for r in found] == [False, True, False]


def test_fields_and_tags():
    record = Record(0, "p", meta={"a": {"b": 1}, "c.d": 2, "tags": ["x", "y", "x"], "n": 3})
    assert field_of(record, "prompt") == "p" and field_of(record, "a.b") == 1
    assert field_of(record, "c.d") == 2 and field_of(record, "a.c") is None
    assert field_of(record, "n.m") is None
    assert tags_of(record, "tags") == ("x", "y") and tags_of(record, "n") == ("3",)
    assert tags_of(record, "none") == ()


@dataclass(frozen=True)
class Judged:
    """Records that something judged."""

    rewards: tuple[str, ...]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Record:
        return Record(0, "p", meta={"keep": True})

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        return 16, 16, 0


def test_judges_of_parts_are_not_lost():
    parts = {"a": {"dataset": Judged(("ocr",)), "weight": 1},
             "b": {"dataset": numbered(2), "weight": 1},
             "c": {"dataset": Judged(("ocr", "clip")), "weight": 1}}  # fmt: skip
    data = Filtered(Reconstruction(Mixture(parts)), {"task": "reconstruct"})
    assert judges(data) == ("ocr", "clip") and judges(Judged(("x",))) == ("x",)
    assert len(list(walk(data))) == 6 and judges(numbered(1)) == ()


def test_identity_is_of_settings_and_code():
    assert identity(SignWorld(length=4)) == identity(SignWorld(length=4))
    assert identity(SignWorld(length=4)) != identity(SignWorld(length=4, seed=1))


def test_without_a_law_all_are_alike():
    law = law_of(numbered(4), 9)
    assert law.weights is None and law.since == 0 and law.shares(4).tolist() == [0.25] * 4
    assert Law(weights=law.shares(2) * 8).shares(2).tolist() == [0.5, 0.5]


def test_a_table_is_aligned():
    assert list(table(["a", "n"], [["long", "1"], ["b", "200"]])) == [
        "a       n", "long    1", "b     200",
    ]  # fmt: skip
