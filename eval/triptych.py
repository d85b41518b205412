"""Triptychs: the student's sample beside what the real and the fake score make of it.

A part of a monitor (`eval.distillation.Part`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.panels import Panel
from flux2 import distributed
from flux2.data.loader import Collator
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.flow import interpolate, x0_from_velocity
from flux2.generate import Sampler, buckets
from flux2.log import Log
from flux2.model import Flux2
from flux2.monitor import Row
from flux2.rng import Rng
from flux2.roles import told
from flux2.samplers import guided
from flux2.types import Batch


@dataclass
class Triptychs:
    """A picture at every check: a row for each prompt; the student's sample x̂0, and what the real
    and the fake score make of it once noise of level t is put on it again, with the same noise at
    every check. Where the two differ is what the student is told; where both are alike and wrong,
    it is told nothing.

    samples/triptych_NNNNNN.png. A method without a role `fake` or `teacher` has no such column.

    Attributes:
        dataset: prompts. sampler: of the student.
        every: steps between two. count: of prompts.
        t: the level, in (0, 1). guidance: of the real score; 1: the conditional one.
        seed: of all noise.
    """

    dataset: Dataset
    sampler: Sampler
    every: int = 50
    count: int = 4
    t: float = 0.6
    guidance: float = 1.0
    seed: int = 4321

    def __post_init__(self) -> None:
        for name in ("every", "count"):
            if getattr(self, name) < 1:
                raise InputError(f"triptychs.{name} is {getattr(self, name)}: at least 1")
        if not 0 < self.t < 1:
            raise InputError(f"triptychs.t is {self.t}: give a number between 0 and 1")
        if not self.guidance >= 0:
            raise InputError(f"triptychs.guidance is {self.guidance}: at least 0 (1: none)")
        self._made: list[str] = []

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """See `Part`. The first one is of the model as it is."""
        self._log, self._model = log, model
        name = "student" if "student" in roles else roles.trainable[0]
        guides = {"teacher": "real score", "fake": "fake score"}
        self._student = roles[name]
        self._scores = {text: told(roles[role]) for role, text in guides.items() if role in roles}
        if step == 0:
            self._made = []
            self._draw(0)

    def records(self) -> Sequence[Record]:
        """See `Part`: of one size, so that they make one picture."""
        found = [self.dataset[i] for i in range(min(self.count, len(self.dataset)))]
        return next(buckets(found))

    def probe(self, step: int) -> Mapping[str, float]:
        """See `Part`. All ranks draw alike; rank 0 keeps the picture."""
        if step % self.every == 0:
            self._draw(step)
        return {}

    @torch.no_grad()
    def columns(self, batch: Batch) -> dict[str, Tensor]:
        """Title → x̂0, b n c: the student's sample, then what each score makes of it."""
        assert batch.cond is not None
        x0 = self.sampler(self._student, batch, self.seed)
        t = x0.new_full(x0.shape[:1], self.t)
        noise = Rng(self.seed, 0)("triptych", batch.ids, batch.shape).to(x0)
        x = interpolate(x0, noise, t)
        out = {f"student, {self.sampler.steps} steps": x0}
        for title, velocity in self._scores.items():
            scale = self.guidance if title == "real score" else 1.0
            v = guided(velocity, scale)(x, t, batch.cond)
            said = f"{title} at t = {self.t:g}" + (f", guidance {scale:g}" if scale != 1 else "")
            out[said] = x0_from_velocity(x, v, t)
        return out

    def _draw(self, step: int) -> None:
        records = self.records()
        unconditional = self.sampler.guidance != 1 or self.guidance != 1
        collate = Collator(self._model, latents=False, unconditional=unconditional)
        batch = collate(records, torch.tensor([r.id for r in records]))
        columns = self.columns(batch)
        if not distributed.is_main():
            return
        drawn = [self._model.codec.decode(x, batch.grid).cpu() for x in columns.values()]
        images = torch.stack(drawn, 1).flatten(0, 1)  # (b columns) 3 h w
        first, *others = columns
        captions = [c for p in batch.prompts for c in (f"{first}: {p}", *others)]
        path = self._log.image(f"triptych_{step:06d}", images, captions, len(columns))
        self._made.append(str(path))

    def watch(self, step: int, row: Row) -> None:
        """See `Part`."""

    def panels(self) -> list[Panel]:
        """See `Part`: none."""
        return []

    def finish(self) -> dict[str, Any]:
        """See `Part`."""
        return {"pictures": list(self._made)}

    def state_dict(self) -> dict[str, Any]:
        """See `Part`."""
        return {"made": list(self._made)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Part`."""
        self._made = list(state["made"])
