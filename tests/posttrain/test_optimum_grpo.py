"""Where GRPO ends: the law that its sampler draws from, in closed form.

What maximises E[R] − β·KL(p ‖ p_ref) is p* ∝ p_ref·exp(R/β). A sampler whose velocity is affine at
each step of the grid is a linear-Gaussian chain, and its law is known.

For a linear reward GRPO reaches p* where the trained steps draw all of the samples' variance; where
they draw V_c of V, the best that they can do, V_c/V of p*'s tilt. For a reward with curvature it
reaches a law of its own, near to what is best: its gradient leaves out how the KL of later steps
depends on earlier ones. The tests have both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2.analytic import AffinePolicy, Gaussian
from flux2.flow import CPS, DanceSDE, FlowSDE, Kernel
from flux2.samplers import sample_sde
from flux2.schedule import Grid, Linear
from flux2.types import Batch
from posttrain.advantages import GroupRelative
from posttrain.axes import AllSteps, Anchor, Clip, FirstSteps, Guard, TrustRegion
from posttrain.grpo import GRPO
from tests.posttrain.toys import (
    NEAR,
    Centred,
    Quick,
    distance,
    moments,
    prompts,
    scored,
    shrunk,
    train,
)

STD, GROUP, STEPS = 0.8, 32, 5
SLOW = pytest.mark.slow
TILT = torch.tensor([[1.0, -0.5]])
"""The linear reward's slope."""


@dataclass(frozen=True)
class Chain:
    """A linear-Gaussian sampler: x' = α_i·x + γ_i + std_i·noise."""

    alpha: list[float]
    gamma: list[Tensor]
    std: list[float]

    def jacobian(self, i: int) -> float:
        """∂x0/∂x_{i+1}."""
        return math.prod(self.alpha[i + 1 :])

    def law(self) -> tuple[Tensor, float]:
        """Mean and variance of what it makes of standard normal noise."""
        mean, var = torch.zeros(1, 2), 1.0
        for alpha, gamma, std in zip(self.alpha, self.gamma, self.std, strict=True):
            mean, var = alpha * mean + gamma, alpha**2 * var + std**2
        return mean, var

    def drawn(self) -> float:
        """The part of that variance that its steps have drawn."""
        return sum((self.jacobian(i) * s) ** 2 for i, s in enumerate(self.std))


def linear(kernel: Kernel, grid: Grid, i: int, window: tuple[int, ...]) -> tuple[float, ...]:
    """(p, q, std) of step i: its mean is p·x + q·v."""
    if i not in window:
        return 1.0, grid.sigmas[i + 1] - grid.sigmas[i], 0.0
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    of_x, of_v = kernel(one, 0 * one, grid, i), kernel(0 * one, one, grid, i)
    return float(of_x.mean), float(of_v.mean), of_x.std


def chain(policy: AffinePolicy, kernel: Kernel, grid: Grid, window: tuple[int, ...]) -> Chain:
    """The sampler that `policy` and the kernel are."""
    steps = [linear(kernel, grid, i, window) for i in range(grid.steps)]
    slope, offset = policy.slope.detach().flatten().tolist(), policy.offset.detach()
    alpha = [p + q * a for (p, q, _), a in zip(steps, slope, strict=True)]
    gamma = [q * offset[i] for i, (_, q, _) in enumerate(steps)]
    return Chain(alpha, gamma, [s for *_, s in steps])


def draws(
    policy: Any, kernel: Kernel, grid: Grid, window: tuple[int, ...], count: int = 20_000
) -> Tensor:
    """What the sampler draws: count 1 2."""
    batch, rng = prompts(count, 1, 2), Quick(99, 0)
    noise = rng("rollout", batch.ids, (1, 2))
    with torch.no_grad():
        return sample_sde(
            policy, noise, batch.cond, grid, kernel, window,
            lambda i: rng("sde", batch.ids, (1, 2), counter=i),
        )[0]  # fmt: skip


def tilt(x: Tensor, batch: Batch) -> Tensor:
    return (x * TILT).sum((1, 2))


def grpo(
    kernel: Kernel, reward: Any = tilt, sign: float = 1.0, updates: int = 120, **kwargs: Any
) -> tuple[Any, ...]:
    """Trains; (policy, reference, grid, window)."""
    grid = Linear()(STEPS, 1)
    policy = AffinePolicy(torch.tensor([[0.5, -0.3]]), STD, grid)
    reference = copy.deepcopy(policy).requires_grad_(False)
    settings: dict[str, Any] = {
        "group": GROUP, "steps": STEPS, "chunk": 4096, "schedule": Linear(), "kernel": kernel,
        "window": AllSteps(), "surrogate": Clip(0.5), "anchor": Anchor(1.0),
        "advantage": GroupRelative(1e6),
    }  # fmt: skip
    method = GRPO(scored(lambda x, b: sign * reward(x, b)), **{**settings, **kwargs})
    window = method.window(grid, Quick(0, 0))
    train(method, {"policy": policy, "reference": reference}, prompts(16, 1, 2), updates, 0.05)
    return policy, reference, grid, window


def tilted_by(reference: Chain, reward_std: float, each: Callable[[int], float]) -> Tensor:
    """How far a linear reward moves the mean: at step i by g·F_i·(c/s_R)/(pull of the anchor), with
    F_i = ∂x0/∂x_{i+1} and `each` 1/pull. Nothing else changes."""
    rate = shrunk(GROUP) / reward_std
    noisy = [i for i, s in enumerate(reference.std) if s > 0]
    return TILT * rate * sum(reference.jacobian(i) ** 2 * each(i) for i in noisy)


@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        (CPS(1.0), AllSteps()),
        (FlowSDE(0.7), AllSteps()),
        pytest.param(DanceSDE(0.6), AllSteps(), marks=SLOW),
        pytest.param(CPS(0.7), AllSteps(), marks=SLOW),
        pytest.param(FlowSDE(0.7), FirstSteps(2, skip=1), marks=SLOW),
    ],
)
def test_grpo_tilts_the_reference_by_its_reward(kernel: Kernel, window: Any):
    """p* ∝ p_ref·exp(R/β'), R linear: the mean moves by g·V_c/β' and the variance stays. V_c is
    what the trained steps draw; CPS of η 1 forgets its noise: V_c is all of V, and this is p*.
    β' = β·s_R/c: the advantage is R over its spread in the group."""
    policy, reference, grid, steps = grpo(kernel, window=window)
    before, after = (chain(p, kernel, grid, steps) for p in (reference, policy))
    mean, var = before.law()
    spread = float(TILT.norm()) * math.sqrt(var)
    strength = shrunk(GROUP) / spread
    want = mean + TILT * strength * before.drawn()
    if kernel == CPS(1.0):
        assert before.drawn() == pytest.approx(var)
        gibbs = Gaussian(mean, math.sqrt(var)).tilted(TILT * strength)
        torch.testing.assert_close(want, gibbs.mean)
    far = float((want - mean).norm())
    assert far > 0.2
    got, got_var = after.law()
    assert float((got - want).norm()) < 0.04 * far
    assert got_var == pytest.approx(var, rel=0.03)
    drawn = draws(policy, kernel, grid, steps)
    for k in range(2):
        law = Gaussian(want[0, k], math.sqrt(var))
        assert distance(drawn[:, 0, k], law) < NEAR
        assert moments(drawn[:, 0, k]) == pytest.approx(
            [float(want[0, k]), math.sqrt(var), 0, 0], abs=0.06
        )


@pytest.mark.parametrize(
    "wrong", [{"sign": -1.0}, pytest.param({"anchor": Anchor(0.0)}, marks=SLOW)]
)
def test_grpos_optimum_is_missed_where_the_reward_or_the_anchor_is_wrong(wrong: dict):
    """The control of the test above: the reward's negative, and no anchor."""
    kernel = CPS(1.0)
    policy, reference, grid, steps = grpo(kernel, updates=60, **wrong)
    mean, var = chain(reference, kernel, grid, steps).law()
    want = mean + TILT * shrunk(GROUP) / float(TILT.norm()) * math.sqrt(var)
    drawn = draws(policy, kernel, grid, steps)[:, 0, 0]
    assert distance(drawn, Gaussian(want[0, 0], math.sqrt(var))) > 8 * NEAR


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "pull"),
    [
        ({"surrogate": TrustRegion(1.0)}, lambda q, std, dt: 1 / std**2),
        ({"anchor": Anchor(0.5, "velocity")}, lambda q, std, dt: 2 * 0.5 / q**2),
        ({"surrogate": Guard(0.5)}, lambda q, std, dt: -dt / std**3),
    ],
    ids=["trust", "velocity", "guard"],
)
def test_what_the_other_axes_make_of_grpos_optimum(kwargs: dict, pull: Any):
    """Each axis weighs the steps in its own way, and the tilt is the sum: a trust region changes
    nothing; ‖Δv‖² is the KL with 2·std²/q² in place of 1 (q = ∂mean/∂v); the guard multiplies a
    step's reward by std/−dt, and so divides its β by it."""
    kernel = FlowSDE(0.7)
    policy, reference, grid, steps = grpo(kernel, updates=400, **kwargs)
    before = chain(reference, kernel, grid, steps)
    mean, var = before.law()
    spread = float(TILT.norm()) * math.sqrt(var)

    def each(i: int) -> float:
        _, q, std = linear(kernel, grid, i, steps)
        return 1 / pull(q, std, grid.sigmas[i + 1] - grid.sigmas[i])

    shift = tilted_by(before, spread, each)
    got, got_var = chain(policy, kernel, grid, steps).law()
    assert float((got - mean - shift).norm()) < 0.06 * float(shift.norm())
    assert got_var == pytest.approx(var, rel=0.04)


PEAK, CURVE = torch.tensor([[1.2, 0.4]]), 4.0


def bowl(x: Tensor, batch: Batch | None = None) -> Tensor:
    return -0.5 * CURVE * (x - PEAK.to(x)).square().sum((1, 2))


def pulled(reference: Chain, beta: float, look_ahead: bool) -> Chain:
    """Each step's mean where the bowl's pull equals the KL's, from the last step back to the first.

    F·x + G is the expected x0 under the later steps. GRPO pulls by ∂E[R]/∂μ (look_ahead False); the
    path's whole objective also charges the KL of later steps (True): by dynamic programming, W(x) =
    −½P·x² + b·x.
    """
    alpha, gamma = list(reference.alpha), list(reference.gamma)
    f, g = alpha[-1], gamma[-1]
    p, b = CURVE * f**2, CURVE * f * (PEAK - g)
    for i in reversed(range(len(alpha) - 1)):
        k = beta / reference.std[i] ** 2
        if not look_ahead:
            p, b = CURVE * f**2, CURVE * f * (PEAK - g)
        alpha[i], gamma[i] = (z * k / (p + k) for z in (alpha[i], gamma[i]))
        gamma[i] = gamma[i] + b / (p + k)
        f, g = f * alpha[i], f * gamma[i] + g
        a, c = reference.alpha[i], reference.gamma[i]
        p, b = p * k / (p + k) * a**2, k * a / (p + k) * (b - p * c)
    return Chain(alpha, gamma, reference.std)


@pytest.mark.parametrize("window", [AllSteps(), pytest.param(FirstSteps(1, skip=3), marks=SLOW)])
def test_grpo_under_a_curved_reward(window: Any):
    """R = −q/2·‖x − c‖² moves mean and variance. GRPO reaches the law at which each step's own pull
    is balanced; the optimum of E[R] − β·KL of the whole path lies near it, and is it where one
    step is trained. That optimum has the mean of p* ∝ p_ref·exp(R/β), but not its variance: the
    noise of a step is the kernel's."""
    kernel, beta = CPS(1.0), 1.0
    policy, reference, grid, steps = grpo(
        kernel, bowl, advantage=Centred(), anchor=Anchor(beta), window=window
    )
    before = chain(reference, kernel, grid, steps)
    scale = beta / (1 - 1 / GROUP)
    if len(steps) == 1:
        before = replace(before, std=[s if i in steps else 1e-9 for i, s in enumerate(before.std)])
    balanced, best = (pulled(before, scale, look_ahead).law() for look_ahead in (False, True))
    mean, var = before.law()
    gibbs = Gaussian(mean, math.sqrt(var)).tilted(CURVE * PEAK / scale, CURVE / scale)
    far = float((best[0] - mean).norm())
    assert far > 0.1 and best[1] < 0.95 * var
    assert float((balanced[0] - best[0]).norm()) < 0.2 * far
    if len(steps) == 1:
        torch.testing.assert_close(balanced, best)
    else:
        torch.testing.assert_close(best[0], gibbs.mean)
        assert float(gibbs.std**2) < best[1] < balanced[1] < var
    got, got_var = chain(policy, kernel, grid, steps).law()
    assert float((got - balanced[0]).norm()) < 0.05 * far
    assert got_var == pytest.approx(balanced[1], rel=0.03)
