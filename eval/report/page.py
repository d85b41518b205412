"""The report's page: which images it holds, and the HTML made of the numbers.

The page needs nothing but itself: style, script, numbers and images are in it. Nothing that a
prompt says can become markup: Jinja escapes all text, the JSON in it holds no `<`, the script only
sets text, and a content security policy lets no script run but the page's own, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from eval import tables
from eval.report.data import BETTER, EQUAL, OPEN, REFUSED, WORSE, Entry
from eval.report.numbers import Settings
from flux2.errors import InputError
from flux2.files import jsonable

TEMPLATES: Final = Path(__file__).parent / "templates"
SCRIPTS: Final = ("charts.js", "report.js")
KINDS: Final = {BETTER: "good", WORSE: "bad", EQUAL: "same", OPEN: "open", REFUSED: "plain"}
MARKS: Final = {BETTER: "▲ ", WORSE: "▼ ", EQUAL: "= "}


# ---------------------------------------------------------------- images


def priority(report: Mapping[str, Any]) -> list[int]:
    """The prompts' indices: failures first (a value that one run has and another lacks, or 0 where
    more is better), then the biggest change of any run from the baseline, in the chosen metric."""
    metric, base = report["order"], report["baseline"]
    count = len(report["prompts"])
    if metric is None:
        return list(range(count))
    values: Mapping[str, Sequence[float | None]] = report["values"][metric]
    [side] = [m["direction"] for m in report["metrics"] if m["name"] == metric]
    keys = [(1, 0.0)] * count
    members: list[list[int]] = [[] for _ in range(count)]
    for k, (prompt, _) in enumerate(report["samples"]):
        members[prompt].append(k)
    for prompt, rows in enumerate(members):
        means = {run: _mean([v[k] for k in rows]) for run, v in values.items()}
        found = [m for m in means.values() if m is not None]
        lost = bool(found) and any(
            values[run][k] is None for run in values for k in rows if report["measured"][run][k]
        )
        failed = lost or (side == "higher" and 0 in found)
        start = means[base]
        change = max((abs(m - start) for m in found), default=0.0) if start is not None else 0.0
        keys[prompt] = (0 if failed else 1, -change)
    return sorted(range(count), key=lambda p: (*keys[p], p))


def _mean(values: Sequence[float | None]) -> float | None:
    good = [v for v in values if v is not None]
    return sum(good) / len(good) if good else None


def pictures(
    entries: Sequence[Entry], report: Mapping[str, Any], settings: Settings
) -> tuple[dict[str, list[str | None]], str]:
    """Run → base64 PNG of each sample (None: not in the page), and a sentence that says which.

    Whole prompts are taken in order of `priority`, until `settings` says that it is enough.
    """
    members: dict[int, list[int]] = {}
    for k, (prompt, _) in enumerate(report["samples"]):
        members.setdefault(prompt, []).append(k)
    out: dict[str, list[str | None]] = {e.name: [None] * len(report["samples"]) for e in entries}
    room, taken, scaled, full = settings.megabytes * 1e6, 0, False, False
    for prompt in priority(report):
        if taken == settings.prompts or full:
            break
        found: dict[tuple[str, int], str] = {}
        for entry in entries:
            for k in members.get(prompt, ()):
                path = _file(entry, report, k)
                if path is not None:
                    data, small = thumbnail(path, settings.side)
                    scaled |= small
                    found[entry.name, k] = base64.b64encode(data).decode()
        room -= sum(map(len, found.values()))
        full = room < 0
        if found and not full:
            taken += 1
            for (name, k), text in found.items():
                out[name][k] = text
    return out, _told(entries, report, settings, taken, scaled)


def _told(
    entries: Sequence[Entry],
    report: Mapping[str, Any],
    settings: Settings,
    taken: int,
    scaled: bool,
) -> str:
    without = [
        e.name for e in entries
        if not any(_file(e, report, k) for k in range(len(report["samples"])))
    ]  # fmt: skip
    text = f"The page holds the images of {taken} of {len(report['prompts'])} prompts"
    if taken < len(report["prompts"]) and len(without) < len(entries):
        text += f", failures and the biggest changes in {report['order']} first"
    text += f", scaled down to at most {settings.side} pixels." if scaled else "."
    return text + (f" No images were kept of {', '.join(without)}." if without else "")


def _file(entry: Entry, report: Mapping[str, Any], sample: int) -> Path | None:
    index, seed = report["samples"][sample]
    prompt = report["ids"][entry.name].get(str(index))
    return None if prompt is None else entry.evaluation.image(prompt, seed)


def thumbnail(path: Path, side: int) -> tuple[bytes, bool]:
    """A PNG of at most `side` pixels a side, as it is where it is small enough; whether it was
    scaled down. Raises InputError where the file is no image."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if max(image.size) <= side:
                image.verify()
                return path.read_bytes(), False
            ratio = side / max(image.size)
            size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no PNG image ({error}): evaluate again") from None
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return out.getvalue(), True


# ---------------------------------------------------------------- numbers as text


number = partial(tables.number, none="–")
signed = partial(tables.signed, none="–")
probability = partial(tables.probability, none="–")
effect = partial(tables.effect, none="–")


def interval(row: Mapping[str, float | None], text: Any = number) -> str:
    """[low, high], or nothing where there is none."""
    low, high = row["low"], row["high"]
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{text(low)}, {text(high)}]"


def common_ceiling(metric: Mapping[str, Any]) -> float | None:
    """The ceiling that all runs share; None where they differ or have none."""
    found = [c["ceiling"] for c in metric["cells"].values()]
    known = [c for c in found if c is not None and math.isfinite(c)]
    return known[0] if known and max(known) - min(known) < 1e-9 else None


def common_count(metric: Mapping[str, Any]) -> int | None:
    """The number of values that all runs have; None where they differ."""
    found = {c["n"] for c in metric["cells"].values() if c["mean"] is not None}
    return found.pop() if len(found) == 1 else None


def aside(cell: Mapping[str, Any], shared_n: int | None, shared_ceiling: float | None) -> str:
    """What else is to be said of a cell, beside what all cells of its row share."""
    parts = [] if shared_n is not None else [f"n {cell['n']}"]
    parts += [f"{cell['missing']} without a value"] if cell["missing"] else []
    if shared_ceiling is None and cell["ceiling"] is not None:
        parts.append(f"ceiling {number(cell['ceiling'])}")
    return " · ".join([*parts, *([cell["note"]] if cell["note"] else [])])


def arrow(side: str) -> str:
    """A metric's better side, for a table."""
    sides = {"higher": "↑ higher is better", "lower": "↓ lower is better"}
    return sides.get(side, "neither is better")


# ---------------------------------------------------------------- the page


def facts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The columns of the table of runs; those that nothing is known of are left out."""
    runs = report["runs"]
    columns = [
        ("model", False, True, [_joined(r, "model", "role") for r in runs]),
        ("stage", False, False, [_fact(r["identity"].get("stage")) for r in runs]),
        ("step", True, False, [str(r["step"]) for r in runs]),
        ("sampling", False, True, [_sampling(r) for r in runs]),
        ("forwards an image", True, True, [_fact(r["identity"].get("forwards")) for r in runs]),
        ("seconds an image", True, False, [_fact(r["identity"].get("seconds")) for r in runs]),
        ("on", False, False, [_fact(r["identity"].get("device")) for r in runs]),
        ("size", False, True, [_fact(r["identity"].get("size")) for r in runs]),
        ("prompts of", False, True, [_fact(r["identity"].get("dataset")) for r in runs]),
        ("prompts", True, True, [str(r["prompts"]) for r in runs]),
        ("images", True, True, [str(r["samples"]) for r in runs]),
    ]
    return [
        {"title": title, "number": number, "marks": marks, "cells": cells}
        for title, number, marks, cells in columns
        if any(cell != "–" for cell in cells)
    ]


def _joined(run: Mapping[str, Any], *keys: str) -> str:
    found = [_fact(v) for k in keys if (v := run["identity"].get(k)) is not None]
    return " ".join(dict.fromkeys(found)) or "–"


def _sampling(run: Mapping[str, Any]) -> str:
    known = run["identity"]
    parts = [str(known["solver"])] if known.get("solver") is not None else []
    parts += [f"{known['steps']} steps"] if known.get("steps") is not None else []
    if known.get("guidance") is not None:
        parts.append(f"guidance {known['guidance']:g}")
    if known.get("embedded_guidance") is not None:
        parts.append(f"embedded {known['embedded_guidance']:g}")
    return ", ".join(parts) or "–"


def _fact(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        pairs = [v if isinstance(v, list | tuple) else (v,) for v in value]
        return ", ".join("×".join(map(str, pair)) for pair in pairs)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def glance(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each run won and lost; apart, what it won in metrics that training maximised."""
    out = []
    for index, run in enumerate(report["runs"]):
        won = [
            (m["cells"][run["name"]]["verdict"], run["name"] in m["trained_on"])
            for m in report["metrics"]
        ]
        chips = [
            (f"{count} {word}{', but rewarded' * rewarded}", "reward" if rewarded else _kind(word))
            for word in (BETTER, WORSE, "higher", "lower", EQUAL, OPEN, REFUSED)
            for rewarded in (False, True)
            if (count := sum(w == word and (t and w == BETTER) == rewarded for w, t in won))
        ]
        if chips:
            out.append({"index": index, "name": run["name"], "counts": chips})
    return out


def _kind(word: str) -> str:
    return KINDS.get(word, "open")


def embed(value: Any) -> Markup:
    """JSON for a script element: no character in it can end the element or begin another."""
    text = json.dumps(jsonable(value), allow_nan=False, separators=(",", ":"))  # ASCII only
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def render(report: Mapping[str, Any], images: Mapping[str, Sequence[str | None]], kept: str) -> str:
    """The page. images and kept: from `pictures`."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters |= {
        "num": number, "signed": signed, "signed2": effect, "p": probability, "range": interval,
        "signed_range": lambda row: interval(row, signed), "side": arrow,
        "ceiling": common_ceiling, "kind": _kind, "count": common_count, "aside": aside,
        "mark": lambda word: MARKS.get(word, ""),
    }  # fmt: skip
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return env.get_template("report.html.j2").render(
        report=report,
        facts=facts(report),
        glance=glance(report),
        kept=kept,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=embed(report),
        images=embed(images),
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
