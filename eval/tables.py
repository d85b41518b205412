"""How evaluation writes numbers, intervals and marks: one way for all its tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from flux2 import log

NONE: Final = "-"
"""What stands where there is no number."""
MARK: Final = " *"
"""Behind what training maximised."""
NOTE: Final = "* training maximised this, or a metric of the same scorer"


def number(x: float | None, none: str = NONE) -> str:
    """Three decimals, fewer of large numbers; `none` where there is none."""
    if x is None or not math.isfinite(x):
        return none
    a = abs(x)
    if a and a < 1e-3:
        return f"{x:.1e}"
    return f"{x:.{0 if a >= 1000 else 1 if a >= 100 else 2 if a >= 10 else 3}f}"


def signed(x: float | None, none: str = NONE) -> str:
    """`number` with its sign."""
    if x is None or not math.isfinite(x):
        return none
    return _sign(x) + number(abs(x))


def effect(x: float | None, none: str = NONE) -> str:
    """A standardised effect: two decimals."""
    if x is None or math.isnan(x):
        return none
    return f"{_sign(x)}{abs(x):.2f}" if math.isfinite(x) else f"{_sign(x)}∞"


def _sign(x: float) -> str:
    return "+" if x > 0 else "−" if x < 0 else "±"


def probability(p: float | None, none: str = NONE) -> str:
    """A p."""
    if p is None or not math.isfinite(p):
        return none
    return "< 0.001" if p < 1e-3 else f"{p:.3f}"


def span(low: float | None, high: float | None, text: Callable[[float], str] = number) -> str:
    """An interval: "low to high"."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return NONE
    return f"{text(low)} to {text(high)}"


def marked(text: str, trained: bool) -> str:
    """`text`, with the mark of what training maximised, which `NOTE` explains."""
    return text + MARK if trained else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of fixed width, without a rule."""
    return log.table(header, rows, rule=False)
