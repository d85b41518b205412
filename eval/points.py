"""Points of a merger: which weights to try, and how their evaluations compare.

Every point is evaluated on the same prompts and noises, so that points are compared pair by pair
(`eval.records.compare`), each with the best of the runs alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.evaluation import Evaluation
from eval.records import compare, summarise
from eval.stats import holm
from flux2.errors import InputError
from flux2.log import COLOURS, table

MOST = 64
"""Points of a grid: more is a slip of the pen."""


# ---------------------------------------------------------------- which weights


def points_of(
    count: int, weights: Any = None, grid: int | None = None, tasks: bool = False
) -> list[tuple[float, ...]]:
    """The weights to try, each one a run.

    Args:
        count: of runs.
        weights: a list, or several; None: equal ones.
        grid: n: all weights in steps of 1/n, which sum to 1; with `tasks` all between 0 and 1.
        tasks: sums other than 1 are meant.

    Raises:
        InputError: too few or too many weights, none that is a number, a sum other than 1.
    """
    if count < (1 if tasks else 2):
        raise InputError(f"runs= names {count}: give two or more, e.g. runs=[outputs/a,outputs/b]")
    if weights is not None and grid is not None:
        raise InputError("weights= and grid= are both given: leave one out")
    if grid is not None:
        return _lattice(count, grid, tasks)
    given = [1 / count] * count if weights is None else list(weights)
    several = any(isinstance(row, list | tuple) for row in given)
    rows = [r if isinstance(r, list | tuple) else [r] for r in given] if several else [given]
    points = []
    for row in rows:
        if len(row) != count or not all(_number(w) for w in row):
            raise InputError(f"weights={list(row)}: give {count} numbers, one for each of runs")
        total = math.fsum(row)
        if not tasks and abs(total - 1) > 1e-6:
            raise InputError(
                f"weights={list(row)} sum to {total:g}: make it 1, or add tasks=true for "
                "base + Σ w·(θ − base)"
            )
        points.append(tuple(float(w) for w in row))
    return points


def _number(w: Any) -> bool:
    return isinstance(w, int | float) and not isinstance(w, bool) and math.isfinite(w)


def _lattice(count: int, grid: int, tasks: bool) -> list[tuple[float, ...]]:
    if grid < 1:
        raise InputError(f"grid is {grid}: give the number of steps from 0 to 1")
    size = (grid + 1) ** count if tasks else math.comb(grid + count - 1, count - 1)
    if size > MOST:
        raise InputError(f"grid={grid} of {count} runs has {size} points: at most {MOST}")
    every = itertools.product(range(grid + 1), repeat=count)
    kept = [row for row in every if (any(row) if tasks else sum(row) == grid)]
    return [tuple(k / grid for k in row) for row in reversed(kept)]


def label(weights: Sequence[float]) -> str:
    """Of a point, in tables and pictures."""
    return " ".join(f"{w:g}" for w in weights)


def alone(weights: Sequence[float]) -> bool:
    """Whether it is one of the runs as it is."""
    return sorted(weights) == [0.0] * (len(weights) - 1) + [1.0]


def compared(
    points: Sequence[Sequence[float]], shots: Sequence[Evaluation], name: str, mode: str
) -> list[dict[str, Any]]:
    """Each point's value beside that of the best run alone (where none is among the points: beside
    the first point's), in pairs of the same prompt and noise.

    Returns:
        weights, mean, low, high; and but for the one compared with (`reference`) gain, its
        gain_low and gain_high, and p, Holm's over the points.
    """
    means = [summarise(s.results)[name] for s in shots]
    sign = 1 if mode == "max" else -1
    single = [k for k, w in enumerate(points) if alone(w)]
    held = max(single, key=lambda k: sign * means[k]["mean"], default=0)
    rows: list[dict[str, Any]] = []
    for k, (weights, mean) in enumerate(zip(points, means, strict=True)):
        row: dict[str, Any] = {"weights": list(weights), "reference": k == held}
        row |= {key: mean[key] for key in ("mean", "low", "high")}
        if k != held:
            change = compare(shots[held].results, shots[k].results)[name]
            row |= {"gain": change["gain"], "gain_low": change["low"],
                    "gain_high": change["high"], "p": change["p"]}  # fmt: skip
        rows.append(row)
    others = [r for r in rows if "p" in r]
    for row, p in zip(others, holm([r["p"] for r in others]), strict=True):
        row["p"] = float(p)
    return rows


def told(name: str, rows: Sequence[Mapping[str, Any]], best: int) -> str:
    """`compared`'s rows as a table; best: the chosen one."""
    header = ["weights", name, "95 % interval", "gain", "95 % interval", "p (Holm)", ""]
    cells = []
    for k, r in enumerate(rows):
        change = ["", "compared with", ""]
        if "gain" in r:
            span = f"{r['gain_low']:+.3f} … {r['gain_high']:+.3f}"
            change = [f"{r['gain']:+.3f}", span, f"{r['p']:.3g}"]
        cells.append([
            label(r["weights"]), f"{r['mean']:.3f}", f"{r['low']:.3f} … {r['high']:.3f}", *change,
            "chosen" if k == best else "",
        ])  # fmt: skip
    note = (
        "Paired by prompt and noise. The chosen one was chosen on these prompts, so its value here "
        "is too good: measure it on others."
    )
    return f"{table(header, cells)}\n{note}\n"


def picture(
    points: Sequence[Sequence[float]], rows: Sequence[Mapping[str, Any]], name: str, best: int,
    path: Path,
) -> Path:  # fmt: skip
    """Draws the value against the weight: of the second of two runs, or of the only one; else by
    point. Returns the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    line = len(points[0]) <= 2 and len({p[-1] for p in points}) == len(points)
    at = [p[-1] if line else float(k) for k, p in enumerate(points)]
    order = sorted(range(len(at)), key=lambda k: at[k])
    x = [at[k] for k in order]
    mean, low, high = ([rows[k][key] for k in order] for key in ("mean", "low", "high"))
    figure = Figure(figsize=(6.4, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and none of pyplot's global state
    axes = figure.add_subplot()
    if line:
        axes.plot(x, mean, color=COLOURS[0], marker="o", markersize=3, linewidth=1.5)
        axes.fill_between(x, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
        axes.set_xlabel(f"weight of {'the run' if len(points[0]) == 1 else 'the second run'}")
    else:
        error = [[m - a for m, a in zip(mean, low, strict=True)],
                 [b - m for m, b in zip(mean, high, strict=True)]]  # fmt: skip
        axes.errorbar(x, mean, error, color=COLOURS[0], fmt="o", markersize=4)
        axes.set_xticks(x, [label(points[k]) for k in order], rotation=60, ha="right", fontsize=7)
        axes.set_xlabel("weights")
    axes.plot([at[best]], [rows[best]["mean"]], "o", color=COLOURS[1])
    axes.set_title(f"chosen: {label(points[best])}", fontsize=9, color=COLOURS[1], loc="right")
    axes.set_ylabel(name)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
