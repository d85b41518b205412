"""Distribution matching distillation of a flow: DMD2 (Yin et al., arXiv 2405.14867) and decoupled
DMD (arXiv 2511.22677), settings of one core.

    x_k from the student's own sampler (backward simulation),  x̂ = x_k − σ_k·v_student(x_k, σ_k)
    x_τ = (1 − τ)·x̂ + τ·ε,  x̂_fake, x̂_c, x̂_u from the scores of the student's and the teacher's laws
    Δ = w·(x̂_fake − x̂_c)(τ_DM) − w·(α − 1)·(x̂_c − x̂_u)(τ_CA),  w = 1/(mean|x̂ − x̂_real| + 10⁻⁶)
    L_student = ½·‖x̂ − sg[x̂ − Δ]‖²/dim,        every `every`-th step
    L_fake = ‖v_fake(x_t, t) − (ε − x̂)‖²/dim,    every step

With one τ for both terms Δ is DMD2's, of the guided real score; with two it is the decoupled one,
whose laws set the guidance that comes out (α_eff, told before training). Added on demand: an
adversarial term (distill.adversarial), and a reward's gradient beside the matching, as in DMDR's
(arXiv 2511.13649) joint stage, without its other parts. No data is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill._common import (
    Critic,
    Renoise,
    check_rollout,
    check_scale,
    effective_guidance,
    shorten,
    simulate,
)
from flux2.errors import InputError, check_positive
from flux2.flow import (
    TimeDensity,
    TimeWeighting,
    Uniform,
    Unweighted,
    expand,
    interpolate,
    x0_from_velocity,
)
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.samplers import branches
from flux2.schedule import EmpiricalShift, Schedule
from flux2.types import Batch, DirectScore, Memoryless, Metrics, RoleSpec, Turn


@dataclass
class DMD(Memoryless):
    """Method of stage=distill.

    Attributes:
        guidance: α, of the teacher.
        steps, schedule, rollout: how the student is sampled, in training as after it.
        match: law of τ_DM. augment: law of τ_CA; None: the same τ and ε (DMD2).
        normalise: w as above; False: w = 1.
        every: steps from one update of the student to the next; the fake score has one each step.
        fake_density, fake_weighting: of the fake score's loss.
        ema: decay of an average of the student's weights; 0: none.
        critic: an adversarial term. score, reward: a reward with a gradient, and its strength λ:
            Δ ← Δ − λ·dim·∂R/∂x̂, of at most `cap` root-mean-square.
        std: of the data's latents, for α_eff.
        micro: samples a micro-batch.
    """

    guidance: float = 3.0
    steps: int = 4
    rollout: str = "euler"
    match: Renoise = field(default_factory=Renoise)
    augment: Renoise | None = None
    normalise: bool = True
    every: int = 5
    fake_density: TimeDensity = field(default_factory=Uniform)
    fake_weighting: TimeWeighting = field(default_factory=Unweighted)
    ema: float = 0.0
    critic: Critic | None = None
    score: DirectScore | None = None
    reward: float = 0.02
    cap: float = 1.0
    std: float = 1.0
    micro: int = 32
    schedule: Schedule = field(default_factory=EmpiricalShift)
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = "distilled"

    def __post_init__(self) -> None:
        check_scale(self.guidance)
        check_rollout(self.rollout)
        check_positive({"every": self.every, "micro": self.micro, "std": self.std,
                        "reward": self.reward, "cap": self.cap})  # fmt: skip
        if not 0 <= self.ema < 1:
            raise InputError(f"method.ema is {self.ema}: give 0 (none) to below 1")
        self.schedule(self.steps, 1)
        if self.score is not None:
            self.score.check_gradient()

    def describe(self) -> str:
        """What the laws of τ make of the guidance, at 1024 tokens."""
        grid = self.schedule(self.steps, 1024)
        effective = effective_guidance(
            self.guidance, self.match, self.augment, grid, self.std, self.normalise
        )
        if self.augment is None:
            return f"DMD: the fixed point is the teacher's law under guidance {self.guidance:g}"
        weak = ", as long as it moves images by less than their spread" if self.normalise else ""
        return f"DMD: guidance {self.guidance:g} of the teacher amounts to {effective:.3g}{weak}"

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """Student and fake score start as the teacher."""
        average = {"ema": RoleSpec(follows="student", decay=self.ema)}
        return {
            "student": RoleSpec(trainable=True),
            "fake": RoleSpec(trainable=True),
            "teacher": RoleSpec(),
            **({} if self.critic is None else self.critic.roles),
            **(average if self.ema else {}),
        }

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The critics first: the student follows what they have just learnt."""
        heads = () if self.critic is None else self.critic.roles
        return (
            Turn("fake", self.fake_loss),
            *(Turn(name, self.critic.loss) for name in heads if self.critic is not None),
            Turn("student", self.student_loss, self.every),
        )

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """The student's own paths, and of each the one step that is judged; one update."""
        grid = self.schedule(self.steps, batch.shape[0])
        sigmas, update = grid.tensor(), []
        for part in batch.split(self.micro):
            path = simulate(roles["student"], part, grid, self.rollout, rng)
            k = (rng.uniform("step", part.ids) * grid.steps).long().to(path.x.device)  # b
            row, s = torch.arange(len(part), device=k.device), sigmas.to(k.device)
            extra = {"x": path.x[k, row], "x0": path.x0[k, row], "sigma": s[k], "after": s[k + 1]}
            update.append(replace(part, weight=torch.ones(len(part)), extra=extra))
        yield update

    def fake_loss(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> tuple[Tensor, Metrics]:
        """The fake score learns the law of what the student makes."""
        at = Noised.draw(replace(batch, x0=batch.extra["x0"]), self.fake_density, rng)
        error = at.matching(roles["fake"](at.x, at.t, batch.cond))  # b
        loss, _ = weighted(batch, self.fake_weighting(at.t) * error, {})
        return loss, {"fake/loss": error.detach().mean()}

    def student_loss(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> tuple[Tensor, Metrics]:
        """Its one forward with gradients, at the input that the sampler gave it."""
        x, sigma = batch.extra["x"], batch.extra["sigma"]
        x0 = x0_from_velocity(x, roles["student"](x, sigma, batch.cond), sigma)
        made = x0.detach()
        delta, metrics = self._delta(roles, made, batch, rng)
        if self.score is not None:
            pull, told = self._reward(made, batch)
            delta, metrics = delta - pull, metrics | told
        term = 0.5 * (x0 - (made - delta)).square().mean((1, 2))  # b
        if self.critic is not None:
            judged = self.critic.term(roles, x0, batch, rng)
            term, metrics = term + judged, metrics | {"critic/term": judged.detach().mean()}
        return weighted(batch, term, metrics)

    @torch.no_grad()
    def _delta(
        self, roles: Mapping[str, Any], x0: Tensor, batch: Batch, rng: Rng
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Δ: b n c."""
        x, tau = self._renoised(self.match, "match", x0, batch, rng)
        fake = x0_from_velocity(x, roles["fake"](x, tau, batch.cond), tau)
        real, ca = self._real(roles, x, tau, batch, self.augment is None)
        if self.augment is None:
            w = self._normaliser(x0 - (real - ca))
            dm, ca = w * (fake - real), w * ca
        else:
            dm = self._normaliser(x0 - real) * (fake - real)
            x, tau = self._renoised(self.augment, "augment", x0, batch, rng)
            real, ca = self._real(roles, x, tau, batch, True)
            ca = self._normaliser(x0 - real) * ca
        pairs = {"dmd/cos": torch.cosine_similarity(ca.flatten(1), dm.flatten(1), 1).mean()}
        return dm + ca, {
            "dmd/delta": ((fake - real).flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)).mean(),
            **(pairs if self.guidance != 1 else {}),
            "dmd/std": x0.std(),
        }

    @staticmethod
    def _renoised(
        law: Renoise, stream: str, x0: Tensor, batch: Batch, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """x_τ: b n c, and τ: b."""
        u = rng.uniform(stream, batch.ids).to(x0.device)
        tau = law(u, batch.extra["sigma"], batch.extra["after"])
        return interpolate(x0, rng(stream, batch.ids, batch.shape).to(x0.device), tau), tau

    def _real(
        self, roles: Mapping[str, Any], x: Tensor, tau: Tensor, batch: Batch, both: bool
    ) -> tuple[Tensor, Tensor]:
        """x̂_c, and −(α − 1)·(x̂_c − x̂_u) where it is asked for: b n c."""
        assert batch.cond is not None
        if not both or self.guidance == 1:
            real = x0_from_velocity(x, roles["teacher"](x, tau, batch.cond), tau)
            return real, torch.zeros_like(real)
        v_c, v_u = branches(roles["teacher"], x, tau, batch.cond)
        # x̂ = x − τ·v: the difference of two is −τ times that of their velocities.
        return x0_from_velocity(x, v_c, tau), (self.guidance - 1) * expand(tau, x) * (v_c - v_u)

    def _normaliser(self, gap: Tensor) -> Tensor:
        """w: b 1 1."""
        if not self.normalise:
            return torch.ones_like(gap[:, :1, :1])
        return 1 / (gap.abs().mean((1, 2), keepdim=True) + 1e-6)

    def _reward(self, x0: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """λ·dim·∂R/∂x̂, shortened: b n c; the mean reward, and the share of samples whose pull was
        too long. A sample without a score has none."""
        assert self.score is not None
        leaf = x0.detach().requires_grad_()
        with torch.enable_grad():
            reward = self.score.differentiable(leaf, batch)  # b
            total = torch.where(reward.isnan(), 0.0, reward).sum()
            (slope,) = torch.autograd.grad(total, leaf)
        pull = self.reward * x0[0].numel() * slope
        short = shorten(pull, self.cap)
        capped = (short != pull).any(2).any(1).float().mean()
        return short, {"reward": reward.detach().nanmean(), "reward_capped": capped}
