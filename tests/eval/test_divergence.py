"""Path KL to a reference, against its closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from eval.divergence import PathKL
from flux2.analytic import toy_condition
from flux2.errors import InputError
from flux2.flow import FlowSDE
from flux2.generate import Sampler
from flux2.schedule import Linear
from flux2.types import Batch, Condition


class Shifted:
    """v(x) = x / 2 + shift."""

    def __init__(self, shift: float) -> None:
        self.shift = shift

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return x / 2 + self.shift


def batch(n: int) -> Batch:
    return Batch(
        ids=torch.arange(n), prompts=("a",) * n, cond=toy_condition(n, 4),
        groups=torch.arange(n), meta=({},) * n, grid=(2, 2), channels=3,
    )  # fmt: skip


def measured(shift: float, n: int = 5) -> Tensor:
    metric = PathKL({"name": "toy"})
    metric._reference = Shifted(0.0)
    sampler = Sampler(steps=6, guidance=1.0, chunk=3, schedule=Linear())
    model = SimpleNamespace(device=torch.device("cpu"))
    return metric.along(Shifted(shift), model, batch(n), sampler, 7)["kl_path"]


def test_a_constant_shift_has_its_closed_form():
    """Δμ_i = shift·(1 + s²(1 − σ)/(2σ))·dt, so the KL is Σ Δμ_i²/(2·std_i²), whatever the path."""
    shift, grid, kernel = 0.3, Linear()(6, 4), FlowSDE()
    want = 0.0
    for i in range(5):
        sigma, after = grid.sigmas[i : i + 2]
        x = torch.zeros(1, 1, 1, dtype=torch.float64)
        a, b = (kernel(x, x + s, grid, i) for s in (shift, 0.0))
        top = grid.sigmas[1] if i == 0 else sigma
        s = kernel.eta * math.sqrt(sigma / (1 - top))
        moved = shift * (1 + s**2 * (1 - sigma) / (2 * sigma)) * (after - sigma)
        assert float(a.mean - b.mean) == pytest.approx(moved)
        want += moved**2 / (2 * s**2 * (sigma - after))
    found = measured(shift)
    assert found.shape == (5,)
    torch.testing.assert_close(found, torch.full((5,), want), rtol=1e-4, atol=0)


def test_it_is_zero_for_the_reference_itself_and_grows_with_the_square():
    assert measured(0.0).abs().max() == 0
    torch.testing.assert_close(measured(0.2), 4 * measured(0.1), rtol=1e-4, atol=0)


def test_nothing_to_measure_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        PathKL({"name": "toy"}, samples=0)
