"""Which records make the batch of a step: a function of (seed, step) and of the data's law."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from flux2.data.order import Law, adaptive_part, law_of
from flux2.data.record import Dataset
from flux2.errors import InputError
from flux2.rng import keyed

_TURNS = (0.7548776662466927, 0.5698402909980532)
"""1/ρ and 1/ρ², ρ³ = ρ + 1: by how much the two roundings' offsets turn from epoch to epoch. Their
multiples, modulo 1, fill the square evenly, so that neither rounding follows the other."""


@dataclass(frozen=True, eq=False)
class IndexSampler:
    """Batches of one bucket each, every record once an epoch, or as often as the data's law says.

    An epoch permutes the records of each bucket, cuts them into batches, and permutes the batches.
    A bucket's last, short batch is filled from its beginning, so that no record is left out. The
    whole state is the step: exact to resume, and independent of the number of ranks.

    Where the records have weights (`flux2.data.order.Law`), an epoch is as many batches as hold
    every record that has one. It has batches of each bucket, and of them each record, as often as
    the weights say: rounded to a whole number by systematic sampling, so that the expectation is
    exact and an epoch never misses it by more than one batch of the bucket and one copy. Copies
    of a record lie apart, and a batch has of each part what its share of the bucket is.

    Attributes:
        dataset, batch_size, seed: of the run.
        lengths: n, asked for when first needed: records of like length come together, of as many
            batches as `window` says. A part's share then holds over the window.
        window: batches that are sorted together.
    """

    dataset: Dataset
    batch_size: int
    seed: int
    lengths: Callable[[], np.ndarray] | None = None
    window: int = 16
    _held: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"data.batch_size is {self.batch_size}: it must be at least 1")
        if len(self.dataset) < 1:
            raise InputError("the dataset holds no record: check data")
        adaptive_part(self.dataset)
        law_of(self.dataset, 0)
        if self.window < 1:
            raise InputError(f"window is {self.window}: it must be at least 1")

    @functools.cached_property
    def buckets(self) -> list[np.ndarray]:
        """Record indices by bucket."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for index in range(len(self.dataset)):
            found.setdefault(self.dataset.bucket_of(index), []).append(index)
        return [np.asarray(found[key]) for key in sorted(found)]

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """Steps that one pass over the records takes, where they have no weights."""
        return sum(-(-len(b) // self.batch_size) for b in self.buckets)

    def __call__(self, step: int) -> list[int]:
        """Record indices of a step's global batch."""
        law = law_of(self.dataset, step)
        if law.once:
            return self._drawn(law, 0, 1)[0].tolist()
        length = self._length(law)
        epoch, batch = divmod(step - law.since, length)
        key = (law.since, epoch)
        if key not in self._held:
            while len(self._held) > 1:
                del self._held[next(iter(self._held))]
            uniform = law.weights is None
            self._held[key] = (
                self._epoch(law.since, epoch) if uniform else self._drawn(law, epoch, length)
            )
        return self._held[key][batch].tolist()

    def _length(self, law: Law) -> int:
        """Batches of an epoch."""
        if law.weights is None:
            return self.batches_per_epoch
        return max(1, -(-int((law.weights > 0).sum()) // self.batch_size))

    # -- every record once -----------------------------------------------------------------------

    def _epoch(self, since: int, epoch: int) -> np.ndarray:
        g, rows = keyed(self.seed, "data", *((since,) if since else ()), epoch), []
        for bucket in self.buckets:
            order = g.permutation(bucket)
            order = np.resize(order, -(-len(order) // self.batch_size) * self.batch_size)
            rows.append(self._cut(order))
        return g.permutation(np.concatenate(rows))

    def _cut(self, order: np.ndarray) -> np.ndarray:
        """Batches of records in this order, or by length where that is asked for."""
        if self.lengths is not None:
            lengths, size = self._lengths[order], self.window * self.batch_size
            parts = [
                order[k : k + size][np.argsort(lengths[k : k + size], kind="stable")]
                for k in range(0, len(order), size)
            ]
            order = np.concatenate(parts)
        return order.reshape(-1, self.batch_size)

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        assert self.lengths is not None
        return self.lengths()

    # -- by weight -------------------------------------------------------------------------------

    def _drawn(self, law: Law, epoch: int, length: int) -> np.ndarray:
        """An epoch of `length` batches: (length, batch_size) record indices."""
        assert law.weights is not None
        g = keyed(self.seed, "data", "weighted", law.since, epoch)
        offsets = keyed(self.seed, "offsets", law.since).random(1 + len(self.buckets))
        turns = np.array([_TURNS[0]] + [_TURNS[1]] * len(self.buckets))
        offsets = (offsets + epoch * turns) % 1
        mass = np.array([law.weights[b].sum() for b in self.buckets])
        rows = []
        batches = systematic(length * mass / mass.sum(), offsets[0])
        for k, count in enumerate(batches.tolist()):
            if count:
                line = self._line(k, law.parts)
                expected = count * self.batch_size * law.weights[line] / mass[k]
                copies = systematic(expected, offsets[1 + k])
                parts = None if law.parts is None else law.parts[line]
                rows.append(self._cut(line[_spread(copies, parts, g)]))
        return g.permutation(np.concatenate(rows))

    def _line(self, bucket: int, parts: np.ndarray | None) -> np.ndarray:
        """A bucket's records in the order in which they are counted: part by part, so that each
        part's number is its share rounded, and by chance within, so that neighbours are not."""
        line = keyed(self.seed, "line", bucket).permutation(self.buckets[bucket])
        return line if parts is None else line[np.argsort(parts[line], kind="stable")]


def systematic(expected: np.ndarray, offset: float) -> np.ndarray:
    """Whole numbers, each `expected` rounded up or down, that sum to its (whole) sum: int64.

    Systematic sampling: the points offset, offset + 1, … on the line of expected numbers laid end
    to end. With the offset uniform on [0, 1), the expectation of each is exact.
    """
    ends = np.cumsum(expected)
    total = round(float(ends[-1]))
    # Points on whole numbers, the line moved by the offset: a record gets those in its stretch.
    edges = np.floor(ends * (total / ends[-1]) + offset).astype(np.int64)
    edges[ends == ends[-1]] = total  # also of what comes last and is expected 0 times
    return np.diff(edges, prepend=0)


def _spread(copies: np.ndarray, parts: np.ndarray | None, g: np.random.Generator) -> np.ndarray:
    """Positions, each as often as `copies` says, in an order in which a record's copies lie apart
    and every part is spread evenly."""
    chosen = np.repeat(np.arange(len(copies)), copies)
    first = np.repeat(np.cumsum(copies) - copies, copies)
    nth = np.arange(len(chosen)) - first
    shift = np.repeat(g.random(len(copies)), copies)
    chosen = chosen[np.argsort((nth + shift) / copies[chosen], kind="stable")]
    if parts is None:
        return chosen
    keys = np.empty(len(chosen))
    for part in np.unique(parts[chosen]):
        mine = parts[chosen] == part
        number = int(mine.sum())
        keys[mine] = (np.arange(number) + g.random()) / number
    return chosen[np.argsort(keys, kind="stable")]
