"""Users' own data: a folder of images with captions, a metadata.jsonl, a list of prompts.

What can be told without reading pixels is checked at construction and refused in one line that
names the file (and line). What shows only in the pixels makes that record unreadable, and no other.
Image paths stay inside the dataset's folder; links in it are followed. Pillow reads the images,
with its limit on their size, and nothing in the data is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flux2.data.record import Record, UnreadableRecord
from flux2.errors import InputError

FORMATS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
"""File names' endings → Pillow's readers; it is allowed no other, whatever a file claims to be."""

MULTIPLE = 16
"""Sides are multiples of this: a token's pixels."""

_ORIENTATION = 0x0112  # EXIF tag; its values 5 to 8 turn the image by a quarter

Size = tuple[int, int]


# -- datasets ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Folder:
    """Images with a caption each: `cat.jpg` beside `cat.txt`, in subfolders as well.

    Records are in order of their paths; names that begin with a dot are passed over. `meta` has
    `file`, the path in the folder.

    Attributes:
        path: the folder.
        sizes: [h, w] of the buckets; an image goes to the one of nearest aspect.
        stamp: changes with any file's name, size or time, or a caption; it keeps caches honest.

    Raises:
        InputError: no such folder, no images, a caption that is missing, empty or not UTF-8, two
            images that share one, wrong sizes.
    """

    path: str
    sizes: Sequence[Sequence[int]] = ((64, 64),)
    stamp: str = field(init=False)
    _rows: _Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError(f"{root} is no folder: set data.dataset.path to a folder of images")
        files = sorted(
            (f for f in root.rglob("*") if f.suffix.lower() in FORMATS and _shown(f, root)),
            key=lambda f: f.relative_to(root).as_posix(),
        )
        if not files:
            raise InputError(f"{root} holds no image: it takes {', '.join(sorted(FORMATS))}")
        owners: dict[Path, Path] = {}
        for file in files:
            other = owners.setdefault(file.with_suffix(".txt"), file)
            if other != file:
                raise InputError(f"{file} has the same caption file as {other.name}: rename one")
        rows = [
            _Row(_caption(text), file, meta={"file": file.relative_to(root).as_posix()})
            for text, file in owners.items()
        ]
        _fill(self, _Rows(rows, _sizes(self.sizes)))

    def __len__(self) -> int:
        return len(self._rows.rows)

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord for a damaged image."""
        return self._rows.record(index)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """(height, width, 0), from the image's header."""
        return self._rows.bucket(index)


@dataclass(frozen=True, eq=False)
class Jsonl:
    """One JSON object a line, in a file or in a folder's metadata.jsonl.

        {"image": "a.png", "prompt": "make it red", "references": ["b.png"], "mask": "m.png"}

    Keys: `image` (or `file_name`), `prompt` (or, without it, `text`), and optionally `references`
    and `mask` (white where an edit may change the last reference). All others, and what is in an
    object `meta`, become the record's meta: `id`, if given, differs from line to line; beside a
    `prompt`, `text` is what the image should spell (a string or several), and `text_box` where:
    [left, top, right, bottom] in parts of the cropped image. Image paths are relative to the file's
    folder. References take the size of the target.

    Attributes:
        path: the file, or a folder with a metadata.jsonl.
        sizes: [h, w] of the buckets; a target goes to the one of nearest aspect.
        stamp: changes with any line, and any image's size or time; it keeps caches honest.

    Raises:
        InputError: no such file, no lines, a line that is no such object, a path that leads out of
            the folder or to no image file, an `id` given twice, wrong sizes.
    """

    path: str
    sizes: Sequence[Sequence[int]] = ((64, 64),)
    stamp: str = field(init=False)
    _rows: _Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        file = Path(self.path).expanduser()
        if file.is_dir():
            file = file / "metadata.jsonl"
        rows = [_image_row(obj, file.parent, where) for where, obj in _objects(file)]
        _fill(self, _Rows(rows, _sizes(self.sizes)))

    def __len__(self) -> int:
        return len(self._rows.rows)

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord for a damaged image."""
        return self._rows.record(index)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """(height, width, number of references), from the target's header."""
        return self._rows.bucket(index)


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts alone, for methods that make their own images; black targets say the size.

    A .txt has a prompt a line; a .jsonl has objects as for `Jsonl`, whose `image` and `mask` are
    not read. Empty lines are passed over.

    Attributes:
        path: the file.
        height, width: of the images to make.
        stamp: changes with any line.

    Raises:
        InputError: no such file, another ending, no prompts, a line that is no such object or has
            references, an `id` given twice, a side that is no multiple of 16.
    """

    path: str
    height: int = 64
    width: int = 64
    stamp: str = field(init=False)
    _rows: _Rows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        file, sizes = Path(self.path).expanduser(), _sizes([[self.height, self.width]])
        if file.suffix == ".jsonl":
            rows = [_prompt_row(obj, where) for where, obj in _objects(file)]
        elif file.suffix == ".txt":
            rows = [_Row(line) for _, line in _lines(file)]
        else:
            raise InputError(f"{file} ends neither in .txt nor in .jsonl: give a file of prompts")
        _fill(self, _Rows(rows, sizes))

    def __len__(self) -> int:
        return len(self._rows.rows)

    def __getitem__(self, index: int) -> Record:
        return self._rows.record(index)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """(height, width, 0)."""
        return self._rows.bucket(index)


# -- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A record before its files are read; without `image` its target is blank."""

    prompt: str
    image: Path | None = None
    references: tuple[Path, ...] = ()
    mask: Path | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return [f for f in (self.image, *self.references, self.mask) if f is not None]


@dataclass(frozen=True)
class _Rows:
    """What the datasets share: records and buckets by index."""

    rows: Sequence[_Row]
    sizes: tuple[Size, ...]

    def _at(self, index: int) -> _Row:
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        return self.rows[index]

    def _size(self, row: _Row) -> Size:
        if row.image is None or len(self.sizes) == 1:
            return self.sizes[0]
        with _open(row.image) as image:
            return nearest_size(_upright(image), self.sizes)

    def bucket(self, index: int) -> tuple[int, int, int]:
        row = self._at(index)
        try:
            size = self._size(row)
        except UnreadableRecord:  # it is left out when it is read, from whichever bucket
            size = self.sizes[0]
        return *size, len(row.references)

    def record(self, index: int) -> Record:
        row = self._at(index)
        size = self._size(row)
        if row.image is None:
            return Record(index, row.prompt, np.zeros((*size, 3), np.uint8), meta=row.meta)
        target, references, mask = _read(row.image), [_read(r) for r in row.references], None
        if row.mask is not None:
            image = _read(row.mask, "L")
            if image.size != references[-1].size:
                raise UnreadableRecord(f"{row.mask}: its size is not that of the last reference")
            mask = _cover(image, size) > 127
        covers = tuple(_cover(r, size) for r in references)
        return Record(index, row.prompt, _cover(target, size), covers, mask, meta=row.meta)

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for row in self.rows:
            stats = [(f.stat().st_size, f.stat().st_mtime_ns) for f in row.files]
            names = [str(f) for f in row.files]
            digest.update(repr((row.prompt, names, stats, row.meta)).encode())
        return digest.hexdigest()[:16]


def _fill(dataset: Folder | Jsonl | Prompts, rows: _Rows) -> None:
    object.__setattr__(dataset, "_rows", rows)
    object.__setattr__(dataset, "stamp", rows.stamp())


def _sizes(sizes: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    out = []
    for size in sizes:
        if len(size) != 2 or any(type(s) is not int or s < 1 or s % MULTIPLE for s in size):
            raise InputError(
                f"{list(size)} is no image size: give [height, width] in multiples of {MULTIPLE}"
            )
        out.append((size[0], size[1]))
    if not out:
        raise InputError("data.dataset.sizes is empty: give at least one [height, width]")
    return tuple(out)


# -- text ----------------------------------------------------------------------------------------


def _shown(file: Path, root: Path) -> bool:
    return file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"cannot read {file} ({error.strerror}): check its path") from None


def _caption(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"{file} is missing: every image needs a caption of its name")
    text = _text(file).strip()
    if not text:
        raise InputError(f"{file} is empty: write a caption, and drop some by data.caption_dropout")
    return text


def _lines(file: Path) -> list[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1.

    Split at \\n alone: str.splitlines also splits at characters that JSON strings may hold.
    """
    lines = enumerate(_text(file).split("\n"), 1)
    found = [(n, line.strip()) for n, line in lines if line.strip()]
    if not found:
        raise InputError(f"{file} has no lines: give at least one record")
    return found


def _objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line n", object) of each line; refuses an `id` that comes twice."""
    seen: dict[str, int] = {}
    for number, line in _lines(file):
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


def _take_text(obj: dict[str, Any], where: str) -> str:
    key = "prompt" if "prompt" in obj else "text"
    prompt = obj.pop(key, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{where} has no prompt: give "prompt" (or "text"), a string')
    return prompt.strip()


def _take_meta(obj: dict[str, Any], where: str) -> dict[str, Any]:
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


def _take_path(name: Any, root: Path, where: str) -> Path:
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


def _image_row(obj: dict[str, Any], root: Path, where: str) -> _Row:
    obj = dict(obj)
    prompt = _take_text(obj, where)
    names = [obj.pop(key) for key in ("image", "file_name") if key in obj]
    if len(names) != 1:
        raise InputError(f'{where} needs one image: give "image" (or "file_name"), and not both')
    references, mask = obj.pop("references", None) or [], obj.pop("mask", None)
    if not isinstance(references, list):
        raise InputError(f'{where}: "references" is no list: write ["a.png", ...]')
    if mask is not None and not references:
        raise InputError(f"{where} has a mask but no references, of which it marks the last")
    return _Row(
        prompt,
        _take_path(names[0], root, where),
        tuple(_take_path(name, root, where) for name in references),
        None if mask is None else _take_path(mask, root, where),
        _take_meta(obj, where),
    )


def _prompt_row(obj: dict[str, Any], where: str) -> _Row:
    obj = {k: v for k, v in obj.items() if k not in ("image", "file_name", "mask")}
    if obj.pop("references", None):
        raise InputError(f"{where} has references, which prompts alone cannot have: use data=jsonl")
    return _Row(_take_text(obj, where), meta=_take_meta(obj, where))


# -- pixels --------------------------------------------------------------------------------------


def nearest_size(image: Size, sizes: Sequence[Size]) -> Size:
    """The (h, w) of `sizes` nearest to image's in log aspect; among equals, nearest in log area."""

    def distance(size: Size) -> tuple[float, float]:
        h, w = size[0] / image[0], size[1] / image[1]
        return round(abs(math.log(h / w)), 6), abs(math.log(h * w))

    return min(sizes, key=distance)


def _open(file: Path) -> Image.Image:
    """The image by its header. Its pixels are bounded by Pillow's limit, of which a warning is
    enough here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=sorted(set(FORMATS.values())))
    except Exception as error:  # Pillow's plugins raise whatever their parsing runs into
        raise UnreadableRecord(f"{file}: {_line(error)}") from error


def _read(file: Path, mode: str = "RGB") -> Image.Image:
    """The image upright, in `mode`; what is transparent shows white."""
    with _open(file) as image:
        try:
            image.load()
            if image.mode.startswith(("I", "F")):  # 16 bits of grey, which convert would clip
                grey = np.asarray(image, np.float64) / 257
                image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            return upright.convert(mode)
        except Exception as error:  # as above
            raise UnreadableRecord(f"{file}: {_line(error)}") from error


def _upright(image: Image.Image) -> Size:
    """(h, w) as the EXIF orientation shows it."""
    try:
        # Where the header has none, getexif would read a PNG to its end to look for it.
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception as error:  # as above
        raise UnreadableRecord(_line(error)) from error
    return (image.width, image.height) if turned else (image.height, image.width)


def _cover(image: Image.Image, size: Size) -> np.ndarray:
    """`image` resized (Lanczos) to cover h w, its overhang cut evenly: h w (3) uint8."""
    return np.array(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS))


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
