"""The monitor's picture: a small plot for each dial, its harmless band shaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flux2.log import COLOURS

ACROSS = 4


@dataclass(frozen=True)
class Panel:
    """One dial.

    Attributes:
        steps, values: its course. baseline: where it began.
        band: the values that are harmless; infinite where a side is open.
        flagged: the step that it was told at; best: that of the best checkpoint; None: none.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    baseline: float
    band: tuple[float, float]
    flagged: int | None = None
    best: int | None = None


def panels(path: Path, dials: Sequence[Panel]) -> Path:
    """Plots the dials as small multiples to the PNG `path`; those that were flagged are red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = max(1, min(ACROSS, len(dials)))
    down = max(1, -(-len(dials) // across))
    figure = Figure(figsize=(2.6 * across, 1.7 * down), dpi=110)
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    wide, tall = figure.get_size_inches()
    # A layout that matplotlib finds by itself takes seconds.
    figure.subplots_adjust(
        left=0.45 / wide, right=1 - 0.1 / wide, bottom=0.25 / tall, top=1 - 0.25 / tall,
        wspace=0.3, hspace=0.45,
    )  # fmt: skip
    for axes, dial in zip(grid, dials, strict=False):
        low, high = _view(dial)
        shade = [max(dial.band[0], low), min(dial.band[1], high)]
        axes.axhspan(*shade, color=COLOURS[2], alpha=0.15, linewidth=0)
        if math.isfinite(dial.baseline) and low < dial.baseline < high:
            axes.axhline(dial.baseline, color="grey", linewidth=0.8, linestyle=":")
        colour = COLOURS[0] if dial.flagged is None else COLOURS[1]
        marker = "o" if len(dial.steps) < 30 else None
        axes.plot(dial.steps, dial.values, color=colour, linewidth=1.2, marker=marker, markersize=2)
        for at, line in ((dial.flagged, COLOURS[1]), (dial.best, COLOURS[2])):
            if at is not None:
                axes.axvline(at, color=line, linewidth=1, linestyle="--")
        axes.set_ylim(low, high)
        title = dial.name if dial.flagged is None else f"{dial.name}: flagged at {dial.flagged}"
        axes.set_title(title, fontsize=8, color="black" if dial.flagged is None else COLOURS[1])
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(dials) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _view(dial: Panel) -> tuple[float, float]:
    """The part of the y axis that shows the course and the band's ends, with some air."""
    shown = [v for v in (*dial.values, *dial.band, dial.baseline) if math.isfinite(v)]
    if not shown:
        return 0.0, 1.0
    low, high = min(shown), max(shown)
    air = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - air, high + air
