"""What the rungs of a ladder (`eval.ladder`) say: rows, the table, the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eval import tables
from eval.evaluation import Evaluation
from eval.images import read_image
from eval.records import compare, summarise
from flux2.errors import InputError
from flux2.generate import Sampler
from flux2.log import COLOURS, grid

if TYPE_CHECKING:
    from eval.ladder import Ladder


@dataclass(frozen=True)
class Rung:
    """One evaluation of the ladder.

    Attributes:
        name: of its folder: n04, n04-512x768, teacher.
        sampler: its steps and guidance.
        size: (height, width) of its images; None: as the dataset has them.
        teacher: sampled from the teacher's weights.
    """

    name: str
    sampler: Sampler
    size: tuple[int, int] | None = None
    teacher: bool = False


def row_of(
    rung: Rung, shot: Evaluation, reference: Evaluation | None, ladder: Ladder
) -> dict[str, Any]:
    """What a rung reached.

    Returns:
        its sampling, forwards and seconds an image; `metrics` as `eval.records.summarise` gives
        them; `against`: value → share of the reference's, gain with its interval and p, over the
        pairs that both have; `drift`: value → its distance from the reference; `keeps`: value →
        whether it keeps the share that is wanted, None where that is not known.
    """
    metrics = summarise(shot.results)
    changes = {} if reference is None else compared(reference, shot)
    away = {}
    for name in (n for n in ladder.drift if n in metrics):
        begin = changes[name]["before"] if name in changes else shot.ceilings.get(name, math.nan)
        away[name] = metrics[name]["mean"] - begin
    keeps = {
        name: changes[name]["share"] >= share
        if name in changes and math.isfinite(changes[name]["share"]) else None
        for name, share in ladder.keep.items()
    }  # fmt: skip
    return {
        "name": rung.name, "teacher": rung.teacher, "steps": rung.sampler.steps,
        "guidance": float(rung.sampler.guidance), "size": rung.size,
        "forwards": rung.sampler.forwards, "seconds": shot.identity["seconds"],
        "folder": str(shot.folder), "metrics": metrics, "against": changes, "drift": away,
        "keeps": keeps,
    }  # fmt: skip


def compared(reference: Evaluation, shot: Evaluation) -> dict[str, dict[str, float]]:
    """Value → before, after, share, gain, low, high, p_holm; of what both measured alike. Raises
    InputError where that is nothing."""
    one, two = reference.results, shot.results
    same = []
    for name in (n for n in two.fingerprints if n in one.fingerprints):
        try:
            compare(one.only(name), two.only(name), sampling="any")
        except InputError:
            continue
        same.append(name)
    if not same:
        raise InputError(
            f"{reference.folder} was measured otherwise, so that nothing can be compared with it: "
            "evaluate the reference on the same prompts, as many noises and the same metrics"
        )
    changes = compare(one.only(*same), two.only(*same), sampling="any")
    wanted = ("before", "after", "gain", "low", "high", "p_holm")
    return {
        name: {
            **{k: float(c[k]) for k in wanted},
            "share": c["after"] / c["before"] if c["before"] else math.nan,
        }
        for name, c in changes.items()
    }


def fewest(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The rung of fewest forwards that keeps all that is wanted; None: none does, or nothing is."""
    good = [r for r in rows if not r["teacher"] and r["keeps"] and all(r["keeps"].values())]
    return min(good, key=lambda r: r["forwards"])["name"] if good else None


def text_table(rows: Sequence[Mapping[str, Any]], ladder: Ladder) -> str:
    """A line for each rung: forwards and values, with the share of the reference or the drift."""
    names = shown_of(rows, ladder)
    header = ["rung", "forwards", "seconds", *names]
    lines = [
        [r["name"], str(r["forwards"]), f"{r['seconds']:.3g}", *(_cell(r, n) for n in names)]
        for r in rows
    ]
    text = tables.table(header, lines)
    held_against = any(r["against"] for r in rows)
    if held_against:
        text += "\nin brackets: share of the reference's value"
    if any(r["drift"] for r in rows):
        of = "the reference" if held_against else "the held-out images"
        text += f"\nsigned: away from {of}"
        if held_against and any(r["teacher"] for r in rows):
            text += "; the teacher's: from the held-out images"
    if ladder.keep and held_against:
        wanted = ", ".join(f"{n} {s:.0%}" for n, s in ladder.keep.items())
        text += f"\nfewest forwards that keep {wanted}: {fewest(rows) or 'no rung does'}"
        lost = [n for n in ladder.keep if all(r["keeps"][n] is None for r in rows)]
        text += f" ({', '.join(lost)}: not compared)" if lost else ""
    return text


def shown_of(rows: Sequence[Mapping[str, Any]], ladder: Ladder) -> list[str]:
    """Values of the table: those that are asked for and were measured."""
    known = list(dict.fromkeys(n for r in rows for n in r["metrics"]))
    return [n for n in ladder.shows if n in known] or known


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["metrics"]:
        return tables.NONE
    text = tables.number(row["metrics"][name]["mean"])
    if name in row["drift"]:
        return f"{text} {tables.signed(row['drift'][name])}"
    if name in row["against"] and math.isfinite(row["against"][name]["share"]):
        return f"{text} ({row['against'][name]['share']:.0%})"
    return text


# ---------------------------------------------------------------- pictures


def _series(
    rows: Sequence[Mapping[str, Any]], name: str
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Size → its rungs that have the value, without the teacher."""
    by: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if not row["teacher"] and math.isfinite(row["metrics"].get(name, {}).get("mean", math.nan)):
            size = "" if row["size"] is None else "×".join(map(str, row["size"]))
            by.setdefault(size, []).append(row)
    yield from by.items()


def picture(path: Path, rows: Sequence[Mapping[str, Any]], ladder: Ladder) -> Path:
    """Each value over the forwards of an image, with its interval; dashed, the reference; dotted,
    the share of it that is wanted."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = shown_of(rows, ladder)
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(3.2 * across, 2.4 * down), dpi=110)
    FigureCanvasAgg(figure)
    cells = list(figure.subplots(down, across, squeeze=False).flat)
    wide, tall = figure.get_size_inches()
    # A layout that matplotlib finds by itself takes seconds.
    figure.subplots_adjust(
        left=0.45 / wide, right=1 - 0.1 / wide, bottom=0.45 / tall, top=1 - 0.25 / tall,
        wspace=0.25, hspace=0.5,
    )  # fmt: skip
    for axes, name in zip(cells, names, strict=False):
        for colour, (size, mine) in zip(COLOURS, _series(rows, name), strict=False):
            xs = [r["forwards"] for r in mine]
            at = [r["metrics"][name] for r in mine]
            axes.plot(xs, [m["mean"] for m in at], "o-", color=colour, markersize=3, label=size)
            low, high = ([m[k] for m in at] for k in ("low", "high"))
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
            known = [r["against"][name]["before"] for r in mine if name in r["against"]]
            if known:
                axes.axhline(known[0], color=colour, linewidth=1, linestyle="--")
            if known and name in ladder.keep:
                wanted = ladder.keep[name] * known[0]
                axes.axhline(wanted, color=colour, linewidth=1, linestyle=":")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("forwards an image", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if ladder.sizes:
            axes.legend(frameon=False, fontsize=7)
    for axes in cells[len(names) :]:
        axes.set_visible(False)
    figure.savefig(path)
    return path


def samples(path: Path, shots: Mapping[str, Evaluation], ladder: Ladder) -> Path | None:
    """The same samples on every rung: a row for each, a column for each rung. None where not all
    rungs have one size, or where no image was kept of all of them."""
    names: Sequence[str] = list(shots)
    kept = [s.folder for s in shots.values() if s.folder is not None]
    common = set.intersection(*({f.name for f in (k / "images").iterdir()} for k in kept))
    firsts: dict[str, str] = {}
    for file in sorted(common):
        firsts.setdefault(file.partition("-")[0], file)
    files = list(firsts.values())[: ladder.shown]
    shapes = [[read_image(k / "images" / f) for k in kept] for f in files]
    flat = [x for line in shapes for x in line]
    if not flat or len({x.shape for x in flat}) > 1:
        return None
    first = next(iter(shots.values()))
    captions = []
    for file in files:
        prompt = first.prompts[int(file.partition("-")[0])]
        captions += [f"{names[0]}: {prompt}", *names[1:]]
    images = torch.from_numpy(np.stack(flat)).permute(0, 3, 1, 2)
    grid(images, captions, len(names)).save(path)
    return path
