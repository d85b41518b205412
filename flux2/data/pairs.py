"""Pairs of images of one prompt, of which one was preferred: our own files and published ones.

    pairs        {"prompt": …, "winner": "a.png", "loser": "b.png", "margin": 0.4} a line, as
                 stage=pairs writes; a folder is read by its pairs.jsonl
    pickapic     Pick-a-Pic v2's parquet files (arXiv 2305.01569): caption, jpg_0, jpg_1, label_0,
                 label_1, has_label; a file, a folder of one split's, or data/train-*; needs
                 pyarrow
    hpdv3        HPDv3's json (arXiv 2508.03789): prompt, path1, which was preferred to path2, and
                 confidence; the file lies beside images/
    imagereward  ImageReward's json (arXiv 2304.05977): prompt, generations, ranking, 1 the best;
                 every two images of different rank are a pair. Or a folder of ImageRewardDB's
                 (train_1/train_1.json beside its images): image_path, rank, prompt_id

Ties and rows without a label are left out and counted. Other wrong rows are refused, by file and
line or row.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

from PIL import Image

from flux2.data.lines import read_objects, read_text, take_meta, take_path, take_prompt
from flux2.data.readers import RowDataset, Rows, Size, checked_sizes, cover, read_image
from flux2.data.record import Record, UnreadableRecord
from flux2.errors import InputError
from flux2.files import read_json

FILE = "pairs.jsonl"
"""What a folder of our own pairs holds."""
FACTS = "facts.json"
"""Beside it, where stage=pairs wrote them: what drew and judged them."""
_SPLIT: Final = re.compile(r"(\w+)-\d+-of-\d+(?:-\w+)?")
"""Names of datasets' shards on the hub."""
_COLUMNS: Final = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")


@dataclass(frozen=True)
class _Pair:
    """A pair before its images are read."""

    prompt: str
    winner: Path | _Cell
    loser: Path | _Cell
    margin: float = 1.0
    references: tuple[Path, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def record(self, index: int, size: Size) -> Record:
        """See `flux2.data.readers.Unread`."""
        winner, loser = (cover(_image(x), size) for x in (self.winner, self.loser))
        references = tuple(cover(read_image(r), size) for r in self.references)
        return Record(
            index, self.prompt, winner, references, None, (winner, loser, self.margin), self.meta
        )

    def sized_by(self) -> Path:
        """See `flux2.data.readers.Unread`."""
        return _source(self.winner)


@dataclass(frozen=True, eq=False)
class Pairs(RowDataset[_Pair]):
    """Pairs as a dataset (`flux2.data.record.Dataset`): a record's target is the winner, and its
    `preference` is (winner, loser, margin), both of the winner's bucket.

    The margin says by how much the winner is better, in the source's own unit: a reward's, ranks,
    the annotators' confidence; 1 where the source says nothing.

    Attributes:
        path: the file, or the folder (see the module).
        sizes: [h, w] of the buckets; a pair goes to the one of nearest aspect.
        layout: pairs, pickapic, hpdv3 or imagereward.
        left_out: reason → rows that are no pair.
        rewards: what judged the pairs, as a manifest keeps it; empty where people did.
        stamp: changes with any row, and any file's size or time; it keeps caches honest.

    Raises:
        InputError: no path, an unknown layout, no such file, no pair in it, a row that does not fit
            its layout, a path that leads out of the folder or to no image file, wrong sizes.
    """

    path: str | None
    sizes: Sequence[Sequence[int]] = ((64, 64),)
    layout: str = "pairs"
    left_out: Counter[str] = field(init=False, repr=False)
    rewards: tuple[str, ...] = field(init=False, repr=False)
    stamp: str = field(init=False)
    _rows: Rows[_Pair] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.path is None:
            raise InputError(
                "data.dataset.path is not set: give the pairs, as <run of stage=pairs>/pairs"
            )
        if self.layout not in LAYOUTS:
            raise InputError(
                f"data.dataset.layout is {self.layout!r}: choose from {', '.join(LAYOUTS)}"
            )
        buckets, left_out = checked_sizes(self.sizes), Counter[str]()
        path = Path(self.path).expanduser()
        rows = list(LAYOUTS[self.layout](path, left_out))
        if not rows:
            why = ", ".join(f"{reason} × {n}" for reason, n in left_out.items())
            raise InputError(f"{path} has no pair{f' ({why})' if why else ''}: give other data")
        found = {"_rows": Rows(rows, buckets), "left_out": left_out, "stamp": _stamp(rows)}
        for name, value in {**found, "rewards": _judges(path)}.items():
            object.__setattr__(self, name, value)


def _stamp(rows: Sequence[_Pair]) -> str:
    digest, seen = hashlib.sha256(), dict[Path, tuple[int, int]]()
    for row in rows:
        facts: list[object] = [row.prompt, row.margin, row.meta]
        for image in (row.winner, row.loser, *row.references):
            file = image if isinstance(image, Path) else image.file
            if file not in seen:
                stat = file.stat()
                seen[file] = stat.st_size, stat.st_mtime_ns
            facts += [str(image), seen[file]]
        digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _judges(path: Path) -> tuple[str, ...]:
    facts = (path if path.is_dir() else path.parent) / FACTS
    return tuple(map(str, read_json(facts).get("rewards", ()))) if facts.is_file() else ()


# -- layouts -------------------------------------------------------------------------------------


def _own(path: Path, left_out: Counter[str]) -> Iterator[_Pair]:
    file = path / FILE if path.is_dir() else path
    for where, row in read_objects(file):
        obj = dict(row)
        prompt = take_prompt(obj, where)
        names = obj.pop("winner", None), obj.pop("loser", None)
        if names[0] == names[1]:
            raise InputError(f'{where} needs two images: give "winner" and "loser"')
        references = obj.pop("references", None) or []
        if not isinstance(references, list):
            raise InputError(f'{where}: "references" is no list: write ["a.png", ...]')
        margin = _margin(obj.pop("margin", 1.0), where)
        winner, loser, *given = (
            take_path(name, file.parent, where) for name in (*names, *references)
        )
        yield _Pair(prompt, winner, loser, margin, tuple(given), take_meta(obj, where))


def _margin(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f'{where}: "margin" is {value!r}: give a number of at least 0, or none')
    return float(value)


def _listed(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, row n", object) of a JSON list, or of one object a line."""
    if file.is_dir():
        raise InputError(f"{file} is a folder: give the json file in it")
    text = read_text(file)
    if not text.lstrip().startswith("["):
        yield from read_objects(file)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}): correct it") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{file}, row {number} is no JSON object: write {{...}}")
        yield f"{file}, row {number}", row


def _hpdv3(path: Path, left_out: Counter[str]) -> Iterator[_Pair]:
    for where, row in _listed(path):
        prompt = take_prompt(dict(row), where)
        winner, loser = (take_path(row.get(k), path.parent, where) for k in ("path1", "path2"))
        confidence = row.get("confidence")
        margin = 1.0 if confidence is None else _margin(confidence, where)
        meta = {k: row[k] for k in ("model1", "model2") if k in row}
        yield _Pair(prompt, winner, loser, margin, meta=meta)


def _imagereward(path: Path, left_out: Counter[str]) -> Iterator[_Pair]:
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    for name, prompt, ranked in itertools.chain.from_iterable(map(_rankings, files)):
        for (a, i), (b, k) in itertools.combinations(ranked, 2):
            if a == b:
                left_out["tie"] += 1
                continue
            winner, loser = (i, k) if a < b else (k, i)
            yield _Pair(prompt, winner, loser, float(abs(a - b)), meta={"id": name})


def _rankings(file: Path) -> Iterator[tuple[Any, str, list[tuple[int, Path]]]]:
    """(the prompt's id, prompt, (rank, image) of each of its images). A row is a prompt with all of
    them (generations, ranking), or one of them (image_path, rank), which lies beside the file."""
    found: dict[Any, tuple[str, list[tuple[int, Path]]]] = {}
    for where, row in _listed(file):
        prompt = take_prompt(dict(row), where)
        names: Any
        ranks: Any
        if "image_path" in row:
            name = row["image_path"]
            names, ranks = [Path(name).name if isinstance(name, str) else name], [row.get("rank")]
            key = row.get("prompt_id")
        else:
            names, ranks, key = row.get("generations"), row.get("ranking"), row.get("id")
        if not isinstance(names, list) or not isinstance(ranks, list) or len(names) != len(ranks):
            raise InputError(f'{where} needs "generations" and "ranking", lists of one length')
        if not all(type(r) is int for r in ranks):
            raise InputError(f'{where}: "ranking" is {ranks}: give whole numbers, 1 the best')
        images = [take_path(name, file.parent, where) for name in names]
        ranked = list(zip(ranks, images, strict=True))
        if "image_path" in row:
            found.setdefault(key, (prompt, []))[1].extend(ranked)
        else:
            yield key, prompt, ranked
    for key, (prompt, ranked) in found.items():
        yield key, prompt, ranked


# -- parquet -------------------------------------------------------------------------------------


def _pyarrow() -> Any:
    """pyarrow.parquet. Raises InputError where it is not installed."""
    try:
        return import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            "layout=pickapic reads parquet files and needs pyarrow: pip install pyarrow"
        ) from None


class _Shards:
    """Parquet files, of which one row group's images are held at a time: whoever reads in the order
    of the rows, as the filling of a cache does, reads each file once."""

    def __init__(self) -> None:
        self._held: tuple[Path, int] | None = None
        self._images: dict[str, list[bytes | None]] = {}

    def bytes(self, cell: _Cell) -> bytes:
        """Raises UnreadableRecord where the file has become unreadable or the cell is empty."""
        if self._held != (cell.file, cell.group):
            try:
                with _pyarrow().ParquetFile(cell.file) as table:
                    found = table.read_row_group(cell.group, columns=["jpg_0", "jpg_1"])
            except (OSError, ValueError) as error:  # pyarrow's errors are kinds of these
                raise UnreadableRecord(f"{cell}: {str(error).splitlines()[0]}") from error
            self._images = {name: found[name].to_pylist() for name in ("jpg_0", "jpg_1")}
            self._held = cell.file, cell.group
        value = self._images[cell.column][cell.row]
        if not value:
            raise UnreadableRecord(f"{cell}: no image")
        return value


@dataclass(frozen=True)
class _Cell:
    """An image in a parquet file: its row group, its row in that, its column."""

    shards: _Shards = field(repr=False)
    file: Path
    group: int
    row: int
    column: str

    def __str__(self) -> str:
        return f"{self.file}, row group {self.group}, row {self.row}, {self.column}"


def _pickapic(path: Path, left_out: Counter[str]) -> Iterator[_Pair]:
    parquet, shards = _pyarrow(), _Shards()
    files = [path]
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    elif "*" in path.name:  # one split of a folder that holds several
        files = sorted(path.parent.glob(path.name))
    splits = {found[1] for f in files if (found := _SPLIT.fullmatch(f.stem))}
    if len(splits) > 1:
        raise InputError(
            f"{path} holds the splits {', '.join(sorted(splits))}: give one, as {path}/train-*"
        )
    for file in files:
        try:
            table = parquet.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} is no parquet file: {str(error).splitlines()[0]}"
            ) from None
        with table:
            names = set(table.schema_arrow.names)
            if missing := [c for c in _COLUMNS if c not in names]:
                raise InputError(f"{file} has no column {missing[0]}: give Pick-a-Pic's files")
            light = [c for c in (*_COLUMNS, "has_label") if c in names and "jpg" not in c]
            for group in range(table.num_row_groups):
                for k, row in enumerate(table.read_row_group(group, columns=light).to_pylist()):
                    winner = _winner(row, left_out)
                    if winner is not None:
                        cells = [_Cell(shards, file, group, k, f"jpg_{i}") for i in (0, 1)]
                        gap = abs(row["label_0"] - row["label_1"])
                        yield _Pair(row["caption"], cells[winner], cells[1 - winner], float(gap))


def _winner(row: Mapping[str, Any], left_out: Counter[str]) -> int | None:
    """0 or 1; None, and counted, where nobody won."""
    a, b = row["label_0"], row["label_1"]
    if row.get("has_label") is False or a is None or b is None:
        left_out["no label"] += 1
    elif a == b:
        left_out["tie"] += 1
    elif not (row["caption"] or "").strip():
        left_out["no caption"] += 1
    else:
        return 0 if a > b else 1
    return None


LAYOUTS: Final[Mapping[str, Callable[[Path, Counter[str]], Iterator[_Pair]]]] = {
    "pairs": _own,
    "pickapic": _pickapic,
    "hpdv3": _hpdv3,
    "imagereward": _imagereward,
}


# -- pixels --------------------------------------------------------------------------------------


class _Named(io.BytesIO):
    """Bytes that name where they are from in messages, as a path does."""

    def __init__(self, cell: _Cell) -> None:
        super().__init__(cell.shards.bytes(cell))
        self._name = str(cell)

    def __str__(self) -> str:
        return self._name


def _source(image: Path | _Cell) -> Path:
    """What Pillow opens: the readers hand it on, and put it into messages."""
    return image if isinstance(image, Path) else cast(Path, _Named(image))


def _image(image: Path | _Cell) -> Image.Image:
    return read_image(_source(image))

