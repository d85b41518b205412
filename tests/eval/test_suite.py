"""The suite: a record for each value, a file, and a table with ceilings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.records import Fingerprint, Results, Score
from eval.suite import Named, Suite, table
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.types import Batch
from rewards.signs import SignMetric


@dataclass(frozen=True)
class Fixed:
    values: Mapping[str, tuple[float, ...]]

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in self.values.items()}


IMAGES = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
BATCH = Batch(torch.arange(3), ("",) * 3, None, torch.tensor([5, 5, 8]), ({},) * 3, (1, 1))
READ = Fixed({"exact": (1, 0, math.nan), "cer": (0, 0.5, 2)})
TINT = Fixed({"tint": (1, 1, 0)})


def prints(*names: str) -> dict[str, Fingerprint]:
    return {n: Fingerprint(n, "test", 3, "r", "g", 1.0) for n in names}


def test_one_record_per_sample_and_value() -> None:
    out = Suite({"read": READ, "tint": TINT}, ("read",)).score(IMAGES, BATCH, [1, 2, 1])
    assert len(out) == 9
    assert out[1] == Score(5, 2, "exact", 0.0, True)
    assert out[5] == Score(8, 1, "cer", 2.0, True)
    assert out[8] == Score(8, 1, "tint", 0.0, False)
    assert math.isnan(out[2].value)
    assert {s.seed for s in Suite({"tint": TINT}).score(IMAGES, BATCH, 4)} == {4}


def test_names_must_not_meet() -> None:
    with pytest.raises(InputError, match="'read' and 'second' both return 'exact'"):
        Suite({"read": READ, "second": READ}).score(IMAGES, BATCH, 0)
    both = Suite({"read": READ, "second": Named(READ, "second_", ("exact",))})
    names = {s.metric for s in both.score(IMAGES, BATCH, [0, 1, 0])}
    assert names == {"exact", "cer", "second_exact"}
    with pytest.raises(InputError, match="no value 'exakt'"):
        Suite({"read": Named(READ, "", ("exakt",))}).score(IMAGES, BATCH, 0)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="'raed'"):
        Suite({"read": READ}, ("raed",))
    with pytest.raises(InputError, match="2 seeds"):
        Suite({"read": READ}).score(IMAGES, BATCH, [0, 1])
    with pytest.raises(InputError, match="2 images"):
        Suite({"read": READ}).score(IMAGES[:2], BATCH, 0)


def test_report_writes_records_and_a_table(tmp_path: Path) -> None:
    suite = Suite({"read": READ, "tint": TINT}, ("read",))
    scores = suite.score(IMAGES, BATCH, [1, 2, 1])
    names = prints("exact", "cer", "tint")
    summary = suite.report(scores, tmp_path, names, {"exact": 0.875})
    assert summary["exact"]["mean"] == 0.5 and summary["exact"]["missing"] == 1
    back = Results.load(tmp_path / "records.jsonl")
    assert len(back.scores) == 9 and back.fingerprints == names
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert lines[0].split() == ["metric", "mean", "95", "%", "interval", "ceiling", "n", "missing"]
    # One prompt has values: a mean, and no interval.
    assert lines[1].split() == ["exact", "*", "0.500", "-", "to", "-", "0.875", "2", "1"]
    assert lines[3].split()[:2] == ["tint", "0.667"] and lines[3].split()[-3:] == ["-", "3", "0"]
    assert lines[-1].startswith("*")
    assert len({len(line) for line in lines[:4]}) == 1
    with pytest.raises(InputError, match="fingerprint"):
        suite.report(scores, tmp_path, prints("exact"))


def test_table_without_trained_metrics_has_no_mark() -> None:
    row = {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 4, "missing": 0}
    text = table({"a": row}, {})
    assert "*" not in text and "0.200 to 0.300" in text


def test_drawn_signs_reach_the_top(tmp_path: Path) -> None:
    world = SignWorld("heldout")
    records = [world[i] for i in range(20)]
    images = torch.stack([torch.from_numpy(r.target).movedim(-1, 0) for r in records])
    ids = torch.arange(20)
    batch = Batch(ids, ("",) * 20, None, ids, tuple(r.meta for r in records), (4, 4))
    suite = Suite({"signs": SignMetric()})
    scores = suite.score(images, batch, 0)
    names = {s.metric for s in scores}
    summary = suite.report(scores, tmp_path, prints(*names))
    for name in ("ground_colour", "ink_colour", "shape_colour", "count", "place", "shape"):
        assert summary[name]["mean"] == 1 and summary[name]["n"] == 20
    assert summary["identity"]["missing"] == 20 and math.isnan(summary["identity"]["mean"])
