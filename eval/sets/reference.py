"""What sets of images are compared with: a data set's targets, or a folder of images.

    <cache>/reference-<extractor>.safetensors   mean, covariance, features; provenance in the header
    <cache>/reference-<extractor>.json          the provenance, to read
    <cache>/images-<source>.json                the hash of the images of a source as it now is

A file whose provenance is not what is asked for is made anew, never used. Images are known by a
hash of their content, so that two machines agree on it. To read them all for that takes long, so
the hash is kept too, under what a data set or folder tells of itself without reading them.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eval.images import check_folder, read_image
from flux2.data.lines import FORMATS
from flux2.data.record import Dataset, UnreadableRecord
from flux2.errors import InputError
from flux2.files import digest, read_json, sha256, write_bytes, write_json
from rewards.nets.features import Extractor

VERSION = 1
"""Of what is computed; another one makes the caches anew."""
BATCH = 64


@dataclass(frozen=True, eq=False)
class Statistics:
    """Features of a reference.

    Attributes:
        mean: d fp64.
        cov: d d fp64, divided by n − 1.
        features: k d fp32: all of them, or as many, evenly spaced, as were kept.
        n: images.
    """

    mean: Tensor
    cov: Tensor
    features: Tensor
    n: int

    @classmethod
    def of(cls, features: Tensor, keep: int = 10_000) -> Statistics:
        """features: n d; keep: how many of them to keep.

        Raises:
            InputError: fewer than two, or some not finite.
        """
        if len(features) < 2 or not bool(features.isfinite().all()):
            raise InputError(
                f"a reference of {len(features)} images: it needs two at least, and finite features"
            )
        x = features.double()
        n, mean = len(x), x.mean(0)
        x = x - mean
        kept = torch.arange(min(n, keep)) * n // min(n, keep)
        return cls(mean, x.T @ x / (n - 1), features[kept].float(), n)


class Reference:
    """Images that a set is compared with. Give one of `dataset` and `folder`.

    Args:
        dataset: its records' targets, in order.
        folder: images of any size, in the order of their names, subfolders too.
        count: the first so many; None takes all.
        cache: folder for the statistics; None keeps them in memory only.
        keep: features to keep for measures that need them (KID, precision and recall).

    Raises:
        InputError: not one of the two is given, there are fewer than two images, or count or keep
            is below 2. Later, from `hash` and `statistics`: a record has no target, or the folder's
            image cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset | None = None,
        folder: str | None = None,
        count: int | None = None,
        cache: str | None = None,
        keep: int = 10_000,
    ) -> None:
        if (dataset is None) == (folder is None):
            raise InputError("a reference is of a dataset or of a folder: give one of the two")
        for name, value in (("count", count), ("keep", keep)):
            if value is not None and value < 2:
                raise InputError(f"reference.{name} is {value}: it must be at least 2")
        self._dataset, self._files = dataset, () if folder is None else _images_in(folder)
        there = len(self._files) if dataset is None else len(dataset)
        self._count = there if count is None else min(count, there)
        if self._count < 2:
            raise InputError(f"a reference of {self._count} images: it needs two at least")
        self._cache, self._keep = None if cache is None else Path(cache).expanduser(), keep
        self._found: dict[str, Statistics] = {}

    @functools.cached_property
    def hash(self) -> str:
        """12 hex digits of the sha256 of the images: of a folder's files, or of targets' pixels.
        What cannot be read (`UnreadableRecord`) is left out."""
        if self._cache is None:
            return self._content()
        path = self._cache / f"images-{self._source()[:12]}.json"
        try:
            return str(read_json(path)["images"])
        except (InputError, KeyError):  # not there yet, or damaged
            found = self._content()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"images": found, "count": self._count})
        return found

    def _source(self) -> str:
        """What a change of the images changes, without reading them: the data set's settings and
        code (readers of files have a stamp of those), or the files' names, sizes and times."""
        if self._dataset is None:
            stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in self._files]
            return digest([stats, self._count])
        file = inspect.getsourcefile(type(self._dataset))
        code = "" if file is None else sha256(Path(file))
        return digest([repr(self._dataset), code, self._count])

    def _content(self) -> str:
        found = hashlib.sha256(f"{self._count} ".encode())
        if self._dataset is None:
            for file in self._files[: self._count]:
                found.update(hashlib.sha256(file.read_bytes()).digest())
        else:
            for image in self._targets():
                found.update(struct.pack("qq", *image.shape[:2]) + image.tobytes())
        return found.hexdigest()[:12]

    def statistics(self, extractor: Extractor) -> Statistics:
        """Of this extractor's features; from the cache where it has them, told where it does not.

        Raises:
            InputError: an image cannot be read, or has no finite features.
        """
        engine = extractor.engine
        if engine not in self._found:
            self._found[engine] = self._cached(extractor, engine)
        return self._found[engine]

    def _cached(self, extractor: Extractor, engine: str) -> Statistics:
        if self._cache is None:
            return Statistics.of(self._features(extractor), self._keep)
        wanted = {
            "version": VERSION, "engine": engine, "count": self._count, "keep": self._keep,
            "images": self.hash,
        }  # fmt: skip
        path = self._cache / f"reference-{digest(engine)[:12]}.safetensors"
        try:
            return _read(path, wanted)
        except FileNotFoundError:
            why = "no statistics yet"
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            why = str(error)
        print(f"reference features of {self._count} images: {why}; making {path}")
        made = Statistics.of(self._features(extractor), self._keep)
        _write(path, made, wanted)
        return made

    def _features(self, extractor: Extractor) -> Tensor:
        """n d fp32, in order; images of one size go together."""
        parts: list[Tensor] = []
        waiting: list[np.ndarray] = []
        for image in self._images():
            if waiting and (len(waiting) == BATCH or waiting[0].shape != image.shape):
                parts.append(_extract(extractor, waiting))
                waiting = []
            waiting.append(image)
        parts += [_extract(extractor, waiting)] if waiting else []
        return torch.cat(parts) if parts else torch.empty(0, extractor.dim)

    def _images(self) -> Iterator[np.ndarray]:
        return self._pictures() if self._dataset is None else self._targets()

    def _targets(self) -> Iterator[np.ndarray]:
        assert self._dataset is not None
        for index in range(self._count):
            try:
                target = self._dataset[index].target
            except UnreadableRecord:
                continue
            if target is None:
                raise InputError(
                    f"record {index} has no target image: a reference needs data with images"
                )
            yield np.ascontiguousarray(target)

    def _pictures(self) -> Iterator[np.ndarray]:
        for file in self._files[: self._count]:
            yield read_image(file)


def _images_in(folder: str) -> tuple[Path, ...]:
    root = Path(folder).expanduser()
    check_folder("reference.folder", root, "images")
    files = (f for f in root.rglob("*") if f.suffix.lower() in FORMATS and f.name[0] != ".")
    return tuple(sorted(files, key=lambda f: f.relative_to(root).as_posix()))


def _extract(extractor: Extractor, images: list[np.ndarray]) -> Tensor:
    batch = torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous()
    return extractor(batch).float().cpu()


def _read(path: Path, wanted: dict[str, Any]) -> Statistics:
    if not path.is_file():
        raise FileNotFoundError
    with safe_open(path, "pt") as file:
        said = json.loads((file.metadata() or {}).get("provenance", "{}"))
        for key, value in wanted.items():
            if said.get(key) != value:
                raise ValueError(f"{path.name} was made with {key} {said.get(key)}, not {value}")
        mean, cov, features = (file.get_tensor(k) for k in ("mean", "cov", "features"))
    d = len(mean)
    if cov.shape != (d, d) or features.shape[1:] != (d,):
        raise ValueError(f"{path.name} holds tensors of odd shapes")
    return Statistics(mean, cov, features, int(said["n"]))


def _write(path: Path, made: Statistics, wanted: dict[str, Any]) -> None:
    said = {**wanted, "n": made.n, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    tensors = {"mean": made.mean, "cov": made.cov, "features": made.features.contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(tensors, {"provenance": json.dumps(said)}))
    write_json(path.with_suffix(".json"), said)
