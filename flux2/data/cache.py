"""Encoded rows on disk: latents and text features, made once.

A cache is a folder named by a hash of all that its rows depend on (dataset, encoder weights,
length, layers, normalisation), so that a change of any of them is another cache and never a stale
row.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flux2.errors import InputError


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
            self._open[name] = self._column(name)
        index = np.asarray(ids)
        known = name in self._open
        absent = [k for k, i in enumerate(ids) if not known or not self._open[name][1][i]]
        if absent:
            fresh = make(absent).detach().to("cpu", torch.float16).numpy()
            if not known:
                # The marks come first: a file of rows without marks would be taken for whole.
                self._create(name, "done", np.uint8, ())
                self._create(name, "rows", np.float16, fresh.shape[1:])
                self._open[name] = self._column(name)
            rows, done = self._open[name]
            if rows.shape[1:] != fresh.shape[1:]:
                raise InputError(
                    f"data.cache holds {name} rows of shape {rows.shape[1:]} and these have "
                    f"{fresh.shape[1:]}: use one size of image, or data.cache=null"
                )
            if not np.isfinite(fresh).all():
                raise InputError(f"{name} rows overflow the cache's fp16: use data.cache=null")
            rows[index[absent]] = fresh
            done[index[absent]] = 1
        return torch.from_numpy(self._open[name][0][index]).float()

    def _file(self, name: str, what: str) -> Path:
        return self.folder / f"{name}.{what}.npy"

    def _column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.lib.format.open_memmap(self._file(name, "rows"), "r+"),
            np.lib.format.open_memmap(self._file(name, "done"), "r+"),
        )

    def _create(self, name: str, what: str, dtype: type, shape: tuple[int, ...]) -> None:
        """A file of zeros; one that another process made in the meantime is kept."""
        temporary = self._file(name, f"{what}.{os.getpid()}")
        np.lib.format.open_memmap(temporary, "w+", dtype=dtype, shape=(self._rows, *shape)).flush()
        with contextlib.suppress(FileExistsError):
            os.link(temporary, self._file(name, what))
        temporary.unlink()
