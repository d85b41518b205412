"""Points of a merger: which weights are tried, what is refused, how they are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.evaluation import Evaluation
from eval.points import alone, compared, label, picture, points_of, told
from eval.records import Fingerprint, Results, Score
from flux2.errors import InputError


def test_weights_given_or_not():
    assert points_of(2) == [(0.5, 0.5)]
    assert points_of(3, [1, -0.5, 0.5]) == [(1, -0.5, 0.5)]
    assert points_of(2, [[1, 0], [0.25, 0.75]]) == [(1, 0), (0.25, 0.75)]
    assert points_of(2, [0.7, 0.5], tasks=True) == [(0.7, 0.5)]
    assert points_of(1, [0.8], tasks=True) == [(0.8,)]


def test_a_grid_is_the_simplex_and_of_tasks_the_cube():
    assert points_of(2, grid=4) == [(1, 0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    three = points_of(3, grid=2)
    assert len(three) == 6 and all(sum(p) == 1 for p in three) and len(set(three)) == 6
    assert sum(map(alone, three)) == 3
    cube = points_of(2, grid=2, tasks=True)
    assert len(cube) == 8 and (1.0, 1.0) in cube and (0.0, 0.0) not in cube
    assert points_of(1, grid=2, tasks=True) == [(1.0,), (0.5,)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"count": 0}, "two or more"),
        ({"count": 1}, "two or more"),
        ({"count": 2, "weights": [0.6, 0.6]}, r"sum to 1.2: make it 1, or add tasks=true"),
        ({"count": 2, "weights": [[1, 0], [1, 1]]}, r"\[1, 1\] sum to 2"),
        ({"count": 2, "weights": [1.0]}, "give 2 numbers"),
        ({"count": 2, "weights": [[1, 0], 1]}, "give 2 numbers"),
        ({"count": 2, "weights": ["a", "b"]}, "give 2 numbers"),
        ({"count": 2, "weights": [float("nan"), 1]}, "give 2 numbers"),
        ({"count": 2, "weights": [1, 0], "grid": 2}, "leave one out"),
        ({"count": 2, "grid": 0}, "number of steps"),
        ({"count": 5, "grid": 9}, "at most 64"),
    ],
)
def test_wrong_weights_are_refused(arguments: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says) as refused:
        points_of(**arguments)
    assert "\n" not in str(refused.value)


def shot(values: np.ndarray) -> Evaluation:
    scores = tuple(Score(p, 0, "good", float(v)) for p, v in enumerate(values))
    prints = {"good": Fingerprint("good", "engine", len(values), "ref", "euler8", 3.0)}
    prompts = {p: str(p) for p in range(len(values))}
    return Evaluation(Results(scores, prints), prompts, {})


POINTS = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]


def shots() -> list[Evaluation]:
    """The second run is better than the first; between them it is best, but for its noise."""
    noise = np.random.default_rng(0).normal(scale=4, size=60)
    return [shot(noise), shot(noise + 1.0), shot(noise + 0.4)]


def test_each_point_is_compared_with_the_best_run_alone():
    rows = compared(POINTS, shots(), "good", "max")
    assert [r["reference"] for r in rows] == [False, False, True]
    assert rows[1]["gain"] == pytest.approx(0.6) and rows[0]["gain"] == pytest.approx(-0.4)
    # In pairs the noise is gone, though it hides the difference of the means.
    assert rows[1]["gain_low"] > 0.55 and rows[1]["p"] < 0.01
    assert rows[1]["low"] < rows[2]["high"] and "p" not in rows[2]
    lower = compared(POINTS, shots(), "good", "min")
    assert [r["reference"] for r in lower] == [True, False, False]
    first = compared([(0.6, 0.4), (0.4, 0.6)], shots()[:2], "good", "max")
    assert first[0]["reference"] and first[1]["gain"] == pytest.approx(1.0)


def test_the_table_and_the_picture(tmp_path: Path):
    rows = compared(POINTS, shots(), "good", "max")
    text = told("good", rows, 1)
    lines = text.splitlines()
    assert lines[3].startswith("0.5 0.5") and lines[3].endswith("chosen")
    assert "compared with" in lines[4] and "too good: measure it on others" in text
    for points, name in ((POINTS, "line"), ([(*p, 0.0) for p in POINTS], "points")):
        path = picture(points, rows, "good", 1, tmp_path / f"{name}.png")
        drawn = np.asarray(Image.open(path).convert("RGB"))
        assert (drawn == (213, 94, 0)).all(-1).sum() > 20  # the chosen point's colour
    assert label((0.5, 0.25)) == "0.5 0.25"
