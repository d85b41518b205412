"""What a chat completion of OpenAI's protocol says: its text, or its log-probabilities."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from rewards.vlm.model import Answer, Question, Written, option_of

_MARK: Final = re.compile(r"score[\s*_]*[:\uff1a][\s*_]*", re.IGNORECASE)
_BLANK: Final = re.compile(r"[\s*_]*")
_GOES_ON: Final = re.compile(r"\d|[.,]\d")


def read_answer(body: bytes, question: Question) -> Answer:
    """A chat completion's log-probabilities at the place of the answer.

    The place is the token after the last "Score:", or, where the model need not reason and wrote no
    "Score:", the first token that is not blank. A token counts for an option if it says it but for
    space around it and full-width forms. Failures: "junk" where the body is no completion with
    log-probabilities, "no score" where there is no such place or a longer number stands there.
    """
    try:
        tokens = json.loads(body)["choices"][0]["logprobs"]["content"]
        words = [str(token["token"]) for token in tokens]
        place = _place("".join(words), question.reason)
        index = _covering(words, place)
        if index is None:
            return Answer(None, "no score")
        return Answer(_probabilities(tokens[index], question.options))
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
        return Answer(None, "junk")


def read_text(body: bytes) -> Written:
    """What a chat completion wrote. Failures: "junk" where the body is no completion, "too long"
    where it was cut off, "no words" where it is blank."""
    try:
        choice = json.loads(body)["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return Written("", "junk")
    if ended == "length":
        return Written("", "too long")
    if text is not None and not isinstance(text, str):
        return Written("", "junk")
    return Written(text) if text and text.strip() else Written("", "no words")


def _place(text: str, reason: bool) -> int:
    """Where the answer stands in the text; its length where it has none."""
    marks = list(_MARK.finditer(text))
    if marks:
        return marks[-1].end()
    blank = _BLANK.match(text)
    return len(text) if reason or blank is None else blank.end()


def _covering(words: Sequence[str], place: int) -> int | None:
    """The token that holds character `place`; None without one, or where a number goes on."""
    end = 0
    for index, word in enumerate(words):
        end += len(word)
        if place < end:
            rest = "".join(words[index + 1 :])
            return None if option_of(word)[-1:].isdigit() and _GOES_ON.match(rest) else index
    return None


def _probabilities(token: Mapping[str, Any], options: Sequence[str]) -> tuple[float, ...]:
    """Of each option, summed over the tokens that say it. Raises ValueError for what is none."""
    found = dict.fromkeys(options, 0.0)
    others = token["top_logprobs"]
    # The chosen token is among its alternatives, except where a server leaves it out.
    listed = [] if any(o["token"] == token["token"] for o in others) else [token]
    total = 0.0
    for entry in (*others, *listed):
        logprob = entry["logprob"]
        if isinstance(logprob, bool) or not isinstance(logprob, int | float) or math.isnan(logprob):
            _junk(f"a log-probability of {logprob!r}")
        p = math.exp(min(logprob, 1.0))
        total += p
        said = option_of(str(entry["token"]))
        if said in found:
            found[said] += p
    if total > 1.001:
        _junk(f"probabilities that sum to {total:.3f}")
    return tuple(found.values())


def _junk(why: str) -> NoReturn:
    raise ValueError(why)
