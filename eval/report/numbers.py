"""The numbers of a report: every metric of every run, its difference to the baseline, and warnings.

All of it is one JSON value (`numbers`), which becomes report.json, the page and the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.records import Fingerprint, compare, summarise, verdict
from eval.report.data import (
    BETTER,
    EQUAL,
    OPEN,
    REFUSED,
    SAMPLING,
    SIDES,
    WORSE,
    Entry,
    curves,
    direction,
    held_out,
    home_of,
    margin_of,
    short,
)
from eval.stats import holm
from flux2.errors import InputError

FEW, MANY = 20, 6
"""Prompts below which a report says that they are few; names above which a title counts them."""


@dataclass(frozen=True)
class Settings:
    """How a report is made.

    Attributes:
        title: of the page; null makes one of the runs' names.
        metric: by whose changes prompts are ordered at first; null: the first of the table.
        directions: pattern of metrics → higher, lower or none (neither is better); others are
            decided by the words of their names (`eval.report.data.direction`).
        margins: pattern of metrics → the difference that does not matter, in the metric's units.
        level: of intervals and tests.
        points: of a training curve, at most.
        prompts: that get images, at most; failures and the biggest changes first.
        side: longest side of the images in the page, pixels; larger ones are scaled down.
        megabytes: of images in the page, at most.
        wandb_prompts: rows of the table of images that W&B gets, at most.
        seeds: pattern of runs' names with one group, '(.+)-[0-9]+': runs that share the group are
            seeds of one method, and get a row together; null: no such table.
        columns: metrics of that table, the first also as the share of the error that is left;
            null: all.
    """

    title: str | None = None
    metric: str | None = None
    directions: Mapping[str, str] | None = None
    margins: Mapping[str, float] | None = None
    level: float = 0.95
    points: int = 300
    prompts: int = 400
    side: int = 256
    megabytes: float = 20.0
    wandb_prompts: int = 100
    seeds: str | None = None
    columns: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for pattern, side in (self.directions or {}).items():
            if side not in SIDES:
                raise InputError(f"page.directions has {pattern}: {side}; write {', '.join(SIDES)}")
        for pattern, margin in (self.margins or {}).items():
            if not margin > 0:
                raise InputError(f"page.margins has {pattern}: {margin}; it must be above 0")
        if not 0 < self.level < 1:
            raise InputError(f"page.level is {self.level}: choose one between 0 and 1")
        for name in ("points", "side"):
            if getattr(self, name) < 1:
                raise InputError(f"page.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("prompts", "megabytes", "wandb_prompts"):
            if getattr(self, name) < 0:
                raise InputError(f"page.{name} is {getattr(self, name)}: it must be at least 0")


def numbers(entries: Sequence[Entry], settings: Settings) -> dict[str, Any]:
    """Everything that the report says, in JSON's types but for NaN.

    Returns:
        title, level, baseline, `runs`, `metrics`, `warnings`, `curves` {training, held_out};
        `prompts` (texts), `ids` run → prompt's index → its id there, `samples` [prompt's index,
        seed], `values` metric → run → value of each sample (None: there is none), `measured` run →
        whether each sample was drawn, `order`: the metric by which prompts are ordered at first.

    Raises:
        InputError: settings.metric is no metric of these evaluations.
    """
    names = list(dict.fromkeys(m for e in entries for m in e.results.fingerprints))
    if settings.metric is not None and settings.metric not in names:
        raise InputError(f"page.metric={settings.metric} was not measured: {', '.join(names)}")
    metrics = [_metric(name, entries, settings) for name in names]
    _correct(metrics, [e.name for e in entries[1:]], settings.level)
    out = {
        "title": settings.title or title_of([e.name for e in entries]),
        "level": settings.level,
        "baseline": entries[0].name,
        "runs": [_run(e) for e in entries],
        "metrics": metrics,
        "curves": {
            "training": _by_metric({e.name: curves(e, settings.points) for e in _once(entries)}),
            "held_out": _by_metric({e.name: held_out(e) for e in entries}),
        },
        **_samples(entries),
    }
    scored = [m["name"] for m in metrics if m["kind"] == "score"]
    chosen = settings.metric if settings.metric in scored else None
    return out | {
        "order": chosen or next(iter(scored), None),
        "warnings": warnings(metrics, out["runs"]),
    }


def _once(entries: Sequence[Entry]) -> list[Entry]:
    """One of each run's: its rungs (`eval.ladder`) share its training."""
    first: dict[Any, Entry] = {}
    for entry in entries:
        first.setdefault((home_of(entry.run).resolve(), entry.step), entry)
    return list(first.values())


def title_of(names: Sequence[str]) -> str:
    """Of a page without one: the runs, the first of which is the baseline."""
    if len(names) == 1:
        return names[0]
    others = ", ".join(names[1:]) if len(names) <= MANY else f"{len(names) - 1} runs"
    return f"{others} against {names[0]}"


def _run(entry: Entry) -> dict[str, Any]:
    seeds = {(s.prompt_id, s.seed) for s in entry.results.scores}
    last = entry.steps[-1] if entry.steps else {}
    return {
        "name": entry.name,
        "path": str(entry.run),
        "step": entry.step,
        "identity": dict(entry.evaluation.identity),
        "prompts": len(entry.evaluation.prompts),
        "samples": len(seeds) or max((f.n for f in entry.results.fingerprints.values()), default=0),
        "ceilings": dict(entry.evaluation.ceilings),
        "skipped": dict(entry.evaluation.skipped),
        "status": entry.manifest.get("status"),
        "training_seconds": entry.seconds,
        "training_steps": last.get("step", -1) + 1 if last else None,
        "fingerprints": {k: vars(f) for k, f in entry.results.fingerprints.items()},
    }


# ---------------------------------------------------------------- metrics


def _metric(name: str, entries: Sequence[Entry], settings: Settings) -> dict[str, Any]:
    cells = {e.name: _cell(name, e, settings) for e in entries}
    base = entries[0]
    for entry in entries[1:]:
        cells[entry.name] |= _against(name, base, entry, settings)
    of_sets = any(a.metric == name for e in entries for a in e.results.aggregates)
    return {
        "name": name,
        "kind": "set" if of_sets else "score",
        "direction": direction(name, settings.directions),
        "margin": margin_of(name, settings.margins),
        "trained_on": [e.name for e in entries if name in _trained(e)],
        "cells": cells,
    }


def _trained(entry: Entry) -> set[str]:
    rows = (*entry.results.scores, *entry.results.aggregates)
    return {row.metric for row in rows if row.trained_on}


def _cell(name: str, entry: Entry, settings: Settings) -> dict[str, Any]:
    """What the run reached; mean, low and high are None where it was not measured."""
    mine = entry.results.only(name)
    return {
        **dict.fromkeys(("mean", "low", "high")), "n": 0, "missing": 0,
        **summarise(mine, settings.level).get(name, {}),
        "ceiling": entry.evaluation.ceilings.get(name),
        "note": next((a.note for a in mine.aggregates), ""),
        **dict.fromkeys(("difference", "refused", "verdict")),
    }  # fmt: skip


def _against(name: str, base: Entry, entry: Entry, settings: Settings) -> dict[str, Any]:
    """The difference to the baseline, or why there is none."""
    for one in (base, entry):
        if name not in one.results.fingerprints:
            why = one.evaluation.skipped.get(name, "not among its metrics")
            return {"refused": f"{one.name} has no value: {why}"}
    try:
        found = compare(
            base.results.only(name), entry.results.only(name), settings.level, sampling="any"
        )
    except InputError as error:
        why = _unlike(base.results.fingerprints[name], entry.results.fingerprints[name])
        return {"refused": why or str(error).removeprefix(f"{name} cannot be compared: ")}
    return {"difference": dict(found[name])}


def _unlike(one: Fingerprint, two: Fingerprint) -> str:
    """In what two measures differ, in plain words; nothing where they are the same."""
    said = {
        "engine": f"scored by {two.engine} instead of {one.engine}",
        "reference": "evaluated on other prompts or against another reference",
        "n": f"{two.n} images instead of {one.n}",
    }
    return ", ".join(text for k, text in said.items() if getattr(one, k) != getattr(two, k))


def _correct(metrics: Sequence[dict[str, Any]], runs: Sequence[str], level: float) -> None:
    """Holm's correction over the metrics of each run, as `compare` does it, and the verdicts."""
    for run in runs:
        found = [(m, m["cells"][run]) for m in metrics if m["cells"][run]["difference"]]
        corrected = holm([cell["difference"]["p"] for _, cell in found])
        for (metric, cell), p in zip(found, corrected, strict=True):
            cell["difference"]["p_holm"] = float(p)
            cell["verdict"] = in_words(cell["difference"], metric, 1 - level)
        for metric in metrics:
            if metric["cells"][run]["refused"]:
                metric["cells"][run]["verdict"] = REFUSED


def in_words(difference: Mapping[str, float], metric: Mapping[str, Any], alpha: float) -> str:
    """The verdict on a difference: better or worse (higher or lower, where the metric has no better
    side), equal within the metric's margin if it has one, or no difference found."""
    if metric["margin"] is not None:
        said = verdict(difference, metric["margin"], alpha)
    elif difference["p_holm"] <= alpha:
        said = "higher" if difference["gain"] > 0 else "lower"
    else:
        said = "undecided"
    if said in ("equal", "undecided"):
        return EQUAL if said == "equal" else OPEN
    if metric["direction"] == "none":
        return said
    return BETTER if said == metric["direction"] else WORSE


# ---------------------------------------------------------------- samples


def _samples(entries: Sequence[Entry]) -> dict[str, Any]:
    """Every (prompt, seed) once, whichever runs have it. Prompts are matched by their texts, the
    first of several alike with the first."""
    keys: dict[tuple[str, int], None] = {}
    ids: list[dict[int, tuple[str, int]]] = []
    for entry in entries:
        count: dict[str, int] = {}
        mine: dict[int, tuple[str, int]] = {}
        for prompt, text in sorted(entry.evaluation.prompts.items()):
            count[text] = count.get(text, -1) + 1
            mine[prompt] = (text, count[text])
            keys.setdefault(mine[prompt])
        ids.append(mine)
    index = {key: k for k, key in enumerate(keys)}
    rows: dict[tuple[int, int], dict[str, dict[str, float | None]]] = {}
    for entry, mine in zip(entries, ids, strict=True):
        for s in entry.results.scores:
            if s.prompt_id not in mine:
                raise InputError(f"{entry.name}: prompt {s.prompt_id} has no text; evaluate again")
            at = rows.setdefault((index[mine[s.prompt_id]], s.seed), {})
            at.setdefault(entry.name, {})[s.metric] = short(s.value)
    samples = sorted(rows)
    scored = dict.fromkeys(s.metric for e in entries for s in e.results.scores)
    runs = [e.name for e in entries]
    return {
        "prompts": [text for text, _ in keys],
        "ids": {e.name: {str(index[key]): p for p, key in mine.items()}
                for e, mine in zip(entries, ids, strict=True)},
        "samples": [list(s) for s in samples],
        "values": {
            m: {r: [rows[s].get(r, {}).get(m) for s in samples] for r in runs} for m in scored
        },
        "measured": {r: [r in rows[s] for s in samples] for r in runs},
    }  # fmt: skip


def _by_metric(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """run → metric → x, turned round."""
    out: dict[str, dict[str, Any]] = {}
    for run, rows in found.items():
        for metric, row in rows.items():
            out.setdefault(metric, {})[run] = row
    return out


# ---------------------------------------------------------------- warnings


def warnings(metrics: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before the table, in plain words."""
    base = runs[0]
    said: dict[str, list[str]] = {}  # what is said → of which runs

    def say(text: str, run: str) -> None:
        said.setdefault(text, []).append(run)

    for run in runs[1:]:
        for text in _sampling(base, run):
            say(text, run["name"])
    for run in runs[1:]:
        for m in metrics:
            cell = m["cells"][run["name"]]
            both = min(cell["missing"], m["cells"][base["name"]]["missing"])
            if cell["difference"] and (lost := cell["difference"]["missing"]) > both:
                say(f"{int(lost)} pairs have no {m['name']} in this run or in {base['name']}; they "
                    "are left out of the difference, not counted as 0.", run["name"])  # fmt: skip
        for why, names in refusals(metrics, run["name"]).items():
            say(f"not compared in {_listed(names)}: {why}.", run["name"])
    for run in runs:
        skipped: dict[str, list[str]] = {}
        for name, why in run["skipped"].items():
            skipped.setdefault(str(why), []).append(name)
        for why, names in skipped.items():
            say(f"not measured: {_listed(names)} ({why}).", run["name"])
        if run["status"] not in (None, "done"):
            say(f"the run's status is {run['status']}, not done.", run["name"])
        if run["prompts"] < FEW:
            say(f"only {run['prompts']} prompts: little can be found.", run["name"])
    return [f"{', '.join(names)}: {text}" for text, names in said.items()]


def refusals(metrics: Sequence[Mapping[str, Any]], run: str) -> dict[str, list[str]]:
    """Why a run was not compared with the baseline → in which metrics."""
    out: dict[str, list[str]] = {}
    for m in metrics:
        if why := m["cells"][run]["refused"]:
            out.setdefault(why, []).append(m["name"])
    return out


def nothing_compared(metrics: Sequence[Mapping[str, Any]], run: str) -> str | None:
    """A line that says why no metric of a run is compared with the baseline; None where one is."""
    if any(m["cells"][run]["difference"] for m in metrics):
        return None
    why = refusals(metrics, run)
    if len(why) == 1:
        return f"nothing is comparable: {next(iter(why))}"
    told = "; ".join(f"{_listed(names)}: {reason}" for reason, names in why.items())
    return f"nothing is comparable ({told})" if told else "nothing is comparable: no metric"


def _sampling(base: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    one, two = base["identity"], run["identity"]
    odd = [k for k in SAMPLING if one.get(k) != two.get(k)]
    if not odd:
        return []
    told = [k for k in odd if k != "grid"]  # a hash says little, and follows from the others
    what = ", ".join(f"{k} {two.get(k)} instead of {one.get(k)}" for k in told) or "another σ grid"
    return [
        f"sampled otherwise than {base['name']} ({what}); differences are those of model and "
        "sampling together."
    ]


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
