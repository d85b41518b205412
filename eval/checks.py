"""What the monitor's held-out checks are made of: their prompts, the length of velocities, a value
from check to check (its best, and whether it falls), and what else has changed.

All comparisons are paired: the same prompts and noise at every check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from torch import Tensor

from eval.dials import Flag, dial_of
from eval.records import Results
from eval.stats import holm, paired
from flux2 import distributed
from flux2.data.record import Dataset, Record
from flux2.types import Condition, Law, Policy, PolicyShape, Velocity

MOST: Final = 100
"""Checks that a p is corrected for, at most."""
SURE: Final = 0.01
"""p, corrected for the number of values, from which a change of a held-out value is no chance."""

Values = Mapping[tuple[int, int], float]
"""(prompt, seed) → a value."""


# ---------------------------------------------------------------- one check


@dataclass(frozen=True)
class PromptsOnly:
    """A dataset whose targets only say their size, so that no ceilings are measured on them."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        record = self.dataset[index]
        blank = None if record.target is None else record.target * 0
        return replace(record, target=blank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)


class Metered:
    """A velocity that measures its own length: root mean square over dimensions, averaged over
    calls and samples."""

    def __init__(self, velocity: Velocity) -> None:
        self._velocity, self._total, self._count = velocity, 0.0, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """See `Velocity`."""
        v = self._velocity(x, t, cond)
        self._note(v)
        return v

    def _note(self, v: Tensor) -> None:
        lengths = v.double().square().mean((1, 2)).sqrt()
        self._total, self._count = self._total + lengths.sum(), self._count + len(lengths)

    def speed(self) -> float:
        """Of all ranks' calls together."""
        parts = distributed.gather_objects((float(self._total), self._count))
        return sum(t for t, _ in parts) / max(1, sum(n for _, n in parts))


class MeteredPolicy(Metered):
    """A policy that measures the velocity it has where its network is asked, and is sampled as the
    policy that it is."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(cast(Any, policy))
        self._policy = policy

    @property
    def shape(self) -> PolicyShape:
        """See `Policy`."""
        return self._policy.shape

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> Law:
        """See `Policy`."""
        law = self._policy.policy(x, t, cond)
        self._note(law.velocity(x, t))
        return law


def metered(role: Any) -> Metered:
    """A velocity or a policy, measured, and sampled as without it."""
    return MeteredPolicy(role) if isinstance(role, Policy) else Metered(role)


# ---------------------------------------------------------------- from check to check


@dataclass
class Trend:
    """A held-out value from check to check: its best, and how long it has been worse.

    A check is compared with the best before it by their pairs (`eval.stats.paired`). That best was
    chosen among all of them, so that p is multiplied by their number.

    Attributes:
        patience: checks in succession that must be worse before it is over; 0: never.
        alpha: p below which a fall is no chance.
        best: (step, values) of the best check; of equals the older.
        worse: checks in succession that are worse than the best. count: of checks.
        fall: the newest check's p, where it lies below the best; else 1.
    """

    patience: int
    alpha: float
    best: tuple[int, Values] | None = None
    worse: int = 0
    count: int = 0
    fall: float = 1.0

    def add(self, step: int, values: Values, counts: bool = True) -> None:
        """The next check. counts: whether it may become the best."""
        self.count += 1
        if self.best is None:
            self.best = (step, values) if counts else None
            return
        was, now, prompts = _pairs(self.best[1], values)
        if not prompts:
            return  # nothing could be scored: no verdict either way
        among = min(self.count - 1, MOST)
        draws = max(4000, math.ceil(2 * among / self.alpha))  # no p lies below 1 / draws
        change = paired(was, now, prompts, draws=draws)
        self.fall = min(1.0, change.p * among) if change.mean < 0 else 1.0
        self.worse = self.worse + 1 if self.fall < self.alpha else 0
        if counts and change.mean > 0:
            self.best = (step, values)

    @property
    def over(self) -> bool:
        """Whether the run is to end."""
        return 0 < self.patience <= self.worse

    @property
    def back(self) -> bool:
        """Whether the newest check is worse than the best, more likely than not."""
        return self.fall < 0.5


def _pairs(
    was: Values, now: Values
) -> tuple[list[float], list[float], list[int]]:
    """Values that both checks have, and their prompts."""
    keys = [k for k in was if k in now and math.isfinite(was[k]) and math.isfinite(now[k])]
    return [was[k] for k in keys], [now[k] for k in keys], [k[0] for k in keys]


def mean(values: Mapping[Any, float]) -> float:
    """Of those that are finite; NaN where none is."""
    found = [v for v in values.values() if math.isfinite(v)]
    return sum(found) / len(found) if found else math.nan


Table = Mapping[str, Values]
"""Value's name → its values in one check."""
DECIDES: Final = "criterion"
"""The name of the value that decides, beside those that it is made of."""


def table_of(results: Results, weights: Mapping[str, float]) -> dict[str, Values]:
    """A check's values, and as DECIDES their weighted mean sample by sample; NaN where one of them
    is. No weights: without it."""
    out: dict[str, dict[tuple[int, int], float]] = {}
    for s in results.scores:
        out.setdefault(s.metric, {})[s.prompt_id, s.seed] = s.value
    if not weights:
        return dict(out)
    keys, total = next(iter(out.values())), sum(weights.values())
    decides = {k: sum(w * out[n][k] for n, w in weights.items()) / total for k in keys}
    return {**out, DECIDES: decides}


def measured(results: Results, weights: Mapping[str, float]) -> dict[str, float]:
    """Those of the weights whose values a check has."""
    table = table_of(results, {})
    return {n: w for n, w in weights.items() if n in table and math.isfinite(mean(table[n]))}


def changed(
    old: Table, new: Table, limits: Mapping[str, float | None], step: int
) -> dict[str, Flag]:
    """Dials "heldout/<name>" beyond their limits, of samples of the same prompts and noise, where
    chance is ruled out (`eval.stats.paired`, Holm over all of them)."""
    rows: dict[str, tuple[float, float, float]] = {}
    for name in (n for n in new if n in old):
        was, now, prompts = _pairs(old[name], new[name])
        if prompts and dial_of(f"heldout/{name}", limits) is not None:
            p = paired(was, now, prompts, draws=max(4000, 400 * len(new))).p
            rows[name] = (sum(was) / len(was), sum(now) / len(now), p)
    found: dict[str, Flag] = {}
    corrected = holm([p for _, _, p in rows.values()])
    for (name, (was, now, _)), p in zip(rows.items(), corrected, strict=True):
        dial = dial_of(f"heldout/{name}", limits)
        if dial is not None and p < SURE and dial.beyond(was, now):
            found[f"heldout/{name}"] = Flag(step, was, now)
    return found


@dataclass(frozen=True)
class Held:
    """What the checks so far say of the value that decides; the same on all ranks.

    Attributes:
        step: of the newest check, −1 before any.
        of: what it is made of, with weights; {}: none decides.
        best: step of its best check; None: none may be.
        over, back: `Trend`'s.
        inside: whether all corridors hold. entered: whether they ever did, all at once.
        left: why a corridor ends the run; None: none does.
    """

    step: int = -1
    of: Mapping[str, float] = field(default_factory=dict)
    best: int | None = None
    over: bool = False
    back: bool = False
    inside: bool = True
    entered: bool = True
    left: str | None = None
