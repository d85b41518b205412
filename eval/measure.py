"""Images in, an evaluation out: every rank scores its own, rank 0 puts them together.

Nothing is scored twice or left out, however unevenly the ranks' shares fall: what a rank drew only
to keep the others company is dropped before it is scored, so that a value computed on eight ranks
is the value computed on one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.evaluation import Evaluation, image_name
from eval.records import Aggregate, Fingerprint, Results, Score
from eval.suite import Suite
from flux2 import distributed
from flux2.types import Batch
from rewards.base import pixels, png

AHEAD = 2
"""Chunks that may wait for their scores while the next is drawn."""


@dataclass
class Measure:
    """Scores chunks of images as they are drawn.

        measure = Measure(suite, staging)
        for …: measure.add(images, batch, seeds, keep)
        found = measure.finish()      # on rank 0

    All ranks make it, add equally many chunks and finish it.

    Attributes:
        suite: the metrics.
        staging: an empty folder for the images (rank 0); None keeps none.
    """

    suite: Suite
    staging: Path | None = None
    _scores: list[Score] = field(default_factory=list)
    _features: dict[str, list[Tensor]] = field(default_factory=dict)
    _samples: list[tuple[int, int]] = field(default_factory=list)
    _prompts: dict[int, str] = field(default_factory=dict)
    _engines: dict[str, str] = field(default_factory=dict)
    _waiting: list[Callable[[], None]] = field(default_factory=list)

    def add(
        self, images: Tensor, batch: Batch, seeds: Sequence[int], keep: int,
        known: Mapping[str, tuple[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        """Starts scoring; all ranks together.

        Args:
            images: b 3 h w uint8.
            batch: of the same samples; `groups` holds the prompts' ids.
            seeds: of the noise, b.
            keep: the first `keep` samples are this rank's own; the others are dropped.
            known: further values that are there already: name → (key of its metric, b values).
        """
        rows = torch.arange(keep, device=images.device)
        images, batch, seeds = images[rows], batch.select(rows.to(batch.ids.device)), seeds[:keep]
        prompts = batch.groups.tolist()
        if keep:
            wait = self.suite.start(images, batch)
            for key, found in self.suite.features(images, batch).items():
                self._features.setdefault(key, []).append(found)
            more = {name: (key, row[:keep]) for name, (key, row) in (known or {}).items()}
            self._waiting.append(lambda: self._take({**wait(), **more}, prompts, seeds))
        self._samples += zip(prompts, seeds, strict=True)
        self._prompts |= dict(zip(prompts, batch.prompts, strict=True))
        if self.staging is not None:
            self._keep(images, prompts, seeds)
        while len(self._waiting) > AHEAD:
            self._waiting.pop(0)()

    def _take(
        self, values: Mapping[str, tuple[str, Tensor]], prompts: list[int], seeds: Sequence[int]
    ) -> None:
        self._engines |= {name: key for name, (key, _) in values.items()}
        self._scores += self.suite.scores(values, prompts, seeds)

    def _keep(self, images: Tensor, prompts: list[int], seeds: Sequence[int]) -> None:
        mine = {
            image_name(p, s): png(x) for p, s, x in zip(prompts, seeds, pixels(images), strict=True)
        }
        for part in distributed.gather_objects(mine):
            if distributed.is_main():
                assert self.staging is not None
                for name, data in part.items():
                    (self.staging / name).write_bytes(data)

    def finish(self) -> Measured | None:
        """Waits for all scores and joins the ranks'; None on ranks other than 0."""
        for wait in self._waiting:
            wait()
        self._waiting.clear()
        features = {k: torch.cat(v) for k, v in self._features.items()}
        mine = (self._scores, self._samples, self._prompts, self._engines, features)
        parts = distributed.gather_objects(mine)
        if not distributed.is_main():
            return None
        scores = [s for part in parts for s in part[0]]
        samples = [s for part in parts for s in part[1]]
        prompts: dict[int, str] = {}
        engines: dict[str, str] = {}
        for part in parts:
            prompts |= part[2]
            engines |= part[3]
        aggregates: list[Aggregate] = []
        ids = torch.tensor([p for p, _ in samples], dtype=torch.int64)
        for key, metric in self.suite.sets.items():
            joined = [part[4][key] for part in parts if key in part[4]]
            if not joined:
                continue
            found = metric.aggregates(torch.cat(joined), ids)
            aggregates += [replace(a, trained_on=key in self.suite.trained_on) for a in found]
            engines |= {a.metric: key for a in found}
        order = {name: k for k, name in enumerate(engines)}
        scores.sort(key=lambda s: (order[s.metric], s.prompt_id, s.seed))
        return Measured(self.suite, scores, aggregates, len(samples), prompts, engines)


@dataclass(frozen=True)
class Measured:
    """What was found, all ranks' together.

    Attributes:
        n: samples. engines: value's name → key of its metric.
    """

    suite: Suite
    scores: Sequence[Score]
    aggregates: Sequence[Aggregate]
    n: int
    prompts: Mapping[int, str]
    engines: Mapping[str, str]

    def means(self, sets: bool = True) -> dict[str, float]:
        """Value's name → mean, and, with `sets`, the aggregates."""
        by_name: dict[str, list[float]] = {}
        for s in self.scores:
            by_name.setdefault(s.metric, []).append(s.value)
        means = {k: float(torch.tensor(v).double().nanmean()) for k, v in by_name.items()}
        return means | {a.metric: a.value for a in self.aggregates if sets}

    def results(self, identity: Mapping[str, Any]) -> Results:
        """The records with their fingerprints, sampled as `identity` says."""
        text = json.dumps([[k, self.prompts[k]] for k in sorted(self.prompts)])
        reference = hashlib.sha256(text.encode()).hexdigest()[:12]
        solver = f"{identity['solver']}{identity['steps']}:{identity['grid']}"
        guidance = identity["guidance"]
        prints = {
            name: Fingerprint(
                name, self.suite.engine(key), self.n, reference,
                solver, -1.0 if guidance is None else float(guidance),  # -1: not known
            )
            for name, key in self.engines.items()
        }  # fmt: skip
        return Results(tuple(self.scores), prints, tuple(self.aggregates))


def staging(folder: Path) -> Path:
    """An empty folder beside `folder` for images on their way there; made by rank 0."""
    path = folder.with_name("unfinished_images")
    if distributed.is_main():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    return path


def save(
    found: Measured,
    identity: Mapping[str, Any],
    ceilings: Mapping[str, float],
    images: Path,
    folder: Path,
) -> Evaluation:
    """Writes what rank 0 found into `folder`; the staged images move there."""

    def move(to: Path) -> None:
        for file in images.iterdir():
            file.replace(to / file.name)
        images.rmdir()

    evaluation = Evaluation(
        found.results(identity), found.prompts, identity, ceilings, found.suite.skipped
    )
    return evaluation.save(folder, move)
