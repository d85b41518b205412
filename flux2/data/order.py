"""What datasets over datasets share: how often records are drawn, what is told without pixels.

A wrapper is a `Dataset` whose parts are datasets. What it may have besides is in the protocols
here; the functions ask for it, and answer for plain datasets too.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor
from tqdm import tqdm

from flux2.data.record import Dataset, Record, UnreadableRecord
from flux2.errors import InputError


@dataclass(frozen=True, eq=False)
class Law:
    """How often each record is drawn, from a step on.

    Attributes:
        since: the first step that it holds for.
        weights: n float64 ≥ 0, relative: the expected share of a record among the samples. None:
            every record once an epoch.
        parts: n int64, the kinds that every batch is composed of in their proportions; None: one.
        once: it holds for step `since` alone, and may be another when asked again.
    """

    since: int = 0
    weights: np.ndarray | None = None
    parts: np.ndarray | None = None
    once: bool = False

    def shares(self, count: int) -> np.ndarray:
        """count float64 that sum to 1: the weights, and equal ones where there are none."""
        if self.weights is None:
            return np.full(count, 1 / count)
        return self.weights / self.weights.sum()


@runtime_checkable
class Weighted(Protocol):
    """A dataset that says how often its records are drawn."""

    def law(self, step: int) -> Law:
        """The law that holds at a step."""
        ...


@runtime_checkable
class Described(Protocol):
    """A dataset that can tell a record's prompt and meta without reading pixels."""

    def describe(self, index: int) -> Record:
        """The record without images."""
        ...


@runtime_checkable
class Identified(Protocol):
    """A dataset that is made of others."""

    @property
    def identity(self) -> str:
        """Of what its records are made; how often they are drawn is no part of it."""
        ...

    @property
    def inner(self) -> Sequence[Dataset]:
        """The datasets that it is made of."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A dataset that has something to say before training starts."""

    def report(self) -> Iterator[str]:
        """Lines."""
        ...


@runtime_checkable
class Adaptive(Protocol):
    """A dataset whose law depends on what records scored."""

    def observe(self, ids: Tensor, scores: Tensor) -> Mapping[str, float]:
        """Takes note of a step's scores, on all ranks together.

        ids: b int64, the records' ids; scores: b, NaN where there is none; both of this rank's
        samples → numbers for the log, the same on every rank.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: JSON types and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict."""
        ...


def law_of(dataset: Dataset, step: int) -> Law:
    """The law that holds at a step; without one of its own, every record once an epoch."""
    return dataset.law(step) if isinstance(dataset, Weighted) else Law()


def describe(dataset: Dataset, index: int) -> Record:
    """The record without images. Raises UnreadableRecord where it must be read and cannot be."""
    if isinstance(dataset, Described):
        return dataset.describe(index)
    return replace(dataset[index], target=None, references=(), mask=None, preference=None)


def describe_all(dataset: Dataset) -> list[Record | None]:
    """Every record without images; None for one that must be read and cannot be."""
    found: list[Record | None] = []
    indices = range(len(dataset))
    for index in tqdm(indices, "reading", leave=False, dynamic_ncols=True, disable=None, delay=2):
        try:
            found.append(describe(dataset, index))
        except UnreadableRecord:
            found.append(None)
    return found


def field_of(record: Record, name: str) -> Any:
    """`prompt`, or what the meta has under the name; None where there is no such field.

    Dots lead into objects: `quality.aesthetic`.
    """
    if name == "prompt":
        return record.prompt
    if name in record.meta:
        return record.meta[name]
    value: Any = record.meta
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def tags_of(record: Record, name: str) -> tuple[str, ...]:
    """A field as tags, each once: a string or a number is one, a list several, None none."""
    value = field_of(record, name)
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(dict.fromkeys(map(str, values)))


def identity(dataset: Dataset) -> str:
    """16 hex digits that change with what the records are: settings, files, and the code that reads
    or draws them. Wrappers that only change how often records are drawn do not change it."""
    if isinstance(dataset, Identified):
        return dataset.identity
    code = Path(inspect.getsourcefile(type(dataset)) or "").read_bytes()
    return digest(dataset, code)


def digest(*facts: object) -> str:
    """16 hex digits of facts, by repr."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def walk(dataset: Dataset) -> Iterator[Dataset]:
    """The dataset and all that it is made of, the outermost first."""
    yield dataset
    if isinstance(dataset, Identified):
        for part in dataset.inner:
            yield from walk(part)


def judges(dataset: Dataset) -> tuple[str, ...]:
    """What judged the records of a dataset or of its parts, as a manifest keeps it."""
    found = (getattr(d, "rewards", ()) for d in walk(dataset) if not isinstance(d, Identified))
    return tuple(dict.fromkeys(name for part in found for name in part))


def adaptive_part(dataset: Dataset) -> Adaptive | None:
    """What learns from scores; None where nothing does.

    Raises:
        InputError: it is not the outermost: the ids that are scored would be others than its own.
    """
    found = [d for d in walk(dataset) if isinstance(d, Adaptive)]
    if found and found != [dataset]:
        raise InputError(
            f"{type(found[0]).__name__} must be the outermost dataset: give data.dataset as its "
            "dataset"
        )
    return found[0] if found else None


def report(dataset: Dataset) -> list[str]:
    """What a dataset and its parts have to say before training: tables of shares and counts."""
    return [line for d in walk(dataset) if isinstance(d, Reporting) for line in d.report()]


class Redrawn:
    """What a dataset has of the one it is over, if it only changes how often records are drawn."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        return self.dataset[index]

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """The dataset's."""
        return self.dataset.bucket_of(index)

    def describe(self, index: int) -> Record:
        """The record without images."""
        return describe(self.dataset, index)

    @property
    def identity(self) -> str:
        """The dataset's."""
        return identity(self.dataset)

    @property
    def inner(self) -> Sequence[Dataset]:
        """The dataset."""
        return (self.dataset,)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of aligned columns, the first to the left and the others to the right."""
    everything = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    for row in everything:
        first, *others = (cell.ljust if not k else cell.rjust for k, cell in enumerate(row))
        cells = [first(widths[0]), *(f(w) for f, w in zip(others, widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
