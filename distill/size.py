"""Healing a transformer from which blocks were removed, by its whole self: output and feature
distillation as in BK-SDM (Kim et al., arXiv 2305.15798, eq. 2 to 4), for velocities.

    t ~ p(t),  ε ~ N(0, I),  x_t = (1 − t)·x0 + t·ε
    L_out  = ‖v_S(x_t, t, c) − v_T(x_t, t, c)‖² / dim
    L_feat = mean over kept blocks j and tokens i of  ‖h_S^j,i − h_T^m(j),i‖² / ‖h_T^m(j),i‖²
    L_task = ‖v_S(x_t, t, c) − (ε − x0)‖² / dim
    L = L_out + features·L_feat + task·L_task

m(j) is the teacher's last block before the next kept one (match=group): a kept block is to do what
those removed behind it did, so that the next one sees what it was trained on. Or it is the kept
block itself (match=own), which leaves the work to those behind. A token's features are divided by
their own norm, since a few tokens are larger than all others together.

The teacher is asked without guidance, with the prompt or, where the data dropped it, without: a
student of both branches is guided as the teacher is. A distilled teacher has one branch, and the
density should lie where its sampler's steps are.

Which blocks are kept is `eval.shorten`'s. Left out: BK-SDM's unequal weights of its stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.flow import LogitNormal, TimeDensity
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.types import Batch, Memoryless, Metrics, RoleSpec, Turn


@dataclass(frozen=True)
class Size(Memoryless):
    """Method of stage=size.

    Attributes:
        blocks: numbers of the double-stream and of the single-stream blocks that are kept.
        features, task: weights of L_feat and L_task; 0: without.
        match: group or own, see m above.
        density: p(t).
        micro: samples a micro-batch.
        accepts, result: the student is what its teacher is (flux2.types.Method).
    """

    blocks: Sequence[Sequence[int]]
    features: float = 0.5
    task: float = 0.0
    match: str = "group"
    density: TimeDensity = field(default_factory=LogitNormal)
    micro: int = 64
    accepts: ClassVar[tuple[str, ...]] = ("base", "distilled", "guidance-distilled")
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.blocks is None or len(self.blocks) != 2 or not all(map(len, self.blocks)):
            raise InputError(
                f"method.blocks is {self.blocks}: give the numbers of the double-stream and of the "
                "single-stream blocks to keep, one at least of each, as [[0],[0,2]]"
            )
        for name, value in (("features", self.features), ("task", self.task)):
            if not 0 <= value < math.inf:
                raise InputError(f"method.{name} is {value}: give a weight of at least 0")
        if self.match not in ("group", "own"):
            raise InputError(f"method.match is {self.match!r}: choose group or own")
        if self.micro < 1:
            raise InputError(f"method.micro is {self.micro}: it must be at least 1")

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The student has the teacher's kept blocks, the teacher all of them."""
        double, single = map(tuple, self.blocks)
        return {
            "student": RoleSpec(trainable=True, blocks=(double, single)),
            "teacher": RoleSpec(),
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("student", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the batch."""
        yield batch.split(self.micro)

    def pairs(self, depth: tuple[int, int]) -> list[tuple[int, int]]:
        """(j, m(j)) of each kept block, from 1 along the student's way and along the teacher's,
        which has `depth` blocks of each kind."""
        kept = [*(i + 1 for i in self.blocks[0]), *(depth[0] + i + 1 for i in self.blocks[1])]
        if self.match == "group":
            kept = [after - 1 for after in (*kept[1:], sum(depth) + 1)]
        return list(enumerate(kept, 1))

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch."""
        at, cond = Noised.draw(batch, self.density, rng), batch.cond
        assert cond is not None
        student, teacher = roles["student"], roles["teacher"]
        pairs = self.pairs(teacher.depth) if self.features else []
        with torch.no_grad():
            target, theirs = teacher.states(at.x, at.t, cond, [m for _, m in pairs])
        v, mine = student.states(at.x, at.t, cond, [j for j, _ in pairs])
        output = (v - target).square().mean((1, 2))  # b
        found: dict[str, float | Tensor] = {"output": output.detach().mean()}
        term = output
        if pairs:
            gaps = [apart(h, g) for h, g in zip(mine, theirs, strict=True)]
            feature = torch.stack(gaps).mean(0)  # b
            term = term + self.features * feature
            found["features"] = feature.detach().mean()
        if self.task:
            task = at.matching(v)
            term = term + self.task * task
            found["task"] = task.detach().mean()
        return weighted(batch, term, found)


def apart(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared distance of hidden states, b n w each, by each token's own squared norm: b."""
    squared = (mine - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
    return squared.mean(1)
