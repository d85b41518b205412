"""How near a guidance-distilled student comes to what its teacher does in two forwards, strength by
strength, on held-out records: beside a training run.

    parity(g) = ‖v_student(x_t, t, c, g) − target(g)‖ / ‖v_c − target(g)‖

Over all records, t and ε together. v_c is the teacher without guidance, which is where the student
begins: 1 says that nothing has been learnt, 0 that the student is its teacher. At g = 1, where the
target is v_c itself, the difference is told relative to that of g = 2, which is one unit of
strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from flux2 import distributed
from flux2.checkpoint import on_main
from flux2.data.loader import Collator
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.files import write_json
from flux2.flow import TimeDensity
from flux2.generate import rank_chunks
from flux2.log import Log
from flux2.losses import Noised
from flux2.model import Flux2
from flux2.rng import Rng
from flux2.types import Condition, Velocity

STRENGTHS: Final = (1.0, 2.0, 3.0, 4.5)
"""Which are measured where nothing else is said."""


class Guiding(Protocol):
    """A method that distils guidance."""

    density: TimeDensity

    @property
    def embeds(self) -> bool:
        """Whether its student is told the strength."""
        ...

    @property
    def range(self) -> tuple[float, float]:
        """Of the strengths that it trains on; two equal numbers where one is baked in."""
        ...

    def target(self, teacher: Velocity, x: Tensor, t: Tensor, cond: Condition, g: Tensor) -> Tensor:
        """What the student is to answer at strengths g: b → b n c."""
        ...

    def asked(self, cond: Condition, g: Tensor) -> Condition:
        """What the student is given."""
        ...


@dataclass
class Parity:
    """Parity at strengths of its own, logged as parity/g3 and so on.

    Attributes:
        dataset: held-out records with images.
        method: of the run.
        strengths: fixed ones; None: those of STRENGTHS that training draws, or the ends of its
            range. A student with one strength baked in is asked for that one.
        samples: how many of the records, the first ones.
        every: steps between two measurements; 0: at the end only.
        chunk: samples of a forward of the student; the teacher's has twice as many.
        seed: of t and ε.
    """

    dataset: Dataset
    method: Guiding
    strengths: Sequence[float] | None = None
    samples: int = 64
    every: int = 0
    chunk: int = 32
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, value, least in (
            ("samples", self.samples, 1), ("chunk", self.chunk, 1), ("every", self.every, 0)
        ):  # fmt: skip
            if value < least:
                raise InputError(f"heldout.{name} is {value}: it must be at least {least}")
        if self.samples > len(self.dataset):
            raise InputError(
                f"heldout.samples is {self.samples} and the held-out data have {len(self.dataset)}"
            )
        low, high = self.method.range
        if not self.method.embeds:
            self.strengths = (low,)
        if self.strengths is None:
            self.strengths = tuple(g for g in STRENGTHS if low <= g <= high) or (low, high)
        self._strengths = tuple(float(g) for g in self.strengths)
        if wrong := [g for g in self._strengths if not low <= g <= high]:
            raise InputError(
                f"heldout.strengths has {wrong[0]:g} and training knows {low:g} … {high:g}: set "
                "heldout.strengths=[…] within that, or null"
            )

    def records(self) -> list[Record]:
        """The held-out records, in order."""
        return [self.dataset[i] for i in range(self.samples)]

    @torch.no_grad()
    def measure(self, model: Flux2, teacher: Velocity, student: Velocity) -> dict[float, float]:
        """Strength → parity; all ranks together, the same on each."""
        collate = Collator(model, unconditional=True)
        sums: list[Tensor] = []  # per chunk: own samples × strengths × (difference, distance)
        for part, own in rank_chunks(self.records(), self.chunk):
            batch = collate(part, torch.tensor([r.id for r in part]))
            at, cond = Noised.draw(batch, self.method.density, Rng(self.seed, 0)), batch.cond
            assert cond is not None

            def aim(g: float, at: Noised = at, cond: Condition = cond) -> Tensor:
                return self.method.target(teacher, at.x, at.t, cond, torch.full_like(at.t, g))

            plain, columns = aim(1.0), []
            for g in self._strengths:
                target = aim(g)
                v = student(at.x, at.t, self.method.asked(cond, torch.full_like(at.t, g)))
                away = (target if g != 1 else aim(2.0)) - plain
                pair = torch.stack([v - target, away])  # 2 b n c
                columns.append(pair.double().square().sum((2, 3)).T)  # b 2
            sums.append(distributed.gather(torch.stack(columns, 1)[:own].cpu()))
        total = torch.cat(sums).sum(0)
        return dict(zip(self._strengths, (total[:, 0] / total[:, 1]).sqrt().tolist(), strict=True))

    # ------------------------------------------------------------ beside a training run

    def start(self, cfg: Any, model: Flux2, roles: Any, log: Log, step: int) -> None:
        """Where a run begins there is nothing to measure: its student is the teacher's v_c."""
        self._model, self._roles, self._log = model, roles, log
        self._file = Path(cfg.run.dir) / "parity.json"

    def _at(self) -> dict[float, float]:
        return self.measure(self._model, self._roles["teacher"], self._roles["student"])

    def probe(self, step: int) -> dict[str, float]:
        """For the log of the step that made `step` steps done; {} where nothing is due."""
        if not self.every or step % self.every:
            return {}
        return {f"parity/g{g:g}": value for g, value in self._at().items()}

    def finish(self, step: int) -> dict[str, Any]:
        """Measures the result and prints it; the summary."""
        found = {f"{g:g}": value for g, value in self._at().items()}
        on_main(lambda: write_json(self._file, {"step": step, "parity": found}))
        if not distributed.is_main():
            return {}
        rows = [[g, f"{value:.4f}"] for g, value in found.items()]
        self._log.print("")
        self._log.table(["strength", "distance to the guided teacher (1: unguided, 0: it)"], rows)
        return {"parity": found}
