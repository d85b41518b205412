"""Grids against diffusers' scheduler and the formulas of FLUX.1 and FLUX.2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler  # pyright: ignore[reportPrivateImportUsage]
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from flux2.errors import InputError
from flux2.schedule import (
    EmpiricalShift,
    Grid,
    Linear,
    StaticShift,
    empirical_mu,
    flux1_mu,
    shift_sigma,
)

TOKENS = (1, 16, 256, 1024, 4096, 4300, 4301, 8192, 16384)
STEPS = (1, 2, 3, 4, 8, 10, 28, 50, 100, 200)


def diffusers_grid(steps: int, mu: float | None = None, shift: float = 1.0) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=mu is not None, time_shift_type="exponential", shift=shift
    )
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / steps, steps)), mu=mu)
    return torch.as_tensor(scheduler.sigmas)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", STEPS)
def test_empirical_shift_is_what_the_pipelines_use(steps, tokens):
    mu = compute_empirical_mu(tokens, steps)
    assert empirical_mu(tokens, steps) == pytest.approx(mu, abs=1e-12)
    grid = EmpiricalShift()(steps, tokens)
    assert grid.steps == steps
    torch.testing.assert_close(grid.tensor(), diffusers_grid(steps, mu), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_static_shift_is_the_schedulers(steps, shift):
    want = diffusers_grid(steps, shift=shift)
    for tokens in (16, 5000):
        got = StaticShift(shift)(steps, tokens).tensor()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_linear():
    assert Linear()(4, 16).sigmas == pytest.approx((1, 0.75, 0.5, 0.25, 0), abs=1e-15)
    torch.testing.assert_close(Linear()(50, 16).tensor(), diffusers_grid(50), atol=1e-6, rtol=0)


def test_shifts_known_of_flux2():
    """e^μ at 512² for 4, 10, 50 steps, at 1 MP for 4 and 50, and the drop after 4300 tokens."""
    shifts = [math.exp(empirical_mu(1024, n)) for n in (4, 10, 50)]
    assert [round(s, 1) for s in shifts] == [7.6, 7.3, 5.5]
    assert [round(math.exp(empirical_mu(4096, n)), 1) for n in (4, 50)] == [9.9, 7.6]
    assert [round(math.exp(empirical_mu(n, 10)), 1) for n in (4300, 4301)] == [9.7, 3.3]


def test_flux1_line():
    assert flux1_mu(256) == pytest.approx(0.5, abs=1e-12)
    assert flux1_mu(4096) == pytest.approx(1.15, abs=1e-12)
    assert flux1_mu(2176) == pytest.approx(0.825, abs=1e-12)


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.7])
def test_shift_formula(shift):
    sigma = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    want = shift * sigma / (1 + (shift - 1) * sigma)
    torch.testing.assert_close(shift_sigma(sigma, shift), want, atol=1e-14, rtol=0)
    torch.testing.assert_close(shift_sigma(want, 1 / shift), sigma, atol=1e-12, rtol=0)
    assert shift_sigma(1.0, shift) == 1.0


def test_every_grid_starts_at_exactly_one():
    shifts = (0.1, 1 / 3, 1.7, 3.3, 7.1)
    grids = [s(n, 900) for n in STEPS for s in (EmpiricalShift(), *map(StaticShift, shifts))]
    assert {g.sigmas[0] for g in grids} == {1.0}


def test_grid_is_a_value():
    a, b = EmpiricalShift()(8, 16), EmpiricalShift()(8, 16)
    assert a == b and hash(a) == hash(b) and a.hash == b.hash
    assert len({a, b, EmpiricalShift()(8, 17), EmpiricalShift()(9, 16)}) == 3
    others = [EmpiricalShift()(8, 17), EmpiricalShift()(9, 16), Linear()(8, 16)]
    assert len({a.hash, *(g.hash for g in others)}) == 4
    nudged = Grid((*(math.nextafter(s, 0) for s in a.sigmas[:-1]), 0.0))
    assert nudged != a and nudged.hash == a.hash  # the last bit is the machine's, not the grid's
    assert Grid((1.0, 0.0)).hash == "96c3c5a74c08"  # b2sum -l 48 of "1.0000000 0.0000000"
    assert a.tensor(dtype=torch.float64).tolist() == list(a.sigmas)


@pytest.mark.parametrize(
    "sigmas", [(), (0.0,), (1.0, 0.5), (1.0, 1.0, 0.0), (0.5, 1.0, 0.0), (1.1, 0.0),
               (1.0, math.nan, 0.0), (math.inf, 0.0), (1.0, 0.0, -0.5)]
)  # fmt: skip
def test_no_grid(sigmas):
    with pytest.raises(InputError, match="no grid"):
        Grid(sigmas)


@pytest.mark.parametrize("schedule", [EmpiricalShift(), StaticShift(3.0), Linear()])
def test_counts_below_one(schedule):
    with pytest.raises(InputError, match="0 steps"):
        schedule(0, 16)
    with pytest.raises(InputError, match="-1 tokens"):
        schedule(4, -1)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
def test_bad_shift(shift):
    with pytest.raises(InputError, match="shift"):
        StaticShift(shift)
