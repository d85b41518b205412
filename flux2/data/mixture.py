"""Several datasets as one, by weight; and images as the task of reproducing them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flux2.data.order import Law, describe, digest, identity, law_of, table
from flux2.data.record import Dataset, Record
from flux2.errors import InputError


@dataclass(frozen=True, eq=False, repr=False)
class Mixture:
    """Datasets as one, each with its share of the samples.

    Records keep their order, part after part, and get ids of their own: caches and randomness are
    keyed by them. `meta["part"]` names the part. Within a part, records are drawn as the part
    itself says; without a law of its own, evenly. A batch is of one bucket and has of each part
    what its share of the bucket is, so that two text-to-image parts stand in every batch as 7 to 3,
    while edits, whose bucket is another, come in batches of their own, as often as their weight.

    Attributes:
        parts: name → {dataset, weight}, weights relative.

    Raises:
        InputError: no part, a part without dataset or weight, a weight below 0, an empty part.
    """

    parts: Mapping[str, Mapping[str, Any]]
    _datasets: tuple[Dataset, ...] = field(init=False)
    _starts: np.ndarray = field(init=False)
    _shares: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("data.dataset.parts is empty: give name: {dataset, weight}")
        for name, part in self.parts.items():
            if set(part) != {"dataset", "weight"}:
                raise InputError(
                    f"data.dataset.parts.{name} has {', '.join(sorted(part)) or 'nothing'}: give "
                    "it a dataset and a weight"
                )
            weight = part["weight"]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
                raise InputError(f"data.dataset.parts.{name}.weight is {weight}: give at least 0")
            if len(part["dataset"]) < 1:
                raise InputError(f"data.dataset.parts.{name} holds no record: check it")
        total = sum(part["weight"] for part in self.parts.values())
        if not 0 < total < float("inf"):
            raise InputError("data.dataset.parts: at least one weight must be above 0, and finite")
        datasets = tuple(part["dataset"] for part in self.parts.values())
        starts = np.cumsum([0, *map(len, datasets)])
        shares = tuple(part["weight"] / total for part in self.parts.values())
        for name, value in (("_datasets", datasets), ("_starts", starts), ("_shares", shares)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord as the part does."""
        part, inside = self._place(index)
        return self._named(index, part, self._datasets[part][inside])

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """The part's."""
        part, inside = self._place(index)
        return self._datasets[part].bucket_of(inside)

    def describe(self, index: int) -> Record:
        """The record without images."""
        part, inside = self._place(index)
        return self._named(index, part, describe(self._datasets[part], inside))

    def _place(self, index: int) -> tuple[int, int]:
        """(part, index in it)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])

    def _named(self, index: int, part: int, record: Record) -> Record:
        return replace(record, id=index, meta={**record.meta, "part": list(self.parts)[part]})

    def law(self, step: int) -> Law:
        """The parts' laws, each scaled to its share."""
        laws = [law_of(d, step) for d in self._datasets]
        if any(law.once for law in laws):
            return self._joined(laws)
        key = tuple(law.since for law in laws)
        if key not in self._laws:
            self._laws[key] = self._joined(laws)
        return self._laws[key]

    @functools.cached_property
    def _laws(self) -> dict[tuple[int, ...], Law]:
        return {}

    def _joined(self, laws: Sequence[Law]) -> Law:
        weights = [
            share * law.shares(len(d))
            for share, law, d in zip(self._shares, laws, self._datasets, strict=True)
        ]
        kinds, first = [], 0
        for law, d in zip(laws, self._datasets, strict=True):
            inner = np.zeros(len(d), np.int64) if law.parts is None else law.parts
            kinds.append(first + inner)
            first += 1 + int(inner.max())
        return Law(
            max(law.since for law in laws),
            np.concatenate(weights),
            np.concatenate(kinds),
            any(law.once for law in laws),
        )

    @property
    def identity(self) -> str:
        """Of the parts, in their order."""
        return digest("mixture", list(self.parts), [identity(d) for d in self._datasets])

    @property
    def inner(self) -> Sequence[Dataset]:
        """The parts."""
        return self._datasets

    def report(self) -> Iterator[str]:
        """A table of the parts."""
        rows = [
            [name, str(len(d)), f"{share:.1%}", f"{share / len(d) * len(self):.2f}"]
            for name, d, share in zip(self.parts, self._datasets, self._shares, strict=True)
        ]
        yield from table(["part", "records", "share", "times an epoch"], rows)

    def __repr__(self) -> str:
        return f"Mixture({self.identity})"


@dataclass(frozen=True, eq=False, repr=False)
class Reconstruction:
    """Images of any dataset as edits that change nothing: the reference is the target itself.

    What a model learns from it is to copy what it is not asked to change. The mask is empty, and
    what the meta says of the image stays true. `meta["task"]` is reconstruct.

    Attributes:
        dataset: whose targets are reproduced; its references and prompts are not used.
        prompt: of every record.
    """

    dataset: Dataset
    prompt: str = "reproduce image 1"

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError("data.dataset.prompt is empty: say what is to be done with image 1")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord as the dataset does; InputError where it has no images."""
        record = self.dataset[index]
        if record.target is None:
            raise InputError("reconstruction needs images, and a record has none: give other data")
        empty = np.zeros(record.target.shape[:2], bool)
        plain = replace(record, references=(record.target,), mask=empty, preference=None)
        return self._asked(plain)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """(height, width, 1)."""
        return *self.dataset.bucket_of(index)[:2], 1

    def describe(self, index: int) -> Record:
        """The record without images."""
        return self._asked(describe(self.dataset, index))

    def _asked(self, record: Record) -> Record:
        return replace(record, prompt=self.prompt, meta={**record.meta, "task": "reconstruct"})

    def law(self, step: int) -> Law:
        """The dataset's."""
        return law_of(self.dataset, step)

    @property
    def identity(self) -> str:
        """Of the dataset and the prompt."""
        return digest("reconstruction", identity(self.dataset), self.prompt)

    @property
    def inner(self) -> Sequence[Dataset]:
        """The dataset."""
        return (self.dataset,)

    def __repr__(self) -> str:
        return f"Reconstruction({self.identity})"
