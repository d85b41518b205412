"""Held-out evaluation of a training run: before, now and then, and after; and stage=eval.

The same prompts, noise, sampler, steps and guidance each time, so that every comparison is paired.
The ceiling beside a score is the same scorer's result on the held-out signs themselves after the
autoencoder's round trip: no generator can be expected to beat it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.records import Fingerprint, Results, Score, compare, summarise
from eval.suite import Named, Suite, table
from flux2 import distributed
from flux2.data.loader import Collator
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.files import write_bytes
from flux2.generate import Sampler, buckets, sample_together
from flux2.log import Log, grid
from flux2.model import Flux2
from flux2.types import Metric, Velocity
from rewards.ocr import OCRReward, TesseractReader


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: its records, and the first images with their prompts."""

    results: Results
    images: Tensor
    prompts: tuple[str, ...]


@dataclass
class HeldOut:
    """Evaluation on held-out prompts, and the hook of a training run.

    Attributes:
        dataset: prompts with ground truth; the first `prompts` records are used.
        sampler: of all evaluations.
        metrics: key → metric; None is told and left out. trained_on: keys whose values training
            maximises.
        prompts: how many. noises: samples a prompt.
        seed: of the noise.
        every: steps between evaluations in training; 0: before and after only.
        shown: images of the before/after picture.
        control: value → gain of the control that the recipe stores, shown beside ours.
    """

    dataset: Dataset
    sampler: Sampler
    metrics: Mapping[str, Metric | None]
    trained_on: Sequence[str] = ()
    prompts: int = 400
    noises: int = 1
    seed: int = 1234
    every: int = 0
    shown: int = 24
    headline: Sequence[str] = ()
    control: Mapping[str, Any] | None = None
    _history: dict[int, Evaluated] = field(default_factory=dict)
    _measured: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, value in (("prompts", self.prompts), ("noises", self.noises)):
            if value < 1:
                raise InputError(f"evaluation.{name} is {value}: it must be at least 1")
        self.prompts = min(self.prompts, len(self.dataset))
        absent = [key for key, metric in self.metrics.items() if metric is None]
        self.metrics = {k: m for k, m in self.metrics.items() if m is not None}
        self.suite = Suite(dict(self.metrics), tuple(self.trained_on))
        for key in absent:
            print(f"evaluation without {key}: it is not installed")

    # ------------------------------------------------------------ one evaluation

    def records(self) -> list[Record]:
        """The held-out records, in order."""
        return [self.dataset[i] for i in range(self.prompts)]

    def evaluate(self, model: Flux2, velocity: Velocity, label: str) -> Evaluated:
        """Samples every (prompt, noise) pair, all ranks together; rank 0 scores them."""
        scores: list[Score] = []
        images: list[Tensor] = []
        prompts: list[str] = []
        grids: set[str] = set()
        engines: dict[str, str] = {}
        share = self.prompts * self.noises // distributed.size()
        bar = tqdm(total=share, desc=label, leave=False, dynamic_ncols=True,
                   disable=None if distributed.is_main() else True)  # fmt: skip
        collate = Collator(model, latents=False, unconditional=self.sampler.guidance != 1)
        for group in buckets(self.records()):
            rows = [r for r in group for _ in range(self.noises)]
            ids = torch.tensor([r.id * self.noises + k for r in group for k in range(self.noises)])
            seeds = [k for _ in group for k in range(self.noises)]
            batch = collate(rows, ids)
            latents = sample_together(self.sampler, velocity, batch, self.seed, bar.update)
            if not distributed.is_main():
                continue
            pixels = model.codec.decode(latents, batch.grid)
            values = self.suite.values(pixels, batch)
            engines |= {name: _engine(self.metrics[key]) for name, (key, _) in values.items()}
            scores += self.suite.scores(values, batch, seeds)
            grids.add(self.sampler.grid(batch.shape[0]).hash)
            if not images:
                images.append(pixels[: self.shown])
                prompts += batch.prompts[: self.shown]
        bar.close()
        results = Results(tuple(scores), self._fingerprints(engines, "+".join(sorted(grids))))
        return Evaluated(results, torch.cat(images) if images else torch.empty(0), tuple(prompts))

    def ceilings(self, model: Flux2) -> dict[str, float]:
        """Each value on the held-out targets after the autoencoder's round trip."""
        scores: list[Score] = []
        collate = Collator(model, text=False, latents=True)
        for group in buckets(self.records()):
            batch = collate(group, torch.tensor([r.id for r in group]))
            assert batch.x0 is not None
            pixels = model.codec.decode(batch.x0, batch.grid)
            scores += self.suite.score(pixels, batch, 0)
        return {name: row["mean"] for name, row in summarise(scores).items()}

    def _fingerprints(
        self, engines: Mapping[str, str], grid_hash: str
    ) -> dict[str, Fingerprint]:
        text = json.dumps([r.prompt for r in self.records()])
        reference = hashlib.sha256(text.encode()).hexdigest()[:12]
        solver = f"{self.sampler.solver}{self.sampler.steps}:{grid_hash}"
        n = self.prompts * self.noises
        return {
            name: Fingerprint(name, engine, n, reference, solver, float(self.sampler.guidance))
            for name, engine in engines.items()
        }

    # ------------------------------------------------------------ beside a training run

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """Evaluates the model as it is; a resumed run reads what it measured before."""
        self._model, self._role, self._log = model, roles[roles.trainable[0]], log
        self._folder = Path(cfg.run.dir) / "evaluation"
        if distributed.is_main():
            self._read(step)
        self._measured = set(distributed.broadcast(list(self._history)))
        due = step if self.every and step % self.every == 0 else 0  # an interrupt came before it
        for at in sorted({0, due} - self._measured):
            self._measure(at)

    def _read(self, step: int) -> None:
        """What was measured up to `step`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.glob("step_*.jsonl")):
            at = int(path.stem.removeprefix("step_"))
            if at <= step:
                shots = torch.load(path.with_suffix(".pt"), weights_only=True)
                self._history[at] = Evaluated(
                    Results.load(path), shots["images"], tuple(shots["prompts"])
                )

    def latest(self, step: int) -> dict[str, float]:
        """The means measured at `step`; {} where nothing was."""
        shot = self._history.get(step)
        rows = summarise(shot.results.scores) if shot is not None else {}
        return {name: row["mean"] for name, row in rows.items()}

    def after_step(self, step: int) -> None:
        """The loop's hook."""
        if self.every and step % self.every == 0:
            self._measure(step)

    def _measure(self, step: int) -> None:
        shot = self.evaluate(self._model, self._role, f"evaluating at step {step}")
        self._measured.add(step)
        if not distributed.is_main():
            return
        # Beside their place first, and the records last: they say that the pictures are there.
        path, temporary = self._folder / f"step_{step:06d}", self._folder / "unfinished"
        pictures = io.BytesIO()
        torch.save({"images": shot.images, "prompts": list(shot.prompts)}, pictures)
        write_bytes(path.with_suffix(".pt"), pictures.getvalue())
        shot.results.save(temporary)
        temporary.replace(path.with_suffix(".jsonl"))
        self._history[step] = shot
        means = self.latest(step)
        shown = self.headline or list(means)[:4]
        self._log.print(
            f"step {step}: held-out "
            + ", ".join(f"{n} {means[n]:.3f}" for n in shown if n in means)
        )

    def finish(self, step: int) -> dict[str, Any]:
        """Evaluates the result, prints the table before/after, draws pictures; the summary."""
        if step not in self._measured:
            self._measure(step)
        if not distributed.is_main():
            return {}
        before, after = self._history[0], self._history[step]
        changes, ceilings = compare(before.results, after.results), self.ceilings(self._model)
        trained = {s.metric for s in after.results.scores if s.trained_on}
        header = ["held-out", "before", "after", "gain", "95 % interval", "p (Holm)", "ceiling"]
        header += ["control"] if self.control else []
        rows = []
        for name, c in changes.items():
            if not c["n"]:  # no prompt asks for it
                continue
            row = [
                name + ("*" if name in trained else ""),
                f"{c['before']:.3f}", f"{c['after']:.3f}", f"{c['gain']:+.3f}",
                f"{c['low']:+.3f} … {c['high']:+.3f}", f"{c['p_holm']:.3g}",
                f"{ceilings.get(name, float('nan')):.3f}",
            ]  # fmt: skip
            if self.control:
                gain = self.control.get(name)
                row.append("-" if gain is None else f"{gain:+.3f}")
            rows.append(row)
        self._log.print("")
        text = self._log.table(header, rows)
        n = self.prompts * self.noises
        note = f"{n} (prompt, noise) pairs, paired by prompt and noise; * rewarded in training"
        if self.control:
            note += "; control: gain where pretraining went on instead"
        self._log.print(note)
        (self._folder / "table.txt").write_text(f"{text}\n{note}\n")
        pictures = self._pictures(before, after, step)
        return {
            "before": {k: c["before"] for k, c in changes.items()},
            "after": {k: c["after"] for k, c in changes.items()},
            "change": changes,
            "ceiling": ceilings,
            "control": dict(self.control or {}),
            "pictures": pictures,
        }

    def _pictures(self, before: Evaluated, after: Evaluated, step: int) -> dict[str, str]:
        pairs = torch.stack([before.images, after.images], 1).flatten(0, 1)
        captions = [c for p in before.prompts for c in (f"before: {p}", "after")]
        name = self._log.image("before_after", pairs, captions, columns=8)
        out = {"before_after": str(name)}
        steps, rewards = self._log.history("reward")
        if steps:
            curves: dict[str, Any] = {"reward in training": (steps, rewards)}
            for key in ("ocr_exact",):
                xs = sorted(self._history)
                ys = [_mean(self._history[x].results.scores, key) for x in xs]
                curves[f"held-out {key}"] = (xs, ys)
            path = self._folder.parent / "samples" / "reward.png"
            out["curve"] = str(self._log.curve(path, curves))
        for what, path in out.items():
            self._log.print(f"{what}: {path}")
        return out

    def close(self) -> None:
        """Ends the processes of metrics that have some."""
        for metric in self.metrics.values():
            inner: Any = getattr(metric, "metric", metric)
            if hasattr(inner, "close"):
                inner.close()


def second_reader(workers: int = 2) -> Named | None:
    """Tesseract on the known region: an opinion that training did not optimise. None where the
    program is not installed."""
    if not TesseractReader.available():
        return None
    reward = OCRReward(partial(TesseractReader, region=True), workers)
    return Named(reward, "tesseract_", ("ocr_exact", "ocr_ned"))


def _engine(metric: Any) -> str:
    """What scored, for the fingerprint."""
    inner = getattr(metric, "metric", metric)
    return str(getattr(inner, "engine", type(inner).__name__))


def _mean(scores: Sequence[Score], name: str) -> float:
    values = [s.value for s in scores if s.metric == name and s.value == s.value]
    return sum(values) / len(values) if values else float("nan")


def evaluate(cfg: Any) -> dict[str, Any]:
    """stage=eval: a model's or a run's scores on held-out prompts, with ceilings and pictures."""
    from flux2.adapters import Switch
    from flux2.distributed import pick_device
    from flux2.lineage import ROLES, check_lineage, init_of
    from flux2.model import AUTOCAST, check_model, load_initial
    from flux2.roles import VelocityRole
    from flux2.runs import Run
    from flux2.train import build

    check_model(cfg.model)
    check_lineage(cfg, init_of(cfg), ROLES)
    held: HeldOut = build(cfg.evaluation)
    run, device = Run(Path(cfg.run.dir)), pick_device(cfg.engine.device)
    try:
        model = load_initial(cfg, device)
        role = VelocityRole(
            model.transformer, Switch(model.transformer), None, AUTOCAST[cfg.engine.autocast]
        )
        shot = held.evaluate(model, role, "evaluating")
        if not distributed.is_main():
            return {}
        ceilings = held.ceilings(model)
        summary = held.suite.report(
            shot.results.scores, run.path, shot.results.fingerprints, ceilings
        )
        print(table(summary, ceilings))
        (run.path / "samples").mkdir(exist_ok=True)
        path = run.path / "samples" / "grid.png"
        grid(shot.images, shot.prompts, None).save(path)
        print(f"records: {run.path / 'records.jsonl'}\nimages: {path}")
        return {"stage": "eval", "metrics": summary, "ceiling": ceilings}
    finally:
        held.close()
