"""Several seeds of one method in one row: what a table of methods shows.

Runs whose names match a pattern with one group are seeds of what that group holds: `(.+)-[0-9]+`
makes nft-0, nft-1 and nft-2 three seeds of nft. A value is the mean over the seeds, with the lowest
and the highest beside it; three seeds are too few for an interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.page import common_ceiling
from eval.tables import NONE, marked, number, span
from flux2.errors import InputError


def groups(names: Sequence[str], pattern: str) -> dict[str, list[str]]:
    """Method → names of its seeds, in order of appearance; what does not match is its own method.

    Raises:
        InputError: the pattern is no regular expression with one group.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"page.seeds={pattern} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise InputError(f"page.seeds={pattern} needs one group, as in '(.+)-[0-9]+'")
    out: dict[str, list[str]] = {}
    for name in names:
        found = compiled.fullmatch(name)
        out.setdefault(found[1] if found else name, []).append(name)
    return out


def by_seed(found: Mapping[str, Any], pattern: str) -> list[dict[str, Any]]:
    """A row a method, of a report's numbers.

    Returns:
        rows of `name`, `runs`, `seconds` and `steps` (means over the seeds; None where not logged)
        and `metrics`: name → mean, low, high over the seeds' means, `trained_on`, and
        `error_left`, (ceiling − mean) / (ceiling − baseline's mean): the share of the baseline's
        error that is still there; None without a common ceiling above the baseline.
    """
    runs = {run["name"]: run for run in found["runs"]}
    rows = []
    for name, seeds in groups(list(runs), pattern).items():
        values = {m["name"]: _over_seeds(m, seeds, found["baseline"]) for m in found["metrics"]}
        times = [runs[s]["training_seconds"] for s in seeds]
        steps = [runs[s]["training_steps"] for s in seeds]
        rows.append({
            "name": name, "runs": seeds, "seconds": _mean(times), "steps": _mean(steps),
            "metrics": values,
        })  # fmt: skip
    return rows


def _over_seeds(metric: Mapping[str, Any], seeds: Sequence[str], baseline: str) -> dict[str, Any]:
    known = [metric["cells"][s]["mean"] for s in seeds]
    known = [x for x in known if x is not None and math.isfinite(x)]
    ceiling, base = common_ceiling(metric), metric["cells"][baseline]["mean"]
    mean = _mean(known)
    left = None
    if ceiling is not None and base is not None and mean is not None and ceiling > base:
        left = (ceiling - mean) / (ceiling - base)
    return {
        "mean": mean, "low": min(known, default=None), "high": max(known, default=None),
        "error_left": left, "trained_on": any(s in metric["trained_on"] for s in seeds),
    }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None and math.isfinite(x)]
    return sum(known) / len(known) if known else None


def seed_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table; columns: names of metrics, None for all. The first column is
    also given as the share of the baseline's error that is left.

    Raises:
        InputError: a column that was not measured.
    """
    known = list(dict.fromkeys(m for row in rows for m in row["metrics"]))
    if unknown := [c for c in columns or () if c not in known]:
        raise InputError(f"page.columns has {unknown[0]}: choose from {', '.join(known)}")
    columns = list(columns or known)
    cells = []
    for row in rows:
        values = [row["metrics"][c] for c in columns]
        left = values[0]["error_left"]
        cells.append([
            row["name"], str(len(row["runs"])), *map(_cell, values),
            NONE if left is None else f"{left:.0%}",
            NONE if row["steps"] is None else f"{row['steps']:.0f}",
            NONE if row["seconds"] is None else f"{row['seconds']:.0f}",
        ])  # fmt: skip
    return ["method", "seeds", *columns, f"error left, {columns[0]}", "steps", "seconds"], cells


def _cell(value: Mapping[str, Any]) -> str:
    around = ""
    if value["low"] is not None and value["high"] > value["low"]:
        around = f" ({span(value['low'], value['high'])})"
    return marked(number(value["mean"]) + around, value["trained_on"])
