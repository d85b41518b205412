"""What was measured: a score per (prompt, seed, metric), and numbers of a whole set.

Means are computed from the scores. A number of a whole set (FID) is no mean; it keeps its values
with each block of prompts left out, from which its differences get intervals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from eval.stats import (
    bootstrap_mean,
    detectable,
    equivalence_p,
    holm,
    jackknife_error,
    paired,
    ratio,
    smallest_effect,
    standard_error,
    standardised_effect,
    t_half_width,
    t_test_p,
)
from flux2.errors import InputError
from flux2.files import jsonable

T = TypeVar("T", "Score", "Fingerprint", "Aggregate")

SAMPLING: Final = ("grid", "guidance")
"""The fields of a fingerprint that say how images were sampled; the others are the measure."""


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
class Aggregate:
    """One number of a whole set of images.

    Attributes:
        metric: its name.
        value: NaN where it is not defined.
        low, high: its 95 % interval, as its metric documents; NaN where there is none.
        n: images.
        replicates: its values with each block of prompts left out (`eval.stats.blocks_of`), in the
            blocks' order, up to a constant that is the same for all of them; of two runs on the
            same prompts they are pairs. Empty where there are none.
        note: what a reader of the number must know.
        trained_on: whether training maximised it.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    replicates: tuple[float, ...]
    note: str = ""
    trained_on: bool = False


@dataclass(frozen=True)
class Fingerprint:
    """What a value depends on besides the model.

    metric, engine, n and reference are the measure: values of different measures must never be
    compared. grid and guidance (`SAMPLING`) say how the images were sampled.

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
    """The scores and aggregates of one model, and the fingerprint of each metric among them.

    Raises:
        InputError: a (prompt, seed, metric) or an aggregate occurs twice, or the fingerprints are
            not those of the metrics.
    """

    scores: tuple[Score, ...]
    fingerprints: Mapping[str, Fingerprint]
    aggregates: tuple[Aggregate, ...] = ()

    def only(self, *names: str) -> Results:
        """The part that speaks of these metrics."""
        return Results(
            tuple(s for s in self.scores if s.metric in names),
            {k: f for k, f in self.fingerprints.items() if k in names},
            tuple(a for a in self.aggregates if a.metric in names),
        )

    def __post_init__(self) -> None:
        seen: set[tuple[str, int, int]] = set()
        for s in self.scores:
            key = (s.metric, s.prompt_id, s.seed)
            if key in seen:
                raise InputError(
                    f"two scores of {s.metric}, prompt {s.prompt_id}, seed {s.seed}: give one each"
                )
            seen.add(key)
        names = {s.metric for s in self.scores}
        for a in self.aggregates:
            if a.metric in names:
                raise InputError(f"two values of the set's {a.metric}: give it one name each")
            names.add(a.metric)
        odd = names ^ set(self.fingerprints)
        odd |= {name for name, f in self.fingerprints.items() if f.metric != name}
        if odd:
            raise InputError(f"{min(odd)!r} needs both scores and a fingerprint of that name")

    def save(self, path: Path) -> None:
        """Writes JSONL: fingerprints, aggregates, scores; a missing value is null."""
        lines = [json.dumps({"fingerprint": asdict(f)}) for f in self.fingerprints.values()]
        lines += [json.dumps({"aggregate": jsonable(asdict(a))}) for a in self.aggregates]
        path.write_text("\n".join([*lines, *(_line(s) for s in self.scores)]) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """The inverse of `save`.

        Raises:
            InputError: the file cannot be read, or a line is no score, aggregate or fingerprint.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read as records: {error}") from None
        prints, aggregates, scores = [], [], []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if "fingerprint" in row:
                    prints.append(_build(Fingerprint, row["fingerprint"]))
                elif "aggregate" in row:
                    aggregates.append(_aggregate(row["aggregate"]))
                else:
                    scores.append(_build(Score, row | {"value": _nan(row["value"])}))
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{path}:{number} is no record ({error}): evaluate again"
                ) from None
        return cls(tuple(scores), {f.metric: f for f in prints}, tuple(aggregates))


def _line(score: Score) -> str:
    return json.dumps(jsonable(asdict(score)))


def _nan(value: Any) -> Any:
    return math.nan if value is None else value


def _aggregate(row: Mapping[str, Any]) -> Aggregate:
    if not isinstance(row["replicates"], list):
        raise ValueError("replicates is no list")
    numbers = {name: _nan(row[name]) for name in ("value", "low", "high")}
    return _build(Aggregate, {**row, **numbers, "replicates": tuple(map(_nan, row["replicates"]))})


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,),
}  # fmt: skip


def _build(kind: type[T], row: Mapping[str, Any]) -> T:
    """A dataclass from exactly its fields, each of its type (an int may stand for a float)."""
    wanted = {f.name: str(f.type) for f in fields(kind)}
    if set(row) != set(wanted):
        raise ValueError(f"it has {sorted(row)}, not {sorted(wanted)}")
    for name, of in wanted.items():
        if of == "tuple[float, ...]":
            fits = all(_is(value, "float") for value in row[name])
        else:
            fits = _is(row[name], of)
        if not fits:
            raise ValueError(f"{name} is not of type {of}")
    return kind(**row)


def _is(value: Any, of: str) -> bool:
    return isinstance(value, _TYPES[of]) and (of == "bool" or not isinstance(value, bool))


def summarise(
    results: Results | Iterable[Score], level: float = 0.95, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Each metric's mean, low and high, n values, and missing ones.

    Means have a bootstrap interval by prompt. An aggregate's `mean` is its value; its interval is
    that of 95 % which it carries, whatever `level` is, and nothing of it is missing. Metrics come
    in order of first occurrence, aggregates last. Missing values are left out of the mean, never 0.
    """
    scores = results.scores if isinstance(results, Results) else results
    out: dict[str, dict[str, float]] = {}
    for metric, rows in _by_metric(scores).items():
        good = [s for s in rows if math.isfinite(s.value)]
        interval = bootstrap_mean(
            [s.value for s in good], [s.prompt_id for s in good], level, seed=seed
        )
        out[metric] = {**asdict(interval), "n": len(good), "missing": len(rows) - len(good)}
    for a in results.aggregates if isinstance(results, Results) else ():
        out[a.metric] = {"mean": a.value, "low": a.low, "high": a.high, "n": a.n, "missing": 0}
    return out


def compare(
    before: Results,
    after: Results,
    level: float = 0.95,
    seed: int = 0,
    sampling: str = "same",
    margins: Mapping[str, float] | None = None,
) -> dict[str, dict[str, float]]:
    """Each metric before and after: scores matched by (prompt, seed), aggregates by prompt.

    Args:
        sampling: "same" refuses images that were sampled in different ways; "any" allows it, as
            between a student of few steps and its teacher. A measure must be the same in any case.
        margins: metric → the largest difference that does not matter, > 0.

    Returns:
        By metric: before and after (means over the pairs, or the aggregates), gain (after − before)
        with its interval's low and high, p (of no difference: sign-flip test by prompt; for
        aggregates Student's t of the jackknife by blocks of prompts), p_holm (over all metrics),
        effect (the smallest gain that would be found in four tries of five), d_z (the gain's size,
        `standardised_effect`; for aggregates gain / (se · √n)), se (standard error of the gain) and
        df (degrees of freedom), n pairs or images, and missing: pairs of which either value is
        missing, which are left out of both means. With a margin also p_equal (`equivalence_p`) and
        equal: whether p_equal ≤ 1 − level, so that the two are equal within the margin.

    Raises:
        InputError: the measures (or, with "same", the sampling), the (prompt, seed) pairs of a
            metric, or the images or blocks of an aggregate differ; `sampling` is another word; a
            margin is not positive.
    """
    if sampling not in ("same", "any"):
        raise InputError(f"sampling {sampling!r}: choose same or any")
    for metric in (*before.fingerprints, *after.fingerprints):
        a, b = before.fingerprints.get(metric), after.fingerprints.get(metric)
        what = _difference(a, b, () if sampling == "same" else SAMPLING)
        if what:
            raise InputError(f"{metric} cannot be compared: {what}; evaluate both alike")
    out: dict[str, dict[str, float]] = {}
    olds, news = _by_metric(before.scores), _by_metric(after.scores)
    was = {a.metric: a for a in before.aggregates}
    now = {a.metric: a for a in after.aggregates}
    for metric in before.fingerprints:
        if (metric in olds) != (metric in news):
            raise InputError(f"{metric} cannot be compared: it has scores in only one of the two")
    for metric, rows in olds.items():
        out[metric] = _paired_scores(metric, rows, news[metric], level, seed)
    for metric, old in was.items():
        out[metric] = _paired_aggregates(old, now[metric], level)
    for row, p in zip(out.values(), holm([row["p"] for row in out.values()]), strict=True):
        row["p_holm"] = float(p)
    for metric, margin in (margins or {}).items():
        if metric in out:
            row = out[metric]
            row["p_equal"] = equivalence_p(row["gain"], row["se"], int(row["df"]), margin)
            row["equal"] = row["p_equal"] <= 1 - level
    return out


def verdict(row: Mapping[str, float], margin: float, alpha: float = 0.05) -> str:
    """What a row of `compare` says of the gain, given the largest one that does not matter.

    "equal": the gain lies within ±margin (`equivalence_p` ≤ alpha: its interval at level
    1 − 2·alpha is inside), whether or not it differs from 0. Else "higher" or "lower": it differs
    from 0, corrected for the number of metrics. Else "undecided": too few prompts for either.

    Raises:
        InputError: the margin is not positive.
    """
    if equivalence_p(row["gain"], row["se"], int(row["df"]), margin) <= alpha:
        return "equal"
    if row["p_holm"] <= alpha:
        return "higher" if row["gain"] > 0 else "lower"
    return "undecided"


def _paired_scores(
    metric: str, olds: Sequence[Score], news: Sequence[Score], level: float, seed: int
) -> dict[str, float]:
    old = {(s.prompt_id, s.seed): s.value for s in olds}
    new = {(s.prompt_id, s.seed): s.value for s in news}
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
    differences = [y - x for x, y in zip(a, b, strict=True)]
    return {
        "before": sum(a) / len(a) if a else math.nan,
        "after": sum(b) / len(b) if b else math.nan,
        "gain": change.mean,
        "low": change.low,
        "high": change.high,
        "p": change.p,
        "effect": smallest_effect(differences, prompts, level),
        "d_z": standardised_effect(differences, prompts),
        "se": standard_error(differences, prompts),
        "df": len(set(prompts)) - 1,
        "n": len(keys),
        "missing": len(old) - len(keys),
    }


def _paired_aggregates(old: Aggregate, new: Aggregate, level: float) -> dict[str, float]:
    """The jackknife of the difference: both leave out the same prompts, so that what they share
    (and most of their bias) is not taken for spread."""
    if old.n != new.n or len(old.replicates) != len(new.replicates):
        raise InputError(
            f"{old.metric} cannot be compared: {old.n} images in {len(old.replicates)} blocks and "
            f"{new.n} in {len(new.replicates)}; its bias depends on their number: evaluate both "
            "alike"
        )
    gain = new.value - old.value
    error = jackknife_error([b - a for a, b in zip(old.replicates, new.replicates, strict=True)])
    df = max(len(old.replicates) - 1, 0)
    half = t_half_width(error, df, level)
    return {
        "before": old.value,
        "after": new.value,
        "gain": gain,
        "low": gain - half,
        "high": gain + half,
        "p": t_test_p(ratio(gain, error), df),
        "effect": detectable(error, level),
        "d_z": ratio(gain, error * math.sqrt(old.n)),
        "se": error,
        "df": df,
        "n": old.n,
        "missing": 0,
    }


def _by_metric(scores: Iterable[Score]) -> dict[str, list[Score]]:
    out: dict[str, list[Score]] = {}
    for s in scores:
        out.setdefault(s.metric, []).append(s)
    return out


def _difference(a: Fingerprint | None, b: Fingerprint | None, ignored: Sequence[str]) -> str:
    if a is None or b is None:
        return "it was measured only once"
    names = [f.name for f in fields(a) if f.name not in ignored]
    return ", ".join(
        f"{n} was {getattr(a, n)!r} and is {getattr(b, n)!r}"
        for n in names
        if getattr(a, n) != getattr(b, n)
    )
