"""Records that are little more than their meta, and what a sampler makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flux2.data.record import Dataset, Record, UnreadableRecord
from flux2.data.sampler import IndexSampler


@dataclass(frozen=True, eq=False)
class Notes:
    """A record for each meta; its prompt is meta["prompt"] or "note <index>".

    Attributes:
        sides: of the images, by index modulo their number.
        sealed: reading one, rather than describing it, is an error of the test.
        broken: indices that cannot be read.
    """

    metas: Sequence[Mapping[str, Any]] = field(repr=False)
    sides: Sequence[int] = (16,)
    sealed: bool = False
    broken: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.metas)

    def __getitem__(self, index: int) -> Record:
        assert not self.sealed, "a wrapper must not read images to learn a bucket or a meta"
        if index in self.broken:
            raise UnreadableRecord(f"{index}.png is truncated")
        side = self.sides[index % len(self.sides)]
        record = self._plain(index)
        image = np.full((side, side, 3), index % 256, np.uint8)
        return Record(index, record.prompt, image, meta=record.meta)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        side = self.sides[index % len(self.sides)]
        return side, side, 0

    def _plain(self, index: int) -> Record:
        if not 0 <= index < len(self.metas):
            raise IndexError(index)
        meta = dict(self.metas[index])
        return Record(index, meta.pop("prompt", f"note {index}"), meta=meta)


@dataclass(frozen=True, eq=False)
class Told(Notes):
    """Notes that can be described without being read."""

    def describe(self, index: int) -> Record:
        return self._plain(index)


def numbered(count: int, sides: Sequence[int] = (16,)) -> Told:
    """Notes without meta."""
    return Told([{}] * count, sides)


def drawn(
    dataset: Dataset, batch: int, steps: int, seed: int = 0, first: int = 0
) -> Counter[int]:
    """How often each index comes in these steps."""
    sampler = IndexSampler(dataset, batch, seed)
    return Counter(i for step in range(first, first + steps) for i in sampler(step))
