"""Which records make the batch of a step: a function of (seed, step), and nothing else."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from flux2.data.record import Dataset
from flux2.errors import InputError
from flux2.rng import keyed


@dataclass(frozen=True, eq=False)
class IndexSampler:
    """Batches of one bucket each, every record once an epoch.

    An epoch permutes the records of each bucket, cuts them into batches, and permutes the batches.
    A bucket's last, short batch is filled from its beginning, so that no record is left out. The
    whole state is the step: exact to resume, and independent of the number of ranks.
    """

    dataset: Dataset
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"data.batch_size is {self.batch_size}: it must be at least 1")
        if len(self.dataset) < 1:
            raise InputError("the dataset holds no record: check data")

    @functools.cached_property
    def buckets(self) -> list[np.ndarray]:
        """Record indices by bucket."""
        found: dict[tuple[int, int, int], list[int]] = {}
        for index in range(len(self.dataset)):
            found.setdefault(self.dataset.bucket_of(index), []).append(index)
        return [np.asarray(found[key]) for key in sorted(found)]

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """Steps that one pass over the records takes."""
        return sum(-(-len(b) // self.batch_size) for b in self.buckets)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a sampler lives as long as its run)
    def _epoch(self, epoch: int) -> np.ndarray:
        g, rows = keyed(self.seed, "data", epoch), []
        for bucket in self.buckets:
            order = g.permutation(bucket)
            order = np.resize(order, -(-len(order) // self.batch_size) * self.batch_size)
            rows.append(order.reshape(-1, self.batch_size))
        return g.permutation(np.concatenate(rows))

    def __call__(self, step: int) -> list[int]:
        """Record indices of a step's global batch."""
        epoch, batch = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[batch].tolist()
