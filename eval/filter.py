"""stage=filter: prompts from which a model can learn by a reward.

    python run.py stage=filter data=prompts data.dataset.path=prompts.jsonl reward=ocr range=0.2
    python run.py stage=nft data=prompts data.dataset.path=<run>/filter/prompts.jsonl

`group` samples of each of `count` prompts, judged by a reward. A group whose rewards are alike
gives no advantage: kept is a prompt whose range (max − min) is at least `range` and whose mean lies
from `low` to `high`. The run holds

    filter/prompts.jsonl    a line a prompt that was kept, for data=prompts and data=derived
    filter/groups.jsonl     a line a prompt, with its rewards
    filter/chunks/          what each chunk gave, whole or absent: a resumed run goes on behind them
    samples/filter.png      how ranges and means are distributed

`range`, `low` and `high` are applied at the end, so that `resume=<run> range=…` filters anew
without sampling.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from eval.groups import Drawn, check_counts, judge, plain_meta, read_chunks
from flux2 import distributed
from flux2.data.derived import FILE
from flux2.errors import InputError
from flux2.files import write_text

GROUPS: Final = "groups.jsonl"
ROUNDING: Final = 1e-6
"""So that rewards of 0.1 and 0.3, as a computer has them, have a range of 0.2."""
REASONS: Final = ("unscored", "range", "low", "high")
"""Why a prompt is left out: fewer than two of its samples have a score; its range, or its mean."""


def found_in(folder: Path, drawn: Drawn | None, rewards: Tensor) -> dict[str, Any]:
    """A chunk's prompts with their rewards (`eval.groups.Gave`)."""
    records = () if drawn is None else drawn.records
    rows = [
        {"record": r.id, "prompt": r.prompt, "rewards": group, "meta": plain_meta(r)}
        for r, group in zip(records, rewards.tolist(), strict=True)
    ]
    return {"rows": rows}


def statistics(rewards: Sequence[float | None]) -> dict[str, float]:
    """Of a group's rewards that are there: mean, min, max, std (n below), range; NaN for none."""
    scored = np.array([r for r in rewards if r is not None], float)
    if not len(scored):
        return dict.fromkeys(("mean", "min", "max", "std", "range"), math.nan)
    low, high = float(scored.min()), float(scored.max())
    return {
        "mean": float(scored.mean()),
        "min": low,
        "max": high,
        "std": float(scored.std()),
        "range": high - low,
    }


def reason(
    rewards: Sequence[float | None], least: float, low: float | None, high: float | None
) -> str:
    """Why a prompt with these rewards is left out, of REASONS; "" where it is kept.

    least: of the range; a range of 0 is never enough. low, high: bounds of the mean, None: open.
    """
    found = statistics(rewards)
    if sum(r is not None for r in rewards) < 2:
        return "unscored"
    if low is not None and found["mean"] < low:
        return "low"
    if high is not None and found["mean"] > high:
        return "high"
    return "range" if found["range"] < least - ROUNDING or found["range"] == 0 else ""


def make(cfg: Any) -> dict[str, Any]:
    """stage=filter, on every rank; returns its summary (on rank 0)."""
    check_counts(cfg, count=1, start=0, group=2, chunk=1)
    if not 0 <= cfg.range < math.inf:
        raise InputError(f"range is {cfg.range}: it must be at least 0")
    if cfg.low is not None and cfg.high is not None and cfg.low > cfg.high:
        raise InputError(f"low={cfg.low} lies above high={cfg.high}: no mean is between them")
    if cfg.reward is None:
        raise InputError("stage=filter needs a judge: choose a reward, as reward=ocr")
    folder, chunks = judge(cfg, found_in, "range, low and high")
    if not distributed.is_main():
        return {}
    return finish(folder, chunks, cfg.range, cfg.low, cfg.high)


# ---------------------------------------------------------------- what comes out


def finish(
    folder: Path, chunks: int, least: float, low: float | None, high: float | None
) -> dict[str, Any]:
    """Joins the chunks, writes both files and the picture, prints and returns the summary.

    Raises:
        InputError: no prompt is kept.
    """
    rows = [row for chunk in read_chunks(folder, chunks) for row in chunk["rows"]]
    lines = [line_of(row, statistics(row["rewards"])) for row in rows]
    reasons = [reason(row["rewards"], least, low, high) for row in rows]
    every = [{**x, "rewards": r["rewards"], "kept": not why}
             for x, r, why in zip(lines, rows, reasons, strict=True)]  # fmt: skip
    _write(folder / GROUPS, every)
    counts = Counter(reasons)
    told = ", ".join(f"{name} {counts[name]}" for name in REASONS)
    picture = histogram(folder.parent / "samples" / "filter.png", lines, least, low, high)
    if not counts[""]:
        (folder / FILE).unlink(missing_ok=True)  # of another range; the groups are this one's
        raise InputError(
            f"none of {len(rows)} prompts is kept (left out: {told}): loosen range={least}, low "
            f"and high (resume=<run> range=… filters anew); {picture} shows where they lie"
        )
    kept = [line for line, why in zip(lines, reasons, strict=True) if not why]
    _write(folder / FILE, kept)
    print(f"{len(kept)} of {len(rows)} prompts kept (left out: {told}): {folder / FILE}, {picture}")
    return {
        "stage": "filter",
        "prompts": len(rows),
        "kept": len(kept),
        "left_out": {name: counts[name] for name in REASONS},
        "asked": {"range": least, "low": low, "high": high},
        "samples_unscored": sum(r is None for row in rows for r in row["rewards"]),
        "reward": {"all": _mean(lines, "mean"), "kept": _mean(kept, "mean")},
        "range": {"all": _mean(lines, "range"), "kept": _mean(kept, "range")},
        "file": str(folder / FILE),
        "picture": str(picture),
    }


def line_of(row: Mapping[str, Any], found: Mapping[str, float]) -> dict[str, Any]:
    """A prompt's line: its record, and what its rewards were."""
    numbers = {f"reward_{k}": None if math.isnan(v) else v for k, v in found.items()}
    own = {"prompt": row["prompt"], "record": row["record"], **numbers}
    return {"id": row["record"], **row["meta"], **own}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A statistic of the prompts that have it."""
    found = [line[f"reward_{name}"] for line in lines]
    return np.array([v for v in found if v is not None], float)


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _values(lines, name)
    return float(values.mean()) if len(values) else None


def histogram(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    least: float,
    low: float | None,
    high: float | None,
) -> Path:
    """Draws how many prompts have which range and which mean to the PNG `path`, with what is kept
    between dashed lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    bounds = {"range": (least, None), "mean": (low, high)}
    for axes, (name, edges) in zip(figure.subplots(1, 2), bounds.items(), strict=True):
        axes.hist(_values(lines, name), bins=24, color="#3b6ea5")
        for edge in edges:
            if edge is not None:
                axes.axvline(edge, color="#b03a2e", linewidth=1, linestyle="--")
        axes.set_xlabel(f"{name} of a prompt's rewards")
        axes.set_ylabel("prompts")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    return path
