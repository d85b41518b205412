"""Samplers against exact flow maps and marginals; guidance against its closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flux2.analytic import ConditionalGaussian, Gaussian, toy_condition
from flux2.errors import InputError
from flux2.flow import FlowSDE
from flux2.rng import Rng
from flux2.samplers import guided, replay, sample_euler, sample_heun, sample_sde
from flux2.schedule import EmpiricalShift, Grid, Linear

EXACT = {"atol": 1e-10, "rtol": 0}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MODEL = Gaussian(torch.tensor([[0.8, -1.1]]).double(), 0.5)
PAIR = ConditionalGaussian(draw(2, 3, seed=9), draw(2, 3, seed=10), 0.5)


class Spy:
    """A velocity that notes how it was called."""

    def __init__(self, model) -> None:
        self.model, self.calls = model, []

    def __call__(self, x, t, cond):
        self.calls.append((x, t, cond))
        return self.model(x, t, cond)


def test_one_euler_step_and_the_grid():
    """x + (σ' − σ)·v by hand over three steps, with the t that the model saw."""
    spy, x = Spy(MODEL), draw(4, 1, 2)
    grid, done = Grid((1.0, 0.7, 0.2, 0.0)), []
    got = sample_euler(spy, x, toy_condition(4, 1), grid, done.append)
    for sigma, after in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.0)):
        x = x + (after - sigma) * MODEL(x, torch.full((4,), sigma, dtype=torch.float64))
    torch.testing.assert_close(got, x, **EXACT)
    assert [t.tolist() for _, t, _ in spy.calls] == [[s] * 4 for s in (1.0, 0.7, 0.2)]
    assert done == [1, 2, 3]


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2)])
def test_order_of_convergence_to_the_flow_map(sampler, order):
    x, cond = draw(8, 1, 2, seed=4), toy_condition(8, 1)
    want = MODEL.flow(x, torch.ones(8).double(), torch.zeros(8).double())
    counts = (32, 64, 128, 256)
    errors = [(sampler(MODEL, x, cond, Linear()(n, 1)) - want).abs().max() for n in counts]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.1), slopes
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize(("sampler", "forwards"), [(sample_euler, 5), (sample_heun, 9)])
def test_forwards_and_dtypes(sampler, forwards):
    """The model sees fp32 x and σ itself, never σ = 0."""
    spy, grid = Spy(MODEL), EmpiricalShift()(5, 1)
    model = Gaussian(MODEL.mean.float(), 0.5)
    spy.model = model
    out = sampler(spy, draw(2, 1, 2).bfloat16(), toy_condition(2, 1), grid)
    assert out.dtype == torch.float32 and len(spy.calls) == forwards
    for x, t, _ in spy.calls:
        assert x.dtype == t.dtype == torch.float32 and t.shape == (2,)
    seen = {t[0].item() for _, t, _ in spy.calls}
    assert seen == set(grid.tensor()[:-1].tolist())


# -- guidance --------------------------------------------------------------------------------------


def test_guidance_of_conditional_gaussians():
    """CFG of equal-variance Gaussians samples N(m_u + g(m_c − m_u), s²): the whole ODE, exactly."""
    x, cond = draw(6, 2, 3), toy_condition(6, 2)
    for scale in (0.0, 2.5, 4.0):
        got = sample_heun(guided(PAIR, scale), x, cond, Linear()(200, 2))
        want = PAIR.guided(scale).flow(x, torch.ones(6).double(), torch.zeros(6).double())
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_guidance_makes_one_batched_forward():
    spy, x, t = Spy(PAIR), draw(3, 2, 3), torch.full((3,), 0.6, dtype=torch.float64)
    cond = toy_condition(3, 2)
    v = guided(spy, 3.0)(x, t, cond)
    torch.testing.assert_close(v, PAIR.guided(3.0)(x, t), **EXACT)
    ((seen_x, seen_t, seen_cond),) = spy.calls
    assert seen_x.shape == (6, 2, 3) and seen_t.shape == (6,) and seen_cond.null is None
    assert seen_cond.text.flatten().tolist() == [1, 1, 1, -1, -1, -1]


def test_guidance_splits_where_shapes_differ():
    spy, x, t = Spy(PAIR), draw(3, 2, 3), torch.full((3,), 0.6, dtype=torch.float64)
    cond = toy_condition(3, 2)
    assert cond.null is not None
    longer = replace(
        cond.null, text=cond.null.text.repeat(1, 4, 1), text_ids=cond.null.text_ids.repeat(1, 4, 1)
    )
    v = guided(spy, 3.0)(x, t, replace(cond, null=longer))
    torch.testing.assert_close(v, PAIR.guided(3.0)(x, t), **EXACT)
    assert [len(x) for x, _, _ in spy.calls] == [3, 3]
    referenced = replace(cond, ref=draw(3, 1, 3), ref_ids=torch.zeros(3, 1, 4))
    guided(spy, 3.0)(x, t, referenced)  # references on one side only
    assert [len(x) for x, _, _ in spy.calls[2:]] == [3, 3]


def test_guidance_one_adds_nothing():
    cond = toy_condition(3, 2)
    assert guided(PAIR, 1.0) is PAIR
    with pytest.raises(InputError, match=r"cond\.null"):
        guided(PAIR, 4.0)(draw(3, 2, 3), torch.ones(3), replace(cond, null=None))


# -- the stochastic sampler ------------------------------------------------------------------------


def noises(b: int, n: int = 1, c: int = 2, seed: int = 0):
    rng, ids = Rng(seed, 0), torch.arange(b)
    return lambda i: rng("rollout", ids, (n, c), counter=i)


def test_no_noisy_step_is_euler():
    x, cond, grid = draw(4, 1, 2), toy_condition(4, 1), EmpiricalShift()(6, 1)
    got, steps = sample_sde(MODEL, x, cond, grid, FlowSDE(), (), noises(4))
    assert steps == [] and torch.equal(got, sample_euler(MODEL, x, cond, grid))


def test_sde_and_ode_steps_by_hand():
    grid, cond = Grid((1.0, 0.8, 0.5, 0.2, 0.0)), toy_condition(4, 1)
    x, noise, done = draw(4, 1, 2), noises(4), []
    got, steps = sample_sde(MODEL, x, cond, grid, FlowSDE(), {0, 2}, noise, progress=done.append)
    y = x
    for i, (sigma, after) in enumerate(pairwise(grid.sigmas)):
        v, dt = MODEL(y, torch.full((4,), sigma, dtype=torch.float64)), after - sigma
        if i in (0, 2):
            s = 0.7 * math.sqrt(sigma / (1 - (0.8 if i == 0 else sigma)))
            eps = y + (1 - sigma) * v
            y = y + v * dt + s**2 / 2 * eps / sigma * dt + s * math.sqrt(-dt) * noise(i).double()
        else:
            y = y + v * dt
    torch.testing.assert_close(got, y, **EXACT)
    assert [s.i for s in steps] == [0, 2] and done == [1, 2, 3, 4]
    assert torch.equal(steps[0].x, x)
    for s in steps:
        # What was drawn is known, so log_prob is −z²/2 − log std − log√2π, averaged.
        std = replay(MODEL, s.x, cond, grid, FlowSDE(), s.i).std
        z2 = (noise(s.i).double() ** 2).mean((1, 2))
        want = -z2 / 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(s.log_prob, want, **EXACT)


@pytest.mark.parametrize("storage", [None, torch.bfloat16, torch.float16])
def test_replay_of_what_is_stored_is_exact(storage):
    """Same weights, same micro-batch: Δlogp is exactly 0 in every storage dtype."""
    model = Gaussian(MODEL.mean.float(), 0.5)
    grid, cond = EmpiricalShift()(10, 1024), toy_condition(16, 1)
    x = draw(16, 1, 2).float()
    out, steps = sample_sde(
        model, x, cond, grid, FlowSDE(), range(3, 7), noises(16), storage=storage
    )
    assert out.dtype == torch.float32 and [s.i for s in steps] == [3, 4, 5, 6]
    for s, following in pairwise(steps):
        assert torch.equal(s.x_next, following.x)
    for s in steps:
        assert s.x.dtype == s.x_next.dtype == (storage or torch.float32)
        again = replay(model, s.x, cond, grid, FlowSDE(), s.i).log_prob(s.x_next)
        assert again.dtype == torch.float32 and torch.equal(again, s.log_prob)


def test_replay_carries_gradients():
    """∂ log_prob/∂m by finite differences through velocity, kernel and log-probability."""
    grid, cond, x = Linear()(4, 1), toy_condition(4, 1), draw(4, 1, 2)
    _, (step,) = sample_sde(MODEL, x, cond, grid, FlowSDE(), [1], noises(4))

    def log_prob(mean: torch.Tensor) -> torch.Tensor:
        law = replay(Gaussian(mean, 0.5), step.x, cond, grid, FlowSDE(), step.i)
        return law.log_prob(step.x_next).sum()

    mean = MODEL.mean.clone().requires_grad_()
    assert torch.autograd.gradcheck(log_prob, (mean,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("noisy", [[3], [4], [-1], [0, 7]])
def test_wrong_steps_are_refused_before_any_forward(noisy):
    spy = Spy(MODEL)
    with pytest.raises(InputError, match="choose from 0 … 2"):
        sample_sde(
            spy, draw(2, 1, 2), toy_condition(2, 1), Linear()(4, 1), FlowSDE(), noisy, noises(2)
        )
    assert spy.calls == []


def test_sde_keeps_the_marginal():
    """200 stochastic steps on a fine grid: N((1 − t)m, C_t) at σ 0.1 within 5 standard errors.

    It starts at σ 0.9, from the exact marginal: near σ = 1 the SDE's coefficients are singular.
    """
    b, stop = 20_000, 0.1
    sigmas = [0.9 - 0.8 * i / 200 for i in range(201)]
    grid, cond = Grid((*sigmas, 0.0)), toy_condition(1, 1)
    mean, var = MODEL.marginal(torch.tensor([0.9], dtype=torch.float64))
    g = torch.Generator().manual_seed(11)
    x = mean + var.sqrt() * torch.randn(b, 1, 2, generator=g).double()

    def noise(i: int) -> torch.Tensor:
        return torch.randn(b, 1, 2, generator=g)

    _, steps = sample_sde(MODEL, x, cond, grid, FlowSDE(), range(200), noise)
    mean, var = MODEL.marginal(torch.tensor([stop], dtype=torch.float64))
    last = steps[-1].x_next
    error = (last.mean(0) - mean[0]).abs().max()
    assert error < 5 * math.sqrt(var.item() / b)
    ratio = last.var(0) / var.item()
    # Sampling error of a variance, plus the discretisation's own 1 %.
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / b) + 0.01
    correlation = torch.corrcoef(last[:, 0].T)[0, 1].abs()
    assert correlation < 5 / math.sqrt(b)
