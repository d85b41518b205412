"""One record per (prompt, seed, metric); every aggregate is computed from records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from eval.stats import bootstrap_mean, holm, paired, smallest_effect
from flux2.errors import InputError

T = TypeVar("T", "Score", "Fingerprint")


@dataclass(frozen=True)
class Score:
    """One value of one image.

    Attributes:
        prompt_id: the prompt.
        seed: of the noise.
        metric: the value's name.
        value: NaN where there is none (the prompt does not ask for it, or scoring failed).
        trained_on: whether training maximised it, so that it says little by itself.
    """

    prompt_id: int
    seed: int
    metric: str
    value: float
    trained_on: bool = False


@dataclass(frozen=True)
class Fingerprint:
    """What a value depends on besides the model. Different fingerprints must not be compared.

    Attributes:
        metric: the value's name.
        engine: the scorer, with its version or the hash of its weights.
        n: the number of (prompt, seed) pairs.
        reference: hash of the reference data (prompts, records).
        grid: hash of the sampler and its σ grid.
        guidance: scale of classifier-free guidance.
    """

    metric: str
    engine: str
    n: int
    reference: str
    grid: str
    guidance: float


@dataclass(frozen=True)
class Results:
    """The scores of one model, and the fingerprint of each metric among them.

    Raises:
        InputError: a (prompt, seed, metric) occurs twice, or the fingerprints are not those of the
            scores' metrics.
    """

    scores: tuple[Score, ...]
    fingerprints: Mapping[str, Fingerprint]

    def __post_init__(self) -> None:
        seen: set[tuple[str, int, int]] = set()
        for s in self.scores:
            key = (s.metric, s.prompt_id, s.seed)
            if key in seen:
                raise InputError(
                    f"two scores of {s.metric}, prompt {s.prompt_id}, seed {s.seed}: give one each"
                )
            seen.add(key)
        odd = {s.metric for s in self.scores} ^ set(self.fingerprints)
        odd |= {name for name, f in self.fingerprints.items() if f.metric != name}
        if odd:
            raise InputError(f"{min(odd)!r} needs both scores and a fingerprint of that name")

    def save(self, path: Path) -> None:
        """Writes JSONL: the fingerprints, then the scores; a missing value is null."""
        lines = [json.dumps({"fingerprint": asdict(f)}) for f in self.fingerprints.values()]
        path.write_text("\n".join([*lines, *(_line(s) for s in self.scores)]) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """The inverse of `save`.

        Raises:
            InputError: the file cannot be read, or a line is neither a score nor a fingerprint.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as records: {error}") from None
        prints, scores = [], []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if "fingerprint" in row:
                    prints.append(_build(Fingerprint, row["fingerprint"]))
                else:
                    value = math.nan if row["value"] is None else row["value"]
                    scores.append(_build(Score, row | {"value": value}))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{path}:{number} is no record ({error}): evaluate again"
                ) from None
        return cls(tuple(scores), {f.metric: f for f in prints})


def _line(score: Score) -> str:
    row = asdict(score)
    if not math.isfinite(score.value):
        row["value"] = None
    return json.dumps(row)


def _build(kind: type[T], row: Mapping[str, Any]) -> T:
    """A dataclass from exactly its fields, each of its type (an int may stand for a float)."""
    wanted = {f.name: str(f.type) for f in fields(kind)}
    if set(row) != set(wanted):
        raise ValueError(f"it has {sorted(row)}, not {sorted(wanted)}")
    types = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for name, of in wanted.items():
        if not isinstance(row[name], types[of]) or (isinstance(row[name], bool) and of != "bool"):
            raise ValueError(f"{name} is not of type {of}")
    return kind(**row)


def summarise(
    scores: Iterable[Score], level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Each metric's mean, low and high (bootstrap by prompt), n values, and missing ones.

    Metrics come in order of first occurrence. Missing values are left out of the mean, never 0.
    """
    out: dict[str, dict[str, float]] = {}
    for metric, rows in _by_metric(scores).items():
        good = [s for s in rows if math.isfinite(s.value)]
        interval = bootstrap_mean(
            [s.value for s in good], [s.prompt_id for s in good], level, seed=seed
        )
        out[metric] = {**asdict(interval), "n": len(good), "missing": len(rows) - len(good)}
    return out


def compare(
    before: Results, after: Results, level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Each metric before and after, matched by (prompt, seed).

    Returns:
        By metric: before and after (means over the pairs), gain (after − before) with its
        interval's low and high, p (sign-flip test by prompt), p_holm (over all metrics), effect
        (the smallest gain that would be found in four tries of five), n pairs, and missing: pairs
        of which either value is missing, which are left out of both means.

    Raises:
        InputError: fingerprints, or the (prompt, seed) pairs of a metric, differ.
    """
    for metric in (*before.fingerprints, *after.fingerprints):
        a, b = before.fingerprints.get(metric), after.fingerprints.get(metric)
        if a != b:
            what = _difference(a, b)
            raise InputError(f"{metric} cannot be compared: {what}; evaluate both alike")
    olds, news = _by_metric(before.scores), _by_metric(after.scores)
    out: dict[str, dict[str, float]] = {}
    for metric, rows in olds.items():
        old = {(s.prompt_id, s.seed): s.value for s in rows}
        new = {(s.prompt_id, s.seed): s.value for s in news[metric]}
        if old.keys() != new.keys():
            odd = min(old.keys() ^ new.keys())
            raise InputError(
                f"{metric} cannot be compared: prompt {odd[0]}, seed {odd[1]} is only in one of "
                "the two; evaluate both alike"
            )
        keys = sorted(k for k in old if math.isfinite(old[k]) and math.isfinite(new[k]))
        a, b = [old[k] for k in keys], [new[k] for k in keys]
        prompts = [k[0] for k in keys]
        change = paired(a, b, prompts, level, seed=seed)
        out[metric] = {
            "before": sum(a) / len(a) if a else math.nan,
            "after": sum(b) / len(b) if b else math.nan,
            "gain": change.mean,
            "low": change.low,
            "high": change.high,
            "p": change.p,
            "effect": smallest_effect([y - x for x, y in zip(a, b, strict=True)], prompts, level),
            "n": len(keys),
            "missing": len(old) - len(keys),
        }
    for row, p in zip(out.values(), holm([row["p"] for row in out.values()]), strict=True):
        row["p_holm"] = float(p)
    return out


def _by_metric(scores: Iterable[Score]) -> dict[str, list[Score]]:
    out: dict[str, list[Score]] = {}
    for s in scores:
        out.setdefault(s.metric, []).append(s)
    return out


def _difference(a: Fingerprint | None, b: Fingerprint | None) -> str:
    if a is None or b is None:
        return "it was measured only once"
    names: Sequence[str] = [f.name for f in fields(a)]
    return ", ".join(
        f"{n} was {getattr(a, n)!r} and is {getattr(b, n)!r}"
        for n in names
        if getattr(a, n) != getattr(b, n)
    )
