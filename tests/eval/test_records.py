"""Records: a round trip, aggregates by hand, and comparisons that must be refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.records import Fingerprint, Results, Score, compare, summarise
from eval.stats import bootstrap_mean, paired
from flux2.errors import InputError

PRINT = Fingerprint("exact", "reader 3.10", 4, "ab12", "cd34", 2.0)


def results(values: dict[tuple[int, int], float], fingerprint: Fingerprint = PRINT) -> Results:
    rows = [Score(p, s, fingerprint.metric, v) for (p, s), v in values.items()]
    return Results(tuple(rows), {fingerprint.metric: fingerprint})


def test_records_survive_the_file(tmp_path: Path) -> None:
    scores = (
        Score(0, 1, "exact", 0.1 + 0.2, True),
        Score(0, 2, "exact", math.nan, True),
        Score(7, 1, "délta", 1e-9),
    )
    prints = {"exact": PRINT, "délta": replace(PRINT, metric="délta", guidance=0.0)}
    path = tmp_path / "records.jsonl"
    Results(scores, prints).save(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[3] == {
        "prompt_id": 0, "seed": 2, "metric": "exact", "value": None, "trained_on": True,
    }  # fmt: skip
    back = Results.load(path)
    assert back.fingerprints == prints
    assert back.scores[0] == scores[0] and back.scores[2] == scores[2]
    assert math.isnan(back.scores[1].value) and back.scores[1].trained_on


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"prompt_id": 1, "seed": 1, "metric": "exact", "value": 1}',
        '{"prompt_id": 1, "seed": 1, "metric": "exact", "value": "1", "trained_on": false}',
        '{"prompt_id": 1, "seed": true, "metric": "exact", "value": 1, "trained_on": false}',
        '{"fingerprint": {"metric": "exact"}}',
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "records.jsonl"
    results({(0, 0): 1.0}).save(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"records\.jsonl:3 is no record"):
        Results.load(path)


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Results.load(tmp_path / "none.jsonl")


def test_results_must_be_whole() -> None:
    with pytest.raises(InputError, match="two scores"):
        Results((Score(0, 0, "exact", 1.0), Score(0, 0, "exact", 0.0)), {"exact": PRINT})
    with pytest.raises(InputError, match="'other'"):
        Results((Score(0, 0, "other", 1.0),), {})
    with pytest.raises(InputError, match="'exact'"):
        Results((), {"exact": PRINT})
    with pytest.raises(InputError, match="'cer'"):
        Results((Score(0, 0, "cer", 1.0),), {"cer": PRINT})


def test_summary_leaves_missing_values_out() -> None:
    scores = [Score(p, s, "exact", float(p % 2)) for p in range(6) for s in range(2)]
    scores += [Score(9, 0, "exact", math.nan), Score(0, 0, "lost", math.nan)]
    out = summarise(scores)
    assert list(out) == ["exact", "lost"]
    interval = bootstrap_mean([p % 2 for p in range(6) for _ in range(2)], np.repeat(range(6), 2))
    assert out["exact"] == {
        "mean": 0.5, "low": interval.low, "high": interval.high, "n": 12, "missing": 1,
    }  # fmt: skip
    assert out["lost"]["n"] == 0 and out["lost"]["missing"] == 1
    assert math.isnan(out["lost"]["mean"])


def test_comparison_matches_by_prompt_and_seed() -> None:
    keys = [(p, s) for p in range(12) for s in range(2)]
    rng = np.random.default_rng(0)
    old = {k: float(v) for k, v in zip(keys, rng.normal(size=24), strict=True)}
    new = {k: old[k] + 1 + 0.1 * k[0] for k in reversed(keys)}
    new[(3, 1)] = math.nan
    out = compare(results(old), results(new))["exact"]
    kept = [k for k in keys if k != (3, 1)]
    gains = [1 + 0.1 * p for p, _ in kept]
    assert out["gain"] == pytest.approx(np.mean(gains))
    assert out["before"] == pytest.approx(np.mean([old[k] for k in kept]))
    assert out["after"] == pytest.approx(np.mean([new[k] for k in kept]))
    assert (out["n"], out["missing"]) == (23, 1)
    wanted = paired(np.zeros(23), gains, [p for p, _ in kept])
    assert (out["low"], out["high"]) == pytest.approx((wanted.low, wanted.high))
    assert out["p"] == out["p_holm"] == wanted.p
    assert 0 < out["effect"] < out["gain"]


def test_comparison_corrects_for_the_number_of_metrics() -> None:
    def make(shift: float, noise: float) -> Results:
        rng = np.random.default_rng(1)
        scores, prints = [], {}
        for name, size in (("a", shift), ("b", 0.0), ("c", 0.0)):
            scores += [Score(p, 0, name, size + noise * rng.normal()) for p in range(30)]
            prints[name] = replace(PRINT, metric=name, n=30)
        scores += [Score(p, 0, "d", math.nan) for p in range(30)]
        return Results(tuple(scores), {**prints, "d": replace(PRINT, metric="d", n=30)})

    out = compare(make(0, 0.0), make(2.0, 1.0))
    p = [out[name]["p"] for name in "abc"]
    assert p[0] == min(p) == pytest.approx(1 / 4001)
    assert out["a"]["p_holm"] == pytest.approx(3 * p[0])
    assert out["b"]["p_holm"] >= out["b"]["p"]
    assert math.isnan(out["d"]["p_holm"]) and out["d"]["missing"] == 30


@pytest.mark.parametrize(
    ("field", "value"),
    [("engine", "reader 3.11"), ("n", 5), ("reference", "x"), ("grid", "x"), ("guidance", 1.0)],
)
def test_other_fingerprints_are_not_compared(field: str, value: object) -> None:
    old = results({(0, 0): 1.0})
    new = results({(0, 0): 1.0}, replace(PRINT, **{field: value}))
    with pytest.raises(InputError, match=field):
        compare(old, new)


def test_other_metrics_or_pairs_are_not_compared() -> None:
    old = results({(0, 0): 1.0})
    with pytest.raises(InputError, match="only once"):
        compare(old, results({(0, 0): 1.0}, replace(PRINT, metric="cer")))
    with pytest.raises(InputError, match="prompt 0, seed 5"):
        compare(results({(0, 0): 1.0, (0, 5): 1.0}), old)
