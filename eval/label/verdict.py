"""From votes to verdicts, and from verdicts to a folder of pairs that training reads.

The folder is laid out as stage=pairs lays it out (pairs.jsonl, images/, facts.json), so that
`stage=dpo data.dataset.path=<it>` and `stage=kto` train on it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from eval.label.agreement import Votes
from eval.label.source import Pair, Source
from flux2.data.pairs import FACTS, FILE
from flux2.errors import InputError
from flux2.files import write_bytes, write_json, write_text

TIES: Final = ("leave_out", "keep")


@dataclass(frozen=True)
class Rules:
    """Which verdicts become pairs.

    Attributes:
        votes: that a pair must have; skips are none.
        agreement: the least share of its votes that the verdict must have, in [0, 1].
        ties: leave_out, or keep: a tie becomes a pair of margin 0, in the source's order.

    Raises:
        InputError: a value that cannot be.
    """

    votes: int = 1
    agreement: float = 0.5
    ties: str = "leave_out"

    def __post_init__(self) -> None:
        if self.votes < 1:
            raise InputError(f"rules.votes is {self.votes}: a verdict needs a vote, give 1 or more")
        if not 0 <= self.agreement <= 1:
            raise InputError(f"rules.agreement is {self.agreement}: give a share from 0 to 1")
        if self.ties not in TIES:
            raise InputError(f"rules.ties is {self.ties!r}: choose from {', '.join(TIES)}")


@dataclass(frozen=True)
class Verdict:
    """What the raters decided on a pair.

    Attributes:
        winner: "a", "b" or "tie", what more raters said than anything else; None where `why`.
        margin: (votes for the winner − votes for the loser) / votes, in [0, 1].
        votes: of each kind.
        why: it makes no pair: "no vote", "few votes", "split" (nothing has most votes),
            "little agreement" or "tie"; "" where it does.
    """

    winner: str | None
    margin: float
    votes: Mapping[str, int]
    why: str


def decide(given: Sequence[str], rules: Rules) -> Verdict:
    """given: the votes on a pair, one a rater."""
    votes = Counter(given)
    total = votes.total()
    ranked = votes.most_common(2)
    if total < rules.votes:
        return Verdict(None, 0.0, votes, "few votes" if total else "no vote")
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        return Verdict(None, 0.0, votes, "split")
    winner, most = ranked[0]
    if most / total < rules.agreement:
        return Verdict(None, 0.0, votes, "little agreement")
    if winner == "tie":
        return Verdict("tie", 0.0, votes, "tie" if rules.ties == "leave_out" else "")
    loser = votes["b" if winner == "a" else "a"]
    return Verdict(winner, (most - loser) / total, votes, "")


def verdicts(pairs: Sequence[Pair], votes: Votes, rules: Rules) -> dict[str, Verdict]:
    """Pair → verdict, of all pairs."""
    return {
        pair.id: decide([own[pair.id] for own in votes.values() if pair.id in own], rules)
        for pair in pairs
    }


# ---------------------------------------------------------------- the folder


def write(
    folder: Path, source: Source, found: Mapping[str, Verdict], facts: Mapping[str, Any]
) -> int:
    """Writes the folder; returns how many pairs it holds.

    Images are copied, pairs.jsonl is written last and in one step: a training run that opens the
    folder sees the old pairs or the new ones. Without any pair there is no pairs.jsonl.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for pair in source.pairs:
        verdict = found[pair.id]
        if not verdict.why:
            rows.append(_row(folder, pair, verdict, source.names))
    write_json(folder / FACTS, {"rewards": [], **source.facts, **facts})
    if rows:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / FILE, "".join(lines))
    else:
        (folder / FILE).unlink(missing_ok=True)
    return len(rows)


def _row(folder: Path, pair: Pair, verdict: Verdict, names: tuple[str, str]) -> dict[str, Any]:
    """A pair's line; its images are copied."""
    places = {
        side: _copied(folder, file, f"{pair.id}-{side}")
        for side, file in (("a", pair.a), ("b", pair.b))
    }
    given = [
        _copied(folder, file, f"{pair.id}-reference{n}") for n, file in enumerate(pair.references)
    ]
    winner = "b" if verdict.winner == "b" else "a"
    loser = "a" if winner == "b" else "b"
    row: dict[str, Any] = {"prompt": pair.prompt, "winner": places[winner], "loser": places[loser]}
    row |= {"margin": verdict.margin} | ({"references": given} if given else {})
    label = {
        "pair": pair.id,
        "votes": {side: verdict.votes.get(side, 0) for side in ("a", "b", "tie")},
        "won": None if verdict.winner == "tie" else names[winner == "b"],
    }
    meta = dict(pair.meta)
    if winner == "b" and isinstance(judged := meta.get("rewards"), list):
        meta["rewards"] = judged[::-1]  # the winner's first, as in every file of pairs
    return row | {"meta": {**meta, "label": label}}


def _copied(folder: Path, file: Path, stem: str) -> str:
    """The image's place in the folder; a pair's id is its content, so what is there is right."""
    name = f"images/{stem}{file.suffix.lower()}"
    if not (folder / name).is_file():
        write_bytes(folder / name, file.read_bytes())
    return name
