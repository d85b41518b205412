"""Files that are whole or absent, their hashes, and JSON.

Everything is written beside its place, synced and renamed, so a reader, or a run that resumes after
a power cut, sees the old file or the new one and nothing between.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flux2.errors import InputError

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""errno of an OSError that says that the disk, and not the program, is at fault."""


def jsonable(value: Any) -> Any:
    """`value` in JSON's types. NaN and infinities, which JSON lacks, become None.

    Tensors and numpy values become numbers or lists, paths strings. Raises TypeError on the rest.
    """
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if callable(getattr(value, "tolist", None)):
        return jsonable(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")


def write_bytes(path: Path, content: bytes) -> None:
    """Put `content` at `path` in one step: after a crash the old content is there, or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 at `path`, in one step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON at `path`, in one step."""
    write_text(path, json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; restore it or name another run") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; restore it or name another run")
    return value


def sync_folder(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(paths: Iterable[Path]) -> list[str]:
    """The sha256 of several files, in threads: hashing lets go of the interpreter's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256, paths))


def digest(value: Any) -> str:
    """The sha256 of a JSON value, in hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def disk_fault(error: BaseException | None) -> str | None:
    """One line if an error says that the disk is full, too small or broken; None if it is another.

    OSErrors, and safetensors' own error, which gives the number in its text; also as the cause of
    another error.
    """
    while error is not None:
        if isinstance(error, OSError):
            number, text = error.errno, error.strerror or str(error)
            text += f": {error.filename}" if error.filename else ""
        else:
            found = re.search(r"\(os error (\d+)\)", str(error))
            number, text = int(found[1]) if found else None, str(error)
        if number in NO_ROOM:
            return " ".join(text.split())
        error = error.__cause__ or error.__context__
    return None
