"""stage=report: evaluations of several runs, compared on one page, in tables, and in W&B.

    python run.py stage=report runs=[outputs/a,outputs/b@50]

Everything that the page says is in report.json as well; docs/report.md says how to read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from eval.report.data import Entry, open_runs
from eval.report.numbers import Settings, nothing_compared, numbers
from eval.report.page import common_ceiling, pictures, priority, render
from eval.report.seeds import by_seed, seed_table
from eval.tables import (
    MARK,
    NONE,
    NOTE,
    effect,
    marked,
    number,
    probability,
    signed,
    span,
    table,
)
from flux2 import distributed
from flux2.errors import InputError
from flux2.files import write_json, write_text


def report(cfg: DictConfig) -> dict[str, Any]:
    """Runs the stage; returns its summary: the files and the verdicts."""
    runs: Any = cfg.runs
    if OmegaConf.is_config(runs):
        runs = OmegaConf.to_container(runs, resolve=True)
    elif runs is not None:
        raise InputError(f"runs={runs} is no list: write runs=[{runs},…]")
    settings: Settings = instantiate(cfg.page, _convert_="all")
    entries = open_runs(runs, cfg.baseline)
    if not distributed.is_main():
        return {}
    found = numbers(entries, settings)
    folder = Path(cfg.run.dir)
    images, kept = pictures(entries, found, settings)
    plain = text_tables(found)
    if settings.seeds is not None:
        found["methods"] = by_seed(found, settings.seeds)
        rows = seed_table(found["methods"], settings.columns)
        write_text(folder / "methods.md", _rows(*rows) + "\n")
        plain = table(*rows) + "\n"
    write_text(folder / "report.html", render(found, images, kept))
    write_json(folder / "report.json", found)
    write_text(folder / "table.md", markdown(found))
    write_text(folder / "table.txt", plain)
    if cfg.logger.wandb not in ("off", False):
        to_wandb(folder, cfg.logger, entries, found, settings)
    print(plain)
    for warning in found["warnings"]:
        print(f"note: {warning}")
    print(f"report: {folder / 'report.html'}")
    return {
        "stage": "report",
        "baseline": found["baseline"],
        "page": str(folder / "report.html"),
        "verdicts": {
            run["name"]: {m["name"]: m["cells"][run["name"]]["verdict"] for m in found["metrics"]}
            for run in found["runs"][1:]
        },
    }


# ---------------------------------------------------------------- tables of text


def text_tables(found: Mapping[str, Any]) -> str:
    """One table of values, and one of differences a run; for a terminal or a letter."""
    parts = [table(*_values(found))]
    for run in found["runs"][1:]:
        title = f"{run['name']} against {found['baseline']}"
        why = nothing_compared(found["metrics"], run["name"])
        changes = why or table(*_differences(found, run["name"]))
        parts.append(f"{title}: {changes}" if why else f"{title}\n{changes}")
    if any(m["trained_on"] for m in found["metrics"]):
        parts.append(NOTE)
    if any(not nothing_compared(found["metrics"], run["name"]) for run in found["runs"][1:]):
        parts.append(
            "p: sign-flip test by prompt (sets: jackknife), Holm-corrected over a run's metrics"
        )
    return "\n\n".join(parts) + "\n"


def markdown(found: Mapping[str, Any]) -> str:
    """The same tables in Markdown."""
    parts = [f"# {found['title']}", _rows(*_values(found))]
    for run in found["runs"][1:]:
        parts.append(f"## {run['name']} against {found['baseline']}")
        why = nothing_compared(found["metrics"], run["name"])
        parts.append(why or _rows(*_differences(found, run["name"])))
    parts.append(f"\\{NOTE}. p: Holm-corrected.")
    parts += ["\n".join(f"- {w}" for w in found["warnings"])] if found["warnings"] else []
    return "\n\n".join(parts) + "\n"


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        tight = (c.replace(MARK, MARK.strip()) for c in cells)  # no line breaks before a mark
        safe = (c.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*") for c in tight)
        return "| " + " | ".join(" ".join(c.split()) for c in safe) + " |"

    rule = "|---|" + "---:|" * (len(header) - 1)
    return "\n".join([line(header), rule, *map(line, rows)])


def _values(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = [run["name"] for run in found["runs"]]
    has_marks = {n for m in found["metrics"] for n in m["trained_on"]}
    rows = []
    for m in found["metrics"]:
        cells = [m["cells"][n] for n in names]
        row = [m["name"] + (" ↓" if m["direction"] == "lower" else "")]
        for name, cell in zip(names, cells, strict=True):
            around = span(cell["low"], cell["high"])
            value = number(cell["mean"]) + (f" ({around})" if around != NONE else "")
            room = " " * len(MARK) if name in has_marks else ""  # so that numbers stand in line
            row.append(marked(value, True) if name in m["trained_on"] else value + room)
        rows.append([*row, number(common_ceiling(m)), str(cells[0]["n"])])
    return ["metric", *names, "ceiling", "n"], rows


def _differences(found: Mapping[str, Any], name: str) -> tuple[list[str], list[list[str]]]:
    header = ["metric", "difference", "interval", "p (Holm)", "d", "finds ≥", "verdict"]
    rows = []
    for m in found["metrics"]:
        cell = m["cells"][name]
        d = cell["difference"]
        rows.append([
            marked(m["name"], name in m["trained_on"]),
            *([NONE] * 5 if d is None else [
                signed(d["gain"]), span(d["low"], d["high"], signed), probability(d["p_holm"]),
                effect(d["d_z"]), number(d["effect"]),
            ]),
            str(cell["verdict"]),
        ])  # fmt: skip
    return header, rows


# ---------------------------------------------------------------- W&B


def to_wandb(
    folder: Path,
    cfg: DictConfig,
    entries: Sequence[Entry],
    found: Mapping[str, Any],
    settings: Settings,
) -> None:
    """One W&B run with two tables, `metrics` and `prompts` (with images), and the page."""
    import wandb

    from flux2.log import start_wandb

    names = [run["name"] for run in found["runs"]]
    columns = ("mean", "low", "high", "n", "missing", "ceiling", "verdict")
    changes = ("gain", "low", "high", "p_holm", "d_z", "effect")
    metrics = wandb.Table(
        columns=["metric", "run", "trained_on", *columns, *(f"difference_{c}" for c in changes)]
    )
    for m in found["metrics"]:
        for name in names:
            cell = m["cells"][name]
            d = cell["difference"] or {}
            metrics.add_data(
                m["name"], name, name in m["trained_on"], *(cell[c] for c in columns),
                *(d.get(c) for c in changes),
            )  # fmt: skip
    shown = list(found["values"])
    prompts = wandb.Table(
        columns=["prompt", "seed", *names, *(f"{m}: {n}" for m in shown for n in names)]
    )
    rank = {p: k for k, p in enumerate(priority(found)[: settings.wandb_prompts])}
    samples = [(rank[p], k) for k, (p, _) in enumerate(found["samples"]) if p in rank]
    for _, k in sorted(samples)[: settings.wandb_prompts]:
        prompt, seed = found["samples"][k]
        files = [_image(entry, found, prompt, seed) for entry in entries]
        prompts.add_data(
            found["prompts"][prompt], seed,
            *(None if file is None else wandb.Image(str(file)) for file in files),
            *(found["values"][m][n][k] for m in shown for n in names),
        )  # fmt: skip
    run = start_wandb(folder, cfg)
    try:
        run.log({"metrics": metrics, "prompts": prompts})
        for name in names:
            for m in found["metrics"]:
                run.summary[f"{m['name']}/{name}"] = m["cells"][name]["mean"]
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _image(entry: Entry, found: Mapping[str, Any], prompt: int, seed: int) -> Path | None:
    mine = found["ids"][entry.name].get(str(prompt))
    return None if mine is None else entry.evaluation.image(mine, seed)
