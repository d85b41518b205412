"""stage=pipeline: several stages in a row, each an ordinary run that starts from the one before.

    this process     examines nothing itself; starts one process at a time, and waits; has no torch
      ├ --links      composes every link and refuses what will not do, before the first one begins
      └ --link       one link: run.py's own job, on as many ranks as it asks for

A link that is done with the same settings and from the same weights is not done again; one that was
interrupted goes on. Links get their signals from here, and die with this process, also when that is
killed: a pipeline that is resumed must not meet its own orphans. flux2.chain says what a link is,
flux2.examine what is refused.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flux2.chain import RECORD, Link, chain_of, outdated, records_of, uses_of
from flux2.errors import InputError
from flux2.examine import STAGE, Ending, Step
from flux2.files import read_json, write_json, write_text
from flux2.launch import KILLED, die_with, note_at, signals_received, write_note
from flux2.ranks import parsed, resolved
from flux2.runs import Interrupted, Run, hold, release

LINKS, LINK = "--links", "--link"  # how run.py is told which of the three it is
SCRIPT = Path(__file__).resolve().parents[1] / "run.py"


class LinkEnded(Exception):
    """A link did not come to its end.

    Attributes:
        code: the exit code to hand on.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


# ---------------------------------------------------------------- the stage


def run(cfg: DictConfig) -> dict[str, Any]:
    """Runs the links that are not done; returns the summary.

    Raises:
        InputError: a link cannot be, before any begins.
        LinkEnded: one failed. Interrupted: after the link has ended for it.
    """
    chain, began = chain_of(cfg), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flux2-") as name, signals_received() as received:
        folder = Path(name)
        plan = _examined(cfg, folder, received)
        todo = [step for step in plan if step.todo]
        print("\n".join(_plan_lines(plan)), flush=True)
        if cfg.dry:
            return {"stage": STAGE, "links": {s.name: asdict(s) for s in plan}, "dry": True}
        if cfg.first is not None:
            _begin_anew(cfg, [link for link in chain if any(s.name == link.name for s in todo)])
        for at, step in enumerate(todo, 1):
            if received:
                raise Interrupted(received[0])
            print(f"\nlink {at} of {len(todo)}: {step.name} → {step.path}", flush=True)
            _do(cfg, chain, step, folder, received)
    return _tell(cfg, chain, plan, time.monotonic() - began)


def _examined(cfg: DictConfig, folder: Path, received: list[int]) -> list[Step]:
    """All links, composed, compared with what there is, and refused, by a process of its own."""
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(resolved(cfg)), encoding="utf-8")
    with (folder / "stderr").open("w") as errors:
        process = _start([LINKS, str(folder)], stdout=subprocess.DEVNULL, stderr=errors)
        _wait(process, received, lambda: False)
    if received:
        raise Interrupted(received[0])
    note = note_at(folder / "links.json")
    if note is None:
        raise LinkEnded(1, f"{(folder / 'stderr').read_text()}error: the links were not examined")
    if note["code"] == 2:
        raise InputError(note["text"])
    if note["code"]:
        raise LinkEnded(note["code"], note["text"])
    return [Step(**step) for step in note["plan"]]


def _begin_anew(cfg: DictConfig, links: Sequence[Link]) -> None:
    """first=: what there is of these links is set aside, the last one first, so that after a kill
    at any moment those before it are whole. Then the run forgets first=, and may be resumed."""
    for link in reversed(links):
        if link.path.exists():
            hold(link.path)
            release(link.path)
            places = (link.path.with_name(f"{link.path.name}.{n}") for n in range(1, 1 << 20))
            place = next(p for p in places if not p.exists())
            link.path.rename(place)
            print(f"{link.name}: what was there is now {place}", flush=True)
    root, gone = Path(cfg.run.dir), {link.name for link in links}
    kept = {name: record for name, record in records_of(root).items() if name not in gone}
    write_json(root / RECORD, kept)
    named = Run(root).manifest.get("links", {})
    Run(root).update(links={name: place for name, place in named.items() if name not in gone})
    cfg.first = None
    write_text(Path(cfg.run.dir) / "config.yaml", OmegaConf.to_yaml(resolved(cfg)))


def _do(
    cfg: DictConfig, chain: Sequence[Link], step: Step, folder: Path, received: list[int]
) -> None:
    """One link, in a process of its own."""
    link = next(link for link in chain if link.name == step.name)
    root, began = Path(cfg.run.dir), time.monotonic()
    before = records_of(root).get(link.name, {}) if step.state == "again" else {}
    try:
        uses = uses_of(link, step.init, chain)
    except InputError as error:  # what an earlier link made has been damaged since
        raise LinkEnded(2, f"error: link {link.name}: {error}") from error
    record = {"init": step.init, "uses": uses, "seconds": 0.0, **before}
    write_json(root / RECORD, {**records_of(root), link.name: record})
    Run(root).update(links={other.name: other.path.name for other in chain
                            if other.name in records_of(root)})  # fmt: skip
    file = folder / f"{step.number:02d}"
    process = _start([LINK, str(file)])
    try:
        _wait(process, received, lambda: file.with_suffix(".json").exists())
    finally:
        process.kill()  # where it has ended, nothing
        process.wait()
    record["seconds"] = round(record["seconds"] + time.monotonic() - began, 1)
    write_json(root / RECORD, {**records_of(root), link.name: record})
    note = note_at(file.with_suffix(".json")) or {}
    if received:
        raise Interrupted(received[0])
    _hand_on(link, note.get("code"), note.get("text", ""), process.returncode, root)


def _hand_on(link: Link, code: int | None, text: str, status: int, root: Path) -> None:
    """Raises what a link's end means for the pipeline."""
    again = f"to go on with the pipeline: python run.py resume={root}"
    if code == 0:
        return
    if code is None:
        name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        memory = " (out of memory?)" if status == -signal.SIGKILL else ""
        raise LinkEnded(1, f"error: link {link.name} was ended by {name}{memory}; {again}")
    if code > 128:
        raise Interrupted(code - 128)
    if code == 2:
        reason = text.removeprefix("error: ") or "refused, as said above"
        raise LinkEnded(2, f"error: link {link.name}: {reason}; then, {again}")
    line = f"error: link {link.name} failed; {again}"
    raise LinkEnded(code, f"{text}\n{line}" if text else line)


# ---------------------------------------------------------------- processes


def _start(arguments: Sequence[str], **streams: Any) -> subprocess.Popen[Any]:
    """run.py, in a session of its own, where a terminal's Ctrl-C does not reach it."""
    command = [sys.executable, str(SCRIPT), *arguments, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **streams)


def _wait(process: subprocess.Popen[Any], received: list[int], hears: Callable[[], bool]) -> None:
    """Wait for a process; give it each signal once. It is killed by the third, and by the first if
    it cannot hear yet, for then it has nothing to write."""
    sent = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return
        while sent < len(received):
            sent += 1
            if sent >= KILLED or not hears():
                process.kill()
            else:
                process.send_signal(received[sent - 1])


def run_link(arguments: list[str], perform: Callable[..., int], ending: Ending) -> int:
    """The process of one link. Arguments: its configuration's file without the suffix, the
    pipeline's process. SIGINT and SIGTERM must raise Interrupted by now.

    perform: does a job, telling `say` what went wrong; returns its exit code.
    """
    file, parent = Path(arguments[0]), int(arguments[1])
    die_with(parent)
    said: list[str] = []

    def say(code: int, text: str) -> int:
        said.append(text)
        return code

    note = file.with_suffix(".json")
    try:
        write_note(note, {})  # from here on signals are sent
        code = perform(parsed(file.with_suffix(".yaml").read_text(encoding="utf-8")), say)
    except BaseException as error:
        code, text = ending(error, ())
        said.append("" if code > 128 else text)  # the pipeline says how to go on
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    write_note(note, {"code": code, "text": "\n".join(filter(None, said))})
    return code


# ---------------------------------------------------------------- what is told


def _plan_lines(plan: Sequence[Step]) -> Iterator[str]:
    """What is to be done about each link."""
    words = {"new": "to do", "again": "to go on with", "done": "done already", "kept": "left as is"}
    width = max(len(step.name) for step in plan)
    for step in plan:
        note = f": {step.note}" if step.note else ""
        yield f"{step.number:3} {step.name:{width}}  {words[step.state]}{note}"


def _tell(
    cfg: DictConfig, chain: Sequence[Link], plan: Sequence[Step], seconds: float
) -> dict[str, Any]:
    """The closing table, printed; the summary."""
    root = Path(cfg.run.dir)
    records, found = records_of(root), {}
    named = {link.name: link for link in chain}
    rows: list[tuple[str, ...]] = []
    for step in plan:
        link, record = named[step.name], records.get(step.name, {})
        state = "made" if step.todo else "there already" if step.state == "done" else "left as is"
        note = outdated(link, chain, record or None) if step.state == "kept" else None
        manifest, numbers = link.manifest, numbers_of(link)
        if manifest is None:
            state = "left out"
        rows.append((step.name, manifest["stage"] if manifest else step.stage, state,
                     _duration(record.get("seconds")), _shown(numbers), note or ""))  # fmt: skip
        found[step.name] = {
            "stage": manifest["stage"] if manifest else None, "run": str(link.path), "state": state,
            "id": manifest["id"] if manifest else None, "seconds": record.get("seconds"),
            "parents": manifest["parents"] if manifest else [], "numbers": numbers, "note": note,
        }  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(6)]
    text = "\n".join(
        "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    print(f"\n{text}\n{len(rows)} links in {root}", flush=True)
    return {"stage": STAGE, "links": found, "seconds": round(seconds, 1)}


def numbers_of(link: Link) -> dict[str, Any]:
    """A few numbers of a run that is done: what its evaluation tells beside the progress, [before,
    after] where both were measured; else the first numbers of its summary."""
    if not link.done:
        return {}
    summary = read_json(link.path / "summary.json")
    named = OmegaConf.select(OmegaConf.load(link.path / "config.yaml"), "evaluation.headline")
    for key in ("metrics", "after"):
        values = summary.get(key)
        if isinstance(values, dict) and values:
            shown = [n for n in named or values if n in values][:3] or list(values)[:3]
            if key == "metrics":
                return {name: values[name]["mean"] for name in shown}
            before = summary.get("before", {})
            return {n: [before[n], values[n]] if n in before else values[n] for n in shown}
    plain = {k: v for k, v in summary.items() if type(v) in (int, float) and k != "seconds"}
    return dict(list(plain.items())[:3])


def _shown(numbers: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, list):
            return " → ".join(map(one, value))
        return "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {one(value)}" for name, value in numbers.items())


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
