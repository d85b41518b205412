"""Evaluation on held-out prompts: beside a training run before, now and then, and after; and alone.

The same prompts, noise, sampler, steps and guidance each time, so that every comparison is paired.
The ceiling beside a score is the same scorer's result on the held-out images themselves after the
autoencoder's round trip: no generator can be expected to beat it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import tables
from eval.ceilings import keep, place, read
from eval.evaluation import FOLDER, Evaluation, find
from eval.images import read_image
from eval.ladder import (
    NO_TEACHER,
    AtSize,
    Ladder,
    climb,
    frozen_teacher,
    has_teacher,
    settings,
    stored,
)
from eval.measure import Measure, save, staging
from eval.records import compare, summarise
from eval.suite import Suite
from flux2 import distributed
from flux2.checkpoint import on_main
from flux2.data.loader import Collator
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.generate import Sampler, rank_chunks
from flux2.lineage import rewards_of
from flux2.log import Log, progress
from flux2.model import Flux2
from flux2.types import Batch, RoleSpec, Velocity


@dataclass
class HeldOut:
    """Evaluation on held-out prompts, and the hook of a training run.

    Attributes:
        dataset: prompts with ground truth; the first `prompts` records are used.
        sampler: of all evaluations.
        metrics: key → metric, set metric, or `eval.suite.Skipped`; None: left out.
        trained_on: keys of metrics that training maximises, besides those that share what scores
            them with a reward of the run or of its ancestors, which are marked by themselves.
        prompts: how many. noises: samples a prompt.
        seed: of the noise.
        every: steps between evaluations in training; 0: before and after only.
        before: evaluate the model as it is before training; off where a run of its own does.
        images: keep every image, for the report; else the `shown` first ones.
        shown: images of the before/after picture.
        headline: values told beside the progress.
        control: value → gain of the control that the recipe stores, shown beside ours.
        ladder: further numbers of steps (and sizes), evaluated at the same times.
        cache: folder where ceilings are kept for other runs; None: each measures its own.
    """

    dataset: Dataset
    sampler: Sampler
    metrics: Mapping[str, Any]
    trained_on: Sequence[str] = ()
    prompts: int = 400
    noises: int = 1
    seed: int = 1234
    every: int = 0
    before: bool = True
    images: bool = True
    shown: int = 24
    headline: Sequence[str] = ()
    control: Mapping[str, Any] | None = None
    ladder: Ladder | None = None
    cache: str | None = None
    _history: dict[int, Evaluation] = field(default_factory=dict)
    _measured: set[int] = field(default_factory=set)
    _known: Mapping[str, float] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value in (
            ("prompts", self.prompts), ("noises", self.noises), ("shown", self.shown)
        ):  # fmt: skip
            if value < 1:
                raise InputError(f"evaluation.{name} is {value}: it must be at least 1")
        self.prompts = min(self.prompts, len(self.dataset))
        wanted = {key: metric for key, metric in self.metrics.items() if metric is not None}
        self.suite = Suite(wanted, tuple(self.trained_on))
        if self.ladder is not None:
            self.ladder.fits(self.sampler, self.dataset, self.prompts)
        for key, reason in self.suite.skipped.items():
            if distributed.is_main():
                print(f"evaluation without {key}: {reason}")

    def check(self, roles: Mapping[str, RoleSpec]) -> None:
        """Before weights are read: raises InputError where the ladder has a teacher and the method
        of these roles none."""
        if self.ladder is not None and self.ladder.teacher and not has_teacher(roles):
            raise InputError(NO_TEACHER)

    def records(self) -> list[Record]:
        """The held-out records, in order."""
        return [self.dataset[i] for i in range(self.prompts)]

    def sampled(self, sampler: Sampler, size: tuple[int, int] | None = None) -> HeldOut:
        """The same prompts, noise and metrics under another sampler, at the dataset's own size or
        at (height, width); for `evaluate` alone."""
        other = copy.copy(self)
        other.sampler = sampler
        if size is not None:
            other.dataset, other._known = AtSize(self.dataset, size), None
        return other

    # ------------------------------------------------------------ one evaluation

    def evaluate(
        self, model: Flux2, velocity: Velocity, label: str, facts: Mapping[str, Any], folder: Path
    ) -> Evaluation | None:
        """Samples every (prompt, noise) pair and scores it, all ranks together; rank 0 writes the
        folder and returns it.

        facts: what the identity says of the run and the model (`Evaluation.identity`).
        """
        collate = Collator(
            model, latents=False, images=True, unconditional=self.sampler.guidance != 1
        )
        images = staging(folder)
        measure = Measure(self.suite, images)
        grids: set[str] = set()
        sizes: set[tuple[int, int]] = set()
        spent, seen = 0.0, 0
        for records, own in self._shares(label):
            batch, seeds = self._batch(collate, records)
            began = time.perf_counter()
            latents = self.sampler(velocity, batch, self.seed)
            drawn = model.codec.decode(latents, batch.grid)
            if drawn.is_cuda:
                torch.cuda.synchronize()
            spent += time.perf_counter() - began
            known = self._along(model, velocity, batch, seen)
            measure.add(drawn, batch, seeds, own * self.noises, known)
            seen += len(batch) * distributed.size()
            grids.add(self.sampler.grid(batch.shape[0]).hash)
            sizes.add((drawn.shape[-2], drawn.shape[-1]))
        found = measure.finish()
        ceilings = self.ceilings(model)
        if found is None:
            return None
        share = -(-self.prompts // distributed.size()) * self.noises
        identity = {
            "run": None, "name": "", "stage": None, "step": 0, **facts,
            "model": model.info.name, "model_hash": model.info.hash, "role": model.info.role,
            "solver": self.sampler.solver, "steps": self.sampler.steps,
            "guidance": float(self.sampler.guidance), "grid": "+".join(sorted(grids)),
            "embedded_guidance": model.info.guidance,
            "forwards": self.sampler.forwards, "seconds": round(spent / share, 6),
            "device": _device(model.device), "dataset": type(self.dataset).__name__,
            "noise_seed": self.seed, "size": sorted(sizes),
        }  # fmt: skip
        if not self.images:
            for file in sorted(images.iterdir())[self.shown :]:
                file.unlink()
        return save(found, identity, ceilings, images, folder)

    def _along(
        self, model: Flux2, velocity: Velocity, batch: Batch, seen: int
    ) -> dict[str, tuple[str, Tensor]]:
        """Values of the sampling itself, of the chunks that begin within a measure's samples."""
        return {
            name: (key, values)
            for key, metric in self.suite.paths.items()
            if seen < metric.samples
            for name, values in metric.along(
                velocity, model, batch, self.sampler, self.seed
            ).items()
        }

    def _shares(self, label: str) -> Iterator[tuple[list[Record], int]]:
        """This rank's records by chunk, each with how many are its own (`rank_chunks`)."""
        most = max(1, self.sampler.chunk // self.noises)
        chunks = list(rank_chunks(self.records(), most))
        yield from progress(chunks, label, sum(own for _, own in chunks), lambda chunk: chunk[1])

    def _batch(self, collate: Collator, records: Sequence[Record]) -> tuple[Batch, list[int]]:
        """Each record `noises` times, with sample ids that key its noise, and which it is."""
        rows = [r for r in records for _ in range(self.noises)]
        ids = torch.tensor([r.id * self.noises + k for r in records for k in range(self.noises)])
        return collate(rows, ids), [k for _ in records for k in range(self.noises)]

    def ceilings(self, model: Flux2) -> Mapping[str, float]:
        """Each value on the held-out targets after the autoencoder's round trip, of which a run
        trains nothing: measured once, all ranks together, or read where another run has measured
        them. {} where the targets only say the size (and on ranks other than 0)."""
        if self._known is None:
            sets = self.noises == 1
            file = on_main(lambda: place(self.cache, self.suite, self.records(), sets, model))
            self._known = on_main(lambda: read(file))
            if self._known is None:
                found = self._known = self._ceilings(model)
                on_main(lambda: keep(file, found))
        return self._known

    def _ceilings(self, model: Flux2) -> dict[str, float]:
        if not all(r.target is not None and r.target.any() for r in self.records()):
            return {}
        collate = Collator(model, text=False, latents=True, images=True)
        measure = Measure(self.suite)
        for records, own in self._shares("ceilings"):
            batch = collate(records, torch.tensor([r.id for r in records]))
            assert batch.x0 is not None
            measure.add(model.codec.decode(batch.x0, batch.grid), batch, [0] * len(records), own)
        found = measure.finish()
        # A set's number at another n is no ceiling.
        return {} if found is None else found.means(sets=self.noises == 1)

    # ------------------------------------------------------------ beside a training run

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """Evaluates the model as it is; a resumed run reads what it measured before."""
        self._model, self._role, self._log = model, roles[roles.trainable[0]], log
        self._teacher = frozen_teacher(roles) if self.ladder and self.ladder.teacher else None
        run = Path(cfg.run.dir)
        self._folder = run / FOLDER
        self.suite = self.suite.mark(distributed.broadcast(rewards_of(run)))
        self._facts = {"run": cfg.run.id, "name": run.name, "stage": cfg.stage.name}
        if distributed.is_main():
            found = {at: Evaluation.load(f) for at, f in find(run).items() if at <= step}
            self._history.update(found)
        on_main(self._check_history)
        self._measured = set(distributed.broadcast(list(self._history)))
        self._known = on_main(self._recorded)
        # An interrupt may have come before this step's own; step 0 cannot be measured any more.
        if (step == 0 and self.before) or (step and self.every and step % self.every == 0):
            for at in {step} - self._measured:
                self._measure(at)
            if self.ladder is not None and self._unclimbed(step):
                self._climb(step)

    def _check_history(self) -> None:
        """Refuses an evaluation that cannot be compared with what the run measured before."""
        for at in self._history if self.ladder is not None else ():
            was = stored(self._folder.parent, at)
            if was is not None and was["settings"] != settings(self):
                raise InputError(
                    f"{self._folder.parent} has a ladder of other rungs at step {at}: resume with "
                    "the evaluation.ladder that it began with, or in another run.dir by init_from"
                )
        engines = {self.suite.engine(key) for key in self.suite.present}
        for at, shot in self._history.items():
            was = shot.identity
            now = {
                "solver": self.sampler.solver, "steps": self.sampler.steps,
                "guidance": float(self.sampler.guidance), "noise_seed": self.seed,
            }  # fmt: skip
            changed = [k for k, v in now.items() if was.get(k) != v]
            for f in shot.results.fingerprints.values():
                if f.n != self.prompts * self.noises:
                    changed.append("prompts")
                if f.engine not in engines:
                    changed.append(f.metric)
            if changed:
                raise InputError(
                    f"{shot.folder} was evaluated otherwise ({', '.join(dict.fromkeys(changed))}): "
                    f"resume with the evaluation of step {at}, or in another run.dir by init_from"
                )

    def _recorded(self) -> Mapping[str, float] | None:
        """The ceilings of the run's first evaluation; None where there is none, or where it was of
        other prompts or had not all the metrics of now."""
        if not self._history:
            return None
        first = self._history[min(self._history)]
        engines = {f.engine for f in first.results.fingerprints.values()}
        same = dict(first.prompts) == {r.id: r.prompt for r in self.records()}
        had = {self.suite.engine(key) for key in self.suite.present} <= engines
        return first.ceilings if same and had else None

    def latest(self, step: int) -> dict[str, float]:
        """The means measured at `step`; {} where nothing was."""
        shot = self._history.get(step)
        rows = summarise(shot.results) if shot is not None else {}
        return {name: row["mean"] for name, row in rows.items()}

    def after_step(self, step: int) -> None:
        """The loop's hook."""
        if self.every and step % self.every == 0:
            self._measure(step)

    def _measure(self, step: int) -> None:
        shot = self.evaluate(
            self._model, self._role, f"evaluating at step {step}",
            {**self._facts, "step": step}, self._folder / f"step_{step:06d}",
        )  # fmt: skip
        self._measured.add(step)
        if shot is not None:
            self._history[step] = shot
            means = self.latest(step)
            shown = self.headline or list(means)[:4]
            self._log.print(
                f"step {step}: held-out "
                + ", ".join(f"{n} {means[n]:.3f}" for n in shown if n in means)
            )
        if self.ladder is not None:
            self._climb(step)

    def _unclimbed(self, step: int) -> bool:
        """Whether a step has no whole ladder; all ranks ask together."""
        return on_main(lambda: stored(self._folder.parent, step)) is None

    def _climb(self, step: int) -> None:
        """The ladder of a step whose own evaluation is there; all ranks together."""
        found = climb(
            self, self._model, self._role, self._teacher, {**self._facts, "step": step},
            self._folder.parent, step, self._history.get(step),
        )  # fmt: skip
        if found:
            self._log.print(f"\nladder at step {step}\n{found['table']}")

    def finish(self, step: int) -> dict[str, Any]:
        """Evaluates the result, prints the table before/after, draws pictures; the summary."""
        if step not in self._measured:
            self._measure(step)
        elif self.ladder is not None and self._unclimbed(step):  # an interrupt came before it
            self._climb(step)
        if not distributed.is_main():
            return {}
        after = self._history[step]
        ladder = {} if self.ladder is None else {"ladder": stored(self._folder.parent, step)}
        if 0 not in self._history:
            self._log.print("there is no evaluation from before training, so no gain is given")
            return {"after": self.latest(step), "ceiling": dict(after.ceilings), **ladder}
        before = self._history[0]
        both = [n for n in before.results.fingerprints if n in after.results.fingerprints]
        changes = compare(before.results.only(*both), after.results.only(*both))
        marks = trained(after)
        header = ["held-out", "before", "after", "gain", "95 % interval", "p (Holm)", "ceiling"]
        header += ["control"] if self.control else []
        rows = []
        for name, c in changes.items():
            if not c["n"]:  # no prompt asks for it
                continue
            row = [
                tables.marked(name, name in marks),
                tables.number(c["before"]), tables.number(c["after"]), tables.signed(c["gain"]),
                tables.span(c["low"], c["high"], tables.signed), tables.probability(c["p_holm"]),
                tables.number(after.ceilings.get(name)),
            ]  # fmt: skip
            if self.control:
                row.append(tables.signed(self.control.get(name)))
            rows.append(row)
        text = tables.table(header, rows)
        self._log.print(f"\n{text}")
        n = self.prompts * self.noises
        note = f"{n} (prompt, noise) pairs, paired by prompt and noise"
        note += f"; {tables.NOTE}" if marks else ""
        if self.control:
            note += "; control: gain where pretraining went on instead"
        self._log.print(note)
        (self._folder / "table.txt").write_text(f"{text}\n{note}\n")
        return {
            "before": {k: c["before"] for k, c in changes.items()},
            "after": {k: c["after"] for k, c in changes.items()},
            "change": changes,
            "ceiling": dict(after.ceilings),
            "control": dict(self.control or {}),
            "pictures": self._pictures(before, after),
            **ladder,
        }

    def _pictures(self, before: Evaluation, after: Evaluation) -> dict[str, str]:
        old, captions = first_images(before, self.shown)
        new, _ = first_images(after, self.shown)
        pairs = torch.stack([old, new], 1).flatten(0, 1)
        texts = [c for p in captions for c in (f"before: {p}", "after")]
        name = self._log.image("before_after", pairs, texts, columns=8)
        out = {"before_after": str(name)}
        steps, rewards = self._log.history("reward")
        if steps:
            curves: dict[str, Any] = {"reward in training": (steps, rewards)}
            for key in self.headline[:1]:
                xs = sorted(self._history)
                curves[f"held-out {key}"] = (xs, [self.latest(x).get(key) for x in xs])
            path = self._folder.parent / "samples" / "reward.png"
            out["curve"] = str(self._log.curve(path, curves))
        for what, path in out.items():
            self._log.print(f"{what}: {path}")
        return out

    def close(self) -> None:
        """Ends the processes of metrics that have some."""
        self.suite.close()


def trained(evaluation: Evaluation) -> set[str]:
    """Names of the values that training maximised."""
    results = evaluation.results
    return {s.metric for s in (*results.scores, *results.aggregates) if s.trained_on}


def first_images(evaluation: Evaluation, count: int) -> tuple[Tensor, list[str]]:
    """The first samples that were kept and have the first one's size: b 3 h w uint8, prompts."""
    assert evaluation.folder is not None
    files = sorted((evaluation.folder / "images").iterdir())[:count]
    shots = [read_image(f) for f in files]
    alike = [k for k, x in enumerate(shots) if x.shape == shots[0].shape]
    images = torch.from_numpy(np.stack([shots[k] for k in alike])).permute(0, 3, 1, 2)
    return images, [evaluation.prompts[int(files[k].stem.partition("-")[0])] for k in alike]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
