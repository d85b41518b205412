"""Random numbers that depend on what they are for, and on nothing else.

Every draw is keyed by (seed, stream, step, sample index, counter). The number of ranks, the order
of calls and a resume cannot change it: there is no state to lose.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def keyed(*key: int | str) -> np.random.Generator:
    """A fresh generator for one key: the same key gives the same numbers on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class Rng:
    """The draws of one step. `Rng(seed, step)("rollout", ids, (n, c))` is normal noise, b n c,
    fp32.

    Frozen, so that a method cannot advance it by accident.
    """

    seed: int
    step: int

    def __call__(
        self, stream: str, sample_ids: Tensor, shape: tuple[int, ...] = (), counter: int = 0
    ) -> Tensor:
        """Standard normal noise, one independent draw per sample.

        Args:
            stream: the use, e.g. "rollout".
            sample_ids: b integers; they include the group member and never the rank.
            shape: the shape of one sample.
            counter: SDE step or inner epoch.
        """
        return self._draw("normal", stream, sample_ids, shape, counter)

    def uniform(
        self, stream: str, sample_ids: Tensor, shape: tuple[int, ...] = (), counter: int = 0
    ) -> Tensor:
        """Like calling, but uniform on [0, 1)."""
        return self._draw("uniform", stream, sample_ids, shape, counter)

    def shared(self, stream: str, counter: int = 0) -> np.random.Generator:
        """A generator that is the same on all ranks, for choices that they must make alike."""
        return keyed(self.seed, stream, self.step, "shared", counter)

    def _draw(
        self, kind: str, stream: str, sample_ids: Tensor, shape: tuple[int, ...], counter: int
    ) -> Tensor:
        rows = []
        for i in sample_ids.tolist():
            key = (self.seed, stream, self.step, int(i), counter)
            # A law of its own in the key: equal bits would tie a time to the noise of its stream.
            g = keyed(*key) if kind == "normal" else keyed(*key, kind)
            draw = g.standard_normal if kind == "normal" else g.random
            rows.append(np.asarray(draw(shape, dtype=np.float32)))
        stacked = np.stack(rows) if rows else np.zeros((0, *shape), np.float32)
        return torch.from_numpy(stacked).to(sample_ids.device)
