"""Records left out by what is known of them: {aesthetic: ">=5", language: en, licence: [a, b]}."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flux2.data.order import (
    Law,
    describe,
    describe_all,
    digest,
    field_of,
    identity,
    law_of,
    table,
)
from flux2.data.record import Dataset, Record
from flux2.errors import InputError

_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(>=|<=|>|<|!=|~)\s*(.*?)\s*", re.DOTALL)
_FACTS = ("height", "width", "references")
"""What a bucket tells, unless the meta has a field of the name."""


@dataclass(frozen=True, eq=False, repr=False)
class Filtered:
    """The records of a dataset that meet every condition, in their order and numbered anew.

    A field is `prompt`, any of the meta (dots lead into objects), or `height`, `width` and
    `references` (their number). What it must be is

        a value           equal to it; of a list (tags), one of them
        a list            one of these
        ">=5", "<0.2"     a number so compared; also <= and >
        "!=de"            another value, and none of a list
        "~regex"          a text in which the expression is found

    A record without the field does not meet its condition. A text that begins with one of the signs
    is compared as it stands inside a list: ["~"].

    Attributes:
        dataset: what is filtered.
        filter: field → condition.
        kept: the records' indices in the dataset.
        counts: condition → (records that meet it, that do not, of those without the field).
        unreadable: records that could not be read to be judged; they are left out.

    Raises:
        InputError: no condition, one that cannot be read, a text compared as a number, or nothing
            left.
    """

    dataset: Dataset
    filter: Mapping[str, Any]
    kept: np.ndarray = field(init=False)
    counts: Mapping[str, tuple[int, int, int]] = field(init=False)
    unreadable: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.filter:
            raise InputError('data.dataset.filter is empty: give field: condition, as age: ">=5"')
        tests = {name: _test(name, said) for name, said in self.filter.items()}
        counts = {name: [0, 0, 0] for name in tests}
        kept, unreadable = [], 0
        for index, record in enumerate(describe_all(self.dataset)):
            if record is None:
                unreadable += 1
                continue
            values = {name: self._value(index, record, name) for name in tests}
            met = {name: v is not None and tests[name](v) for name, v in values.items()}
            for name, good in met.items():
                counts[name][0 if good else 1] += 1
                counts[name][2] += values[name] is None
            if all(met.values()):
                kept.append(index)
        if not kept:
            told = ", ".join(f"{_told(n, self.filter[n])} keeps {c[0]}" for n, c in counts.items())
            raise InputError(
                f"data.dataset.filter leaves no record of {len(self.dataset)} ({told}): loosen it"
            )
        object.__setattr__(self, "kept", np.asarray(kept))
        object.__setattr__(self, "counts", {n: (c[0], c[1], c[2]) for n, c in counts.items()})
        object.__setattr__(self, "unreadable", unreadable)

    def _value(self, index: int, record: Record, name: str) -> Any:
        value = field_of(record, name)
        if value is None and name in _FACTS:
            return self.dataset.bucket_of(index)[_FACTS.index(name)]
        return value

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord as the dataset does."""
        return replace(self.dataset[self._at(index)], id=index)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """The dataset's."""
        return self.dataset.bucket_of(self._at(index))

    def describe(self, index: int) -> Record:
        """The record without images."""
        return replace(describe(self.dataset, self._at(index)), id=index)

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self.kept):
            raise IndexError(index)
        return int(self.kept[index])

    def law(self, step: int) -> Law:
        """The dataset's, of what is kept. Raises InputError where that is never drawn."""
        law = law_of(self.dataset, step)
        weights = None if law.weights is None else law.weights[self.kept]
        if weights is not None and not weights.any():
            raise InputError("data.dataset.filter keeps only records of weight 0: loosen it")
        return replace(
            law, weights=weights, parts=None if law.parts is None else law.parts[self.kept]
        )

    @property
    def identity(self) -> str:
        """Of the dataset and of what is kept."""
        return digest("filtered", identity(self.dataset), self.kept.tobytes())

    @property
    def inner(self) -> Sequence[Dataset]:
        """The dataset."""
        return (self.dataset,)

    def report(self) -> Iterator[str]:
        """A table of the conditions, each by itself, and what all of them leave."""
        rows = [
            [_told(name, self.filter[name]), *map(str, self.counts[name])] for name in self.filter
        ]
        total = len(self.dataset)
        lost = total - len(self) - self.unreadable
        rows.append(["all", str(len(self)), str(lost), ""])
        yield from table(["filter", "kept", "lost", "without the field"], rows)
        if self.unreadable:
            yield f"{self.unreadable} of {total} records could not be read, and are left out"

    def __repr__(self) -> str:
        return f"Filtered({self.identity})"


def _told(name: str, said: Any) -> str:
    return f"{name} {said}" if isinstance(said, str) and _parsed(said) else f"{name} = {said}"


def _parsed(said: str) -> tuple[str, str] | None:
    """(operator, operand) of a condition; None where it is a plain value."""
    found = _CONDITION.fullmatch(said)
    return None if found is None else (found[1], found[2])


def _test(name: str, said: Any) -> Callable[[Any], bool]:
    """The condition as a function of a field's value. Raises InputError where it is none."""
    if said is None or isinstance(said, Mapping):
        raise InputError(f'data.dataset.filter.{name} is {said!r}: give a value, a list, or ">=5"')
    if isinstance(said, list | tuple):
        wanted = list(said)
        return lambda value: any(_same(v, w) for v in _several(value) for w in wanted)
    parsed = _parsed(said) if isinstance(said, str) else None
    if parsed is None:
        return lambda value: any(_same(v, said) for v in _several(value))
    sign, operand = parsed
    if sign == "!=":
        return lambda value: operand not in map(str, _several(value))
    if sign == "~":
        try:
            pattern = re.compile(operand)
        except re.error as error:
            raise InputError(
                f"data.dataset.filter.{name}: {operand!r} is no regular expression ({error})"
            ) from None
        return lambda value: any(pattern.search(str(v)) for v in _several(value))
    try:
        bound = float(operand)
    except ValueError:
        raise InputError(f"data.dataset.filter.{name}: {operand!r} is no number") from None

    def compared(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(
                f"data.dataset.filter.{name} compares numbers, and a record has {value!r}: give "
                "a value or a list, or correct the data"
            )
        return _ORDERS[sign](value, bound)

    return compared


def _several(value: Any) -> Sequence[Any]:
    """A list's members, or the one value."""
    return value if isinstance(value, list | tuple) else (value,)


def _same(a: Any, b: Any) -> bool:
    """Equal, where true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b
