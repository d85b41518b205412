"""Records of another dataset, as a stage left them: with prompts rewritten, or the better part of
them.

    {"record": 17, "prompt": …, "original_prompt": …, "captions": {…}}    a line of stage=enhance
    {"record": 17, "prompt": …, "reward_range": 0.4, …}                   of stage=filter
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flux2.data.lines import read_objects, take_meta, take_prompt
from flux2.data.order import Law, describe, digest, identity, law_of, table
from flux2.data.record import Dataset, Record
from flux2.errors import InputError

FILE = "prompts.jsonl"
"""What the folder of such a stage holds."""


@dataclass(frozen=True)
class _Line:
    record: int
    prompt: str
    meta: Mapping[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Derived:
    """The records that a file names, in its order and numbered anew: images, references and ground
    truth are the dataset's, the prompt and its captions the file's.

    Of the meta, what both have is the dataset's, except `captions`.

    Attributes:
        dataset: what the file was made of.
        path: the file, or a folder with a prompts.jsonl.

    Raises:
        InputError: no path, no such file, a line without `record`, or of another dataset, which
            shows where a record's own prompt is none of the line's.
    """

    dataset: Dataset
    path: str | None
    _lines: tuple[_Line, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.path is None:
            raise InputError(
                "data.dataset.path names no file: give the prompts.jsonl of stage=enhance or filter"
            )
        file = Path(self.path).expanduser()
        file = file / FILE if file.is_dir() else file
        lines = tuple(self._line(obj, where) for where, obj in read_objects(file))
        object.__setattr__(self, "_lines", lines)
        self._same(describe(self.dataset, lines[0].record), lines[0])

    def _line(self, obj: Mapping[str, Any], where: str) -> _Line:
        rest = dict(obj)
        record = rest.pop("record", None)
        if type(record) is not int or not 0 <= record < len(self.dataset):
            raise InputError(
                f"{where}: record {record!r} is none of the dataset's {len(self.dataset)}: give "
                "the data that the file was made of"
            )
        return _Line(record, take_prompt(rest, where), take_meta(rest, where))

    def _same(self, record: Record, line: _Line) -> None:
        captions = line.meta.get("captions") or {}
        was = str(captions.get("raw") or line.meta.get("original_prompt", line.prompt))
        if record.prompt.strip() not in (was.strip(), line.prompt):
            raise InputError(
                f"{self.path} was made of other data: record {line.record} is "
                f"{record.prompt[:60]!r} here and {was[:60]!r} there; give the data it was made of"
            )

    def _with(self, record: Record, index: int) -> Record:
        line = self._lines[index]
        self._same(record, line)
        captions = {k: v for k, v in line.meta.items() if k == "captions"}
        meta = {**line.meta, **record.meta, **captions}
        return replace(record, id=index, prompt=line.prompt, meta=meta)

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self._lines):
            raise IndexError(index)
        return self._lines[index].record

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord as the dataset does."""
        return self._with(self.dataset[self._at(index)], index)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """The dataset's."""
        return self.dataset.bucket_of(self._at(index))

    def describe(self, index: int) -> Record:
        """The record without images."""
        return self._with(describe(self.dataset, self._at(index)), index)

    def law(self, step: int) -> Law:
        """The dataset's, of the records that are here. Raises InputError where it draws none."""
        law, kept = law_of(self.dataset, step), np.array([line.record for line in self._lines])
        weights = None if law.weights is None else law.weights[kept]
        if weights is not None and not weights.any():
            raise InputError(f"{self.path} names only records of weight 0: give others")
        return replace(law, weights=weights, parts=None if law.parts is None else law.parts[kept])

    @property
    def identity(self) -> str:
        """Of the dataset and of the file's lines."""
        return digest("derived", identity(self.dataset), self._lines)

    @property
    def inner(self) -> Sequence[Dataset]:
        """The dataset."""
        return (self.dataset,)

    def report(self) -> Iterator[str]:
        """How many records there are, and how many have each kind of caption."""
        kinds: dict[str, int] = {}
        for line in self._lines:
            for kind in line.meta.get("captions") or ():
                kinds[kind] = kinds.get(kind, 0) + 1
        rows = [["all", str(len(self))], *([k, str(n)] for k, n in kinds.items())]
        yield from table([f"of {len(self.dataset)} records", "here"], rows)

    def __repr__(self) -> str:
        return f"Derived({self.identity})"
