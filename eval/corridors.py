"""Corridors: what a value must keep while something else is trained for, and when it has left.

An axis is a held-out value with bounds: numbers, or shares of a reference, which is the run's own
best check, its first one, the teacher's samples, or a number. A check lies outside where its mean
does. It has left where it was inside before, and lies outside by more than chance in `patience`
checks in succession: compared with its bound sample by sample, of the same prompts and noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from eval.checks import MOST, Table, Values, mean
from eval.stats import paired
from flux2.errors import InputError

REFERENCES: Final = ("best", "first", "teacher")


@dataclass(frozen=True)
class Corridor:
    """The bounds of one axis; at least one of them.

    Attributes:
        min, max: numbers.
        min_share, max_share: times the reference's value.
        within: ± this, around the reference's value.
        of: the reference: best, first, teacher, or a number. best is the check with the highest
            mean so far, so that it fits min_share alone.
        patience: checks in succession outside, from which the axis has left.
    """

    min: float | None = None
    max: float | None = None
    min_share: float | None = None
    max_share: float | None = None
    within: float | None = None
    of: str | float = "best"
    patience: int = 2

    def check(self, name: str) -> None:
        """Raises InputError where these are no bounds."""
        where = f"monitor.corridors.{name}"
        bounds = (self.min, self.max, self.min_share, self.max_share, self.within)
        if all(b is None for b in bounds):
            raise InputError(f"{where} has no bound: give min, max, min_share, max_share or within")
        for key in ("min_share", "max_share", "within"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise InputError(f"{where}.{key} is {value}: it must be above 0")
        if isinstance(self.of, str) and self.of not in REFERENCES:
            raise InputError(
                f"{where}.of is {self.of!r}: write {', '.join(REFERENCES)}, or a number"
            )
        if self.of == "best" and (self.max_share is not None or self.within is not None):
            raise InputError(
                f"{where}: the best check is the one with the highest value, which fits min_share "
                "alone; write of: first, teacher or a number"
            )
        if self.patience < 1:
            raise InputError(f"{where}.patience is {self.patience}: it must be at least 1")

    @property
    def relative(self) -> bool:
        """Whether there is a bound that needs the reference."""
        return any(b is not None for b in (self.min_share, self.max_share, self.within))

    def sides(self) -> list[tuple[int, float, float]]:
        """(side, scale, shift) of each bound scale · reference + shift: at least that where side is
        1, at most where it is −1."""
        out: list[tuple[int, float, float]] = []
        for side, number, share in ((1, self.min, self.min_share), (-1, self.max, self.max_share)):
            out += [] if number is None else [(side, 0.0, number)]
            out += [] if share is None else [(side, share, 0.0)]
        out += [] if self.within is None else [(1, 1.0, -self.within), (-1, 1.0, self.within)]
        return out

    def __str__(self) -> str:
        of = self.of if isinstance(self.of, str) else f"{self.of:g}"
        of = f"the {of}" if of in REFERENCES else of
        parts = [
            f"at least {self.min:g}" if self.min is not None else "",
            f"at most {self.max:g}" if self.max is not None else "",
            f"at least {self.min_share:.0%} of {of}" if self.min_share is not None else "",
            f"at most {self.max_share:.0%} of {of}" if self.max_share is not None else "",
            f"within {self.within:g} of {of}" if self.within is not None else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass
class Axis:
    """An axis from check to check.

    Attributes:
        entered: whether it was ever inside.
        inside: whether the newest check is.
        out: checks in succession that are outside by more than chance, since it was inside.
        left: the step at which it had left; None: it has not.
        value, bound: of the newest check: its mean, and the mean of the bound that is nearest to
            being broken.
    """

    entered: bool = False
    inside: bool = False
    out: int = 0
    left: int | None = None
    value: float = math.nan
    bound: float = math.nan


@dataclass
class Corridors:
    """All axes of a run. Rank 0 has it; it is made again from the checks after a resume.

    Attributes:
        rules: value's name → its corridor.
        alpha: p below which being outside is no chance.
        teacher: the teacher's values of the same prompts and noise; None: not measured.
    """

    rules: Mapping[str, Corridor]
    alpha: float
    teacher: Table | None = None
    axes: dict[str, Axis] = field(default_factory=dict)
    _first: Table | None = None
    _best: dict[str, Values] = field(default_factory=dict)
    _count: int = 0

    def add(self, step: int, table: Table) -> bool:
        """The next check; whether all axes that it measured lie inside."""
        if self._first is None:
            self._first = table
        for name, rule in self.rules.items():
            values = table.get(name)
            if values is None or not math.isfinite(mean(values)):
                continue  # no verdict either way
            axis = self.axes.setdefault(name, Axis())
            self._judge(step, rule, axis, values, self._reference(name, rule))
            if name not in self._best or mean(values) > mean(self._best[name]):
                self._best[name] = values
        self._count += 1
        return all(axis.inside for axis in self.axes.values())

    def _reference(self, name: str, rule: Corridor) -> Values | float:
        if not isinstance(rule.of, str):
            return float(rule.of)
        if not rule.relative:
            return math.nan
        if rule.of == "teacher":
            assert self.teacher is not None
            return self.teacher.get(name, math.nan)
        if rule.of == "first":
            assert self._first is not None
            return self._first.get(name, math.nan)
        return self._best.get(name, math.nan)  # the first check is its own best

    def _judge(
        self, step: int, rule: Corridor, axis: Axis, now: Values, reference: Values | float
    ) -> None:
        among = min(self._count, MOST) if rule.of == "best" and rule.relative else 1
        outside, sure, nearest = False, False, math.inf
        axis.value = mean(now)
        for side, scale, shift in rule.sides():
            bound = _bound(now, reference, scale, shift)
            keys = [k for k in bound if math.isfinite(bound[k]) and math.isfinite(now[k])]
            if not keys:
                continue
            a, b = [bound[k] for k in keys], [now[k] for k in keys]
            room = side * (sum(b) - sum(a)) / len(keys)
            if room < nearest:
                nearest, axis.bound = room, sum(a) / len(a)
            if room < 0:
                outside = True
                draws = max(4000, math.ceil(2 * max(1, among) / self.alpha))
                change = paired(a, b, [k[0] for k in keys], draws=draws)
                sure |= change.p * max(1, among) < self.alpha
        axis.inside = not outside
        axis.entered |= axis.inside
        axis.out = axis.out + 1 if axis.entered and sure else 0
        if axis.left is None and axis.out >= rule.patience:
            axis.left = step

    @property
    def left(self) -> str | None:
        """Why the run is to end; None where no axis has left."""
        for name, axis in self.axes.items():
            if axis.left is not None:
                rule = self.rules[name]
                return (
                    f"{name} has left its corridor ({rule}): {axis.value:.3g} against "
                    f"{axis.bound:.3g}, in {rule.patience} checks in succession"
                )
        return None

    @property
    def outside(self) -> list[str]:
        """Axes that the newest check left outside."""
        return [name for name, axis in self.axes.items() if not axis.inside]

    def rows(self) -> dict[str, dict[str, Any]]:
        """For the summary: each axis's bounds, its newest value and bound, whether it is inside,
        was ever, and the step at which it had left."""
        return {
            name: {
                "corridor": str(self.rules[name]), "value": a.value, "bound": a.bound,
                "inside": a.inside, "entered": a.entered, "left": a.left,
            }
            for name, a in self.axes.items()
        }  # fmt: skip


def _bound(now: Values, reference: Values | float, scale: float, shift: float) -> Values:
    """A bound for each sample; samples that the reference lacks have none."""
    if not scale:
        return dict.fromkeys(now, shift)
    if isinstance(reference, int | float):
        return dict.fromkeys(now, scale * reference + shift)
    return {k: scale * reference[k] + shift for k in now if k in reference}


def check_corridors(rules: Mapping[str, Any], teacher: bool) -> dict[str, Corridor]:
    """The corridors of a configuration: name → the keys of `Corridor`.

    Raises:
        InputError: an unknown key, no bounds, or the teacher named without one being sampled.
    """
    out: dict[str, Corridor] = {}
    for name, given in rules.items():
        if given is None:
            continue  # switched off
        if isinstance(given, Corridor):
            rule = given
        else:
            known = Corridor.__dataclass_fields__
            odd = [k for k in given if k not in known]
            if odd:
                raise InputError(
                    f"monitor.corridors.{name} has {odd[0]!r}: choose from {', '.join(known)}"
                )
            rule = Corridor(**given)
        rule.check(name)
        if rule.of == "teacher" and rule.relative and not teacher:
            raise InputError(
                f"monitor.corridors.{name}.of is teacher, and monitor.teacher=null: give its steps "
                "and guidance"
            )
        out[name] = rule
    return out
