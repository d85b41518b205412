"""The dials of a distillation by score differences: what its numbers mean, and what to do.

A part of a monitor (`eval.monitor.HackMonitor`); it reads what the method logs of itself:

    dmd/delta  ‖x̂_fake − x̂_real‖ / ‖x̂‖     dmd/cos   cos(Δ_CA, Δ_DM), where guidance is > 1
    fake/loss  of the fake score           dmd/std   of the student's x̂,  real/std  of the data

Δ_DM = x̂_fake − x̂_c is the matching, Δ_CA = −(α − 1)·(x̂_c − x̂_u) what guidance adds. Where both see
the same noise, Δ_DM + Δ_CA = 0 at the fixed point, so that in a healthy run the cosine is below 0:
the fake score holds guidance back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from eval.panels import Panel
from flux2 import distributed
from flux2.data.loader import Collator
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.files import jsonable, write_text
from flux2.generate import buckets
from flux2.log import Log
from flux2.model import Flux2
from flux2.monitor import Row


class Part(Protocol):
    """What watches a run beside the monitor's own dials. Every rank has one and calls it alike."""

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """Before the first step of a session; `step` are done."""
        ...

    def records(self) -> Sequence[Record]:
        """The records whose prompts it will ask the model for."""
        ...

    def probe(self, step: int) -> Mapping[str, float]:
        """What it measured of a step, for the log."""
        ...

    def watch(self, step: int, row: Row) -> None:
        """The step's whole line."""
        ...

    def panels(self) -> list[Panel]:
        """Its plots in monitor.png."""
        ...

    def finish(self) -> dict[str, Any]:
        """Its part of the summary."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        ...


# ---------------------------------------------------------------- dials

SURE: Final = 4.0
"""Standard errors beyond a bound from which a mean is no chance."""


@dataclass(frozen=True)
class Gauge:
    """A number that is to stay between two bounds.

    Attributes:
        column: of the log. over: what it is divided by: "" nothing, another column, "baseline" its
            own mean over the first window, "floor" the lowest mean of a window so far.
        low, high: the bounds. below, above: what it means, and what to do, beyond either.
    """

    column: str
    over: str = ""
    low: float = -math.inf
    high: float = math.inf
    below: str = ""
    above: str = ""

    @property
    def bounds(self) -> str:
        """For a person."""
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


_FASTER = "give the fake score more updates for each of the student's (method.every), or lower the "
_FASTER += "student's learning rate"

GAUGES: Final[Mapping[str, Gauge]] = {
    "delta": Gauge(
        "dmd/delta", "", 2e-3, 1.0,
        "the two scores hardly differ, so that the student is told nothing: is the fake score "
        "trained (its loss, its learning rate)? If it is and samples are good, end the run",
        "the scores differ by as much as the sample is long: the fake score has gone astray, or "
        "guidance is too strong; lower the learning rates, or method.guidance",
    ),
    "cos": Gauge(
        "dmd/cos", "", -math.inf, 0.3, "",
        "matching pulls where guidance pulls, so that nothing holds saturation back: the fake "
        f"score lags; {_FASTER}",
    ),
    "fake_lag": Gauge(
        "fake/loss", "floor", -math.inf, 1.5, "",
        f"the fake score has fallen behind the student (far above its lowest loss); {_FASTER}",
    ),
    "fake_ease": Gauge(
        "fake/loss", "baseline", 0.25, math.inf,
        "samples have become easy to denoise: they grow alike, or plain; look at diversity and at "
        "the triptych, lower the student's learning rate, and go back to an earlier checkpoint",
    ),
    "std": Gauge(
        "dmd/std", "real/std", 0.8, 1.25,
        "the student's samples are flatter than the data (blur, or fewer modes): renoise up to "
        f"τ = 1 in matching; {_FASTER}",
        "the student's samples are stronger than the data (saturated): lower method.guidance, or "
        "move the law of augmentation to smaller τ",
    ),
}  # fmt: skip
"""The dials of a method like DMD. A name for each: a column may have several."""


@dataclass
class Course:
    """A gauge's values that count.

    Attributes:
        first: those of the first window. last: those of the newest one.
        floor: the lowest mean of a window, and its standard error. since: values since the last
            change of side.
        side: where the window's mean is: "" within, "low", "high", or "nan".
        entered: whether it was ever within.
    """

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    floor: list[float] = field(default_factory=lambda: [math.inf, 0.0])
    since: int = 0
    side: str = ""
    entered: bool = False


@dataclass
class Gauges:
    """Dials that are judged by the mean of their last values; the part that reads the log.

    A dial is told when its window's mean passes a bound by more than `SURE` standard errors, once
    each time it does, and again when it is back; at most once a window. One that has not been
    within its bounds yet (as before the first updates) is told after `wait` windows.

    Attributes:
        window: values of a mean. wait: windows.
        bounds: gauge → [low, high], null for an open side; null for a whole gauge switches it off.
        dataset: images whose latents' standard deviation stands for real/std, where the method
            logs none (it needs no data); None: it is then not judged. samples: how many.
    """

    window: int = 10
    wait: int = 5
    bounds: Mapping[str, Any] | None = None
    dataset: Dataset | None = None
    samples: int = 32

    def __post_init__(self) -> None:
        for name in ("window", "wait", "samples"):
            if getattr(self, name) < 1:
                raise InputError(f"gauges.{name} is {getattr(self, name)}: it must be at least 1")
        self._gauges = _bounded(self.bounds or {})
        self._courses: dict[str, Course] = {name: Course() for name in self._gauges}
        self._events: list[dict[str, Any]] = []
        self._others: dict[str, float] = {}

    # ------------------------------------------------------------ the part

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """See `Part`."""
        self._log, self._file = log, Path(cfg.run.dir) / "monitor" / "gauges.jsonl"
        if self.dataset is not None:
            self._others["real/std"] = self._real(model)
        if distributed.is_main():
            self._file.unlink(missing_ok=True)
            if self._events:
                self._write()

    def _real(self, model: Flux2) -> float:
        """The standard deviation of the latents of the first images, of one size."""
        assert self.dataset is not None
        records = [self.dataset[i] for i in range(min(self.samples, len(self.dataset)))]
        records = next(buckets(records))
        ids = torch.tensor([r.id for r in records])
        batch = Collator(model, text=False)(records, ids)
        assert batch.x0 is not None
        return float(batch.x0.float().std())

    def records(self) -> Sequence[Record]:
        """See `Part`: none, as it draws nothing."""
        return ()

    def probe(self, step: int) -> Mapping[str, float]:
        """See `Part`."""
        return {}

    def watch(self, step: int, row: Row) -> None:
        """See `Part`. Judges what the step logged."""
        self._others |= {
            g.over: value
            for g in self._gauges.values()
            if g.over in row and (value := row[g.over]) is not None
        }
        for name, gauge in self._gauges.items():
            if gauge.column not in row:
                continue
            event = self._judge(step, name, gauge, row[gauge.column])
            if event is not None:
                self._events.append(event)
                self._log.print(line(event))
                if distributed.is_main():
                    self._write()

    def _judge(
        self, step: int, name: str, gauge: Gauge, value: float | None
    ) -> dict[str, Any] | None:
        """What the next value changes; None: nothing."""
        course = self._courses[name]
        course.since += 1
        if value is None:
            changed, course.side, course.last = course.side != "nan", "nan", []
            course.since = 0 if changed else course.since
            return _event(step, name, gauge, "nan", math.nan) if changed else None
        now, error = self._value(gauge, course, value)
        if math.isnan(now):
            return None
        side = _side(gauge, now, 0.0 if course.side else SURE * error)
        course.entered |= gauge.low <= now <= gauge.high
        least = self.window * (1 if course.entered else self.wait)
        if side == course.side or course.since < least:
            return None
        course.side, course.since = side, 0
        return _event(step, name, gauge, side, now)

    def _value(self, gauge: Gauge, course: Course, value: float) -> tuple[float, float]:
        """The window's mean as the gauge gives it, and its standard error; NaN before a window is
        full, and where what it is divided by is not known."""
        over, unknown = gauge.over, (math.nan, math.nan)
        if over not in ("", "baseline", "floor"):
            value = _ratio(value, self._others.get(over, math.nan))
        if math.isnan(value):
            return unknown
        if len(course.first) < self.window:
            course.first = [*course.first, value]
        course.last = [*course.last, value][-self.window :]
        if len(course.last) < self.window:
            return unknown
        mean, error = _mean(course.last)
        if mean < course.floor[0]:
            course.floor = [mean, error]
        by, its = {"baseline": _mean(course.first), "floor": course.floor}.get(over, (1.0, 0.0))
        now = _ratio(mean, by)
        return now, _ratio(math.hypot(error, now * its), abs(by))

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, "".join(json.dumps(jsonable(e)) + "\n" for e in self._events))

    def panels(self) -> list[Panel]:
        """See `Part`: one for each gauge that has values, as it is divided."""
        out = []
        for name, gauge in self._gauges.items():
            xs, ys = self._log.history(gauge.column)
            if not xs:
                continue
            ys = self._drawn(gauge, self._courses[name], ys)
            told = [e["step"] for e in self._events if e["gauge"] == name and e["side"]]
            band = (gauge.low, gauge.high)
            flagged = told[-1] if told else None
            out.append(Panel(name, [x + 1 for x in xs], ys, math.nan, band, flagged))
        return out

    def _drawn(self, gauge: Gauge, course: Course, ys: Sequence[float]) -> list[float]:
        by = {
            "": 1.0, "floor": course.floor[0],
            "baseline": sum(course.first) / max(1, len(course.first)),
        }  # fmt: skip
        divisor = by.get(gauge.over, self._others.get(gauge.over, math.nan))
        return [_ratio(y, divisor) for y in ys]

    def finish(self) -> dict[str, Any]:
        """See `Part`. Tells which gauges left their bounds, and which had nothing to judge."""
        told = [f"{e['gauge']} at step {e['step']}" for e in self._events if e["side"]]
        if told:
            self._log.print(f"monitor: beyond their bounds: {', '.join(told)} ({self._file})")
        silent = [n for n, c in self._courses.items() if len(c.last) < self.window]
        if silent:
            self._log.print(f"monitor: too few values, or none, of {', '.join(silent)}")
        last = {n: sum(c.last) / len(c.last) for n, c in self._courses.items() if c.last}
        return {"means": last, "events": list(self._events), "silent": silent}

    def state_dict(self) -> dict[str, Any]:
        """See `Part`."""
        courses = {name: vars(c).copy() for name, c in self._courses.items()}
        return {"courses": courses, "events": list(self._events), "others": dict(self._others)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Part`."""
        for name, kept in state["courses"].items():
            if name in self._courses:
                self._courses[name] = Course(**kept)
        self._events, self._others = list(state["events"]), dict(state["others"])


def _bounded(bounds: Mapping[str, Any]) -> dict[str, Gauge]:
    """GAUGES with the bounds of a configuration. Raises InputError for an unknown or an odd one."""
    for name, given in bounds.items():
        if name not in GAUGES:
            raise InputError(f"gauges.bounds has {name!r}: choose from {', '.join(GAUGES)}")
        fits = given is None or (len(given) == 2 and any(b is not None for b in given))
        if not fits:
            raise InputError(
                f"gauges.bounds.{name} is {given}: give [low, high], null for an open side, or "
                "null to switch it off"
            )
    out = {}
    for name, gauge in GAUGES.items():
        given = bounds.get(name, (gauge.low, gauge.high))
        if given is None:
            continue
        low, high = (
            open_ if b is None else float(b)
            for b, open_ in zip(given, (-math.inf, math.inf), strict=True)
        )
        if not low < high:
            raise InputError(f"gauges.bounds.{name} is {list(given)}: low must be below high")
        below, above = gauge.below or "it is low", gauge.above or "it is high"
        out[name] = Gauge(gauge.column, gauge.over, low, high, below, above)
    return out


def _event(step: int, name: str, gauge: Gauge, side: str, value: float) -> dict[str, Any]:
    advice = {
        "low": gauge.below, "high": gauge.above, "": "it is back within its bounds",
        "nan": "it is not a finite number: lower the learning rates, clip (optim.clip), and go on "
        "from an earlier checkpoint",
    }[side]  # fmt: skip
    return {
        "step": step, "gauge": name, "column": gauge.column, "over": gauge.over, "side": side,
        "value": value, "low": gauge.low, "high": gauge.high, "bounds": gauge.bounds,
        "advice": advice,
    }  # fmt: skip


def line(event: Mapping[str, Any]) -> str:
    """An event for a person."""
    what = event["column"] + (f" / {event['over']}" if event["over"] else "")
    return (
        f"monitor, step {event['step']}: {event['gauge']} ({what}) is {event['value']:.3g}, "
        f"{event['bounds']} is healthy: {event['advice']}"
    )


def _side(gauge: Gauge, value: float, slack: float) -> str:
    if gauge.low - value > slack:
        return "low"
    return "high" if value - gauge.high > slack else ""


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; 0 for one value."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _ratio(x: float, y: float) -> float:
    return x / y if y and math.isfinite(y) else math.nan
