"""Several metrics over one set of images: which there are, which are missing or trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from eval import tables
from eval.records import Score
from flux2.errors import InputError
from flux2.generate import Sampler
from flux2.model import Flux2
from flux2.scorer import close
from flux2.types import Batch, Deferred, Metric, SetMetric, Velocity
from rewards.base import Unavailable, families
from rewards.ocr import OCRReward, TesseractReader

Values = Mapping[str, Tensor]


@runtime_checkable
class PathMetric(Protocol):
    """A measure of the sampling itself, which no image shows; `samples`: of so many, the first."""

    samples: int

    def along(
        self, velocity: Velocity, model: Flux2, batch: Batch, sampler: Sampler, seed: int
    ) -> Values:
        """Values of the batch's samples, b each; all ranks together."""
        ...


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

    def __call__(self, images: Tensor, batch: Batch) -> Values:
        """See `Metric`. Raises InputError where the metric has no name that is to be kept."""
        return self.rename(self.metric(images, batch))

    def rename(self, values: Values) -> Values:
        """Its metric's values under their new names. Raises InputError as a call does."""
        unknown = set(self.only) - set(values)
        if unknown:
            raise InputError(f"no value {min(unknown)!r}: choose from {', '.join(values)}")
        return {self.prefix + n: v for n, v in values.items() if not self.only or n in self.only}


@dataclass(frozen=True)
class Skipped:
    """A metric that cannot be computed here, and why."""

    reason: str


def optional(metric: Any, prefix: str = "", only: Sequence[str] = ()) -> Any:
    """The metric, named as `Named` does, or `Skipped` with the reason where its weights or its
    program are not at hand.

    metric: a function that builds it, or its configuration; the latter wants `_recursive_: false`
        beside `_target_: eval.suite.optional`, or Hydra builds it before anyone can ask.
    """
    from flux2.train import build

    try:
        built: Any = metric() if callable(metric) else build(metric)
    except Unavailable as error:
        return Skipped(str(error))
    return Named(built, prefix, tuple(only)) if prefix or only else built


def tesseract(workers: int = 2) -> OCRReward:
    """tesseract on the known region: an opinion that training did not optimise.

    Raises:
        Unavailable: the program is not installed.
    """
    if not TesseractReader.available():
        raise Unavailable("tesseract is not installed (Debian: tesseract-ocr)")
    return OCRReward(partial(TesseractReader, region=True), workers)


@dataclass(frozen=True)
class Suite:
    """Metrics by key.

    Attributes:
        metrics: key → `Metric`, `SetMetric` or `Skipped`; no two may return the same name.
        trained_on: keys of metrics that training maximised, besides those of `mark`.

    Raises:
        InputError: trained_on names an unknown key.
    """

    metrics: Mapping[str, Any]
    trained_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.trained_on) - set(self.metrics)
        if unknown:
            raise InputError(
                f"trained_on has {min(unknown)!r}, which is no metric: choose from "
                f"{', '.join(self.metrics)}"
            )

    @property
    def skipped(self) -> dict[str, str]:
        """Key → why it is left out."""
        return {k: m.reason for k, m in self.metrics.items() if isinstance(m, Skipped)}

    @property
    def present(self) -> dict[str, Any]:
        """Key → metric, without what is skipped."""
        return {k: m for k, m in self.metrics.items() if not isinstance(m, Skipped)}

    @property
    def sets(self) -> dict[str, SetMetric]:
        """Key → metric of the whole set."""
        return {k: m for k, m in self.present.items() if isinstance(m, SetMetric)}

    def engine(self, key: str) -> str:
        """What scores a metric."""
        inner = _inner(self.metrics[key])
        return str(getattr(inner, "engine", type(inner).__name__))

    def mark(self, rewards: Iterable[str]) -> Suite:
        """The suite with every metric marked as trained on that shares what scores it with one of
        the rewards (engines): a reader that was optimised for says little by any of its values."""
        trained = set().union(*map(families, rewards)) if rewards else set()
        keys = [k for k in self.present if families(self.engine(k)) & trained]
        return Suite(self.metrics, tuple(dict.fromkeys([*self.trained_on, *keys])))

    def ready(self) -> None:
        """Waits for metrics that work in processes of their own. Raises InputError where one
        cannot work."""
        for metric in map(_inner, self.present.values()):
            if isinstance(metric, Deferred):
                metric.ready()

    @property
    def paths(self) -> dict[str, PathMetric]:
        """Key → measure of the sampling itself."""
        return {k: m for k, m in self.present.items() if isinstance(m, PathMetric)}

    def start(self, images: Tensor, batch: Batch) -> Callable[[], dict[str, tuple[str, Tensor]]]:
        """Starts on images b 3 h w uint8 and returns at once where a metric can; the function
        waits: name of the value → (key of its metric, b values).

        Raises:
            InputError: two metrics return one name.
        """
        waits = {
            key: begin(metric, images, batch)
            for key, metric in self.present.items()
            if not isinstance(metric, SetMetric | PathMetric)
        }

        def wait() -> dict[str, tuple[str, Tensor]]:
            out: dict[str, tuple[str, Tensor]] = {}
            for key, finish in waits.items():
                for name, values in finish().items():
                    if name in out:
                        raise InputError(
                            f"metrics {out[name][0]!r} and {key!r} both return {name!r}: give one "
                            "of them a prefix (eval.suite.Named)"
                        )
                    out[name] = (key, values)
            return out

        return wait

    def features(self, images: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Key of a set metric → b d."""
        return {key: metric.features(images, batch) for key, metric in self.sets.items()}

    def scores(
        self, values: Mapping[str, tuple[str, Tensor]], prompts: Sequence[int], seeds: Sequence[int]
    ) -> list[Score]:
        """The records of `start`'s values, one per sample and name."""
        return [
            Score(p, s, name, v, key in self.trained_on)
            for name, (key, row) in values.items()
            for p, s, v in zip(prompts, seeds, row.tolist(), strict=True)
        ]

    def close(self) -> None:
        """Ends the processes of metrics that have some."""
        close(*map(_inner, self.present.values()))


def _inner(metric: Any) -> Any:
    return metric.metric if isinstance(metric, Named) else metric


def begin(metric: Any, images: Tensor, batch: Batch) -> Callable[[], Values]:
    """Starts a metric or a reward on images b 3 h w uint8 and returns at once where it can
    (`Deferred`); the function waits for its values."""
    inner = _inner(metric)
    if isinstance(inner, Deferred):
        pending = inner.submit(images, batch)

        def values() -> Values:
            return inner.result(pending)
    else:
        found = inner(images, batch)

        def values() -> Values:
            return found

    return (lambda: metric.rename(values())) if isinstance(metric, Named) else values


def table(
    summary: Mapping[str, Mapping[str, float]],
    ceilings: Mapping[str, float],
    trained: Iterable[str] = (),
) -> str:
    """`summarise`'s summary as text, with each score's ceiling; what was trained on has a *."""
    marks = set(trained)
    rows = [
        [
            tables.marked(name, name in marks),
            tables.number(row["mean"]),
            tables.span(row["low"], row["high"]),
            tables.number(ceilings.get(name)),
            str(int(row["n"])),
            str(int(row["missing"])),
        ]
        for name, row in summary.items()
    ]
    text = tables.table(["metric", "mean", "95 % interval", "ceiling", "n", "missing"], rows)
    return text + (f"\n\n{tables.NOTE}\n" if marks & set(summary) else "\n")
