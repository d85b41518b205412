"""Several metrics over one set of images, their records, and the table made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eval.records import Fingerprint, Results, Score, summarise
from flux2.errors import InputError
from flux2.types import Batch, Metric


@dataclass(frozen=True)
class Named:
    """A metric whose values get names of their own, as a second reader's beside the first's.

    Attributes:
        metric: any.
        prefix: put before each of its names.
        only: the names to keep (without prefix); empty keeps all.
    """

    metric: Metric
    prefix: str = ""
    only: tuple[str, ...] = ()

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """See `Metric`. Raises InputError where the metric has no name that is to be kept."""
        values = self.metric(images, batch)
        unknown = set(self.only) - set(values)
        if unknown:
            raise InputError(f"no value {min(unknown)!r}: choose from {', '.join(values)}")
        return {self.prefix + n: v for n, v in values.items() if not self.only or n in self.only}


@dataclass(frozen=True)
class Suite:
    """Metrics by key.

    Attributes:
        metrics: key → metric; no two of them may return the same name.
        trained_on: keys of the metrics that training maximised; all their values are marked.

    Raises:
        InputError: trained_on names an unknown key.
    """

    metrics: Mapping[str, Metric]
    trained_on: Sequence[str] = ()

    def __post_init__(self) -> None:
        unknown = set(self.trained_on) - set(self.metrics)
        if unknown:
            raise InputError(
                f"trained_on has {min(unknown)!r}, which is no metric: choose from "
                f"{', '.join(self.metrics)}"
            )

    def score(self, images: Tensor, batch: Batch, seed: int | Sequence[int]) -> list[Score]:
        """One record per sample and value.

        Args:
            images: b 3 h w uint8.
            batch: of the same samples; `groups` holds the prompts' ids.
            seed: of the noise, one for all or one for each sample.

        Raises:
            InputError: two metrics return one name, or there is not one seed per sample.
        """
        seeds = [seed] * len(batch) if isinstance(seed, int) else list(seed)
        if len(seeds) != len(batch) or len(images) != len(batch):
            raise InputError(
                f"{len(images)} images, {len(seeds)} seeds, {len(batch)} samples: give one each"
            )
        return self.scores(self.values(images, batch), batch, seeds)

    def scores(
        self, values: Mapping[str, tuple[str, Tensor]], batch: Batch, seeds: Sequence[int]
    ) -> list[Score]:
        """The records of `values`, one per sample and name."""
        prompts = batch.groups.tolist()
        return [
            Score(p, s, name, v, key in self.trained_on)
            for name, (key, row) in values.items()
            for p, s, v in zip(prompts, seeds, row.tolist(), strict=True)
        ]

    def values(self, images: Tensor, batch: Batch) -> dict[str, tuple[str, Tensor]]:
        """Name of the value → (key of its metric, b values).

        Raises:
            InputError: two metrics return one name.
        """
        out: dict[str, tuple[str, Tensor]] = {}
        for key, metric in self.metrics.items():
            for name, values in metric(images, batch).items():
                if name in out:
                    raise InputError(
                        f"metrics {out[name][0]!r} and {key!r} both return {name!r}: give one of "
                        "them a prefix (eval.suite.Named)"
                    )
                out[name] = (key, values)
        return out

    def report(
        self,
        scores: Iterable[Score],
        folder: Path,
        fingerprints: Mapping[str, Fingerprint],
        ceilings: Mapping[str, float] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Writes records.jsonl and table.txt into an existing folder; returns the summary.

        Args:
            scores: of all batches.
            folder: where to write.
            fingerprints: by name of the value.
            ceilings: by name of the value, the best that the scorer gives (e.g. to the targets
                after the autoencoder's round trip).

        Raises:
            InputError: scores and fingerprints do not fit (`Results`).
        """
        results = Results(tuple(scores), fingerprints)
        results.save(folder / "records.jsonl")
        summary = summarise(results.scores)
        trained = {s.metric for s in results.scores if s.trained_on}
        (folder / "table.txt").write_text(table(summary, ceilings or {}, trained))
        return summary


def table(
    summary: Mapping[str, Mapping[str, float]],
    ceilings: Mapping[str, float],
    trained: Iterable[str] = (),
) -> str:
    """`summarise`'s summary as text, with each score's ceiling; what was trained on has a *."""
    marked = set(trained)
    rows = [("metric", "mean", "95 % interval", "ceiling", "n", "missing")]
    for name, row in summary.items():
        rows.append((
            name + " *" * (name in marked),
            _number(row["mean"]),
            f"{_number(row['low'])} to {_number(row['high'])}",
            _number(ceilings.get(name, math.nan)),
            str(int(row["n"])),
            str(int(row["missing"])),
        ))  # fmt: skip
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    pads = (str.ljust, *[str.rjust] * (len(widths) - 1))
    lines = ["  ".join(p(c, w) for p, c, w in zip(pads, r, widths, strict=True)) for r in rows]
    if marked & set(summary):
        lines += ["", "* training maximised this value"]
    return "\n".join(lines) + "\n"


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.3f}"
