"""How far raters agree: with each other, beyond chance, and with themselves.

A vote is "a", "b" or "tie". Which image of a pair is called a is an accident, and chance-corrected
numbers depend on it: where a is always a reward's favourite, raters who agree with the reward look
as if they agreed by chance. So every pair is counted in both orders, with the votes turned round;
then a and b are equally frequent for everybody, and only the share of ties can differ.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from eval.label.answers import Answer

Votes = Mapping[str, Mapping[str, str]]
"""Rater → pair → "a", "b" or "tie"."""
TURNED: Final = {"a": "b", "b": "a", "tie": "tie"}


def cohen_kappa(x: Sequence[Hashable], y: Sequence[Hashable]) -> float:
    """κ = (p_o − p_e) / (1 − p_e) of two raters' nominal labels (Cohen 1960).

    p_o: share of equal labels. p_e: Σ_c of the product of both raters' shares of c. NaN without
    labels, and where both raters gave one and the same label throughout.
    """
    n = len(x)
    if n == 0:
        return math.nan
    observed = sum(p == q for p, q in zip(x, y, strict=True)) / n
    first, second = Counter(x), Counter(y)
    chance = sum(first[c] * second[c] for c in first) / n**2
    return math.nan if chance == 1 else (observed - chance) / (1 - chance)


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float:
    """α = 1 − D_o / D_e of nominal labels by any number of raters, some of them missing
    (Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C).

    Args:
        units: the labels that each unit got; units with fewer than two are left out.

    Returns:
        1 − (n − 1) Σ_{c≠k} o_ck / Σ_{c≠k} n_c n_k, where o_ck counts the unit's ordered pairs of
        labels, each by 1 / (m_u − 1). NaN where nothing can be compared or all labels are one.
    """
    disagreed, counts = 0.0, Counter[Hashable]()
    for unit in units:
        if len(unit) < 2:
            continue
        own = Counter(unit)
        counts += own
        unequal = len(unit) ** 2 - sum(k * k for k in own.values())
        disagreed += unequal / (len(unit) - 1)
    n = counts.total()
    unequal = n * n - sum(k * k for k in counts.values())
    return 1 - (n - 1) * disagreed / unequal if unequal else math.nan


@dataclass(frozen=True)
class Agreement:
    """What several raters have in common.

    Attributes:
        measure: "Cohen's kappa" of two raters, "Krippendorff's alpha" of more.
        value: NaN where it is not defined.
        pairs: with two votes at least. same: the share of equal votes among all pairs of raters.
    """

    measure: str
    value: float
    pairs: int
    same: float


def agreement(votes: Votes) -> Agreement | None:
    """Of all raters who gave a vote; None: fewer than two did."""
    given = {rater: own for rater, own in votes.items() if own}
    if len(given) < 2:
        return None
    units: dict[str, list[str]] = {}
    for own in given.values():
        for pair, vote in own.items():
            units.setdefault(pair, []).append(vote)
    shared = {pair: unit for pair, unit in units.items() if len(unit) > 1}
    duels = [x == y for unit in shared.values() for x, y in itertools.combinations(unit, 2)]
    same = sum(duels) / len(duels) if duels else math.nan
    both = [*shared.values(), *([TURNED[v] for v in unit] for unit in shared.values())]
    if len(given) == 2:
        x, y = [unit[0] for unit in both], [unit[1] for unit in both]
        return Agreement("Cohen's kappa", cohen_kappa(x, y), len(shared), same)
    return Agreement("Krippendorff's alpha", krippendorff_alpha(both), len(shared), same)


# ---------------------------------------------------------------- one rater


@dataclass(frozen=True)
class Habits:
    """How one rater answers.

    Attributes:
        answers: all, with repeats. ties, skips: of them.
        left: share of left among left and right; far from ½ it is a habit and no judgement.
        repeated: pairs that were judged twice, sides swapped. same: of them, with one verdict.
        seconds: the median answer's.
    """

    answers: int
    ties: int
    skips: int
    left: float
    repeated: int
    same: int
    seconds: float


def habits(answers: Sequence[Answer]) -> Habits:
    """Of the answers that count; shares and seconds are NaN where there is nothing to count."""
    choices = Counter(a.choice for a in answers)
    sided = choices["left"] + choices["right"]
    first = {a.pair: a.vote for a in answers if not a.repeat}
    twice = [
        (first[a.pair], a.vote)
        for a in answers
        if a.repeat and a.vote is not None and first.get(a.pair) is not None
    ]
    times = [a.seconds for a in answers if math.isfinite(a.seconds)]
    return Habits(
        answers=len(answers),
        ties=choices["tie"],
        skips=choices["skip"],
        left=choices["left"] / sided if sided else math.nan,
        repeated=len(twice),
        same=sum(x == y for x, y in twice),
        seconds=median(times) if times else math.nan,
    )


def votes_of(answers: Sequence[Answer], known: Iterable[str]) -> dict[str, str]:
    """Pair → vote. Of a pair that was shown twice the first answer is the vote; skipped pairs and
    those that are not `known` have none."""
    wanted = set(known)
    return {
        a.pair: a.vote for a in answers if not a.repeat and a.vote is not None and a.pair in wanted
    }
