"""How hard the text of an image is to write, in eight levels, from what is known of it."""

from __future__ import annotations

import unicodedata
from typing import Any

from flux2.data.order import field_of
from flux2.data.record import Record
from flux2.errors import InputError

LEVELS = (
    "none", "word", "phrase", "lines", "mixed-scripts", "small-type", "paragraph", "poster",
)  # fmt: skip
"""From easy to hard."""

PARAGRAPH = 20
"""Words in one piece, from which it is a paragraph."""
POSTER = 4
"""Pieces of text, from which so many words in all are a poster: headline, dates, small print."""
SMALL = 0.05
"""Height of a line, in parts of the image's, below which type is small."""
# Characters that are counted as words where a script sets no spaces: about two to a word.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
_MARKS = ("COMBINING", "VARIATION", "ZERO", "MODIFIER")
# Kana and ideographs are one way of writing.
_JOINED = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "IDEOGRAPHIC": "CJK",
           "FULLWIDTH": "LATIN", "HALFWIDTH": "CJK"}  # fmt: skip


def level_of(record: Record) -> str:
    """One of `LEVELS`: meta `complexity` where there is one, by name or number from 0; else the
    hardest that the ground truth `text` (pieces of text) shows.

        word           one word                     phrase      several words in one line
        lines          several lines                small-type  lines lower than 1/20 of the image,
        mixed-scripts  letters of two scripts                   by `text_box` or `text_height`
        paragraph      20 words in one piece        poster      20 words or more in 4 pieces or more

    Raises:
        InputError: a `complexity` that is no level.
    """
    said = field_of(record, "complexity")
    if said is not None:
        return _named(said)
    text = field_of(record, "text")
    pieces = [text] if isinstance(text, str) else list(text or ())
    pieces = [p for p in map(str, pieces) if p.strip()]
    lines = [line for p in pieces for line in p.splitlines() if line.strip()]
    if not lines:
        return "none"
    counts = [count_words(p) for p in pieces]
    if len(pieces) >= POSTER and sum(counts) >= PARAGRAPH:
        return "poster"
    if max(counts) >= PARAGRAPH:
        return "paragraph"
    if _height(record, len(lines)) < SMALL:
        return "small-type"
    if len(scripts("".join(lines))) > 1:
        return "mixed-scripts"
    if len(lines) > 1:
        return "lines"
    return "phrase" if counts[0] > 1 else "word"


def count_words(text: str) -> int:
    """Words between spaces; of scripts that set none, one for two characters."""
    total = 0
    for word in text.split():
        unspaced = sum(_script(c) in _UNSPACED for c in word)
        rest = any(c.isalnum() and _script(c) not in _UNSPACED for c in word)
        total += -(-unspaced // 2) + (rest or not unspaced)
    return total


def scripts(text: str) -> set[str]:
    """The scripts of its letters, by Unicode's names: LATIN, CJK, CYRILLIC, … Digits and signs
    belong to none."""
    found = {_script(c) for c in text if c.isalpha()}
    return {_JOINED.get(s, s) for s in found if s not in _MARKS}


def _script(character: str) -> str:
    return unicodedata.name(character, "").partition(" ")[0]


def _height(record: Record, lines: int) -> float:
    """Of a line, in parts of the image's height; 1 where nothing says it."""
    height: Any = field_of(record, "text_height")
    if isinstance(height, int | float):
        return float(height)
    box: Any = field_of(record, "text_box")
    return 1.0 if box is None else (float(box[3]) - float(box[1])) / lines


def _named(said: Any) -> str:
    if said in LEVELS:
        return said
    if type(said) is int and 0 <= said < len(LEVELS):
        return LEVELS[said]
    raise InputError(f"a record's complexity is {said!r}: give one of {', '.join(LEVELS)}, or its "
                     "number from 0")  # fmt: skip
