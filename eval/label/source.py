"""What is labelled: pairs of images of one prompt, from a folder of pairs or from two runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from PIL import Image

from eval.report.data import Entry, open_runs
from flux2.data.lines import read_objects, take_meta, take_path, take_prompt
from flux2.data.pairs import FACTS, FILE, Pairs
from flux2.errors import InputError
from flux2.files import digest, read_json, sha256_of

_SAMPLE: Final = re.compile(r"(\d+)-(\d+)\.png")


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt.

    Attributes:
        id: a hash of the prompt and of both images' bytes, in their order: it stays when files
            move, and is another when anything that a rater sees is another.
        a: of a folder of pairs the winner, of two runs the first one's. b: the other.
        references: images given with the prompt.
        meta: the record's, and where the pair is from.
    """

    id: str
    prompt: str
    a: Path
    b: Path
    references: tuple[Path, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """All pairs, and what they are.

    Attributes:
        names: of a and b.
        home: where answers go if nothing is said; None: it must be said.
        facts: for the dataset that comes out.
        left_out: reason → pairs.
        runs: the two are runs, whose comparison is a result in itself.
    """

    pairs: tuple[Pair, ...]
    names: tuple[str, str]
    home: Path | None
    facts: Mapping[str, Any]
    left_out: Mapping[str, int]
    runs: bool = False


@dataclass(frozen=True)
class _Row:
    """A pair before its images are hashed."""

    prompt: str
    a: Path
    b: Path
    references: tuple[Path, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


def read(given: str | Sequence[str] | None) -> Source:
    """The pairs of a folder with pairs.jsonl, of a run of stage=pairs, or of two evaluated runs.

    Args:
        given: a path, or two runs as stage=report names them (`path`, `path@step`, `name=path`).

    Raises:
        InputError: nothing is given, there is no such folder or file, it holds no pair that can be
            shown, a line is wrong, or the runs share no image.
    """
    if not given:
        raise InputError(
            "pairs names nothing: give a folder with pairs.jsonl (stage=pairs writes one), or two "
            "evaluated runs, pairs=[outputs/a,outputs/b]"
        )
    if isinstance(given, str):
        return _folder(Path(given).expanduser())
    if len(given) == 1:
        return _folder(Path(given[0]).expanduser())
    if len(given) != 2:
        raise InputError(f"pairs names {len(given)} runs: people compare two, give two")
    return _two_runs(open_runs(given, None))


# ---------------------------------------------------------------- a folder


def _folder(path: Path) -> Source:
    file = path if path.suffix == ".jsonl" else path / FILE
    if not file.is_file() and (path / "pairs" / FILE).is_file():  # a run of stage=pairs
        file = path / "pairs" / FILE
    if not file.is_file():
        raise InputError(
            f"pairs={path} holds no {FILE}: name a folder of pairs, a run of stage=pairs, or two "
            "evaluated runs, pairs=[outputs/a,outputs/b]"
        )
    known = Pairs(str(file))  # refuses what is wrong, by file and line
    rows = [_line(row, file.parent, where) for where, row in read_objects(file)]
    facts = {"source": str(file.resolve()), "chosen_by": list(known.rewards)}
    if (file.parent / FACTS).is_file():
        drawn = read_json(file.parent / FACTS)
        facts |= {k: drawn[k] for k in ("model", "sampler", "dataset") if k in drawn}
    pairs, left_out = _usable(rows)
    return Source(pairs, ("the given winner", "the other"), file.parent / "labels", facts, left_out)


def _line(row: Mapping[str, Any], root: Path, where: str) -> _Row:
    """A line that `Pairs` has accepted."""
    obj = dict(row)
    prompt = take_prompt(obj, where)
    a, b = (take_path(obj.pop(name), root, where) for name in ("winner", "loser"))
    references = [take_path(name, root, where) for name in obj.pop("references", None) or ()]
    obj.pop("margin", None)
    return _Row(prompt, a, b, tuple(references), take_meta(obj, where))


# ---------------------------------------------------------------- two runs


def _two_runs(entries: Sequence[Entry]) -> Source:
    """Samples of the same prompt and seed in both."""
    first, second = (_samples(entry) for entry in entries)
    rows = [
        _Row(prompt, first[prompt, seed], second[prompt, seed], meta={"seed": seed})
        for prompt, seed in first
        if (prompt, seed) in second
    ]
    names = entries[0].name, entries[1].name
    if not rows:
        raise InputError(
            f"{names[0]} and {names[1]} share no image (the same prompt and seed): keep images, "
            "and evaluate both on the same data"
        )
    where = [f"{entry.run.resolve()}@{entry.step}" for entry in entries]
    pairs, left_out = _usable(rows)
    return Source(pairs, names, None, {"source": where, "names": list(names)}, left_out, True)


def _samples(entry: Entry) -> dict[tuple[str, int], Path]:
    """(prompt, seed) → image, of what the evaluation kept."""
    folder = entry.evaluation.folder
    files = sorted((folder / "images").glob("*.png")) if folder is not None else []
    out: dict[tuple[str, int], Path] = {}
    for file in files:
        found = _SAMPLE.fullmatch(file.name)
        prompt = entry.evaluation.prompts.get(int(found[1])) if found else None
        if found and prompt is not None:
            out.setdefault((prompt, int(found[2])), file)
    if not out:
        raise InputError(
            f"{entry.run} kept no images at step {entry.step}: evaluate it again and keep them"
        )
    return out


# ---------------------------------------------------------------- both


def _usable(rows: Sequence[_Row]) -> tuple[tuple[Pair, ...], Counter[str]]:
    """Pairs that can be told apart, once each, and what was left out. Raises InputError where
    nothing is left."""
    left_out, found = Counter[str](), dict[str, Pair]()
    files = {file for row in rows for file in (row.a, row.b, *row.references)}
    damaged = {file for file in files if not _readable(file)}
    good = sorted(files - damaged)
    hashes = dict(zip(good, sha256_of(good), strict=True))
    for row in rows:
        if damaged & {row.a, row.b, *row.references}:
            left_out["unreadable image"] += 1
        elif hashes[row.a] == hashes[row.b]:
            left_out["the same image twice"] += 1
        else:
            name = digest([row.prompt, hashes[row.a], hashes[row.b]])[:16]
            left_out["given before"] += name in found
            found.setdefault(name, Pair(name, row.prompt, row.a, row.b, row.references, row.meta))
    counts = +left_out
    if not found:
        raise InputError(f"there is no pair to label ({told(counts) or 'none given'})")
    return tuple(found.values()), counts


def _readable(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            image.verify()
    except Exception:  # Pillow's plugins raise whatever their parsing runs into
        return False
    return True


def told(counts: Mapping[str, int] | Iterable[tuple[str, int]]) -> str:
    """Counts in a line: "tie 3, split 1"."""
    return ", ".join(f"{name} {n}" for name, n in dict(counts).items())
