"""What raters said, on disk: a file of JSON lines a rater, only ever added to, synced line by line.

    answers/r1.jsonl
    {"n": 1, "pair": "5f…", "repeat": false, "left": "b", "choice": "left", "seconds": 2.4, …}
    {"undo": 1, "time": …}

`n` counts the file's answers; `undo` names the one that no longer counts. What a kill cut short (a
last line without its end) was never answered to, and is cut off when the rater goes on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from flux2.errors import InputError
from flux2.files import sync_folder

SIDES: Final = ("a", "b")
"""The two images of a pair (`eval.label.source.Pair`), as answers name them."""
CHOICES: Final = ("left", "right", "tie", "skip")
FOLDER: Final = "answers"
_NAME: Final = re.compile(r"\w[\w.-]{0,63}")


def other(side: str) -> str:
    """ "b" of "a", and "a" of "b"."""
    return SIDES[side == SIDES[0]]


@dataclass(frozen=True)
class Answer:
    """What a rater said of a pair.

    Attributes:
        n: its number in the rater's file, from 1.
        pair: its id. repeat: it was shown a second time, sides swapped.
        left: which image was to the left: "a" or "b".
        choice: left, right, tie or skip.
        seconds: from both images being there to the answer; NaN where it is not known.
    """

    n: int
    pair: str
    repeat: bool
    left: str
    choice: str
    seconds: float

    @property
    def vote(self) -> str | None:
        """ "a", "b" or "tie", whatever the sides were; None: it was skipped."""
        if self.choice in ("tie", "skip"):
            return "tie" if self.choice == "tie" else None
        return self.left if self.choice == "left" else other(self.left)


def check_name(rater: str | None) -> str:
    """The name, if it can name a file. Raises InputError."""
    if rater is None or not _NAME.fullmatch(str(rater)):
        raise InputError(
            f"rater={rater}: say who answers, in letters, digits, _ - and . (at most 64)"
        )
    return str(rater)


# ---------------------------------------------------------------- reading


def read_answers(file: Path) -> list[Answer]:
    """The answers that count, in order. Raises InputError by file and line where one is wrong."""
    return _replayed(_lines(file), file)


def read_all(folder: Path) -> dict[str, list[Answer]]:
    """Rater → answers that count, of a folder that raters share; {} where nobody has answered."""
    files = sorted((folder / FOLDER).glob("*.jsonl"))
    return {file.stem: read_answers(file) for file in files}


def _lines(file: Path) -> list[str]:
    """The whole lines; what stands behind the last line's end is no answer."""
    try:
        return [line.decode("utf-8") for line in file.read_bytes().split(b"\n")[:-1]]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}; restore it") from None


def _replayed(lines: Sequence[str], file: Path) -> list[Answer]:
    out: dict[int, Answer] = {}
    count = 0
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "undo" in row:
                del out[row["undo"]]
                continue
            answer = _answer(row)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}, line {number} is no answer ({error}): restore it") from None
        count += 1
        if answer.n != count:
            raise InputError(f"{file}, line {number} is not the file's answer {count}: restore it")
        out[count] = answer
    return list(out.values())


def _answer(row: Mapping[str, Any]) -> Answer:
    if row["left"] not in SIDES or row["choice"] not in CHOICES or type(row["repeat"]) is not bool:
        raise ValueError("left, choice or repeat is none that there is")
    seconds = row["seconds"]
    return Answer(
        int(row["n"]), str(row["pair"]), row["repeat"], row["left"], row["choice"],
        math.nan if seconds is None else float(seconds),
    )  # fmt: skip


# ---------------------------------------------------------------- writing


class AnswerFile:
    """One rater's file, held by this process until it ends; `close` gives it back.

    Raises:
        InputError: another process holds it, it cannot be written, or a line is wrong.
    """

    def __init__(self, folder: Path, rater: str) -> None:
        self.rater = check_name(rater)
        self.path = folder / FOLDER / f"{self.rater}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; say labels=<another folder>"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lines = _lines(self.path)
            self.answers = _replayed(lines, self.path)
            self._size = sum(len(line.encode()) + 1 for line in lines)
            self._count = sum('"undo":' not in line for line in lines)
            os.ftruncate(self._handle, self._size)
            os.fsync(self._handle)
            sync_folder(self.path.parent)
        except BlockingIOError:
            os.close(self._handle)
            raise InputError(
                f"{self.rater} is answering already, in another process: end that one, or give "
                "another rater="
            ) from None
        except BaseException:
            os.close(self._handle)
            raise

    def add(self, pair: str, repeat: bool, left: str, choice: str, seconds: float) -> Answer:
        """Stores an answer; when this returns, it is on the disk. Raises OSError where it is not,
        and then nothing of it is."""
        answer = Answer(self._count + 1, pair, repeat, left, choice, seconds)
        row = asdict(answer)
        self._append(row | {"seconds": round(seconds, 3) if math.isfinite(seconds) else None})
        self._count += 1
        self.answers.append(answer)
        return answer

    def undo(self) -> Answer | None:
        """Takes the last answer back, and returns it; None: there is none."""
        if not self.answers:
            return None
        self._append({"undo": self.answers[-1].n})
        return self.answers.pop()

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._handle)

    def _append(self, row: Mapping[str, Any]) -> None:
        stamped = {**row, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line = (json.dumps(stamped) + "\n").encode()
        try:
            if os.pwrite(self._handle, line, self._size) != len(line):
                raise OSError("the disk took only a part of the line")
            os.fsync(self._handle)
        except OSError:
            os.ftruncate(self._handle, self._size)
            raise
        self._size += len(line)
