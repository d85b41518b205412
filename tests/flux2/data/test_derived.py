"""Records of another dataset, as a file names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flux2.data.derived import Derived
from flux2.data.mixture import Mixture
from flux2.data.order import describe, identity, judges, law_of
from flux2.data.signs import SignWorld
from flux2.errors import InputError

WORLD = SignWorld("train", length=9, tasks={"t2i": 1.0, "move": 1.0})


def written(tmp_path: Path, *rows: dict[str, Any], name: str = "prompts.jsonl") -> str:
    file = tmp_path / name
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def row(index: int, **more: Any) -> dict[str, Any]:
    return {"record": index, "prompt": WORLD[index].prompt, **more}


def enhanced(index: int) -> dict[str, Any]:
    raw = WORLD[index].prompt
    rich = f"{raw}, at dusk"
    return {**row(index), "prompt": rich, "original_prompt": raw, "text": ["OTHER"],
            "captions": {"raw": raw, "enhanced": rich}}  # fmt: skip


def test_records_come_in_the_files_order_with_the_datasets_truth(tmp_path: Path):
    written(tmp_path, row(7, reward_range=0.5), enhanced(2))
    data = Derived(WORLD, str(tmp_path))
    assert len(data) == 2
    for index, of in ((0, 7), (1, 2)):
        record, origin = data[index], WORLD[of]
        assert record.id == index and data.bucket_of(index) == WORLD.bucket_of(of)
        assert np.array_equal(record.target, origin.target)
        assert len(record.references) == len(origin.references)
        for key, value in origin.meta.items():  # also where the file says otherwise
            assert record.meta[key] is value or record.meta[key] == value
        told = describe(data, index)
        assert (told.prompt, told.id, told.target) == (record.prompt, index, None)
    assert data[0].prompt == WORLD[7].prompt and data[0].meta["reward_range"] == 0.5
    assert data[1].prompt == f"{WORLD[2].prompt}, at dusk"
    assert data[1].meta["original_prompt"] == WORLD[2].prompt
    assert data[1].meta["captions"]["raw"] == WORLD[2].prompt
    with pytest.raises(IndexError):
        data[2]


def test_a_file_of_a_file(tmp_path: Path):
    """stage=filter on what stage=enhance wrote: prompts are the rewritten ones, twice."""
    first = Derived(WORLD, written(tmp_path, enhanced(2), enhanced(4)))
    line = {**enhanced(4), "record": 1, "reward_mean": 0.2}
    second = Derived(first, written(tmp_path, line, name="kept.jsonl"))
    assert second[0].prompt == first[1].prompt and second[0].meta["reward_mean"] == 0.2
    assert np.array_equal(second[0].target, WORLD[4].target)


def test_weights_and_identity_follow_the_dataset(tmp_path: Path):
    parts = {"a": {"dataset": SignWorld("train", length=3), "weight": 3.0},
             "b": {"dataset": SignWorld("train", length=2, seed=1), "weight": 1.0}}  # fmt: skip
    mixed = Mixture(parts)
    rows = [{"record": k, "prompt": mixed[k].prompt} for k in (0, 4, 3)]
    data = Derived(mixed, written(tmp_path, *rows))
    weights, whole = law_of(data, 0).weights, law_of(mixed, 0).weights
    assert weights is not None and whole is not None
    assert np.array_equal(weights, whole[[0, 4, 3]]) and weights[0] != weights[1]
    other = Derived(mixed, written(tmp_path, *rows[:2], name="other.jsonl"))
    again = Derived(mixed, written(tmp_path, *rows, name="again.jsonl"))
    assert identity(data) == identity(again) != identity(other)
    assert judges(data) == () and list(data.inner) == [mixed]
    assert law_of(Derived(WORLD, written(tmp_path, row(1), name="w.jsonl")), 0).weights is None


def test_what_there_is_is_told(tmp_path: Path):
    data = Derived(WORLD, written(tmp_path, enhanced(2), row(4)))
    told = "\n".join(data.report())
    assert [line.split() for line in told.splitlines()] == [
        ["of", "9", "records", "here"], ["all", "2"], ["raw", "1"], ["enhanced", "1"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "says"),
    [([{"prompt": "a"}], "record None is none"), ([{"record": 9, "prompt": "a"}], "record 9"),
     ([{"record": True, "prompt": "a"}], "record True"), ([{"record": 1}], "no prompt"),
     ([{"record": 1, "prompt": "another"}], "made of other data")],
)  # fmt: skip
def test_wrong_files_are_one_line(tmp_path: Path, rows: list[dict[str, Any]], says: str):
    with pytest.raises(InputError, match=says) as caught:
        Derived(WORLD, written(tmp_path, *rows))
    assert "\n" not in str(caught.value)


def test_no_path_and_no_file(tmp_path: Path):
    with pytest.raises(InputError, match="names no file"):
        Derived(WORLD, None)
    with pytest.raises(InputError, match="cannot read"):
        Derived(WORLD, str(tmp_path))


def test_a_later_record_of_other_data_is_found_when_it_is_read(tmp_path: Path):
    data = Derived(WORLD, written(tmp_path, row(1), {"record": 2, "prompt": "another"}))
    assert data[0].prompt == WORLD[1].prompt
    with pytest.raises(InputError, match="record 2"):
        data[1]
