"""Conversions, laws of t and transition kernels, against formulas written out anew."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from flux2 import flow
from flux2.analytic import Gaussian
from flux2.errors import InputError
from flux2.flow import (
    CPS,
    CosMap,
    CosMapWeighting,
    DanceSDE,
    FlowSDE,
    InversePower,
    LogitNormal,
    MinSNR,
    Mode,
    Transition,
    Uniform,
    Unweighted,
)
from flux2.schedule import EmpiricalShift, Grid, Linear

EXACT = {"atol": 1e-12, "rtol": 0}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def points(b: int = 6):
    t = torch.linspace(0.05, 0.95, b, dtype=torch.float64)
    return draw(b, 3, 4, seed=1), draw(b, 3, 4, seed=2), t


# -- conversions -----------------------------------------------------------------------------------


def test_interpolation_ends_and_derivative():
    x0, eps, _ = points()
    zero, one = torch.zeros(6).double(), torch.ones(6).double()
    assert torch.equal(flow.interpolate(x0, eps, zero), x0)
    assert torch.equal(flow.interpolate(x0, eps, one), eps)
    slope = flow.interpolate(x0, eps, one * 0.75) - flow.interpolate(x0, eps, one * 0.25)
    torch.testing.assert_close(slope / 0.5, flow.target_velocity(x0, eps), **EXACT)


def test_conversions_recover_the_pair():
    x0, eps, t = points()
    x, v = flow.interpolate(x0, eps, t), flow.target_velocity(x0, eps)
    torch.testing.assert_close(flow.x0_from_velocity(x, v, t), x0, **EXACT)
    torch.testing.assert_close(flow.eps_from_velocity(x, v, t), eps, **EXACT)
    score = flow.score_from_velocity(x, v, t)
    torch.testing.assert_close(score, -eps / t[:, None, None], **EXACT)


def test_conversions_round_trip():
    x, v, t = points()
    back = [
        flow.velocity_from_x0(x, flow.x0_from_velocity(x, v, t), t),
        flow.velocity_from_eps(x, flow.eps_from_velocity(x, v, t), t),
        flow.velocity_from_score(x, flow.score_from_velocity(x, v, t), t),
    ]
    for got in back:
        torch.testing.assert_close(got, v, **EXACT)


def test_low_precision_is_raised_and_double_kept():
    x0, eps, t = points()
    low = flow.interpolate(x0.bfloat16(), eps.bfloat16(), t.bfloat16())
    want = flow.interpolate(x0.bfloat16().float(), eps.bfloat16().float(), t.bfloat16().float())
    assert low.dtype == torch.float32 and torch.equal(low, want)
    assert flow.x0_from_velocity(x0.half(), eps.half(), t.float()).dtype == torch.float32
    assert flow.score_from_velocity(x0.float(), eps, t.float()).dtype == torch.float64
    assert FlowSDE()(x0.bfloat16(), eps, Linear()(4, 1), 0).mean.dtype == torch.float64
    step = FlowSDE()(x0.bfloat16(), eps.bfloat16(), Linear()(4, 1), 0)
    assert step.mean.dtype == step.log_prob(x0.bfloat16()).dtype == torch.float32


def test_one_time_per_sample():
    x0, eps, t = points()
    with pytest.raises(ValueError, match="batch of 6"):
        flow.interpolate(x0, eps, t[:3])
    with pytest.raises(ValueError, match="batch of 6"):
        flow.interpolate(x0, eps, t[:, None])


# -- densities of t --------------------------------------------------------------------------------

U = torch.tensor([0.02, 0.25, 0.5, 0.8, 0.999], dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_uniform_quantiles(shift):
    torch.testing.assert_close(Uniform(shift)(U), shift * U / (1 + (shift - 1) * U), **EXACT)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.4), (1.2, 1.7)])
def test_logit_normal_quantiles(mean, std):
    """P(t ≤ quantile(u)) = u, with the distribution function from the error function."""
    t = LogitNormal(mean, std)(U)
    logit = torch.log(t / (1 - t))
    cdf = 0.5 * (1 + torch.erf((logit - mean) / (std * math.sqrt(2))))
    torch.testing.assert_close(cdf, U, atol=1e-10, rtol=0)


def test_shift_moves_a_logit_normals_mean():
    """logit(shifted t) = logit(t) + log s: a shift is a change of mean."""
    got, want = LogitNormal(0.3, 0.9, shift=3.0)(U), LogitNormal(0.3 + math.log(3), 0.9)(U)
    torch.testing.assert_close(got, want, **EXACT)


def test_time_moments():
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(3))
    t = LogitNormal(0.5, 0.8)(u)
    logit = torch.logit(t.double())
    assert t.dtype == torch.float32
    assert logit.mean().item() == pytest.approx(0.5, abs=5 * 0.8 / math.sqrt(2e5))
    assert logit.std().item() == pytest.approx(0.8, abs=5 * 0.8 / math.sqrt(4e5))
    assert Uniform()(u).mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / 2e5))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, 1.75])
def test_mode_density(scale):
    """Against SD3's own map, and P(t ≤ quantile(u)) = u by counting."""
    got = Mode(scale)(U)
    v = 1 - U
    torch.testing.assert_close(
        got, 1 - v - scale * (torch.cos(math.pi * v / 2) ** 2 - 1 + v), **EXACT
    )
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = Mode(scale)(u)
    assert (t.diff() >= 0).all() and t[0] > 0 and t[-1] <= 1
    middle = ((t > 0.4) & (t < 0.6)).double().mean()
    assert middle > 0.2 if scale > 0 else middle <= 0.2
    with pytest.raises(InputError, match="mode times"):
        Mode(-1.5 if scale < 0 else 1.8)


@pytest.mark.parametrize(
    "law",
    [Uniform(), Uniform(5.0), LogitNormal(), LogitNormal(2, 2, 0.1), Mode(), Mode(-0.5, 3),
     CosMap(), CosMap(3.0)],
)
def test_times_stay_usable_at_the_ends(law):
    t = law(torch.tensor([0.0, 2.0**-24, 1 - 2.0**-24]))
    assert (t > 0).all() and (t <= 1).all() and (t.diff() > 0).all()


def test_bad_densities():
    for bad in ({"std": 0.0}, {"std": -1.0}, {"mean": math.nan}, {"shift": 0.0}):
        with pytest.raises(InputError):
            LogitNormal(**bad)
    with pytest.raises(InputError, match="shift"):
        Uniform(-1.0)


def test_cosmap_is_sd3s_map():
    """t = 1 − 1/(tan(π·u/2) + 1); the density 2/(π·(1 − 2t + 2t²)) has the distribution function
    ½ + (2/π)·arctan(2t − 1)."""
    t = CosMap()(U)
    torch.testing.assert_close(t, 1 - 1 / (torch.tan(math.pi / 2 * U) + 1), **EXACT)
    torch.testing.assert_close(0.5 + 2 / math.pi * torch.atan(2 * t - 1), U, **EXACT)
    odds, shifted = t / (1 - t), CosMap(3.0)(U)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * odds, atol=1e-9, rtol=1e-9)


# -- weightings ------------------------------------------------------------------------------------


def test_weightings_are_diffusers_own():
    from diffusers.training_utils import compute_loss_weighting_for_sd3 as sd3

    t = torch.linspace(0.001, 1, 1000)
    torch.testing.assert_close(InversePower(2.0, 0.001)(t), sd3("sigma_sqrt", t))
    torch.testing.assert_close(CosMapWeighting()(t), sd3("cosmap", t))
    torch.testing.assert_close(Unweighted()(t), sd3("none", t))


@pytest.mark.parametrize("moment", [1, 2, 5])
def test_a_weighting_is_a_density(moment: int):
    """E_u[f(t)] under density=cosmap is E_u[w·f(t)] under uniform times and weighting=cosmap."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = (CosMap()(u) ** moment).mean()
    weighed = (CosMapWeighting()(u) * u**moment).mean()
    assert weighed.item() == pytest.approx(drawn.item(), rel=1e-7)
    assert abs(drawn - (u**moment).mean()) > 1e-3 or moment == 1  # both are symmetric


@pytest.mark.parametrize("gamma", [0.5, 5.0, math.inf])
def test_min_snr_is_the_clipped_loss_of_x0(gamma: float):
    """min(SNR, γ)·‖x̂0 − x0‖² of a wrong velocity, with x̂0 by its own formula."""
    x0, eps, t = points()
    x, v = flow.interpolate(x0, eps, t), flow.target_velocity(x0, eps)
    wrong = v + draw(6, 3, 4, seed=5)
    found = flow.x0_from_velocity(x, wrong, t)
    want = (((1 - t) / t) ** 2).clamp(max=gamma) * (found - x0).square().mean((1, 2))
    torch.testing.assert_close(MinSNR(gamma)(t) * (wrong - v).square().mean((1, 2)), want, **EXACT)
    if gamma == math.inf:  # the loss of ε
        of = (flow.eps_from_velocity(x, wrong, t) - eps).square().mean((1, 2))
        torch.testing.assert_close(want, of, **EXACT)


def test_inverse_weights_are_clamped():
    t = torch.tensor([1e-6, 0.05, 0.1, 0.5, 1.0], dtype=torch.float64)
    want = torch.tensor([20.0, 20.0, 10.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(InversePower(1.0, 0.05)(t), want, **EXACT)
    for wrong in ({"power": math.inf}, {"floor": 0.0}, {"floor": 2.0}):
        with pytest.raises(InputError, match="inverse weighting"):
            InversePower(**wrong)
    with pytest.raises(InputError, match="min-SNR"):
        MinSNR(0.0)


# -- guidance --------------------------------------------------------------------------------------


def test_guidance_of_each_sample_and_its_undoing():
    v_c, v_u, _ = points()
    scale = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 7.5], dtype=torch.float64)
    got = flow.guide(v_c, v_u, scale)
    for k, g in enumerate(scale.tolist()):
        torch.testing.assert_close(got[k], (1 - g) * v_u[k] + g * v_c[k], **EXACT)
    assert torch.equal(got[1], v_u[1] + (v_c[1] - v_u[1]))
    torch.testing.assert_close(flow.unguide(got, v_u, scale), v_c, **EXACT)


# -- transitions -----------------------------------------------------------------------------------


def test_log_prob_is_the_normals_with_constants():
    mean, x, _ = points()
    for std in (1e-3, 0.3, 2.0):
        want = Normal(mean, std).log_prob(x).mean((1, 2))
        got = Transition(mean, std).log_prob(x)
        torch.testing.assert_close(got, want, atol=0, rtol=1e-12)


def test_kl_is_the_normals():
    a, b, _ = points()
    want = kl_divergence(Normal(a, 0.3), Normal(b, 0.5)).mean((1, 2))
    torch.testing.assert_close(Transition(a, 0.3).kl(Transition(b, 0.5)), want, **EXACT)
    torch.testing.assert_close(Transition(a, 0.3).kl(Transition(a, 0.3)), 0 * want, **EXACT)


def test_log_prob_gradient_is_the_scores():
    """∂ log_prob/∂ mean = (x − mean)/(std²·n·c)."""
    mean, x, _ = points()
    mean.requires_grad_()
    (grad,) = torch.autograd.grad(Transition(mean, 0.2).log_prob(x).sum(), mean)
    torch.testing.assert_close(grad, (x - mean.detach()) / 0.2**2 / 12, atol=1e-12, rtol=0)


def test_sample_is_mean_plus_noise():
    mean, noise, _ = points()
    assert torch.equal(Transition(mean, 0.2).sample(noise), mean + 0.2 * noise)


def flow_sde_per_number(x: float, v: float, sigmas: list[float], i: int, eta: float):
    """Flow-GRPO's step for one number, as an SDE: drift v − (s²/2)·score, score = −ε̂/σ."""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    s2 = eta**2 * sigma / (1 - (sigmas[1] if i == 0 else sigma))
    score = -(x + (1 - sigma) * v) / sigma
    return x + (v - s2 / 2 * score) * dt, math.sqrt(s2 * -dt)


@pytest.mark.parametrize("steps", [2, 4, 10, 50])
@pytest.mark.parametrize("eta", [0.2, 0.7])
def test_flow_sde_against_the_paper(steps, eta):
    x, v, _ = points(2)
    grid = EmpiricalShift()(steps, 1024)
    for i in range(steps - 1):
        got = FlowSDE(eta)(x, v, grid, i)
        for a, b, mean in zip(x.flatten(), v.flatten(), got.mean.flatten(), strict=True):
            want = flow_sde_per_number(a.item(), b.item(), list(grid.sigmas), i, eta)
            assert mean.item() == pytest.approx(want[0], abs=1e-12)
            assert got.std == pytest.approx(want[1], abs=1e-12)


@pytest.mark.parametrize("tokens", [16, 1024, 4096])
def test_flow_sde_keeps_the_datas_coefficient_and_overshoots_the_noises(tokens):
    """On x = (1 − σ)x0 + σε the mean's x0 has coefficient 1 − σ' exactly.

    Its ε and the added noise together exceed σ' by the factor √((1 − q/(2σσ'))² + q/σ'²), q = std².
    """
    x0, eps, _ = points(1)
    grid = EmpiricalShift()(10, tokens)
    ratios = []
    for i, (sigma, after) in enumerate(zip(grid.sigmas[:-2], grid.sigmas[1:-1], strict=True)):

        def mean(data, noise, sigma=sigma, i=i):
            x = (1 - sigma) * data + sigma * noise
            return FlowSDE()(x, noise - data, grid, i)

        zero = torch.zeros_like(x0)
        torch.testing.assert_close(mean(x0, zero).mean, (1 - after) * x0, **EXACT)
        q = mean(zero, eps).std ** 2
        kept = after - q / (2 * sigma)
        torch.testing.assert_close(mean(zero, eps).mean, kept * eps, **EXACT)
        ratios.append(math.sqrt(kept**2 + q) / after - 1)
    assert all(r > 0 for r in ratios)  # it never loses noise
    assert 0.14 < ratios[-1] < 0.18  # the noise level's overshoot at the last but one step
    assert 0.03 < ratios[0] < 0.04


def test_first_step_is_chosen_by_index():
    """A first σ that misses 1 by rounding must not blow up std; exactly 1 must not divide by 0."""
    x, v, _ = points(2)
    exact = EmpiricalShift()(10, 1024)
    for first in (1.0, 1 - 2.0**-24, 1 - 2.0**-53):
        step = FlowSDE()(x, v, Grid((first, *exact.sigmas[1:])), 0)
        want = 0.7 * math.sqrt(first / (1 - exact.sigmas[1]) * (first - exact.sigmas[1]))
        assert step.std == pytest.approx(want, rel=1e-12) and step.std < 0.71
        assert step.log_prob(x).isfinite().all()
    for tokens in (16, 1024, 4096, 4301):
        for steps in (2, 4, 10, 50):
            step = FlowSDE()(x, v, EmpiricalShift()(steps, tokens), 0)
            assert step.mean.isfinite().all() and step.log_prob(x).isfinite().all()


@pytest.mark.parametrize("eta", [0.1, 0.3, 1.0])
def test_dance_sde_against_the_paper(eta):
    """Drift v − (η²/2)·score with score = −(x − (1 − σ)·x̂0)/σ², for one number at a time."""
    x, v, _ = points(2)
    grid = EmpiricalShift()(10, 1024)
    for i, (sigma, after) in enumerate(zip(grid.sigmas[:-2], grid.sigmas[1:-1], strict=True)):
        got, dt = DanceSDE(eta)(x, v, grid, i), after - sigma
        for a, b, mean in zip(x.flatten(), v.flatten(), got.mean.flatten(), strict=True):
            a, b = a.item(), b.item()
            score = -(a - (1 - sigma) * (a - sigma * b)) / sigma**2
            assert mean.item() == pytest.approx(a + (b - eta**2 / 2 * score) * dt, abs=1e-12)
        assert got.std == pytest.approx(eta * math.sqrt(-dt), abs=1e-12)


@pytest.mark.parametrize("tokens", [16, 1024, 4096])
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_cps_preserves_both_coefficients(tokens, eta):
    """On x = (1 − σ)x0 + σε: x0 keeps 1 − σ', and kept and added noise together have level σ'."""
    x0, eps, _ = points(1)
    grid, zero = EmpiricalShift()(10, tokens), torch.zeros_like(x0)
    for i, (sigma, after) in enumerate(zip(grid.sigmas[:-2], grid.sigmas[1:-1], strict=True)):
        data = CPS(eta)((1 - sigma) * x0, -x0, grid, i)
        torch.testing.assert_close(data.mean, (1 - after) * x0, **EXACT)
        noise = CPS(eta)(sigma * eps, eps, grid, i)
        kept = (noise.mean / eps).flatten()
        torch.testing.assert_close(kept, kept[0].expand_as(kept), atol=1e-9, rtol=0)
        assert kept[0].item() ** 2 + noise.std**2 == pytest.approx(after**2, abs=1e-12)
        assert noise.std == pytest.approx(after * math.sin(eta * math.pi / 2), abs=1e-12)
    forgotten = CPS(1.0)(zero + grid.sigmas[3] * eps, eps, grid, 3).mean
    torch.testing.assert_close(forgotten, zero, atol=1e-12, rtol=0)


def test_dance_overshoots_the_noise_little():
    """At η 0.3 and 512² or 1024² the noise level after a step exceeds σ' by at most 1.4 %."""
    x0, eps, _ = points(1)
    zero, worst = torch.zeros_like(x0), 0.0
    for tokens in (1024, 4096):
        grid = EmpiricalShift()(10, tokens)
        for i, (sigma, after) in enumerate(zip(grid.sigmas[:-2], grid.sigmas[1:-1], strict=True)):
            step = DanceSDE()(zero + sigma * eps, eps, grid, i)
            kept = (step.mean / eps).mean().item()
            ratio = math.sqrt(kept**2 + step.std**2) / after - 1
            assert ratio > 0
            worst = max(worst, ratio)
    assert 0.005 < worst < 0.0145


@pytest.mark.parametrize("i", [-1, 3, 4])
def test_last_step_is_never_noised(i):
    x, v, _ = points(2)
    for kernel in (FlowSDE(), DanceSDE(), CPS()):
        with pytest.raises(ValueError, match="cannot be stochastic"):
            kernel(x, v, Linear()(4, 16), i)
        with pytest.raises(ValueError, match="cannot be stochastic"):
            kernel(x, v, Linear()(1, 16), 0)


@pytest.mark.parametrize("eta", [0.0, -0.7, math.nan])
def test_eta_must_be_positive(eta):
    for kernel in (FlowSDE, DanceSDE, CPS):
        with pytest.raises(InputError, match="eta"):
            kernel(eta)
    with pytest.raises(InputError, match="at most 1"):
        CPS(1.2)


def moments_after(steps: int) -> tuple[float, float]:
    """Mean and variance of one coordinate carried through FlowSDE steps from σ 0.9 to 0.1.

    The kernel is affine in x for Gaussian data, so its moments are propagated exactly: no sampling.
    """
    model = Gaussian(torch.tensor(1.5, dtype=torch.float64), 0.6)
    sigmas = [0.9 - 0.8 * i / steps for i in range(steps + 1)]
    grid = Grid((*sigmas, 0.0))
    mean, var = (m.item() for m in model.marginal(torch.tensor([sigmas[0]], dtype=torch.float64)))
    for i in range(steps):
        t = torch.full((2,), sigmas[i], dtype=torch.float64)
        x = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
        step = FlowSDE()(x, model(x, t), grid, i)
        at_0, at_1 = step.mean.flatten().tolist()
        mean, var = at_0 + (at_1 - at_0) * mean, (at_1 - at_0) ** 2 * var + step.std**2
    return mean, var


def test_flow_sde_keeps_the_marginal():
    """The mean stays (1 − t)m to rounding at any step size, as x0's coefficient is exact.

    The variance converges to C_t at Euler–Maruyama's weak order 1.
    """
    mean, var = 0.9 * 1.5, 0.9**2 * 0.6**2 + 0.1**2
    results = [moments_after(steps) for steps in (100, 200, 400, 800)]
    assert [m for m, _ in results] == pytest.approx([mean] * 4, abs=1e-12)
    errors = [abs(v - var) for _, v in results]
    assert errors[-1] < 4e-4
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, abs=0.05)
