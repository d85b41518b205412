"""A curriculum: what is easy first, what is hard later, and some of what was easy ever after."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flux2.data.complexity import LEVELS, level_of
from flux2.data.order import (
    Law,
    Redrawn,
    describe_all,
    field_of,
    law_of,
    table,
)
from flux2.data.record import Dataset, Record
from flux2.errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class Curriculum(Redrawn):
    """A dataset whose records are admitted level by level, as the steps go on. It changes none.

    A stage begins at a step and names the levels that it admits; those of the stages before it keep
    the share `keep` of the samples together, each record of them as often as before. A stage may
    instead give shares, level → share of the samples; then these are all that is drawn. Within a
    level, records are drawn as the data say. Which batch a step has depends on the seed and the
    step alone.

    Attributes:
        dataset: whose records have levels.
        stages: {from: step, levels: [name, …]} each, or levels: {name: share}. `from` is a step,
            or, as a number with a point, the part of `total` (0.25); the first is 0.
        total: steps of the run, for stages that begin at a part of it.
        keep: share of the samples for levels of earlier stages.
        by: the field of the meta whose values are the levels; None: the complexity of the text
            in the image (`flux2.data.complexity`).

    Raises:
        InputError: no stages, a stage that begins before the last or admits no record, an unknown
            level, wrong shares, parts of no total.
    """

    dataset: Dataset
    stages: Sequence[Mapping[str, Any]]
    total: int | None = None
    keep: float = 0.2
    by: str | None = None
    _levels: Mapping[str, np.ndarray] = field(init=False)
    _starts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("data.dataset.stages is empty: give {from: 0, levels: [word]}, …")
        if not 0 <= self.keep < 1:
            raise InputError(f"data.dataset.keep is {self.keep}: give 0 to below 1")
        found: dict[str, list[int]] = {}
        for index, record in enumerate(describe_all(self.dataset)):
            if record is not None:
                found.setdefault(self._level(record), []).append(index)
        levels = {name: np.asarray(rows) for name, rows in found.items()}
        starts = tuple(self._start(k, stage) for k, stage in enumerate(self.stages))
        if list(starts) != sorted(set(starts)) or starts[0] != 0:
            raise InputError(
                f"data.dataset.stages begin at steps {', '.join(map(str, starts))}: let the first "
                "begin at 0 and each after the last"
            )
        object.__setattr__(self, "_levels", levels)
        object.__setattr__(self, "_starts", starts)
        for k in range(len(self.stages)):
            self._check(k)

    def _level(self, record: Record) -> str:
        if self.by is None:
            return level_of(record)
        value = field_of(record, self.by)
        return "none" if value is None else str(value)

    def _start(self, k: int, stage: Mapping[str, Any]) -> int:
        if set(stage) != {"from", "levels"}:
            raise InputError(f"data.dataset.stages: the {k + 1}. is not {{from: …, levels: …}}")
        begin = stage["from"]
        if type(begin) is int and begin >= 0:
            return begin
        if type(begin) is not float or not 0 <= begin < 1:
            raise InputError(
                f"data.dataset.stages: from {begin!r} is neither a step nor a part of the run "
                "from 0 to below 1"
            )
        if self.total is None or self.total < 1:
            raise InputError(
                "data.dataset.stages begin at parts of the run: set data.dataset.total to its "
                "steps, as ${train.steps}"
            )
        return round(begin * self.total)

    def _check(self, k: int) -> None:
        levels = self.stages[k]["levels"]
        known = LEVELS if self.by is None else tuple(map(str, sorted(self._levels)))
        for name in map(str, levels):
            if name not in known:
                raise InputError(
                    f"data.dataset.stages has level {name!r}: choose from {', '.join(known)}"
                )
        if isinstance(levels, Mapping):
            bad = [s for s in levels.values() if not isinstance(s, int | float) or s < 0]
            if bad or abs(sum(levels.values()) - 1) > 1e-6:
                raise InputError(
                    f"data.dataset.stages: the shares {list(levels.values())} must be numbers "
                    "from 0 that sum to 1"
                )
            missing = [n for n, s in levels.items() if s and str(n) not in self._levels]
        else:
            missing = list(map(str, levels)) if not self._rows(levels).size else []
        if missing:
            raise InputError(
                f"data.dataset.stages: no record is of level {', '.join(map(str, missing))}: "
                f"there are {self._census()}"
            )

    def _census(self) -> str:
        return ", ".join(f"{name} × {len(rows)}" for name, rows in sorted(self._levels.items()))

    def _rows(self, levels: Any) -> np.ndarray:
        """The records of these levels."""
        parts = [self._levels[n] for n in dict.fromkeys(map(str, levels)) if n in self._levels]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def stage_of(self, step: int) -> int:
        """The number of the stage that a step lies in, from 0."""
        return int(np.searchsorted(self._starts, step, side="right")) - 1

    def law(self, step: int) -> Law:
        """The dataset's law, restricted to what the step's stage admits."""
        inner, k = law_of(self.dataset, step), self.stage_of(step)
        key = (k, inner.since)
        if not inner.once and key in self._laws:
            return self._laws[key]
        since = max(inner.since, self._starts[k])
        weights = self._admitted(k, inner.shares(len(self)))
        law = Law(since, weights, inner.parts, inner.once)
        if not inner.once:
            self._laws[key] = law
        return law

    @functools.cached_property
    def _laws(self) -> dict[tuple[int, int], Law]:
        return {}

    def _admitted(self, k: int, base: np.ndarray) -> np.ndarray:
        """The weights of stage k: n, which sum to 1."""
        levels = self.stages[k]["levels"]
        if isinstance(levels, Mapping):
            wanted = [(self._rows([name]), float(share)) for name, share in levels.items()]
        else:
            new = self._rows(levels)
            old = self._rows([n for s in self.stages[:k] for n in s["levels"]])
            old = np.setdiff1d(old, new)
            keep = self.keep if base[old].sum() else 0.0
            wanted = [(old, keep), (new, 1 - keep)]
        weights = np.zeros(len(base))
        for rows, share in wanted:
            total = base[rows].sum()
            if share and not total:
                raise InputError(
                    f"data.dataset.stages: what stage {k + 1} admits has weight 0 in the data: "
                    "change the stages or the weights"
                )
            if share:
                weights[rows] = share * base[rows] / total
        return weights

    def report(self) -> Iterator[str]:
        """A table: of each level its records, and its share of the samples by stage."""
        base = law_of(self.dataset, 0).shares(len(self))
        laws = [self._admitted(k, base) for k in range(len(self.stages))]
        known = {name: k for k, name in enumerate(LEVELS)} if self.by is None else {}
        rows = []
        for name in sorted(self._levels, key=lambda n: (known.get(n, 0), n)):
            mine = self._levels[name]
            shares = [f"{law[mine].sum():.1%}" if law[mine].any() else "-" for law in laws]
            rows.append([name, str(len(mine)), *shares])
        steps = [f"from {start}" for start in self._starts]
        yield from table([self.by or "complexity", "records", *steps], rows)

    def __repr__(self) -> str:
        return f"Curriculum({self.identity})"
