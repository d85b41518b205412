"""Images that somebody else drew: a folder with their prompts, as `stage=eval images=` reads it.

Four layouts are told apart by what the folder holds:

    samples.jsonl, metadata.jsonl     {"file": "0.png", "prompt": "…", "seed": 0} a line, as
                                      stage=sample writes; `file_name` and `text` do as well
    000012-0.png …                    <prompt id>-<seed>.png: an evaluation's images/ folder
    00000/metadata.jsonl, samples/    a folder a prompt, as GenEval's scripts write
    cat.png beside cat.txt            captions
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.evaluation import FACTS
from eval.images import check_folder, read_image
from flux2.data.lines import FORMATS
from flux2.data.loader import stack_images, truth
from flux2.data.record import Dataset
from flux2.errors import InputError
from flux2.types import Batch

NAME = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Picture:
    """One image of the folder.

    Attributes:
        path: of the file.
        prompt: what it was drawn from.
        id: the prompt's. seed: of its noise, or its number among the prompt's images.
        meta: the prompt's ground truth, where it is known.
    """

    path: Path
    prompt: str
    id: int
    seed: int
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_folder(folder: Path, dataset: Dataset, prompts: int) -> tuple[list[Picture], bool]:
    """The images of a folder, and whether they were matched with the dataset's first `prompts`
    records, by prompt (or by the id in the file name): then those give ids and ground truth.

    Raises:
        InputError: no such folder, none of the layouts, an image that is missing, or prompts of
            which only some are the dataset's.
    """
    check_folder("images", folder, "images and their prompts")
    records = [dataset[k] for k in range(min(prompts, len(dataset)))]
    by_id = {r.id: r for r in records}
    by_prompt = {r.prompt: r for r in reversed(records)}
    found = list(_found(folder, {k: r.prompt for k, r in by_id.items()}))
    if not found:
        raise InputError(
            f"{folder} holds no images with prompts: give samples.jsonl, <id>-<seed>.png, a folder "
            "a prompt with metadata.jsonl, or a .txt beside each image"
        )
    truths = []
    for row in found:
        named = by_id.get(-1 if row.id is None else row.id)
        same = named is not None and named.prompt == row.prompt
        truths.append(named if same else by_prompt.get(row.prompt))
    strange = [row.prompt for row, r in zip(found, truths, strict=True) if r is None]
    if strange and len(strange) < len(found):
        raise InputError(
            f"{len(strange)} of {len(found)} images in {folder} have prompts that "
            f"evaluation.dataset does not ({strange[0]!r}): evaluate one set of prompts at a time"
        )
    own = {prompt: k for k, prompt in enumerate(dict.fromkeys(row.prompt for row in found))}
    ids = [own[row.prompt] if r is None else r.id for row, r in zip(found, truths, strict=True)]
    metas = [{} if r is None else truth(r) for r in truths]
    seeds = _numbered(found, ids)
    return [
        Picture(row.path, row.prompt, k, seed, meta)
        for row, k, seed, meta in zip(found, ids, seeds, metas, strict=True)
    ], not strange


@dataclass(frozen=True)
class Row:
    """An image as the folder tells of it; id and seed where it does."""

    path: Path
    prompt: str
    seed: int | None = None
    id: int | None = None


def _numbered(rows: Sequence[Row], ids: Sequence[int]) -> list[int]:
    """The seeds; those that are not known are counted, for each prompt. Raises InputError where
    one comes twice."""
    counts: Counter[int] = Counter()
    seen: set[tuple[int, int]] = set()
    out = []
    for row, k in zip(rows, ids, strict=True):
        number = counts[k] if row.seed is None else row.seed
        counts[k] += 1
        if (k, number) in seen:
            raise InputError(f"{row.path}: prompt {row.prompt!r} has two images of seed {number}")
        seen.add((k, number))
        out.append(number)
    return out


def _found(folder: Path, texts: Mapping[int, str]) -> Iterator[Row]:
    for name in ("samples.jsonl", "metadata.jsonl"):
        if (folder / name).is_file():
            yield from _listed(folder / name)
            return
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in FORMATS)
    if files and all(NAME.fullmatch(f.stem) for f in files):
        texts = _prompts_beside(folder) or texts
        for file in files:
            prompt, seed = map(int, file.stem.split("-"))
            if prompt not in texts:
                raise InputError(f"{file}: evaluation has no prompt {prompt}: raise its number")
            yield Row(file, texts[prompt], seed, prompt)
        return
    homes = sorted(f.parent for f in folder.glob("*/metadata.jsonl"))
    for home in homes:
        row = _object((home / "metadata.jsonl").read_text().splitlines()[0], home)
        images = sorted(f for f in (home / "samples").iterdir() if f.suffix.lower() in FORMATS)
        yield from (Row(f, _text(row, home), k) for k, f in enumerate(images))
    if not homes:
        for file in files:
            caption = file.with_suffix(".txt")
            if not caption.is_file():
                raise InputError(f"{file} has no prompt: put it in {caption.name} beside it")
            yield Row(file, caption.read_text().strip())


def _prompts_beside(folder: Path) -> dict[int, str]:
    """The prompts of the evaluation whose images these are."""
    facts = folder.parent / FACTS
    if not facts.is_file():
        return {}
    return {int(k): v for k, v in json.loads(facts.read_text())["prompts"].items()}


def _listed(file: Path) -> Iterator[Row]:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        where = f"{file}:{number}"
        row = _object(line, where)
        name = row.get("file", row.get("file_name"))
        path = file.parent / str(name)
        if name is None or not path.is_file() or not path.resolve().is_relative_to(
            file.parent.resolve()
        ):  # fmt: skip
            raise InputError(f"{where} names no image of its folder ({name}): correct its `file`")
        # stage=sample gives all images one seed and tells them apart by their ids.
        yield Row(path, _text(row, where), None if "id" in row else row.get("seed"))


def _object(line: str, where: object) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object: correct or remove it")
    return row


def _text(row: Mapping[str, Any], where: object) -> str:
    text = row.get("prompt", row.get("text"))
    if not isinstance(text, str):
        raise InputError(f"{where} has no prompt")
    return text


def batches(pictures: Sequence[Picture], most: int) -> Iterator[tuple[Tensor, Batch, list[int]]]:
    """Images b 3 h w uint8 of one size, their batch and seeds; all images of a prompt that have
    one size come together.

    Raises:
        InputError: an image cannot be read.
    """
    groups: dict[tuple[int, int], list[tuple[Picture, np.ndarray]]] = {}
    by_prompt = sorted(pictures, key=lambda p: (p.id, p.seed))
    for k, picture in enumerate(by_prompt):
        image = read_image(picture.path)
        rows = groups.setdefault((image.shape[0], image.shape[1]), [])
        rows.append((picture, image))
        following = by_prompt[k + 1] if k + 1 < len(by_prompt) else None
        if following is None or (len(rows) >= most and following.id != picture.id):
            for size in list(groups) if following is None else [image.shape[:2]]:
                yield _batch(groups.pop((size[0], size[1])))


def _batch(rows: Sequence[tuple[Picture, np.ndarray]]) -> tuple[Tensor, Batch, list[int]]:
    images = stack_images([x for _, x in rows])
    batch = Batch(
        ids=torch.arange(len(rows)),
        prompts=tuple(p.prompt for p, _ in rows),
        cond=None,
        groups=torch.tensor([p.id for p, _ in rows]),
        meta=tuple(p.meta for p, _ in rows),
        grid=(1, 1),
    )
    return images, batch, [p.seed for p, _ in rows]
