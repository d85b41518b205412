"""Several seeds of a method in one row."""

from __future__ import annotations

import pytest

from eval.report.seeds import by_seed, groups, seed_table
from flux2.errors import InputError

MEANS = {"base": 0.5, "nft-0": 0.7, "nft-1": 0.9, "sft-0": 0.6}


def found() -> dict:
    cells = {n: {"mean": m, "ceiling": 0.9} for n, m in MEANS.items()}
    other = {n: {"mean": None if n == "base" else 2.0, "ceiling": None} for n in MEANS}
    return {
        "baseline": "base",
        "runs": [
            {"name": n, "training_seconds": None if n == "base" else 100.0 + i,
             "training_steps": None if n == "base" else 10 * i}
            for i, n in enumerate(MEANS)
        ],
        "metrics": [
            {"name": "ocr", "cells": cells, "trained_on": ["nft-1"]},
            {"name": "kl", "cells": other, "trained_on": []},
        ],
    }  # fmt: skip


def test_seeds_of_one_method_make_one_row():
    rows = {r["name"]: r for r in by_seed(found(), "(.+)-[0-9]+")}
    assert list(rows) == ["base", "nft", "sft"]
    nft = rows["nft"]["metrics"]["ocr"]
    assert nft["mean"] == pytest.approx(0.8)
    assert (nft["low"], nft["high"], nft["trained_on"]) == (0.7, 0.9, True)
    assert nft["error_left"] == pytest.approx(0.25)
    assert rows["base"]["metrics"]["ocr"]["error_left"] == pytest.approx(1.0)
    assert rows["sft"]["metrics"]["kl"]["error_left"] is None
    assert (rows["nft"]["seconds"], rows["nft"]["steps"]) == (101.5, 15.0)
    assert rows["base"]["seconds"] is None


def test_the_table_shows_the_mean_the_range_and_the_error_left():
    header, cells = seed_table(by_seed(found(), "(.+)-[0-9]+"), ["ocr"])
    assert header == ["method", "seeds", "ocr", "error left, ocr", "steps", "seconds"]
    assert cells[1] == ["nft", "2", "0.800 (0.700 to 0.900) *", "25%", "15", "102"]
    assert cells[0] == ["base", "1", "0.500", "100%", "-", "-"]


def test_what_makes_no_table_is_refused():
    for pattern in ("(.+", ".+", "(a)(b)"):
        with pytest.raises(InputError, match=r"page\.seeds"):
            groups(["a"], pattern)
    with pytest.raises(InputError, match="choose from ocr, kl"):
        seed_table(by_seed(found(), "(.+)-[0-9]+"), ["cer"])
