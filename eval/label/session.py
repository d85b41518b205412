"""What a rater is shown next, on which sides, and what becomes of the answer.

The order of the pairs is the same for all raters, so that those who stop early have judged the same
ones; sides are drawn for each rater and pair, and some pairs come a second time with sides swapped.
All of it follows from (seed, rater, pair): a session that goes on needs nothing but the answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Final

from eval.label.answers import CHOICES, SIDES, AnswerFile, other
from eval.label.source import Pair
from flux2.errors import InputError
from flux2.rng import keyed

DISTANCE: Final = 20
"""Pairs between the two times that one is shown, where there are enough."""


@dataclass(frozen=True)
class Item:
    """A pair as it is shown. left: the image to the left, "a" or "b"."""

    pair: Pair
    repeat: bool
    left: str

    @property
    def token(self) -> str:
        """What the page gives back with the answer, so that no key is taken for another pair's."""
        return f"{self.pair.id}-{int(self.repeat)}"

    @property
    def files(self) -> tuple[Path, Path]:
        """(left, right)."""
        files = self.pair.a, self.pair.b
        return files if self.left == SIDES[0] else (files[1], files[0])


def schedule(pairs: Sequence[Pair], seed: int, rater: str, repeat: float) -> list[Item]:
    """All that a rater is asked, in order.

    Args:
        repeat: share of pairs, in [0, 1), that come again `DISTANCE` pairs later (half of all
            pairs later, where there are fewer); the last ones cannot.
    """
    order = sorted(pairs, key=lambda p: (keyed(seed, "label order", p.id).random(), p.id))
    distance = min(DISTANCE, len(order) // 2)
    placed: list[tuple[float, Item]] = []
    for at, pair in enumerate(order):
        side = int(keyed(seed, "label side", rater, pair.id).integers(2))
        placed.append((at, Item(pair, False, SIDES[side])))
        again = keyed(seed, "label repeat", rater, pair.id).random() < repeat
        if again and at + distance < len(order):
            placed.append((at + distance + 0.5, Item(pair, True, other(SIDES[side]))))
    return [item for _, item in sorted(placed, key=lambda x: x[0])]


@dataclass
class Session:
    """One rater at work. Its methods may be called from several threads.

    Attributes:
        items: what is asked, in order (`schedule`).
        file: where answers go.
    """

    items: Sequence[Item]
    file: AnswerFile
    _lock: Lock = field(default_factory=Lock, repr=False)

    def asked(self) -> list[Item]:
        """What this rater is asked, given the answers so far: a pair that was skipped does not come
        again, and one that does has its sides swapped from how it was shown."""
        first = {a.pair: a for a in self.file.answers if not a.repeat}
        out = []
        for item in self.items:
            before = first.get(item.pair.id) if item.repeat else None
            if before is None:
                out.append(item)
            elif before.choice != "skip":
                out.append(replace(item, left=other(before.left)))
        return out

    def upcoming(self, count: int = 2) -> list[Item]:
        """The next items without an answer; the first is the one that is shown."""
        done = {(a.pair, a.repeat) for a in self.file.answers}
        waiting = (item for item in self.asked() if (item.pair.id, item.repeat) not in done)
        return list(islice(waiting, count))

    @property
    def progress(self) -> tuple[int, int]:
        """(answered, all)."""
        asked = {(item.pair.id, item.repeat) for item in self.asked()}
        return len(asked & {(a.pair, a.repeat) for a in self.file.answers}), len(asked)

    def answer(self, token: str, choice: str, seconds: float | None) -> bool:
        """Stores the answer to the item that is shown; False: the token is another's, and nothing
        is stored. Raises InputError for a choice that there is not, OSError where the disk fails.
        """
        if choice not in CHOICES:
            raise InputError(f"{choice!r} is no answer: give {', '.join(CHOICES)}")
        known = isinstance(seconds, int | float) and 0 <= seconds < math.inf
        with self._lock:
            following = self.upcoming(1)
            if not following or following[0].token != token:
                return False
            item = following[0]
            took = float(seconds) if known and seconds is not None else math.nan
            self.file.add(item.pair.id, item.repeat, item.left, choice, took)
            return True

    def undo(self) -> bool:
        """Takes the last answer back, of an earlier session as well; False: there is none."""
        with self._lock:
            return self.file.undo() is not None
