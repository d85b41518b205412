"""Users' own data: a folder of images with captions, a metadata.jsonl, a list of prompts.

What can be told without reading pixels is checked at construction and refused in one line that
names the file (and line). What shows only in the pixels makes that record unreadable, and no other.
Image paths stay inside the dataset's folder; links in it are followed. Pillow reads the images,
with its limit on their size, and nothing in the data is ever executed.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps

from flux2.data.lines import (
    FORMATS,
    read_lines,
    read_objects,
    read_text,
    take_meta,
    take_path,
    take_prompt,
)
from flux2.data.record import Record, UnreadableRecord
from flux2.errors import InputError

MULTIPLE = 16
"""Sides are multiples of this: a token's pixels."""

_ORIENTATION = 0x0112  # EXIF tag; its values 5 to 8 turn the image by a quarter

Size = tuple[int, int]


# -- rows ----------------------------------------------------------------------------------------


class Unread(Protocol):
    """A record before its files are read, as `Rows` sees it."""

    @property
    def prompt(self) -> str:
        """Its caption."""
        ...

    @property
    def references(self) -> Sequence[Path]:
        """Files of its reference images."""
        ...

    @property
    def meta(self) -> Mapping[str, Any]:
        """What else is known of it."""
        ...

    def sized_by(self) -> Path | None:
        """What Pillow opens for the size that decides the bucket; None: a blank target."""
        ...

    def record(self, index: int, size: Size) -> Record:
        """Its images, which cover `size`. Raises UnreadableRecord for a damaged one."""
        ...


R = TypeVar("R", bound=Unread)


@dataclass(frozen=True)
class Rows(Generic[R]):
    """What datasets of files share: rows by index, and their buckets by the images' headers.

    sizes: (h, w) of the buckets; a row goes to the one of nearest aspect, a blank to the first.
    """

    rows: Sequence[R]
    sizes: tuple[Size, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> R:
        """The row. Raises IndexError below 0 as well."""
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        return self.rows[index]

    def described(self, index: int) -> Record:
        """The record without images; nothing is read."""
        row = self.at(index)
        return Record(index, row.prompt, meta=row.meta)

    def size(self, row: R) -> Size:
        """The bucket's (h, w). Raises UnreadableRecord for a damaged header."""
        if len(self.sizes) == 1 or (file := row.sized_by()) is None:
            return self.sizes[0]
        with open_image(file) as image:
            return nearest_size(upright_size(image), self.sizes)

    def bucket(self, index: int) -> tuple[int, int, int]:
        """(height, width, number of references)."""
        row = self.at(index)
        try:
            size = self.size(row)
        except UnreadableRecord:  # it is left out when it is read, from whichever bucket
            size = self.sizes[0]
        return *size, len(row.references)


class RowDataset(Generic[R]):
    """A dataset (`flux2.data.record.Dataset`) over rows, which its class finds."""

    _rows: Rows[R]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord for a damaged image."""
        row = self._rows.at(index)
        return row.record(index, self._rows.size(row))

    def describe(self, index: int) -> Record:
        """The record without images; nothing is read."""
        return self._rows.described(index)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """(height, width, number of references), from the header of the target."""
        return self._rows.bucket(index)


@dataclass(frozen=True)
class Row:
    """A record before its files are read; without `image` its target is blank."""

    prompt: str
    image: Path | None = None
    references: tuple[Path, ...] = ()
    mask: Path | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """All that it names."""
        return [f for f in (self.image, *self.references, self.mask) if f is not None]

    def sized_by(self) -> Path | None:
        """See `Unread`."""
        return self.image

    def record(self, index: int, size: Size) -> Record:
        """See `Unread`."""
        image = None if self.image is None else read_image(self.image)
        references, mask = [read_image(r) for r in self.references], None
        if self.mask is not None:
            marks = read_image(self.mask, "L")
            if marks.size != references[-1].size:
                raise UnreadableRecord(f"{self.mask}: its size is not that of the last reference")
            mask = cover(marks, size) > 127
        target = np.zeros((*size, 3), np.uint8) if image is None else cover(image, size)
        covers = tuple(cover(r, size) for r in references)
        return Record(index, self.prompt, target, covers, mask, meta=self.meta)


# -- datasets ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Folder(RowDataset[Row]):
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
    _rows: Rows[Row] = field(init=False, repr=False)

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
            Row(_caption(text), file, meta={"file": file.relative_to(root).as_posix()})
            for text, file in owners.items()
        ]
        _fill(self, Rows(rows, checked_sizes(self.sizes)))


@dataclass(frozen=True, eq=False)
class Jsonl(RowDataset[Row]):
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
    _rows: Rows[Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        file = Path(self.path).expanduser()
        if file.is_dir():
            file = file / "metadata.jsonl"
        rows = [_image_row(obj, file.parent, where) for where, obj in read_objects(file)]
        _fill(self, Rows(rows, checked_sizes(self.sizes)))


@dataclass(frozen=True, eq=False)
class Prompts(RowDataset[Row]):
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
    _rows: Rows[Row] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        file, sizes = Path(self.path).expanduser(), checked_sizes([[self.height, self.width]])
        if file.suffix == ".jsonl":
            rows = [_prompt_row(obj, where) for where, obj in read_objects(file)]
        elif file.suffix == ".txt":
            rows = [Row(line) for _, line in read_lines(file)]
        else:
            raise InputError(f"{file} ends neither in .txt nor in .jsonl: give a file of prompts")
        _fill(self, Rows(rows, sizes))


# -- files ----------------------------------------------------------------------------------------


def _fill(dataset: Folder | Jsonl | Prompts, rows: Rows[Row]) -> None:
    digest = hashlib.sha256()
    for row in rows.rows:
        stats = [(f.stat().st_size, f.stat().st_mtime_ns) for f in row.files]
        names = [str(f) for f in row.files]
        digest.update(repr((row.prompt, names, stats, row.meta)).encode())
    object.__setattr__(dataset, "_rows", rows)
    object.__setattr__(dataset, "stamp", digest.hexdigest()[:16])


def checked_sizes(sizes: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    """Buckets' [h, w] as tuples. Raises InputError for none, and for what is no multiple of 16."""
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


# -- lines ---------------------------------------------------------------------------------------


def _shown(file: Path, root: Path) -> bool:
    return file.is_file() and not any(p.startswith(".") for p in file.relative_to(root).parts)


def _caption(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"{file} is missing: every image needs a caption of its name")
    text = read_text(file).strip()
    if not text:
        raise InputError(f"{file} is empty: write a caption, and drop some by data.caption_dropout")
    return text


def _image_row(obj: dict[str, Any], root: Path, where: str) -> Row:
    obj = dict(obj)
    prompt = take_prompt(obj, where)
    names = [obj.pop(key) for key in ("image", "file_name") if key in obj]
    if len(names) != 1:
        raise InputError(f'{where} needs one image: give "image" (or "file_name"), and not both')
    references, mask = obj.pop("references", None) or [], obj.pop("mask", None)
    if not isinstance(references, list):
        raise InputError(f'{where}: "references" is no list: write ["a.png", ...]')
    if mask is not None and not references:
        raise InputError(f"{where} has a mask but no references, of which it marks the last")
    return Row(
        prompt,
        take_path(names[0], root, where),
        tuple(take_path(name, root, where) for name in references),
        None if mask is None else take_path(mask, root, where),
        take_meta(obj, where),
    )


def _prompt_row(obj: dict[str, Any], where: str) -> Row:
    obj = {k: v for k, v in obj.items() if k not in ("image", "file_name", "mask")}
    if obj.pop("references", None):
        raise InputError(f"{where} has references, which prompts alone cannot have: use data=jsonl")
    return Row(take_prompt(obj, where), meta=take_meta(obj, where))


# -- pixels --------------------------------------------------------------------------------------


def nearest_size(image: Size, sizes: Sequence[Size]) -> Size:
    """The (h, w) of `sizes` nearest to image's in log aspect; among equals, nearest in log area."""

    def distance(size: Size) -> tuple[float, float]:
        h, w = size[0] / image[0], size[1] / image[1]
        return round(abs(math.log(h / w)), 6), abs(math.log(h * w))

    return min(sizes, key=distance)


def open_image(file: Path) -> Image.Image:
    """The image by its header. Its pixels are bounded by Pillow's limit, of which a warning is
    enough here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=sorted(set(FORMATS.values())))
    except Exception as error:  # Pillow's plugins raise whatever their parsing runs into
        raise UnreadableRecord(f"{file}: {_line(error)}") from error


def read_image(file: Path, mode: str = "RGB") -> Image.Image:
    """The image upright, in `mode`; what is transparent shows white."""
    with open_image(file) as image:
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


def upright_size(image: Image.Image) -> Size:
    """(h, w) as the EXIF orientation shows it."""
    try:
        # Where the header has none, getexif would read a PNG to its end to look for it.
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    except Exception as error:  # as above
        raise UnreadableRecord(_line(error)) from error
    return (image.width, image.height) if turned else (image.height, image.width)


def cover(image: Image.Image, size: Size) -> np.ndarray:
    """`image` resized (Lanczos) to cover h w, its overhang cut evenly: h w (3) uint8."""
    return np.array(ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS))


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0]
