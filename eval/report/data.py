"""What a report compares: the runs that were named, opened, and every number of the page.

Statistics are `eval.records` and `eval.stats`; here they are only asked, run by run, against one
baseline. Nothing here knows HTML.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from eval.evaluation import FACTS, FOLDER, Evaluation, find
from eval.ladder import LADDER
from eval.records import Results
from eval.stats import standard_error
from flux2.errors import InputError
from flux2.files import read_json

LOWER: Final = frozenset((
    "cer", "wer", "pned", "copy", "fid", "rfid", "kid", "fd", "cmmd", "lpips", "delta", "de",
    "distance", "error", "errors", "loss", "mse", "mae", "drift", "false", "failures", "missing",
    "swap", "swaps", "noface", "seconds", "forwards",
))  # fmt: skip
"""Words of a metric's name that say: lower is better."""
HIGHER: Final = frozenset(("diversity", "vendi", "recall", "precision", "coverage"))
"""Words that say the contrary, whatever else the name holds (`diversity_lpips`)."""
NEITHER: Final = frozenset(("saturation", "contrast", "kl"))
"""Words that say: neither side is better; a divergence from the base is what a gain costs."""
SIDES: Final = ("higher", "lower", "none")
BETTER, WORSE, OPEN, EQUAL = "better", "worse", "no difference found", "equal within margin"
REFUSED: Final = "not compared"
SAMPLING: Final = ("solver", "steps", "guidance", "embedded_guidance", "grid", "size")
"""Keys of an evaluation's identity that say how its images were drawn."""


@dataclass(frozen=True)
class Entry:
    """One column of the report.

    Attributes:
        name: in tables, unique.
        run: the run directory.
        step: of the evaluation.
        evaluation: that evaluation.
        history: all evaluations of the run, by step.
        steps: lines of metrics.jsonl, in order; empty where the run has none.
        manifest: {} where the run has none.
    """

    name: str
    run: Path
    step: int
    evaluation: Evaluation
    history: Mapping[int, Evaluation] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> Results:
        """Its records."""
        return self.evaluation.results

    @property
    def seconds(self) -> float:
        """Of training up to the evaluation's step; NaN where no time was logged."""
        times = [t for at, t in clock(self.steps) if at < self.step]
        return times[-1] if times else math.nan


# ---------------------------------------------------------------- opening


def open_runs(items: Sequence[str] | Mapping[str, str] | None, baseline: str | None) -> list[Entry]:
    """The evaluations that were named, the baseline first.

    Args:
        items: `path`, `path@step` or `name=path@step`; or name → path or path@step. Without a step
            that of the run's result, or else its latest evaluation.
        baseline: a name; None: the first item.

    Raises:
        InputError: no item, a path without such an evaluation, a name that comes twice or is
            unknown, or an evaluation that shares no prompt with the baseline.
    """
    wanted: list[tuple[str | None, str, int | None]]
    if isinstance(items, Mapping):
        wanted = [(str(name), *_at(str(item))) for name, item in items.items()]
    else:
        wanted = [_parse(one) for item in items or () for one in _expanded(str(item))]
    if not wanted:
        raise InputError("runs= names nothing: give run directories, e.g. runs=[out/a,out/b@50]")
    places = [_place(path, step) for _, path, step in wanted]  # all are checked before any is read
    opened = [_open("", *place) for place in places]
    names = _names([name for name, _, _ in wanted], opened)
    first = 0
    if baseline is not None:
        if baseline not in names:
            raise InputError(f"baseline={baseline} is none of the runs: {', '.join(names)}")
        first = names.index(baseline)
    entries = [replace(e, name=n) for n, e in zip(names, opened, strict=True)]
    entries.insert(0, entries.pop(first))
    texts = set(entries[0].evaluation.prompts.values())
    for entry in entries[1:]:
        if texts.isdisjoint(entry.evaluation.prompts.values()):
            raise InputError(
                f"{entry.name} and {entries[0].name} were evaluated on different prompts, none is "
                "shared: evaluate both on the same data"
            )
    return entries


def _expanded(item: str) -> list[str]:
    """The runs that a pattern (`outputs/methods/*`) fits, by name; the item itself if it is none.

    Raises:
        InputError: nothing with an evaluation fits.
    """
    if "*" not in item:
        return [item]
    found = [p for p in sorted(glob.glob(item)) if Path(p).is_dir() and find(Path(p))]
    if not found:
        raise InputError(f"runs={item} fits no run with an evaluation: check the path")
    return found


def _parse(item: str) -> tuple[str | None, str, int | None]:
    """(name, path, step). An existing path may hold = and @ itself."""
    name, equals, rest = item.partition("=")
    if equals and "/" not in name and not Path(_at(item)[0]).exists():
        if not name or not rest:
            raise InputError(f"runs has {item!r}: write name=path, or name=path@step")
        return name, *_at(rest)
    return None, *_at(item)


def _at(text: str) -> tuple[str, int | None]:
    found = None if Path(text).exists() else re.fullmatch(r"(.+)@(\d+)", text)
    return (found[1], int(found[2])) if found else (text, None)


def _place(path: str, step: int | None) -> tuple[Path, int, Path]:
    """(run directory, step, evaluation's folder)."""
    run = Path(path)
    if not run.is_dir():
        raise InputError(f"no run {path}: name a run directory")
    if step is None and (run / FACTS).is_file():  # the folder of one evaluation
        at = re.fullmatch(r"step_(\d+)", run.resolve().name)
        inside = run.resolve().parent.name == FOLDER
        return (run.resolve().parent.parent if inside else run), int(at[1]) if at else 0, run
    known = find(run)
    if not known:
        raise InputError(
            f"{path} holds no evaluation: python run.py stage=eval init_from={path}, and name "
            "that run"
        )
    at = _result_of(run, known) if step is None else step
    if at not in known:
        raise InputError(
            f"{path} was not evaluated at step {at}: choose from {', '.join(map(str, known))}"
        )
    return run, at, known[at]


def _result_of(run: Path, known: Mapping[int, Path]) -> int:
    """The step whose weights a finished run chose as its result (`flux2.train`), if it was
    evaluated; else the latest."""
    home = home_of(run)
    facts = read_json(home / "manifest.json") if (home / "manifest.json").is_file() else {}
    chosen = facts.get("exported") if facts.get("status") == "done" else None
    return chosen["step"] if chosen and chosen["step"] in known else max(known)


def home_of(run: Path) -> Path:
    """The run directory that a rung's folder (`eval.ladder`) belongs to; any other is its own."""
    there = run.resolve()
    return there.parent.parent if there.parent.name == LADDER else run


def _names(given: Sequence[str | None], entries: Sequence[Entry]) -> list[str]:
    """A name for each: the given one, else the evaluation's own, the folder's, or either with the
    step, whichever comes first that no other has."""
    kinds = [
        [e.evaluation.identity.get("name") or e.run.resolve().name for e in entries],
        [e.run.resolve().name for e in entries],
        ["/".join(e.run.resolve().parts[-2:]) for e in entries],
        [f"{e.run.resolve().name}@{e.step}" for e in entries],
        [f"{'/'.join(e.run.resolve().parts[-2:])}@{e.step}" for e in entries],
    ]
    out = [
        name or next((str(k[i]) for k in kinds if k.count(k[i]) == 1), str(kinds[-1][i]))
        for i, name in enumerate(given)
    ]
    twice = {n for n in out if out.count(n) > 1}
    if twice:
        raise InputError(f"two runs are named {min(twice)!r}: write name=path@step, or leave one")
    return out


def _open(name: str, run: Path, step: int, folder: Path) -> Entry:
    history = {at: Evaluation.load(f) for at, f in find(run).items() if f != folder}
    evaluation = Evaluation.load(folder)
    history[step] = evaluation
    manifest = home_of(run) / "manifest.json"
    return Entry(
        name, run, step, evaluation, dict(sorted(history.items())), _log_lines(home_of(run)),
        read_json(manifest) if manifest.is_file() else {},
    )  # fmt: skip


def _log_lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl; a last line that a kill cut short is left out."""
    path = run / "metrics.jsonl"
    out: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                out.append(row)
    return out


# ---------------------------------------------------------------- what is better


def direction(metric: str, rules: Mapping[str, str] | None = None) -> str:
    """higher, lower or none: which side of a metric is better.

    rules: pattern (`fnmatch`) → side; the first that fits decides, then the words of the name.
    """
    for pattern, side in (rules or {}).items():
        if fnmatch.fnmatchcase(metric, pattern):
            return side
    words = set(re.split(r"[^a-z]+", metric.lower()))
    if words & NEITHER:
        return "none"
    return "lower" if words & LOWER and not words & HIGHER else "higher"


def margin_of(metric: str, margins: Mapping[str, float] | None) -> float | None:
    """The margin of the first pattern that fits; None where none does."""
    fitting = (m for pattern, m in (margins or {}).items() if fnmatch.fnmatchcase(metric, pattern))
    return next(fitting, None)


# ---------------------------------------------------------------- numbers


def clock(steps: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, seconds of training at its end) of every line that says how long it took."""
    total, out = 0.0, []
    for row in steps:
        took = row.get("time/step")
        if isinstance(took, int | float):
            total += took
            out.append((int(row["step"]), total))
    return out


def curves(entry: Entry, points: int) -> dict[str, dict[str, list[float | None]]]:
    """Logged value → {step, seconds, value}, of at most `points` points: means of as many
    successive steps each."""
    seconds = dict(clock(entry.steps))
    series: dict[str, list[tuple[int, float]]] = {}
    for row in entry.steps:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                series.setdefault(key, []).append((int(row["step"]), float(value)))
    out: dict[str, dict[str, list[float | None]]] = {}
    for key, rows in series.items():
        size = max(1, -(-len(rows) // points))
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        out[key] = {
            "step": [p[-1][0] + 1 for p in parts],
            "seconds": [seconds.get(p[-1][0]) for p in parts],
            "value": [short(sum(v for _, v in p) / len(p)) for p in parts],
        }
    return out


def held_out(entry: Entry) -> dict[str, dict[str, list[float | None]]]:
    """Metric → {step, seconds, value, low, high} over the run's evaluations. The band is ± 1.96
    standard errors, clustered by prompt; set metrics have their own intervals."""
    times = clock(entry.steps)
    out: dict[str, dict[str, list[float | None]]] = {}
    for step, evaluation in entry.history.items():
        done = [t for at, t in times if at < step]
        seconds = done[-1] if done else (0.0 if step == 0 else None)
        for metric, (value, low, high) in _levels(evaluation.results).items():
            row = out.setdefault(
                metric, {k: [] for k in ("step", "seconds", "value", "low", "high")}
            )
            for key, number in zip(row, (step, seconds, value, low, high), strict=True):
                row[key].append(None if number is None else short(number))
    return out


def _levels(results: Results) -> dict[str, tuple[float, float, float]]:
    by: dict[str, list[tuple[float, int]]] = {}
    for s in results.scores:
        if math.isfinite(s.value):
            by.setdefault(s.metric, []).append((s.value, s.prompt_id))
    out = {}
    for metric, rows in by.items():
        values, prompts = [v for v, _ in rows], [p for _, p in rows]
        mean, wide = sum(values) / len(values), 1.96 * standard_error(values, prompts)
        out[metric] = (mean, mean - wide, mean + wide)
    return out | {a.metric: (a.value, a.low, a.high) for a in results.aggregates}


def short(value: float) -> float | None:
    """Five digits, for files; None where not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
