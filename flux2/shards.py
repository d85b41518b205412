"""Tensors in safetensors files: written in parts by each rank, read by name when asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux2.errors import InputError
from flux2.files import sha256, sync_file

if TYPE_CHECKING:
    from torch import Tensor


class Tensors(Mapping[str, "Tensor"]):
    """Tensors by name, each read when asked for: memory-mapped, so that a rank that takes some of
    them reads no more than those. In-place changes stay in memory.

    index: name → file in `folder`.
    """

    def __init__(self, folder: Path, index: Mapping[str, str]) -> None:
        self._folder, self._index = folder, dict(index)
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self._index[name]
        if file not in self._open:
            self._open[file] = _opened(self._folder / file)
        return self._open[file].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._index  # Mapping's own would read the tensor

    def select(self, keep: Callable[[str], bool]) -> Tensors:
        """Those whose names `keep` accepts."""
        return Tensors(self._folder, {n: f for n, f in self._index.items() if keep(n)})


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises InputError if absent or corrupt."""
    file = _opened(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"cannot read weights {path}: {reason}; restore the file or name another"
        ) from error


@dataclass
class Share:
    """What one rank wrote: file → sha256, tensor → file, and what stopped it, if anything did."""

    files: dict[str, str] = field(default_factory=dict)
    index: dict[str, str] = field(default_factory=dict)
    fault: Exception | None = None


def write_share(
    folder: Path,
    rank: int,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    max_bytes: int,
) -> Share:
    """Write one rank's tensors to folder/weights-RRRRR-PPPPP.safetensors, synced.

    Raises nothing: see Share.fault. An iterable is consumed to its end even then, since other ranks
    may wait for this one in the gathers that it makes.
    """
    share, part = Share(), _Part()
    lent = not isinstance(tensors, Mapping)

    def flush() -> None:
        if part.tensors:
            path = folder / f"weights-{rank:05d}-{len(share.files):05d}.safetensors"
            share.index |= dict.fromkeys(part.tensors, path.name)
            share.files[path.name] = _save(part.tensors, path)
            part.clear()

    try:
        pairs: Any = tensors.items() if isinstance(tensors, Mapping) else tensors
        for name, tensor in pairs:
            if share.fault is not None:
                continue
            try:
                if name in share.index or name in part.tensors:
                    raise ValueError(f"two tensors are named {name}")
                if part.bytes + tensor.nbytes > max_bytes:
                    flush()
                part.add(name, tensor, lent)
            except Exception as error:
                share.fault = error
                part.clear()
        flush()
    except Exception as error:
        share.fault = share.fault or error
    return share


class _Part:
    """Tensors for one file: contiguous, on the CPU, no two in the same memory, as safetensors
    wants them."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.bytes = 0
        self._memory: set[int] = set()

    def add(self, name: str, tensor: Tensor, lent: bool) -> None:
        """lent: the tensor's memory may be used again for the next one."""
        held = tensor.detach().cpu().contiguous()
        memory = held.untyped_storage().data_ptr()
        fresh = memory != tensor.untyped_storage().data_ptr()
        if not fresh and (lent or memory in self._memory):
            held = held.clone()
        self._memory.add(memory)
        self.tensors[name] = held
        self.bytes += held.nbytes

    def clear(self) -> None:
        self.tensors.clear()
        self._memory.clear()
        self.bytes = 0


def _save(tensors: dict[str, Tensor], path: Path) -> str:
    """Write and sync one file; returns its sha256. Raises OSError for what the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    sync_file(path)
    return sha256(path)
