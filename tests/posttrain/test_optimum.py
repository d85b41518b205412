"""Where the methods without transitions end, as a law and not only as a mean.

What maximises E[R] − β·KL(p ‖ p_ref) is p* ∝ p_ref·exp(R/β). Each method is trained by its own code
from a Gaussian or a mixture, and compared with the law at which its expected gradient vanishes,
found by quadrature:

    SFT            the data's law
    AWM            p* for a linear reward, at any density of t; to first order in 1/β for others
    NFT, direct    for a linear reward p* at an effective β, which is in the tests
    direct without an anchor: no law, it collapses onto the reward's peak

GRPO is in test_optimum_grpo.py. DPO and KTO: test_dpo.py, test_kto.py, and test_implicit_reward.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import root
from torch import Tensor, nn

from flux2.analytic import Gaussian, GaussianPolicy, Mixture, MixturePolicy, toy_condition
from flux2.flow import Uniform
from flux2.samplers import sample_euler
from flux2.schedule import Grid, Linear
from flux2.types import Batch
from posttrain.awm import AWM
from posttrain.axes import Anchor
from posttrain.direct import Direct, DirectAlign, LastSteps, OneStep
from posttrain.nft import NFT
from posttrain.sft import FlowMatching
from tests.posttrain.toys import NEAR, Centred, Known, Quick, distance, prompts, scored, train

STD, GROUP = 0.8, 32
SLOW = pytest.mark.slow

EULER = Linear()(60, 1)
"""Fine enough that Euler's samples are nearly of the law that the policy stands for."""
LEVELS = [((x + 1) / 2, w / 2) for x, w in zip(*np.polynomial.legendre.leggauss(12), strict=True)]
"""(t, weight): a quadrature of the uniform density of t."""


def normal(count: int = 61, width: float = 5.0) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a standard normal law; the trapezoid rule, which for it is exact to
    far more digits than are looked at."""
    x = torch.linspace(-width, width, count, dtype=torch.float64)
    w = (-(x**2) / 2).exp()
    return x, w / w.sum()


Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
"""(v, v_ref, u, A, t) → the loss at each node; at its law, and with no gradient but v's."""


def expected(
    policy: Any, reference: Any, reward: Any, loss: Loss, grid: Grid = EULER, nodes: int = 25
) -> Tensor:
    """E of a loss over x0 ~ the policy's own samples, noise and t, by quadrature; A = R − E R."""
    (z, mass), (eps, noise) = normal(), normal(nodes)
    with torch.no_grad():
        x0 = sample_euler(policy, z[:, None, None], toy_condition(len(z), 1), grid)[:, 0, 0]
        gain = reward(x0[:, None, None])
        gain = gain - (mass * gain).sum()
    pairs = torch.meshgrid(torch.arange(len(z)), torch.arange(len(eps)), indexing="ij")
    i, j = (k.flatten() for k in pairs)
    total = torch.zeros((), dtype=torch.float64)
    for t, weight in LEVELS:
        x = ((1 - t) * x0[i] + t * eps[j])[:, None, None]
        times = torch.full_like(x[:, 0, 0], t)
        v, held = (role(x, times).flatten() for role in (policy, reference))
        value = loss(v, held.detach(), eps[j] - x0[i], gain[i], t)
        total = total + weight * (mass[i] * noise[j] * value).sum()
    return total


def stationary(policy: Any, objective: Callable[[Any], Tensor]) -> Any:
    """The policy at which the gradient of `objective` vanishes, found from `policy` on."""
    found = copy.deepcopy(policy).double().requires_grad_(True)
    parameters = list(found.parameters())

    def force(theta: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            nn.utils.vector_to_parameters(torch.from_numpy(theta), parameters)
        grads = torch.autograd.grad(objective(found), parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None]).numpy()

    start = nn.utils.parameters_to_vector(parameters).detach().numpy().copy()
    result = root(force, start, method="lm", tol=1e-7)  # logits have a direction without force
    assert result.success, result.message
    force(result.x)
    return found


def sampled(policy: Any, count: int = 20_000) -> Tensor:
    """What Euler's method draws from the policy: count numbers."""
    batch = prompts(count, 1, 1)
    noise = Quick(99, 0)("rollout", batch.ids, (1, 1))
    with torch.no_grad():
        return sample_euler(policy, noise, batch.cond, EULER).flatten()


def gaussians() -> dict[str, Any]:
    """Policy and reference of one number, N(0.5, STD²); both parameters learn."""
    policy = GaussianPolicy(torch.tensor([[0.5]]), STD, train_std=True)
    return {n: copy.deepcopy(policy) for n in ("policy", "old", "reference")}


def slope(x: Tensor, batch: Batch | None = None) -> Tensor:
    return x.sum((1, 2))


def hill(x: Tensor, batch: Batch | None = None) -> Tensor:
    return -0.5 * 1.5 * (x.sum((1, 2)) - 1.5) ** 2


SCALE = 1 - 1 / GROUP  # of an advantage whose mean is the group's own
COMMON: dict[str, Any] = {
    "group": GROUP, "steps": EULER.steps, "chunk": 4096, "schedule": Linear(),
    "density": Uniform(),
}  # fmt: skip


def awm(reward: Any, beta: float) -> AWM:
    return AWM(scored(reward), anchor=Anchor(beta, "velocity"), advantage=Centred(), **COMMON)


def awms(beta: float) -> Loss:
    """A·‖v − u‖² + β·‖v − v_ref‖²."""
    return lambda v, held, u, a, t: SCALE * a * (v - u) ** 2 + beta * (v - held) ** 2


A_MAX, NFT_BETA = 10.0, 0.7


def nft(reward: Any, beta: float) -> NFT:
    return NFT(scored(reward), beta=NFT_BETA, anchor=Anchor(beta, "velocity"),
               advantage=Centred(A_MAX), **COMMON)  # fmt: skip


def nfts(beta: float) -> Loss:
    """r̃ − (1 − r̃) = A/A_max; where v = v_old each branch is t·(v − u)²/|v − u| with its denominator
    held. The sign is smoothed over the distance of two nodes, which a quadrature needs."""

    def loss(v: Tensor, held: Tensor, u: Tensor, a: Tensor, t: float) -> Tensor:
        pull = SCALE * a / A_MAX * NFT_BETA * 2 * t * ((v - u) / 0.1).tanh().detach() * v
        return pull + beta * (v - held) ** 2

    return loss


def vector(policy: Any) -> Tensor:
    """The law's parameters in a row."""
    law = fixed(policy.law)
    if isinstance(law, Gaussian):
        return torch.stack([law.mean.flatten()[0], torch.as_tensor(law.std).log()])
    return torch.cat([law.means[:, 0], law.weights.log(), torch.as_tensor(law.std).log()[None]])


def check(policy: Any, want: Any, start: Any) -> None:
    """That a policy's parameters, and what it draws, are those of the law `want`."""
    moved, gap = vector(want) - vector(start), vector(policy) - vector(want)
    assert float(gap.norm()) < 0.06 * float(moved.norm())
    assert distance(sampled(policy), fixed(want.law)) < NEAR
    assert distance(sampled(start), fixed(want.law)) > 4 * NEAR


def fixed(law: Any) -> Any:
    """The law in numbers without gradients."""
    values = {k: v.detach().float() if isinstance(v, Tensor) else v for k, v in vars(law).items()}
    return type(law)(**values)


def kappa(t: Tensor) -> Tensor:
    """−dv/dm of a Gaussian's velocity: t/C_t."""
    return t / ((1 - t) ** 2 * STD**2 + t**2)


@pytest.mark.parametrize(
    ("make", "loss", "reward", "beta", "nodes"),
    [
        (awm, awms, hill, 1.0, 25),
        (nft, nfts, slope, 0.03, 121),
        pytest.param(awm, awms, slope, 1.0, 25, marks=SLOW),
        pytest.param(nft, nfts, hill, 0.03, 121, marks=SLOW),
    ],
)
def test_matching_methods_reach_their_optimum(
    make: Any, loss: Any, reward: Any, beta: float, nodes: int
):
    """Mean and spread, as numbers and as a law."""
    roles, data = gaussians(), prompts(16, 1, 1)
    reference = roles["reference"]
    held = copy.deepcopy(reference).double()
    want = stationary(reference, lambda p: expected(p, held, reward, loss(beta), nodes=nodes))
    train(make(reward, beta), roles, data, 200, 0.03)
    check(roles["policy"], want, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "loss", "beta", "nodes"), [(awm, awms, 1.0, 25), (nft, nfts, 0.03, 121)]
)
def test_the_wrong_sign_and_another_anchor_miss_it(make: Any, loss: Any, beta: float, nodes: int):
    """The control of the test above: the reward's negative, and an anchor twice as strong."""
    reference = gaussians()["reference"]
    held = copy.deepcopy(reference).double()
    want = stationary(reference, lambda p: expected(p, held, hill, loss(beta), nodes=nodes))
    for wrong in (make(lambda x, b: -hill(x, b), beta), make(hill, 2 * beta)):
        roles = gaussians()
        train(wrong, roles, prompts(16, 1, 1), 100, 0.03)
        assert distance(sampled(roles["policy"]), fixed(want.law)) > 2 * NEAR


def test_the_optima_of_matching_methods_are_tilts_of_the_reference():
    """R = x. AWM: v − v_ref = −κ·Δm is E[A·u | x_t]/β at each t, whatever the density, where Δm =
    s²/β: p* ∝ p_ref·exp(R/β). NFT: its denominator leaves E|v − u| = √(2·Var(u | x_t)/π), so Δm =
    β'·√(2/π)·E[κ·t·√Σ_t]/(A_max·β·E[κ²]), Σ_t = Var(x0 | x_t). Neither changes the spread.

    Under a curved reward AWM's law is p* to first order in 1/β, and beyond that less narrow."""
    reference = gaussians()["reference"]
    held = copy.deepcopy(reference).double()
    euler = 0.05  # of a move: the quadrature has Euler's samples, the formulas the exact law's

    def at(reward: Any, loss: Loss, nodes: int = 25) -> Gaussian:
        found = stationary(reference, lambda p: expected(p, held, reward, loss, nodes=nodes))
        return fixed(found.law)

    for beta in (0.5, 2.0):
        gibbs, found = fixed(reference.law).tilted(SCALE / beta), at(slope, awms(beta))
        assert float(found.mean) - 0.5 == pytest.approx(float(gibbs.mean) - 0.5, rel=euler)
        assert float(found.std) == pytest.approx(float(gibbs.std), abs=1e-3)
    t = torch.tensor([t for t, _ in LEVELS])
    w = torch.tensor([w for _, w in LEVELS])
    k, spread = kappa(t), STD * (t * kappa(t)).sqrt()
    shift = (w * k * t * spread).sum() / (w * k**2).sum() * math.sqrt(2 / math.pi)
    shift = float(shift) * NFT_BETA * SCALE / (A_MAX * 0.03)
    found = at(slope, nfts(0.03), 121)
    assert float(found.mean) - 0.5 == pytest.approx(shift, rel=euler)
    assert float(found.std) == pytest.approx(STD, abs=1e-3)
    missed = []
    for beta in (8.0, 4.0, 2.0, 1.0):
        rate = 1.5 * SCALE / beta
        gibbs, found = fixed(reference.law).tilted(rate * 1.5, rate), at(hill, awms(beta))
        missed.append((float(found.std) - float(gibbs.std)) / (STD - float(gibbs.std)))
    assert missed == sorted(missed) and 0 < missed[0] < 0.12 < missed[-1] < 0.3


# ---------------------------------------------------------------- mixtures


MODES = Mixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.5, 0.5]), 0.4)


@pytest.mark.slow
def test_awm_moves_the_modes_and_their_weights():
    """A mixture's p* has other weights, too: w_k·exp(λ·m_k + λ²s²/2), and means moved by λ·s². AWM
    goes five sixths of the way to it."""
    beta = 2.0
    roles = {n: MixturePolicy(MODES) for n in ("policy", "reference")}
    reference = roles["reference"]
    held = copy.deepcopy(reference).double()
    want = stationary(reference, lambda p: expected(p, held, slope, awms(beta)))
    gibbs = MODES.tilted(torch.tensor([SCALE / beta]))
    train(awm(slope, beta), roles, prompts(32, 1, 1), 400, 0.02)
    check(roles["policy"], want, reference)
    far = distance(sampled(reference), gibbs)
    assert far > 0.2 and distance(sampled(roles["policy"]), gibbs) < far / 5


def test_sft_reaches_the_datas_mixture():
    law = Mixture(torch.tensor([[-1.2], [0.9]]), torch.tensor([0.3, 0.7]), 0.3)
    policy = MixturePolicy(MODES)
    start = copy.deepcopy(policy)

    def data(step: int) -> Batch:
        batch, rng = prompts(512, 1, 1), Quick(7, step)
        x0 = law.sample(rng.uniform("mode", batch.ids), rng("data", batch.ids, (1, 1)))
        return replace(batch, x0=x0, weight=torch.full((512,), 1 / 512))

    train(FlowMatching(Uniform(), micro=512), {"model": policy}, data, 300, 0.03)
    check(policy, MixturePolicy(law), start)


# ---------------------------------------------------------------- the reward's own gradient


def test_direct_reaches_its_optimum():
    """R = −q/2·(x − c)² through all of the sampler's steps, with ‖Δv‖² as the anchor."""
    grid, beta = Linear()(12, 1), 0.5
    roles = gaussians()
    reference = roles["reference"]
    held = copy.deepcopy(reference).double()
    z, mass = normal()

    def objective(p: Any) -> Tensor:
        cond = toy_condition(len(z), 1)
        reward = hill(sample_euler(p, z[:, None, None], cond, grid))
        anchor = expected(p, held, hill, lambda v, r, u, a, t: beta * (v - r) ** 2, grid)
        return anchor - (mass * reward).sum()

    want = stationary(reference, objective)
    method = Direct(
        Known(hill), samples=GROUP, steps=12, chunk=4096, bound=1e9, through=LastSteps(12),
        anchor=Anchor(beta, "velocity"), schedule=Linear(),
    )  # fmt: skip
    train(method, roles, prompts(16, 1, 1), 150, 0.03)
    moved, gap = (vector(p) - vector(want) for p in (reference, roles["policy"]))
    assert float(moved.norm()) > 0.5 and float(gap.norm()) < 0.05 * float(moved.norm())


@pytest.mark.parametrize(
    ("through", "beta"),
    [
        (DirectAlign(0.3, 0.6, 0.1), 0.2),
        pytest.param(LastSteps(1), 0.02, marks=SLOW),
        pytest.param(OneStep(0.5, 0.6), 0.5, marks=SLOW),
    ],
)
def test_each_way_through_the_sampler_has_its_own_tilt(through: Any, beta: float):
    """R = x: the mean moves by S/(2·β·E[κ²]), S = ∂x̂0/∂m of that way, and the spread stays."""
    grid = Linear()(12, 1)
    t = torch.tensor([t for t, _ in LEVELS])
    w = torch.tensor([w for _, w in LEVELS])
    if isinstance(through, DirectAlign):
        level = 0.3 + 0.3 * t
        gain = (w * 0.1 * kappa(level) / (1 - level + 0.1)).sum()
    else:
        sigma = torch.tensor(grid.sigmas[11] if isinstance(through, LastSteps) else grid.sigmas[6])
        gain = sigma * kappa(sigma)
    shift = float(gain / (2 * beta * (w * kappa(t) ** 2).sum()))
    roles = gaussians()
    method = Direct(
        Known(slope), samples=GROUP, steps=12, chunk=4096, bound=1e9, through=through,
        anchor=Anchor(beta, "velocity"), schedule=Linear(),
    )  # fmt: skip
    train(method, roles, prompts(16, 1, 1), 120, 0.03)
    assert float(roles["policy"].mean.detach()) - 0.5 == pytest.approx(shift, rel=0.06)
    assert float(roles["policy"].log_std.detach().exp()) == pytest.approx(STD, rel=0.03)


@pytest.mark.slow
def test_without_an_anchor_direct_collapses_onto_the_rewards_peak():
    """It has no optimum but the peak itself: the spread goes to 0."""
    roles = gaussians()
    method = Direct(Known(hill), samples=GROUP, steps=12, chunk=4096, bound=1e9,
                    through=LastSteps(12), schedule=Linear())  # fmt: skip
    train(method, roles, prompts(4, 1, 1), 200, 0.1)
    assert float(roles["policy"].mean.detach()) == pytest.approx(1.5, abs=0.05)
    assert float(roles["policy"].log_std.detach().exp()) < 0.1 * STD
