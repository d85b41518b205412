"""stage=label: a page on which people choose between two images, and what comes of it.

    python run.py stage=label pairs=outputs/pairs rater=r1       the page; answers are kept at once
    python run.py stage=label pairs=outputs/pairs finish=true    no page: the pairs that come out
    python run.py stage=dpo data.dataset.path=outputs/pairs/pairs/labels/pairs

docs/labelling.md has the keys, the files and the numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from eval.label.agreement import Votes, agreement, habits, votes_of
from eval.label.answers import Answer, AnswerFile, check_name, read_all
from eval.label.session import Session, schedule
from eval.label.source import Source, read, told
from eval.label.verdict import Rules, Verdict, verdicts, write
from eval.stats import bootstrap_mean
from flux2 import distributed
from flux2.errors import InputError
from flux2.files import write_json
from flux2.log import table


def label(cfg: DictConfig) -> dict[str, Any]:
    """Runs the stage; returns its summary.

    Raises:
        InputError: no pairs, no rater, a rater who answers elsewhere, answers that are damaged, a
            port that is taken, Gradio is not installed; with finish=true, no answer.
    """
    from hydra.utils import instantiate

    if distributed.launched():
        raise InputError("stage=label is one process: start it without a launcher")
    if not 0 <= cfg.repeat < 1:
        raise InputError(f"repeat is {cfg.repeat}: give the share of pairs to repeat, from 0 to 1")
    rules: Rules = instantiate(cfg.rules, _convert_="all")
    rater = None if cfg.finish else check_name(cfg.rater)
    source = read(_plain(cfg.pairs))
    if source.left_out:
        print(f"left out: {told(source.left_out)}", flush=True)
    home = _home(cfg.labels, source)
    board = Board(source, home, rules)
    if rater is None:
        if not any(read_all(home).values()):
            raise InputError(
                f"{home} holds no answers: let somebody answer first (rater=<name>, without finish)"
            )
        return board.finish()
    from eval.label.page import serve

    file = AnswerFile(home, rater)
    try:
        session = Session(schedule(source.pairs, cfg.seed, rater, cfg.repeat), file)
        try:
            serve(session, board.standing, cfg.serve.host, cfg.serve.port, Path(cfg.run.dir))
        finally:  # Ctrl-C as well ends a day's work
            summary = board.finish() if file.answers else {"stage": "label", "answers": 0}
    finally:
        file.close()
    return summary


def _plain(pairs: Any) -> str | list[str] | None:
    if OmegaConf.is_list(pairs):
        return [str(item) for item in pairs]
    return None if pairs is None else str(pairs)


def _home(labels: str | None, source: Source) -> Path:
    if labels is not None:
        return Path(labels).expanduser()
    if source.home is None:
        raise InputError("labels says nothing: give the folder where the raters' answers go")
    return source.home


# ---------------------------------------------------------------- what all raters said


@dataclass(frozen=True)
class Board:
    """The answers of all raters to one source's pairs.

    Attributes:
        home: the folder that they share: answers/, and pairs/ as it comes out.
    """

    source: Source
    home: Path
    rules: Rules

    def votes(self, answers: Mapping[str, Sequence[Answer]]) -> Votes:
        """Rater → pair → vote."""
        known = [pair.id for pair in self.source.pairs]
        return {rater: votes_of(own, known) for rater, own in answers.items()}

    def standing(self) -> dict[str, Any]:
        """Numbers for the page, and for the summary, as they are on the disk now."""
        answers = read_all(self.home)
        both = agreement(self.votes(answers))
        return {
            "raters": {rater: asdict(habits(own)) for rater, own in answers.items()},
            "agreement": None if both is None else asdict(both),
        }

    def finish(self) -> dict[str, Any]:
        """Writes the pairs and labels.json, prints what was found, and returns the summary."""
        votes = self.votes(read_all(self.home))
        found = verdicts(self.source.pairs, votes, self.rules)
        standing = self.standing()
        folder = self.home / "pairs"
        raters = {rater: len(own) for rater, own in votes.items()}
        kept = write(folder, self.source, found, {"raters": raters, "rules": asdict(self.rules)})
        reasons = Counter(v.why for v in found.values() if v.why)
        summary = {
            "stage": "label",
            "pairs": str(folder),
            "given": len(self.source.pairs),
            "kept": kept,
            "left_out": dict(reasons),
            "preferred": preferred(self.source, found),
            **standing,
        }
        write_json(self.home / "labels.json", summary)
        print(said(summary))
        return summary


def preferred(source: Source, found: Mapping[str, Verdict]) -> dict[str, Any]:
    """How often b was preferred to a, a tie being half, over pairs with a vote; with the interval
    of the mean, clustered by prompt."""
    rows = [(pair.prompt, found[pair.id].votes) for pair in source.pairs]
    voted = [(prompt, votes) for prompt, votes in rows if sum(votes.values())]
    shares = [
        (votes.get("b", 0) + votes.get("tie", 0) / 2) / sum(votes.values()) for _, votes in voted
    ]
    _, clusters = np.unique(np.array([prompt for prompt, _ in voted], str), return_inverse=True)
    mean = bootstrap_mean(shares, clusters)
    return {"a": source.names[0], "b": source.names[1], "share_of_b": asdict(mean)}


def said(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal."""
    raters: Mapping[str, Mapping[str, Any]] = summary["raters"]
    rows = [
        [
            rater, str(own["answers"]), str(own["ties"]), str(own["skips"]), share(own["left"]),
            f"{own['same']} of {own['repeated']}",
            "" if math.isnan(own["seconds"]) else f"{own['seconds']:.1f}",
        ]
        for rater, own in raters.items()
    ]  # fmt: skip
    head = ["rater", "answers", "ties", "skips", "left", "alike when repeated", "seconds"]
    lines = [table(head, rows)]
    if both := summary["agreement"]:
        value = "undefined" if math.isnan(both["value"]) else f"{both['value']:.2f}"
        lines.append(
            f"{both['measure']} {value} on {both['pairs']} pairs; {share(both['same'])} alike"
        )
    who, mean = summary["preferred"], summary["preferred"]["share_of_b"]
    lines.append(
        f"{who['b']} preferred to {who['a']}: {share(mean['mean'])} "
        f"({share(mean['low'])} … {share(mean['high'])})"
    )
    why = told(summary["left_out"])
    lines.append(f"{summary['kept']} of {summary['given']} pairs{f' ({why})' if why else ''}")
    if summary["kept"]:
        lines.append(f"train on them: stage=dpo data.dataset.path={summary['pairs']}")
    return "\n".join(lines)


def share(value: float) -> str:
    """A share in per cent; "–" where there is none."""
    return "–" if math.isnan(value) else f"{100 * value:.0f} %"
