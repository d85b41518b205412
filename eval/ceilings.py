"""Ceilings that another run has measured: <cache>/ceilings-<hash of all they depend on>.json.

A ceiling depends on the held-out images, on what scores them and on the autoencoder, and on nothing
that a run trains; the runs of a sweep have the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.suite import Named, Suite
from flux2.data.cache import fingerprint
from flux2.data.record import Record
from flux2.errors import InputError
from flux2.files import read_json, write_json
from flux2.model import Flux2

VERSION = 1
"""Of what is computed; another one measures anew."""


def place(
    cache: str | None, suite: Suite, records: Sequence[Record], sets: bool, model: Flux2
) -> Path | None:
    """The file of the ceilings of these records; None where none are to be kept.

    sets: whether the numbers of whole sets count (`HeldOut` draws one image a prompt).
    """
    if cache is None:
        return None
    scorers = [(key, suite.engine(key), _names(suite.metrics[key])) for key in suite.present]
    held = hashlib.sha256()
    for r in records:
        held.update(repr((r.id, r.prompt, sorted(r.meta.items(), key=str))).encode())
        for image in (r.target, *r.references, r.mask):
            held.update(b"" if image is None else repr(image.shape).encode() + image.tobytes())
    facts = (VERSION, scorers, held.hexdigest(), sets, model.device.type, model.codec.autocast)
    name = fingerprint(*facts, modules=[model.vae])
    return Path(cache).expanduser() / f"ceilings-{name}.json"


def _names(metric: object) -> tuple[object, ...]:
    return (metric.prefix, tuple(metric.only)) if isinstance(metric, Named) else ()


def read(file: Path | None) -> dict[str, float] | None:
    """What is kept there; None where nothing is, or where it cannot be read."""
    if file is None or not file.is_file():
        return None
    try:
        found = read_json(file)
    except InputError:  # half a file of another program: measured anew, and written over
        return None
    return {name: math.nan if value is None else value for name, value in found.items()}


def keep(file: Path | None, ceilings: Mapping[str, float]) -> None:
    """Writes them for other runs."""
    if file is not None and ceilings:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, dict(ceilings))
