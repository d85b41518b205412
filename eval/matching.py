"""The flow-matching loss on held-out records, by time: where on the way from noise to image a run
learns, and whether it has begun to learn its training data by heart.

    ℓ(r, k) = ‖v_θ(x_t, t, c) − (ε − x0)‖² / dim,   t in the k-th of `bins` parts of the density

Each (record, part) keeps its t and ε for good, so that two steps of a run, and two runs of one
seed, are compared pair by pair: most of the loss is noise that no network can foresee, and it
cancels. A network that answers with distilled guidance is judged by the conditional velocity that
its answer stands for, v_u + (v − v_u)/g, which costs a second forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.stats import paired
from flux2 import distributed
from flux2.checkpoint import on_main
from flux2.data.loader import Collator
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.files import read_json, write_json
from flux2.flow import TimeDensity, Uniform, interpolate, target_velocity, unguide
from flux2.generate import rank_chunks
from flux2.log import Log
from flux2.model import Flux2
from flux2.rng import Rng
from flux2.types import Batch, Velocity

FILE = "heldout_loss.json"
"""In the run's directory: step → the loss of each record and part."""


@dataclass
class MatchingLoss:
    """Held-out losses beside a training run, logged as heldout/t0 (the cleanest part) and so on.

    Attributes:
        dataset: held-out records with images.
        samples: how many of its records, the first ones.
        bins: parts of the density.
        density: which times there are; uniform, whatever the run trains on, so that runs compare.
        every: steps between two measurements; 0: before and after only.
        chunk: samples of a forward.
        seed: of t and ε.
        guidance: g that distilled guidance is undone at; null: conf/model's where the model has the
            embedder, else there is none to undo.
    """

    dataset: Dataset
    samples: int = 64
    bins: int = 5
    density: TimeDensity = field(default_factory=Uniform)
    every: int = 0
    chunk: int = 64
    seed: int = 1234
    guidance: float | None = None
    _history: dict[int, Tensor] = field(default_factory=dict)
    _was: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("samples", self.samples, 2), ("bins", self.bins, 1), ("chunk", self.chunk, 1),
            ("every", self.every, 0),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"heldout.{name} is {value}: it must be at least {least}")
        if self.guidance is not None and not self.guidance > 0:
            raise InputError(f"heldout.guidance is {self.guidance}: give a number above 0, or null")
        if self.samples > len(self.dataset):
            raise InputError(
                f"heldout.samples is {self.samples} and the held-out data have {len(self.dataset)}"
            )

    def records(self) -> list[Record]:
        """The held-out records, in order."""
        return [self.dataset[i] for i in range(self.samples)]

    # ------------------------------------------------------------ one measurement

    @torch.no_grad()
    def measure(self, model: Flux2, velocity: Velocity) -> Tensor:
        """The losses, samples × bins fp64 on the CPU; all ranks together, the same on each."""
        scale = self.guidance or model.info.guidance
        collate = Collator(model, unconditional=scale is not None)
        records = self.records()
        row = {r.id: k for k, r in enumerate(records)}
        found = torch.full((self.samples, self.bins), torch.nan, dtype=torch.float64)
        for part, own in rank_chunks(records, self.chunk):
            batch = collate(part, torch.tensor([r.id for r in part]))
            losses = self._losses(velocity, batch, scale)
            ids = distributed.gather(batch.ids[:own]).tolist()
            found[[row[i] for i in ids]] = distributed.gather(losses[:own])
        return found

    def _losses(self, velocity: Velocity, batch: Batch, scale: float | None) -> Tensor:
        """batch: b → b × bins."""
        x0, cond, rng = batch.x0, batch.cond, Rng(self.seed, 0)
        assert x0 is not None and cond is not None
        asked, columns = replace(cond, null=None), []
        if scale is not None and cond.guidance is not None:
            asked = replace(asked, guidance=torch.full_like(cond.guidance, scale))
        for k in range(self.bins):
            u = (k + rng.uniform("heldout", batch.ids, counter=k)) / self.bins
            t = self.density(u).to(x0.device)  # b
            eps = rng("heldout", batch.ids, batch.shape, counter=k).to(x0.device)  # b n c
            x = interpolate(x0, eps, t)
            v = velocity(x, t, asked)
            if scale is not None:
                assert cond.null is not None
                empty = replace(cond.null, guidance=asked.guidance)
                v = unguide(v, velocity(x, t, empty), torch.full_like(t, scale))
            columns.append((v - target_velocity(x0, eps)).square().mean((1, 2)))
        return torch.stack(columns, 1).double().cpu()

    # ------------------------------------------------------------ beside a training run

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """Measures the model as it is; a resumed run reads what it measured before.

        Raises:
            InputError: the resumed run measured otherwise.
        """
        self._model, self._role, self._log = model, roles[roles.trainable[0]], log
        self._file = Path(cfg.run.dir) / FILE
        # At step 0 a file is of a run that failed at once, perhaps of another model.
        if distributed.is_main() and step and self._file.exists():
            stored = read_json(self._file)
            self._history = {
                int(at): torch.tensor(rows, dtype=torch.float64)
                for at, rows in stored["losses"].items()
                if int(at) <= step
            }
            self._was = stored["settings"]
        on_main(self._check)
        self._history = distributed.broadcast(self._history)
        if step == 0:
            self._at(0)

    def _check(self) -> None:
        if self._history and self._was != self._settings:
            raise InputError(
                f"{self._file} was measured with {self._was}, and heldout says {self._settings}: "
                "resume with the same, or in another run.dir by init_from"
            )

    @property
    def _settings(self) -> dict[str, Any]:
        """What two measurements must share to be compared."""
        return {
            "samples": self.samples, "bins": self.bins, "density": repr(self.density),
            "seed": self.seed, "guidance": self.guidance,
        }  # fmt: skip

    def _at(self, step: int) -> Tensor:
        """The losses at `step`, measured unless they are known: samples × bins."""
        if step not in self._history:
            self._history[step] = self.measure(self._model, self._role)
            rows = {str(at): x.tolist() for at, x in self._history.items()}
            on_main(lambda: write_json(self._file, {"settings": self._settings, "losses": rows}))
        return self._history[step]

    def probe(self, step: int) -> dict[str, float]:
        """For the log of the step that made `step` steps done: the mean of each part and of all;
        {} where nothing is due."""
        if not self.every or step % self.every:
            return {}
        means = self._at(step).mean(0)
        return {"heldout/loss": float(means.mean())} | {
            f"heldout/t{k}": float(x) for k, x in enumerate(means)
        }

    def finish(self, step: int) -> dict[str, Any]:
        """Measures the result and prints before and after; the summary."""
        after = self._at(step)
        if not distributed.is_main():
            return {}
        out: dict[str, Any] = {"after": after.mean(0).tolist()}
        if 0 in self._history:
            before = self._history[0]
            out["before"] = before.mean(0).tolist()
            out["change"] = self._table(before, after)
        return {"heldout_loss": out}

    def _table(self, before: Tensor, after: Tensor) -> list[dict[str, float]]:
        """Prints each part's losses and their paired change; last row: all parts."""
        edges = self.density(torch.linspace(0, 1, self.bins + 1)).tolist()
        names = [f"{a:.2f} … {b:.2f}" for a, b in pairwise(edges)] + ["all"]
        columns = [(before[:, k], after[:, k]) for k in range(self.bins)]
        columns.append((before.mean(1), after.mean(1)))
        changes, rows = [], []
        for name, (old, new) in zip(names, columns, strict=True):
            c = paired(old.numpy(), new.numpy(), range(self.samples))
            changes.append({"mean": c.mean, "low": c.low, "high": c.high, "p": c.p})
            rows.append([
                name, f"{float(old.mean()):.4f}", f"{float(new.mean()):.4f}", f"{c.mean:+.4f}",
                f"{c.low:+.4f} … {c.high:+.4f}",
            ])  # fmt: skip
        self._log.print("")
        self._log.table(["held-out loss at t", "before", "after", "change", "95 % interval"], rows)
        return changes
