"""How a vision-language model is asked, whoever runs it: a question with images, of which the
answer is one of a few options, and the probability that the model gives each of them; or a request
to write something.

`rewards.vlm.endpoint` asks a server, `rewards.vlm.local` a model in this process; `rewards.judge`
and `rewards.pairwise` make the questions, stage=enhance the requests.
"""

from __future__ import annotations

import math
import re
import threading
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np

from flux2.errors import InputError
from rewards.base import data_url

MARKER: Final = "Score:"
"""After reasoning, what the answer follows."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image in questions, h w 3 uint8; its encoding is made once, however often it is asked
    about."""

    array: np.ndarray
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _made: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.array.dtype != np.uint8 or self.array.ndim != 3 or self.array.shape[2] != 3:
            raise InputError(
                f"a judge wants images h w 3 uint8, not {self.array.shape} {self.array.dtype}"
            )

    @property
    def url(self) -> str:
        """A data URL of its PNG, without loss."""
        with self._lock:  # several threads ask for one picture at a time
            if not self._made:
                self._made.append(data_url(self.array))
        return self._made[0]


@dataclass(frozen=True, eq=False)
class Question:
    """What a model is asked.

    Attributes:
        system: how to judge.
        parts: text and images, in order.
        options: the possible answers, of one character each.
        reason: whether the model may think in words first, and then writes MARKER and its answer.
    """

    system: str
    parts: tuple[str | Picture, ...]
    options: tuple[str, ...]
    reason: bool = False


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        probabilities: of each option, at the place of the answer, and not renormalised: what is
            missing to 1 went to other tokens. None where there is no answer.
        failure: why there is none, in a word or two.
    """

    probabilities: tuple[float, ...] | None
    failure: str | None = None

    @property
    def mass(self) -> float:
        """The options' share of the probability; NaN without an answer."""
        return math.nan if self.probabilities is None else sum(self.probabilities)

    def checked(self, least: float) -> Answer:
        """This answer, or a failure where its mass is 0 or below `least`."""
        if self.probabilities is None or (self.mass >= least and self.mass > 0):
            return self
        return Answer(None, "low mass")

    def share(self, values: Sequence[float]) -> float:
        """Expectation of a value per option, under the renormalised probabilities; NaN without an
        answer."""
        if self.probabilities is None:
            return math.nan
        weighted = sum(p * v for p, v in zip(self.probabilities, values, strict=True))
        return weighted / self.mass


class Model(Protocol):
    """Who answers.

    Attributes:
        cost: one of `rewards.base.COSTS`.
        licence: of the model.
    """

    cost: str
    licence: str

    @property
    def engine(self) -> str:
        """The model and its version, without parentheses."""
        ...

    def ready(self) -> None:
        """Waits until questions can be answered; raises InputError where they cannot be."""
        ...

    def submit(self, questions: Sequence[Question]) -> Any:
        """Starts on the questions and returns at once."""
        ...

    def result(self, pending: Any) -> list[Answer]:
        """Waits for what submit started: an answer to each question, in order."""
        ...

    def close(self) -> None:
        """Frees what is held. Nothing can be asked afterwards."""
        ...


@dataclass(frozen=True, eq=False)
class Request:
    """Words that a model is asked to write.

    Attributes:
        system: how to write.
        parts: text and images, in order.
        tokens: at most; what has not ended by then is a failure, "too long".
        temperature: of the draws; 0 takes the likeliest token each time.
        seed: of the draws.
    """

    system: str
    parts: tuple[str | Picture, ...]
    tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What a model wrote, or, in a word or two, why there is nothing."""

    text: str
    failure: str | None = None


class Writer(Protocol):
    """Who writes.

    Attributes:
        licence: of the model.
        sees: whether images can be shown to it.
    """

    licence: str
    sees: bool

    @property
    def engine(self) -> str:
        """The model and its version, without parentheses."""
        ...

    def ready(self) -> None:
        """Waits until requests can be answered; raises InputError where they cannot be."""
        ...

    def write(self, requests: Sequence[Request]) -> Any:
        """Starts on the requests and returns at once."""
        ...

    def written(self, pending: Any) -> list[Written]:
        """Waits for what write started: an answer to each request, in order."""
        ...

    def close(self) -> None:
        """Frees what is held. Nothing can be asked afterwards."""
        ...


def option_of(token: str) -> str:
    """What a token says: without space around it, full-width characters as plain ones."""
    return unicodedata.normalize("NFKC", token.replace("▁", " ")).strip()


def plain(text: str) -> str:
    """Text of others, so that it cannot spell a model's control tokens or end its own quotation."""
    return re.sub(r"</(?=\s*prompt)", "< /", text.replace("<|", "< |").replace("|>", "| >"))
