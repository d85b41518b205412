"""One training or evaluation example, whatever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Record:
    """An example.

    Attributes:
        id: its index in its dataset; stable, since it keys randomness.
        prompt: what the model is asked.
        target: h w 3 uint8, or None for prompts only.
        references: images given with the prompt, each h w 3 uint8.
        mask: h w bool, True where an edit may change the last reference.
        preference: (winner, loser, margin) where the data are pairs.
        meta: ground truth and provenance (`text`, `text_box`, `shape`, …).
    """

    id: int
    prompt: str
    target: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()
    mask: np.ndarray | None = None
    preference: tuple[np.ndarray, np.ndarray, float] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """(height, width, number of references): what a batch must share."""
        h, w = (0, 0) if self.target is None else self.target.shape[:2]
        return h, w, len(self.references)


class Dataset(Protocol):
    """Index-based data: the same index gives the same record."""

    def __len__(self) -> int:
        """How many records there are."""
        ...

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises UnreadableRecord where its files cannot be read."""
        ...

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """The record's bucket, without reading its pixels."""
        ...


class UnreadableRecord(Exception):
    """A record whose files cannot be read: it is counted and left out, never guessed."""
