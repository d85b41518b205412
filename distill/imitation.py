"""On-policy distillation of velocities, from one teacher or several: several runs into one.

    x_0 … x_{N−1} of the student's own sampler, from noise (data-free), without gradients
    v* = Σ_j w_j·v_j(x_i, σ_i, c),  v_j teacher j's guided velocity, w_j its share of this prompt
    loss = Σ_i λ_i·‖v_student(x_i, σ_i, c) − sg[v*]‖² / dim

An Euler step is x + dt·v, so with λ_i = dt²/(2·std²) this is KL(student ‖ teacher) of each step's
law N(x + dt·v, std²·I), at states drawn from the student: on-policy distillation, as of language
models (arXiv 2306.13649). `std` sets that weight; without it every step counts the same.

It makes a copy of the teachers at this number of steps and no faster sampler: the velocity at a
point is not the flow map from it. Teachers that draw well in N steps become one student that does,
and their guidance may be taken in. For fewer steps take distill.policy or distill.dmd.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill._common import check_rollout, check_scale, simulate
from flux2.distributed import gather_objects
from flux2.errors import InputError, check_positive
from flux2.losses import weighted
from flux2.rng import Rng
from flux2.samplers import branches, guided
from flux2.schedule import EmpiricalShift, Schedule
from flux2.types import Batch, Memoryless, Metrics, RoleSpec, Turn, Velocity


@dataclass(frozen=True)
class OnPolicyImitation(Memoryless):
    """Method of stage=distill.

    Attributes:
        teachers: name → a run or an export whose result it is; None: what this run starts from, as
            is the one teacher where none is named.
        shares: name → w_j, scaled to sum to 1; None: equal. With `by` they are not used.
        by: field of a record's meta that names the prompt's teacher: each prompt has one. None:
            every prompt has all of them, and the student follows their average velocity.
        guidance: of the teachers. own_guidance: with which the student is sampled: 1 takes the
            teachers' guidance in; another, the teachers' own, keeps it, and then both branches are
            matched, with the prompt and without.
        steps, schedule, rollout: how the student is sampled, in training as after it.
        std: see above; None weighs every step alike.
        ema: decay of an average of the student's weights; 0: none.
        micro: samples a micro-batch, of one step.
    """

    teachers: Mapping[str, str | None] | None = None
    shares: Mapping[str, float] | None = None
    by: str | None = None
    guidance: float = 3.0
    own_guidance: float = 1.0
    steps: int = 8
    rollout: str = "euler"
    std: float | None = None
    ema: float = 0.0
    micro: int = 32
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base", "distilled")

    def __post_init__(self) -> None:
        check_scale(self.guidance)
        check_scale(self.own_guidance)
        check_rollout(self.rollout)
        check_positive({"micro": self.micro, **({} if self.std is None else {"std": self.std})})
        if not 0 <= self.ema < 1:
            raise InputError(f"method.ema is {self.ema}: give 0 (none) to below 1")
        if self.own_guidance not in (1, self.guidance):
            raise InputError(
                f"method.own_guidance is {self.own_guidance}: give 1, which takes the teachers' "
                f"in, or {self.guidance} as method.guidance, which keeps it"
            )
        if self.std is not None and self.rollout != "euler":
            raise InputError("method.std is of an Euler step's law: leave it out, or rollout=euler")
        if not self.sources:
            raise InputError("method.teachers is empty: give e.g. '{ocr: outputs/ocr}'")
        for name in self.sources:
            if not re.fullmatch(r"[A-Za-z]\w*", name):
                raise InputError(f"method.teachers: {name!r} is no name: give letters and digits")
        if self.shares is not None:
            if set(self.shares) != set(self.sources):
                raise InputError(f"method.shares: give one for each of {', '.join(self.sources)}")
            if not all(0 < w < math.inf for w in self.shares.values()):
                raise InputError("method.shares must be above 0")
        self.schedule(self.steps, 1)

    @property
    def sources(self) -> dict[str, str | None]:
        """The teachers by name."""
        return {"start": None} if self.teachers is None else dict(self.teachers)

    @property
    def result(self) -> str | None:
        """Distilled, as nothing was learnt without a prompt; or what it was, with both branches."""
        return "distilled" if self.own_guidance == 1 else None

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The student starts as what the run starts from."""
        teachers = {f"teacher_{k}": RoleSpec(source=run) for k, run in self.sources.items()}
        average = {"ema": RoleSpec(follows="student", decay=self.ema)}
        return {
            "student": RoleSpec(trainable=True),
            **teachers,
            **(average if self.ema else {}),
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("student", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """What the student's sampler visits, a micro-batch of each step; one update on all."""
        grid, update = self.schedule(self.steps, batch.shape[0]), []
        shares = self._shares(batch)
        # One teacher's prompts together, so that most micro-batches ask one teacher.
        order = shares.argmax(1).argsort(stable=True).to(batch.ids.device)
        batch = replace(batch, extra={"shares": shares.to(batch.ids.device)}).select(order)
        student = guided(roles["student"], self.own_guidance)
        for part in batch.split(self.micro):
            path = simulate(student, part, grid, self.rollout, rng)
            for i, x in enumerate(path.x):
                extra = {**part.extra, "x": x, "step": torch.full_like(part.ids, i)}
                update.append(replace(part, weight=torch.ones(len(part)), extra=extra))
        yield update

    def _shares(self, batch: Batch) -> Tensor:
        """w: b j. Raises InputError for a prompt that names no teacher."""
        names = list(self.sources)
        if self.by is None:
            shares = [1.0 if self.shares is None else self.shares[n] for n in names]
            w = torch.tensor(shares)
            return (w / w.sum()).expand(len(batch), -1).clone()
        w = torch.zeros(len(batch), len(names))
        for row, meta in enumerate(batch.meta):
            named = str(meta.get(self.by))
            if named not in names:
                raise InputError(
                    f"method.by={self.by}: a prompt's is {named!r}, which is no teacher: choose "
                    f"from {', '.join(names)} ({batch.prompts[row]!r})"
                )
            w[row, names.index(named)] = 1
        return w

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch, of one step."""
        assert batch.cond is not None
        i, x = int(batch.extra["step"][0]), batch.extra["x"]
        sigma, after = self.schedule(self.steps, batch.shape[0]).sigmas[i : i + 2]
        t = x.new_full(x.shape[:1], sigma)
        with torch.no_grad():
            target = self._target(roles, x, t, batch)
        error = (self._said(roles["student"], 1.0, x, t, batch) - target).square().mean((0, 2, 3))
        scale = 1.0 if self.std is None else (after - sigma) ** 2 / (2 * self.std**2)
        noted = {"speed": target.square().mean(), f"error_{i + 1}": error.detach().mean()}
        return weighted(batch, scale * error, noted)

    def _said(self, role: Velocity, scale: float, x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """What is matched of a role: its velocity under that guidance, 1 b n c, or both of its
        branches, 2 b n c."""
        assert batch.cond is not None
        if self.own_guidance == 1:
            return guided(role, scale)(x, t, batch.cond)[None]
        return torch.stack(branches(role, x, t, batch.cond))

    def _target(self, roles: Mapping[str, Any], x: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Σ_j w_j·v_j: 1 or 2 b n c. A teacher that no rank needs is not asked; else all ask it."""
        shares = batch.extra["shares"].to(x.device)
        asked = [any(row) for row in zip(*gather_objects(shares.any(0).tolist()), strict=True)]
        target = torch.zeros_like(x)[None]  # 1 b n c
        for j, name in enumerate(self.sources):
            if asked[j]:
                v = self._said(roles[f"teacher_{name}"], self.guidance, x, t, batch)
                target = target + shares[:, j, None, None] * v
        return target
