"""Encoded rows on disk: latents and text features, made once.

A cache is a folder named by a hash of all that its rows depend on (dataset, encoder weights, length,
layers, normalisation), so that a change of any of them is another cache and never a stale row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def fingerprint(*facts: object, modules: Sequence[nn.Module] = ()) -> str:
    """16 hex digits of facts (by repr) and of modules (by their weights and buffers)."""
    digest = hashlib.sha256(repr(facts).encode())
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class RowCache:
    """Rows by record id, fp16, in memory-mapped files; what is absent is made when first asked for.

    A row is marked after it has been written, so that a killed run leaves no torn rows behind.

    Args:
        folder: parent of this cache's own folder.
        key: from `fingerprint`.
        rows: how many records the dataset has.
    """

    def __init__(self, folder: Path, key: str, rows: int) -> None:
        self.folder, self._rows = folder / key, rows
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(
        self, name: str, ids: Sequence[int], make: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """Rows `ids` of the column `name`: b …, fp32 (rounded through fp16 also when just made).

        make: positions in `ids` that are absent → their rows, on any device.
        """
        if name not in self._open and self._file(name, "rows").exists():
            self._open[name] = (
                np.lib.format.open_memmap(self._file(name, "rows"), "r+"),
                np.lib.format.open_memmap(self._file(name, "done"), "r+"),
            )
        index = np.asarray(ids)
        known = name in self._open
        absent = [k for k, i in enumerate(ids) if not known or not self._open[name][1][i]]
        if absent:
            fresh = make(absent).detach().to("cpu", torch.float16).numpy()
            if not known:
                self._open[name] = self._create(name, fresh.shape[1:])
            rows, done = self._open[name]
            rows[index[absent]] = fresh
            done[index[absent]] = 1
        return torch.from_numpy(self._open[name][0][index]).float()

    def _file(self, name: str, what: str) -> Path:
        return self.folder / f"{name}.{what}.npy"

    def _create(self, name: str, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        # The marks come first: a file of rows without marks would be taken for whole.
        done = np.lib.format.open_memmap(
            self._file(name, "done"), "w+", dtype=np.uint8, shape=(self._rows,)
        )
        rows = np.lib.format.open_memmap(
            self._file(name, "rows"), "w+", dtype=np.float16, shape=(self._rows, *shape)
        )
        return rows, done
