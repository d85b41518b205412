"""Users' text files, line by line: JSON objects, and the prompts, facts and paths in them.

What does not fit is refused in one line that names the file, and the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flux2.errors import InputError

FORMATS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
"""File names' endings → Pillow's readers; it is allowed no other, whatever a file claims to be."""


def read_text(file: Path) -> str:
    """A UTF-8 file, without its byte order mark. Raises InputError."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}): check its path") from None


def read_lines(file: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1.

    Split at \\n alone: str.splitlines also splits at characters that JSON strings may hold.
    """
    lines = enumerate(read_text(file).split("\n"), 1)
    found = [(n, line.strip()) for n, line in lines if line.strip()]
    if not found:
        raise InputError(f"{file} has no lines: give at least one record")
    return found


def read_objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", object) of each line; refuses an `id` that comes twice."""
    seen: dict[str, int] = {}
    for number, line in read_lines(file):
        where = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}): correct it") from None
        if not isinstance(value, dict):
            raise InputError(f"{where} is no JSON object: write {{...}}")
        if "id" in value:
            first = seen.setdefault(repr(value["id"]), number)
            if first != number:
                raise InputError(f"{where} has the id of line {first}: ids must differ")
        yield where, value


def take_prompt(obj: dict[str, Any], where: str) -> str:
    """Removes and returns a line's prompt. Raises InputError; so do the others that take."""
    key = "prompt" if "prompt" in obj else "text"
    prompt = obj.pop(key, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{where} has no prompt: give "prompt" (or "text"), a string')
    return prompt.strip()


def take_meta(obj: dict[str, Any], where: str) -> dict[str, Any]:
    """What is left of a line, with `meta` opened and the lists that rewards read as tuples."""
    inner = obj.pop("meta", {})
    if not isinstance(inner, dict):
        raise InputError(f'{where}: "meta" is no object: write {{...}}')
    if twice := sorted(set(inner) & set(obj)):
        raise InputError(f'{where} has "{twice[0]}" both in meta and beside it: keep one')
    meta = obj | inner
    if "text" in meta:
        text = [meta["text"]] if isinstance(meta["text"], str) else meta["text"]
        if not isinstance(text, list) or not all(isinstance(s, str) for s in text):
            raise InputError(f'{where}: "text" of an image is a string or a list of strings')
        meta["text"] = tuple(text)
    if "text_box" in meta:
        box = meta["text_box"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_share, box))):
            raise InputError(f'{where}: "text_box" is [left, top, right, bottom], each from 0 to 1')
        meta["text_box"] = tuple(map(float, box))
    return meta


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def take_path(name: Any, root: Path, where: str) -> Path:
    """An image file's path in `root`, which it may not leave. Raises InputError."""
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: {name!r} is no path: give a string")
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or inside.split(os.sep)[0] == ".." or "\0" in inside:
        raise InputError(f"{where}: {name!r} leads out of {root}: keep images in the folder")
    file = root / inside
    if file.suffix.lower() not in FORMATS:
        raise InputError(f"{where}: {name!r} is no image: use {', '.join(sorted(FORMATS))}")
    if not file.is_file():
        raise InputError(f"{where}: there is no {file}: correct the line or add the file")
    return file
