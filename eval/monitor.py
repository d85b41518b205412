"""The hack monitor: is a policy that pleases its reward also getting better?

It looks at every rollout's images and at what the method logs of itself (`eval.dials`), and now and
then at held-out samples: the same prompts and noise each time, scored by what training does not
maximise. A dial beyond its limit is told once. The run ends where the held-out value is worse than
at its best, by more than chance, in several checks in succession, or where a value has left its
corridor (`eval.corridors`); and what is exported is the best.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.checks import DECIDES, Held, Table, Trend, changed, mean, measured, metered, table_of
from eval.corridors import Corridors, check_corridors
from eval.dials import (
    DIALS,
    IMAGE,
    Flag,
    ImageDials,
    Watch,
    check_limits,
    column_of,
    dial_in,
    dial_of,
)
from eval.distillation import Part
from eval.evaluation import FACTS, Evaluation, find
from eval.heldout import HeldOut
from eval.ladder import (
    TEACHER,
    check_teacher,
    drawn_by,
    frozen_teacher,
    has_teacher,
    teachers,
)
from eval.panels import Panel, panels
from eval.records import Results
from eval.suite import Suite
from flux2 import distributed
from flux2.checkpoint import Best
from flux2.data.record import Record
from flux2.errors import InputError
from flux2.lineage import rewards_of
from flux2.log import Log
from flux2.model import Flux2
from flux2.monitor import Row
from flux2.types import Batch, RoleSpec


@dataclass
class HackMonitor:
    """Watches a run of online RL (`flux2.monitor.Monitor`).

    Attributes:
        heldout: samples, metrics and `every` of the checks; None looks at rollouts only.
        criterion: held-out value → its weight. The mean of those that are there, and that training
            does not maximise, decides on the end and on what is exported. None of them: neither.
        patience, alpha: see `Trend`.
        stop_on: dials that end the run as soon as they are flagged (dark stands for heldout/dark
            too); checkpoints from then on are not exported.
        limits: dial → its limit, or null for none; the others have those of `eval.dials.DIALS`.
        baseline: first steps of the run that make a dial's baseline. window: last steps that are
            looked at together.
        corridors: held-out value → its bounds (`eval.corridors.Corridor`). A value that has left
            them ends the run, and only a check within all of them can be the best, as soon as there
            was one.
        teacher: steps, guidance (and solver) with which the frozen role `teacher` is sampled once,
            on the same prompts and noise, for corridors of its shares.
        parts: what else watches, by any name.
    """

    heldout: HeldOut | None = None
    criterion: Mapping[str, float] = field(default_factory=dict)
    patience: int = 2
    alpha: float = 0.01
    stop_on: Sequence[str] = ()
    limits: Mapping[str, float | None] | None = None
    baseline: int = 5
    window: int = 5
    corridors: Mapping[str, Any] | None = None
    teacher: Mapping[str, Any] | None = None
    parts: Mapping[str, Part | None] | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("patience", self.patience, 0), ("baseline", self.baseline, 1),
            ("window", self.window, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"monitor.{name} is {value}: it must be at least {least}")
        if not 0 < self.alpha < 1:
            raise InputError(f"monitor.alpha is {self.alpha}: give a number between 0 and 1")
        if any(not w > 0 for w in self.criterion.values()):
            raise InputError("monitor.criterion: weights must be positive; leave out the others")
        self._limits = dict(self.limits or {})
        check_limits(self._limits)
        for name in self.stop_on:
            if dial_of(name, {}) is None:
                known = ", ".join(sorted(DIALS))
                raise InputError(f"monitor.stop_on has {name!r}, which is no dial: {known}")
        if self.heldout is not None and self.heldout.every < 1:
            raise InputError("monitor.heldout.every is 0: give the steps between two checks")
        if self.heldout is not None and self.heldout.ladder is not None:
            raise InputError("monitor.heldout has a ladder: a check has one sampling; drop it")
        if self.teacher is not None:
            check_teacher("monitor.teacher", self.teacher)
            if self.heldout is not None:
                teachers(self.heldout.sampler, self.teacher)
        self._rules = check_corridors(self.corridors or {}, self.teacher is not None)
        if self._rules and self.heldout is None:
            raise InputError("monitor.corridors are of held-out values: give monitor.heldout")
        self._axes = Corridors(self._rules, self.alpha)
        self._parts = {k: p for k, p in (self.parts or {}).items() if p is not None}
        self._dials, self._watch = ImageDials(), Watch(self._limits, self.baseline, self.window)
        self._groups: list[dict[str, float]] = []
        self._errors: dict[str, float] = {}
        self._prompts = 0
        self._trend, self._held = Trend(self.patience, self.alpha), Held()
        self._means: dict[int, dict[str, float]] = {}
        self._tables: dict[int, Table] = {}  # of checks that are not judged yet, on rank 0
        self._first: tuple[Results, Table] | None = None
        self._weights: dict[str, float] = {}
        self._why: str | None = None
        self._began, self._kept = 0, False  # where a session begins, and whether that is kept
        self._seconds = 0.0

    def check(self, roles: Mapping[str, RoleSpec]) -> None:
        """See `Monitor`. Raises InputError where a teacher is to be sampled and there is none."""
        if self.teacher is not None and self.heldout is not None and not has_teacher(roles):
            raise InputError(
                "monitor.teacher samples a frozen role named teacher, and this method has none: "
                "set monitor=none, or monitor.teacher=null and null for each of monitor.corridors "
                "that is of the teacher"
            )

    def records(self) -> list[Record]:
        """See `Monitor`."""
        mine = [] if self.heldout is None else self.heldout.records()
        return [*mine, *(r for part in self._parts.values() for r in part.records())]

    def close(self) -> None:
        """See `Monitor`."""
        if self.heldout is not None:
            self.heldout.close()

    @property
    def stopped(self) -> str | None:
        """See `Monitor`. A run that was ended goes on with monitor.patience=0, stop_on=[] and
        corridors=null."""
        return self._why

    # ------------------------------------------------------------ what it looks at

    def tap(self, images: Tensor, batch: Batch) -> None:
        """See `Monitor`. Notes each prompt's means."""
        began = time.perf_counter()
        found, groups = self._dials(images, batch), batch.groups.cpu()
        for group in groups.unique():
            rows = groups == group
            self._groups.append({k: float(v[rows].nanmean()) for k, v in found.items()})
        self._seconds += time.perf_counter() - began

    def probe(self, step: int) -> dict[str, float]:
        """See `Monitor`: monitor/<dial> of the rollouts, all ranks' together, and at a check
        monitor/heldout/<value>."""
        began = time.perf_counter()
        mine, self._groups = self._groups, []
        groups = [g for part in distributed.gather_objects(mine) for g in part]
        self._prompts = len(groups)
        found: dict[str, float] = {}
        for name in IMAGE:
            values = [g[name] for g in groups if math.isfinite(g[name])]
            if values:
                n, center = len(values), sum(values) / len(values)
                square = sum((v - center) ** 2 for v in values)
                found[f"monitor/{name}"] = center
                self._errors[name] = square / (n - 1) / n if n > 1 else math.nan
        if self.heldout is not None and step % self.heldout.every == 0:
            means = self._check(step)
            found |= {f"monitor/heldout/{k}": v for k, v in means.items()}
        for part in self._parts.values():
            found |= part.probe(step)
        seconds, self._seconds = self._seconds + time.perf_counter() - began, 0.0
        return {**found, "time/monitor": seconds}

    def watch(self, step: int, row: Row) -> None:
        """See `Monitor`. Looks at the rollouts' dials and, after a check, at the held-out ones."""
        numbers = {
            name: (float(value), self._errors.get(name, math.nan))
            for column, value in row.items()
            if value is not None and (name := dial_in(column)) is not None
        }
        self._tell(self._watch.add(step, numbers, self._prompts))
        for part in self._parts.values():
            part.watch(step, row)
        if step in self._means and self._held.step != step:
            self._judge(step)
            if self.stopped is None and self._held.over:
                self._end(step, f"the held-out value is below that of step {self._held.best} in "
                                f"{self.patience} checks in succession")  # fmt: skip
            if self.stopped is None and self._held.left is not None:
                self._end(step, self._held.left)

    def _tell(self, flags: Mapping[str, Flag]) -> None:
        """Each new flag's line; the end of the run where one of them asks for it."""
        for name, flag in flags.items():
            dial = dial_of(name, self._limits)
            assert dial is not None
            self._log.print(flag.line(name, dial))
            if self._stops(name) and self.stopped is None:
                self._end(flag.step, f"{name} is beyond its limit (monitor.stop_on)")

    def _stops(self, name: str) -> bool:
        return bool({name, name.rpartition("/")[2]} & set(self.stop_on))

    def _clean(self, step: int) -> bool:
        """Whether no dial of stop_on was flagged until `step`."""
        flags = self._watch.flags.items()
        return not any(self._stops(name) and f.step <= step for name, f in flags)

    def _end(self, step: int, why: str) -> None:
        self._why = why
        self._log.print(f"monitor, step {step}: the run ends early: {why}")

    # ------------------------------------------------------------ held-out checks

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """See `Monitor`. Checks the policy as it is; a resumed run reads its earlier checks."""
        self._log, self._run, self._model, self._began = log, Path(cfg.run.dir), model, step
        self._role, self._facts = roles[roles.trainable[0]], {"run": cfg.run.id}
        for part in self._parts.values():
            part.start(cfg, model, roles, log, step)
        held = self.heldout
        if held is None or cfg.train.steps < held.every:  # too short for a comparison
            self.close()
            self.heldout = None
            self._rules, self._axes = {}, Corridors({}, self.alpha)
            return
        marked = held.suite.mark(distributed.broadcast(rewards_of(self._run)))
        held.suite = Suite({k: m for k, m in marked.present.items() if k not in marked.trained_on})
        # What training maximises is not even measured.
        Suite({k: marked.metrics[k] for k in marked.trained_on}).close()
        if step == 0:
            self._means = {}
        if distributed.is_main():
            if step == 0:
                shutil.rmtree(self._run / "monitor", ignore_errors=True)
            shots = find(self._run / "monitor")
            for at in [k for k in self._means if k in shots]:
                self._take(at, Evaluation.load(shots[at]))
        if self.teacher is not None:
            self._reference(held, roles)
        for at in sorted(self._means):
            self._judge(at, told=True)
        if not self._means:
            self._kept = False
            self._check(step)
            self._judge(step)
            if step:
                log.print(f"monitor: no check from before training; step {step} stands in for it")
        decides = f"{' + '.join(self._held.of)} chooses the result"
        if not self._held.of:
            wanted = ", ".join(self.criterion) or "nothing"
            decides = (
                f"of monitor.criterion ({wanted}) nothing is measured that training does not "
                "maximise, so that the last step is the result"
            )
        log.print(f"monitor: {held.prompts * held.noises} held-out samples every {held.every} "
                  f"steps; {decides}")  # fmt: skip
        for name, rule in self._rules.items():
            missing = name not in self._means[max(self._means)]
            note = ": not measured, as training maximises it, or no metric has it" * missing
            log.print(f"monitor: {name} is to stay {rule}{note}")

    def _reference(self, held: HeldOut, roles: Any) -> None:
        """The teacher's samples of the checks' prompts and noise, once a run, by all ranks."""
        assert self.teacher is not None
        folder, sampler = self._run / "monitor" / TEACHER, teachers(held.sampler, self.teacher)
        shot = None
        if distributed.is_main() and (folder / FACTS).is_file():
            shot = Evaluation.load(folder)
        known = shot is not None and drawn_by(shot, held.sampled(sampler))
        if not distributed.broadcast(known):
            shot = held.sampled(sampler).evaluate(
                self._model, frozen_teacher(roles), "monitor's teacher", self._facts, folder
            )
        if shot is not None:
            self._axes.teacher = table_of(shot.results, {})

    def _check(self, step: int) -> dict[str, float]:
        """Samples the held-out prompts, all ranks together; the means, on all of them."""
        assert self.heldout is not None
        velocity = metered(self._role)
        shot = self.heldout.evaluate(
            self._model, velocity, f"monitor at step {step}", {**self._facts, "step": step},
            self._run / "monitor" / "evaluation" / f"step_{step:06d}",
        )  # fmt: skip
        means = {"speed": velocity.speed()}
        if shot is not None:
            means |= {name: mean(values) for name, values in self._take(step, shot).items()}
        self._means[step] = distributed.broadcast(means)
        return self._means[step]

    def _take(self, step: int, shot: Evaluation) -> Table:
        """A check's values, on rank 0, until they are judged."""
        if self._first is None:
            self._weights = measured(shot.results, self.criterion)
            self._first = shot.results, table_of(shot.results, self._weights)
        if shot.results.fingerprints != self._first[0].fingerprints:
            raise InputError(
                f"{shot.folder} was measured otherwise than the run's first check: resume with the "
                "monitor that the run began with, or start in another run.dir by init_from"
            )
        self._tables[step] = table_of(shot.results, self._weights)
        return self._tables[step]

    def _judge(self, step: int, told: bool = False) -> None:
        """What a check means: its flags, and the trend of the value that decides. told: it was
        judged before a resume, and only the trend is to be taken up."""
        flags: dict[str, Flag] = {}
        table = self._tables.pop(step, None)
        if table is not None and self._first is not None:  # rank 0
            if not told:
                flags = changed(self._first[1], table, self._limits, step)
            self._held = self._follow(step, table, {**self._watch.flags, **flags})
        self._held, flags = distributed.broadcast((self._held, flags))
        if told:
            return
        speed, begun = self._means[step]["speed"], self._means[min(self._means)]["speed"]
        dial = dial_of("heldout/speed", self._limits)
        if dial is not None and dial.beyond(begun, speed):
            flags["heldout/speed"] = Flag(step, begun, speed)
        new = {k: f for k, f in flags.items() if k not in self._watch.flags}
        self._watch.flags.update(new)
        self._tell(new)

    def _follow(self, step: int, table: Table, flags: Mapping[str, Flag]) -> Held:
        """The value that decides after one more check, and the corridors."""
        inside, entered = self._axes.add(step, table), self._held.entered and self._held.step >= 0
        if inside and not entered:
            self._trend.best, self._trend.worse = None, 0  # those before were not within bounds
        entered |= inside
        axes = {"inside": inside, "entered": entered, "left": self._axes.left}
        if not self._weights:
            return Held(step, **axes)
        clean = not any(self._stops(name) and f.step <= step for name, f in flags.items())
        self._trend.add(step, table[DECIDES], clean and (inside or not entered))
        best = None if self._trend.best is None else self._trend.best[0]
        return Held(step, self._weights, best, self._trend.over, self._trend.back, **axes)

    # ------------------------------------------------------------ what becomes of the run

    def improved(self, step: int) -> bool:
        """See `Monitor`. Where a dial alone decides, what it began with must be there to go back
        to."""
        if self._kept and step == self._began:
            return False
        if not self._held.of and self._rules:
            return self._held.step == step and self._held.inside
        if not self._held.of:
            return bool(self.stop_on) and step == self._began
        return self._held.step == step == self._held.best

    def score(self, step: int) -> Best | None:
        """See `Monitor`. Where a held-out value decides, only a check that was better than all
        before it has a rank, and the later the higher: the trend compares samples in pairs, which
        means over those that have a value need not agree with. Else, where a corridor or a dial
        may end the run, by age."""
        if self._held.of:
            chosen = self._held.best == step
        elif self._rules:
            chosen = self._held.step == step and self._held.inside
        else:
            chosen = bool(self.stop_on)
        return ("monitor/step", float(step), "max") if chosen and self._clean(step) else None

    def back(self, step: int) -> str | None:
        """See `Monitor`. Checks the last step, if no check has."""
        if not self._clean(step):
            return self._why or "a dial of monitor.stop_on is beyond its limit"
        if not (self._held.of or self._rules):
            return None
        if step not in self._means:
            self._check(step)
            self._judge(step)
        if self._held.entered and not self._held.inside:
            return self._held.left or "a value lies outside its corridor at the end"
        if not self._held.back or self._held.best is None:
            return None
        was, now = (self._means[k][DECIDES] for k in (self._held.best, step))
        return f"the held-out value was {was:.3f} there and is {now:.3f} at the end"

    def finish(self, exported: Mapping[str, Any]) -> dict[str, Any]:
        """See `Monitor`. A table of what was flagged, one line, and monitor.png."""
        if not distributed.is_main():
            return {}
        flags = self._watch.flags
        rows = self._rows()
        if flags:
            header = ["monitor: flagged", "baseline", "then", "at the end", "limit", "at step"]
            now = {n: rows[n]["value"] if n in rows else math.nan for n in flags}
            self._log.table(header, [self._line(n, f, now[n]) for n, f in flags.items()])
        for name, axis in self._axes.axes.items():
            if not axis.inside:
                self._log.print(
                    f"monitor: {name} is {axis.value:.3g} at the last check, outside its corridor, "
                    f"{self._rules[name]} ({axis.bound:.3g})" + ", as ever" * (not axis.entered)
                )
        picture = panels(self._run / "monitor.png", self._panels())
        if flags:
            parts = [f"{len(flags)} flagged"]
        elif any(math.isfinite(row["value"]) for row in rows.values()):
            parts = ["nothing flagged"]
        else:
            parts = ["nothing judged: the run ended before a baseline and a window were full"]
        if self._why is not None:
            parts.append("ended early")
        parts.append(f"exported step {exported['step']} of {exported['of']}: {exported['why']}")
        self._log.print(f"monitor: {'; '.join(parts)}; dials: {picture}")
        return {
            "monitor": {
                "criterion": dict(self._held.of),
                "heldout": {str(k): v for k, v in sorted(self._means.items())},
                "best": self._held.best,
                "stopped": self._why,
                "exported": dict(exported),
                "dials": rows,
                "picture": str(picture),
                "corridors": self._axes.rows(),
                **{name: part.finish() for name, part in self._parts.items()},
            }
        }

    def _line(self, name: str, flag: Flag, now: float) -> list[object]:
        """Of the table."""
        dial = dial_of(name, self._limits)
        limit = "-" if dial is None else dial.bounds
        numbers = (f"{v:.3g}" for v in (flag.baseline, flag.value, now))
        return [name, *numbers, limit, flag.step]

    def _rows(self) -> dict[str, dict[str, Any]]:
        """Each dial's baseline and newest value, and the step that it was flagged at."""
        out: dict[str, dict[str, Any]] = {}
        for name, s in self._watch.series.items():
            out[name] = {"baseline": s.baseline, "value": s.value}
        if self._means:
            first, last = self._means[min(self._means)], self._means[max(self._means)]
            for name, value in last.items():
                known = dial_of(f"heldout/{name}", self._limits) is not None
                if known and math.isfinite(value):
                    out[f"heldout/{name}"] = {"baseline": first.get(name, math.nan), "value": value}
        for name, row in out.items():
            flag = self._watch.flags.get(name)
            row["flagged"] = None if flag is None else flag.step
        return out

    def _panels(self) -> list[Panel]:
        """One for each dial."""
        out = []
        for name, row in self._rows().items():
            dial = dial_of(name, self._limits)
            if dial is None:
                continue
            best = None
            if name.startswith("heldout/"):
                key, xs = name.removeprefix("heldout/"), sorted(self._means)
                ys = [self._means[k].get(key, math.nan) for k in xs]
                best = self._held.best if key == DECIDES else None
            else:
                xs, ys = self._log.history(column_of(name))
                xs = [x + 1 for x in xs]
            begun = row["baseline"]
            out.append(Panel(name, xs, ys, begun, dial.band(begun), row["flagged"], best))
        return [*out, *(p for part in self._parts.values() for p in part.panels())]

    def state_dict(self) -> dict[str, Any]:
        """See `Monitor`. The checks' samples lie in monitor/, beside the checkpoints."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        own = {"watch": self._watch.state_dict(), "why": self._why, "means": dict(self._means)}
        return {**own, "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Monitor`."""
        self._watch.load_state_dict(state["watch"])
        self._means, self._kept = dict(state["means"]), True
        for name, kept in state.get("parts", {}).items():
            if name in self._parts:
                self._parts[name].load_state_dict(kept)
        self._why = state["why"] if self.patience or self.stop_on or self._rules else None
