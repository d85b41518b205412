"""Flow matching on Gaussian data, whose mean, loss and gradients are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flux2.analytic import Gaussian, GaussianPolicy, toy_condition
from flux2.errors import InputError
from flux2.flow import LogitNormal, TimeDensity, Uniform
from flux2.rng import Rng
from flux2.types import Batch, RoleSpec
from posttrain.sft import FlowMatching

N, C, STD = 4, 3, 0.6
MEAN = torch.randn(N, C, generator=torch.Generator().manual_seed(0))


def data(count: int, seed: int = 1) -> Batch:
    """Samples of N(MEAN, STD²)."""
    ids, g = torch.arange(count), torch.Generator().manual_seed(seed)
    return Batch(
        ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (2, 2), C,
        x0=MEAN + STD * torch.randn(count, N, C, generator=g),
        weight=torch.full((count,), 1 / count),
    )  # fmt: skip


def irreducible(density: TimeDensity) -> float:
    """E_t Var(ε − x0 | x_t) = E_t STD²/C_t, by midpoint quadrature over the times' uniform.

    (x0, ε) → (x_t, ε − x0) has determinant 1, so Var(ε − x0 | x_t)·Var(x_t) = STD²·1.
    """
    u = (torch.arange(200_000) + 0.5) / 200_000
    t = density(u).double()
    return float((STD**2 / ((1 - t) ** 2 * STD**2 + t**2)).mean())


@pytest.mark.parametrize("density", [LogitNormal(), LogitNormal(0.3, 0.8, 3.0), Uniform()])
def test_the_loss_at_the_optimum_is_the_irreducible_one(density):
    method, batch = FlowMatching(density), data(4096)
    loss, metrics = method.loss({"model": Gaussian(MEAN, STD)}, batch, Rng(0, 0))
    want = irreducible(density)
    assert float(loss) == pytest.approx(want, rel=0.02)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    worse, _ = method.loss({"model": Gaussian(MEAN + 0.3, STD)}, batch, Rng(0, 0))
    assert float(worse) > 1.05 * want


def test_training_finds_the_mean_and_the_spread_of_the_data():
    """The whole loop: 256 samples, whose own mean and spread are the optimum."""
    batch, method = data(256), FlowMatching(micro=256)
    model = GaussianPolicy(torch.zeros(N, C), 1.0, train_std=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.15)
    steps = 120
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.15 * (1 - step / steps)
        for update in method.collect({"model": model}, batch, Rng(0, step)):
            optimizer.zero_grad()
            for micro in update:
                method.loss({"model": model}, micro, Rng(0, step))[0].backward()
            optimizer.step()
    assert batch.x0 is not None
    torch.testing.assert_close(model.mean.detach(), batch.x0.mean(0), atol=0.05, rtol=0)
    spread = float((batch.x0 - batch.x0.mean(0)).square().mean().sqrt())
    assert float(model.log_std.detach().exp()) == pytest.approx(spread, rel=0.05)


def test_the_loss_is_the_weighted_squared_error_at_the_keyed_draws():
    """With a velocity of 0 it is Σ w·mean (ε − x0)²."""
    batch, rng = data(6), Rng(3, 4)
    weight = torch.tensor([0.5, 0.5, 0, 0, 0, 0])
    assert batch.x0 is not None
    eps = rng("noise", batch.ids, (N, C))
    want = ((eps - batch.x0) ** 2).mean((1, 2))
    zero = {"model": lambda x, t, cond: torch.zeros_like(x)}
    loss, metrics = FlowMatching().loss(zero, replace(batch, weight=weight), rng)
    torch.testing.assert_close(loss, want[:2].mean())
    torch.testing.assert_close(metrics["loss"], want.mean())


def test_the_model_sees_the_interpolant():
    seen: dict[str, Tensor] = {}

    def model(x: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.update(x=x, t=t)
        return x

    batch, rng = data(5), Rng(3, 4)
    FlowMatching().loss({"model": model}, batch, rng)
    assert batch.x0 is not None
    t = seen["t"][:, None, None]
    eps = rng("noise", batch.ids, (N, C))
    torch.testing.assert_close(seen["x"], (1 - t) * batch.x0 + t * eps)
    assert ((seen["t"] > 0) & (seen["t"] < 1)).all() and len(set(seen["t"].tolist())) == 5


def test_loss_and_gradient_do_not_depend_on_the_micro_batches():
    found = []
    for micro in (8, 12, 32):
        method, model = FlowMatching(micro=micro), GaussianPolicy(MEAN + 1, STD)
        (update,) = method.collect({"model": model}, data(32), Rng(0, 7))
        assert len(update[0]) == micro
        losses = [method.loss({"model": model}, m, Rng(0, 7))[0] for m in update]
        total = torch.stack(losses).sum()
        total.backward()
        found.append((total.detach(), model.mean.grad))
    assert found[0][1].abs().max() > 1e-2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-4)


def test_edits_have_a_loss_of_their_own_name():
    batch = data(2)
    assert batch.cond is not None
    edit = replace(batch, cond=replace(batch.cond, ref=torch.zeros(2, N, C)))
    _, metrics = FlowMatching().loss({"model": Gaussian(MEAN, STD)}, edit, Rng(0, 0))
    assert set(metrics) == {"loss_edit"}


def test_roles():
    assert FlowMatching().roles == {"model": RoleSpec(trainable=True)}
    assert FlowMatching(ema=0.99).roles["ema"] == RoleSpec(follows="model", decay=0.99)
    assert [t.role for t in FlowMatching(ema=0.99).turns] == ["model"]


@pytest.mark.parametrize("wrong", [{"micro": 0}, {"ema": 1.0}, {"ema": -0.5}, {"ema": math.nan}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match=r"method\."):
        FlowMatching(**wrong)
