"""Several captions of one record, and which of them a sample is trained with.

A record's meta may hold `captions`: kind → caption, e.g. `{long, medium, short, tags, user}`. A
model that has read long ones alone does not understand how people ask, and one that has read short
ones alone does not follow details, so each sample draws its kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flux2.data.record import Record
from flux2.errors import InputError

PROMPT = "prompt"
"""The kind of a record's own prompt: what has no other captions is trained with it."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises InputError unless there are weights of at least 0, one of them above."""
    wrong = [k for k, w in weights.items() if not 0 <= w < math.inf]
    if wrong:
        raise InputError(f"data.captions.{wrong[0]} is {weights[wrong[0]]}: give a weight from 0")
    if not sum(weights.values()) > 0:
        raise InputError("data.captions weighs nothing: give one kind a weight above 0")


def captions_of(record: Record) -> dict[str, str]:
    """Kind → caption, with the prompt itself as `prompt`; tags that come as a list are joined by
    commas, and empty captions left out.

    Raises:
        InputError: captions that are neither text nor a list of it.
    """
    given: Any = record.meta.get("captions") or {}
    if not isinstance(given, Mapping):
        raise InputError(f"record {record.id}: captions must be an object of kind: text")
    found = {PROMPT: record.prompt}
    for kind, caption in given.items():
        if isinstance(caption, Sequence) and not isinstance(caption, str):
            caption = ", ".join(map(str, caption))
        if not isinstance(caption, str):
            raise InputError(f"record {record.id}: its caption {kind!r} is no text")
        if caption.strip():
            found[str(kind)] = caption
    return found


def pick_caption(record: Record, weights: Mapping[str, float], u: float) -> Record:
    """The record with one of its captions as its prompt, and that caption's kind in its meta as
    `caption`; u: uniform on [0, 1).

    A kind is drawn by its weight among those that the record has. A record that has none of them
    keeps its own prompt. Kinds are taken in the order of `weights`, so that equal weights and u
    choose alike.

    Raises:
        InputError: weights that are none, or captions that are no text.
    """
    check_weights(weights)
    captions = captions_of(record)
    have = {k: w for k, w in weights.items() if k in captions and w > 0}
    chosen, below = PROMPT, 0.0
    for kind, weight in have.items():
        chosen, below = kind, below + weight / sum(have.values())
        if u < below:
            break
    return replace(record, prompt=captions[chosen], meta={**record.meta, "caption": chosen})
