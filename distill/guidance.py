"""Guidance distillation: what classifier-free guidance needs two forwards for, in one. The first
stage of Meng et al., "On Distillation of Guided Diffusion Models" (CVPR 2023, arXiv 2210.03142),
eq. 3 to 5, for velocities.

    t ~ p(t),  g ~ p(g),  ε ~ N(0, I),  x_t = (1 − t)·x0 + t·ε
    v_c = v_teacher(x_t, t, c),  v_u = v_teacher(x_t, t, ∅)
    v_g = v_u + g_t·(v_c − v_u),  g_t = g where lo ≤ t ≤ hi, else 1        (interval)
    x̂' = [φ·std(x̂_c)/std(x̂_g) + 1 − φ]·x̂_g,  x̂ = x_t − t·v               (rescale)
    target = sg[(x_t − x̂')/t]
    loss = ‖v_student(x_t, t, c, g) − target‖² / dim

A range of strengths reaches the student through the guidance embedder, which is inserted with a
last layer of zeros: it starts as the conditional teacher, bit for bit. One strength is baked in and
needs none. The student never sees the empty prompt, and is sampled with guidance 1.

The interval is Kynkäänniemi et al.'s (arXiv 2404.07724), in t. The rescaling is Lin et al.'s (arXiv
2305.08891, eq. 14 to 16). They rescale the network's output, which at their noisiest time is −x̂; a
flow's is ε − x̂, and rescaling that would leave noise in the image: hence x̂ here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.errors import BatchError, InputError, check_positive
from flux2.flow import LogitNormal, TimeDensity, expand, guide, velocity_from_x0, x0_from_velocity
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.samplers import branches
from flux2.types import Batch, Condition, Memoryless, Metrics, RoleSpec, Turn, Velocity

LAWS = ("uniform", "log-uniform")


@dataclass(frozen=True)
class GuidanceDistillation(Memoryless):
    """Method of stage=guidance.

    Attributes:
        scale: g, of the teacher; 1 is its conditional branch. A number is baked in; [low, high] are
            drawn from, sample by sample, and embedded.
        law: of g on [low, high]: uniform, or log-uniform, which prefers the weak ones.
        default: the strength that an embedding student is given where nothing else is said; None:
            the middle of the range.
        interval: [lo, hi] of t, outside which there is no guidance.
        rescale: φ, from 0 (as guidance gives it) to 1 (x̂ of the conditional one's std).
        density: p(t).
        micro: samples a micro-batch; the teacher's forward is twice that.
        accepts: bases alone: any other teacher's answer is guided already, and would be so twice.
    """

    scale: float | Sequence[float] = 3.0
    law: str = "uniform"
    default: float | None = None
    interval: Sequence[float] = (0.0, 1.0)
    rescale: float = 0.0
    density: TimeDensity = field(default_factory=LogitNormal)
    micro: int = 64
    accepts: ClassVar[tuple[str, ...]] = ("base",)

    def __post_init__(self) -> None:
        low, high = self.range
        if not (0 <= low < math.inf and (low < high < math.inf or not self.embeds)):
            raise InputError(
                f"method.scale is {self.scale}: give a number of at least 0 (1: none), or [low, "
                "high] with low < high to embed the strengths between"
            )
        if self.law not in LAWS:
            raise InputError(f"method.law is {self.law!r}: choose from {', '.join(LAWS)}")
        if self.law == "log-uniform" and low == 0:
            raise InputError("method.law=log-uniform has no 0: give method.scale a low above it")
        if self.default is not None and not (self.embeds and low <= self.default <= high):
            raise InputError(
                f"method.default is {self.default}: give a strength within method.scale=[low, "
                "high], or null where one strength is baked in"
            )
        lo, hi = self.interval if len(self.interval) == 2 else (1.0, 0.0)
        if not 0 <= lo < hi <= 1:
            raise InputError(
                f"method.interval is {list(self.interval)}: give [lo, hi] of t, 0 ≤ lo < hi ≤ 1"
            )
        if not 0 <= self.rescale <= 1:
            raise InputError(f"method.rescale is {self.rescale}: give 0 (none) to 1")
        check_positive({"micro": self.micro})

    @property
    def embeds(self) -> bool:
        """Whether the student is told the strength."""
        return not isinstance(self.scale, float | int)

    @property
    def range(self) -> tuple[float, float]:
        """(low, high) of g; NaN for what is no range."""
        if isinstance(self.scale, float | int):
            return self.scale, self.scale
        low, high = self.scale if len(self.scale) == 2 else (math.nan, math.nan)
        return low, high

    @property
    def result(self) -> str:
        """As FLUX.2 [dev], or as one that has its guidance in it."""
        return "guidance-distilled" if self.embeds else "distilled"

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The student starts as the teacher."""
        low, high = self.range
        shown = (low + high) / 2 if self.default is None else self.default
        student = RoleSpec(trainable=True, embeds=True, strength=shown)
        return {
            "student": student if self.embeds else RoleSpec(trainable=True),
            "teacher": RoleSpec(embeds=False),
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

    def strength(self, u: Tensor) -> Tensor:
        """u: b uniform on [0, 1) → g: b, by the law."""
        low, high = self.range
        if self.law == "uniform":
            return low + (high - low) * u
        return low * (high / low) ** u

    def asked(self, cond: Condition, g: Tensor) -> Condition:
        """What the student is given of a condition: the prompt, and g (b) where it embeds."""
        return replace(cond, null=None, guidance=g if self.embeds else None)

    @torch.no_grad()
    def target(self, teacher: Velocity, x: Tensor, t: Tensor, cond: Condition, g: Tensor) -> Tensor:
        """What the student is to answer: b n c. x: b n c at t: b; g: b.

        Raises:
            InputError: the condition has no empty prompt.
        """
        if cond.null is None:
            raise BatchError(
                "guidance needs the empty prompt's condition: set data.collate.unconditional=true"
            )
        null = replace(cond.null, guidance=None)
        v_c, v_u = branches(teacher, x, t, replace(cond, guidance=None, null=null))
        lo, hi = self.interval
        v = guide(v_c, v_u, torch.where((lo <= t) & (t <= hi), g, 1.0))
        if not self.rescale:
            return v
        x0_c, x0 = x0_from_velocity(x, v_c, t), x0_from_velocity(x, v, t)
        factor = self.rescale * x0_c.std((1, 2)) / x0.std((1, 2)) + 1 - self.rescale  # b
        return velocity_from_x0(x, expand(factor, x0) * x0, t)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch; batch.cond.null is the empty prompt."""
        assert batch.cond is not None
        at = Noised.draw(batch, self.density, rng)
        g = self.strength(rng.uniform("strength", batch.ids)).to(at.t)
        target = self.target(roles["teacher"], at.x, at.t, batch.cond, g)
        v = roles["student"](at.x, at.t, self.asked(batch.cond, g))
        error = (v - target).square().mean((1, 2))  # b
        return weighted(batch, error, {"speed": target.square().mean()})
