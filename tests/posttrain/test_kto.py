"""Diffusion-KTO on a Gaussian policy: its gradient, its reference point, its optimum."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flux2.analytic import GaussianPolicy, toy_condition
from flux2.engine import share
from flux2.errors import InputError
from flux2.flow import Uniform
from flux2.rng import Rng
from flux2.types import Batch, RoleSpec
from posttrain import kto
from posttrain.kto import KTO, labelled

N, C, STD, BETA = 4, 3, 0.8, 30.0
D = N * C
RNG = Rng(5, 0)


def at(t: float) -> Any:
    return lambda u: torch.full_like(u, t)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def judged(x0: Tensor, label: Tensor, weight: Tensor | None = None) -> Batch:
    count = len(x0)
    ids = torch.arange(count)
    return Batch(
        ids, ("p",) * count, toy_condition(count, x0.shape[1]), ids, ({},) * count,
        (x0.shape[1], 1), x0.shape[2], x0=x0,
        weight=torch.full((count,), 1 / count) if weight is None else weight,
        extra={"label": label},
    )  # fmt: skip


def policies(shift: Tensor | float = 0.0) -> dict[str, GaussianPolicy]:
    policy = GaussianPolicy(normal(0, N, C) + 0.5, STD)
    reference = copy.deepcopy(policy).requires_grad_(False)
    with torch.no_grad():
        policy.mean += shift
    return {"policy": policy, "reference": reference}


def backward(method: KTO, roles: dict[str, Any], batch: Batch, rng: Any = RNG) -> float:
    total = 0.0
    for update in map(share, method.collect(roles, batch, rng)):
        for micro in update:
            loss, _ = method.loss(roles, micro, rng)
            loss.backward()
            total += float(loss.detach())
    return total


def by_hand(roles: dict[str, GaussianPolicy], batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """r and ∂r/∂m (b, and b n c), from the residual κ·(x0 − m) + (a·t − 1)·ε."""
    t = RNG.uniform("time", batch.ids)[:, None, None]
    eps = RNG("noise", batch.ids, (N, C))
    a = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    k, c = a * (1 - t) + 1, a * t - 1
    gap = {n: k * (batch.x0 - roles[n].mean.detach()) + c * eps for n in roles}
    loss = {n: x.square().mean((1, 2)) for n, x in gap.items()}
    slope = beta / 2 * 2 * k * gap["policy"] / D
    return -beta / 2 * (loss["policy"] - loss["reference"]), slope


def test_the_gradient_at_the_reference():
    """r = Q = 0 there, and σ'(0) = ¼: ∇L = −¼·Σ weight·λ·w·∂r/∂m."""
    label = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    roles, batch = policies(), judged(normal(2, 5, N, C), label)
    method = KTO(Uniform(), BETA, desirable=2.0, undesirable=0.5, micro=2)
    loss = backward(method, roles, batch)
    _, slope = by_hand(roles, batch, BETA)
    scale = torch.where(label > 0, 2.0, 0.5)
    want = (-0.25 / 5 * (scale * label)[:, None, None] * slope).sum(0)
    assert want.abs().max() > 1e-2
    torch.testing.assert_close(roles["policy"].mean.grad, want, atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(float(scale.mean()) / 2, rel=1e-5)
    assert roles["reference"].mean.grad is None


@pytest.mark.parametrize("up", [True, False])
def test_the_reference_point_is_the_batchs_mean_and_has_no_gradient(up: bool):
    """Towards the samples the mean reward is above 0 and is Q; away from them Q is 0."""
    roles = policies()
    x0 = roles["reference"].mean.detach() + 1.0 + 0.3 * normal(2, 6, N, C)
    with torch.no_grad():
        roles["policy"].mean += 0.3 if up else -0.3
    label = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])
    batch, method = judged(x0, label), KTO(Uniform(), BETA, micro=4)
    reward, slope = by_hand(roles, batch, BETA)
    q = max(0.0, float(reward.mean()))
    assert (q > 0.1) is up
    backward(method, roles, batch)
    metrics = method.metrics()
    assert float(metrics["q"]) == pytest.approx(q, rel=1e-4, abs=1e-6)
    assert float(metrics["liked"]) == pytest.approx(float(reward[label > 0].mean()), rel=1e-4)
    assert float(metrics["disliked"]) == pytest.approx(float(reward[label < 0].mean()), rel=1e-4)
    u = (label * (reward - q)).sigmoid()
    want = (-(u * (1 - u) * label)[:, None, None] * slope / 6).sum(0)
    torch.testing.assert_close(roles["policy"].mean.grad, want, atol=1e-6, rtol=1e-3)


def test_the_reference_point_is_that_of_all_ranks(monkeypatch):
    """Each rank's rewards are joined before the mean is taken and cut at 0."""
    roles, label = policies(0.2), torch.ones(4)
    batch = judged(roles["policy"].mean.detach() + normal(2, 4, N, C), label)
    mine, _ = by_hand(roles, batch, BETA)
    others = torch.tensor([5.0, 7.0])
    rows = iter([torch.tensor([1.0, -1.0]), others])  # labels, then rewards
    monkeypatch.setattr(kto, "gather", lambda x: torch.cat([x, next(rows)]))
    method = KTO(Uniform(), BETA, micro=3)
    (update,) = method.collect(roles, batch, RNG)
    want = max(0.0, float(torch.cat([mine, others]).mean()))
    assert all(torch.allclose(m.extra["q"], torch.tensor(want), rtol=1e-4) for m in update)
    assert float(method.metrics()["disliked"]) == 7


def test_it_does_not_matter_how_the_batch_is_cut():
    grads = []
    for micro in (2, 16):
        roles, label = policies(0.3), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
        backward(KTO(Uniform(), BETA, micro=micro), roles, judged(normal(2, 5, N, C), label))
        grads.append(roles["policy"].mean.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-7, rtol=1e-5)


def test_pairs_become_a_liked_and_a_disliked_sample_of_their_own_noise():
    winner, loser = normal(2, 3, N, C), normal(3, 3, N, C)
    batch = replace(judged(winner, torch.zeros(3)), extra={"loser": loser, "margin": torch.ones(3)})
    out = labelled(batch)
    assert out.extra["label"].tolist() == [1, -1] * 3 and set(out.extra) == {"label"}
    assert torch.equal(out.x0[::2], winner) and torch.equal(out.x0[1::2], loser)
    assert len(set(out.ids.tolist())) == 6 and out.groups.tolist() == [0, 0, 1, 1, 2, 2]
    assert out.cond is not None and len(out.cond.text) == 6 and len(out) == 6
    roles = policies(0.2)
    (update,) = map(share, KTO(Uniform(), BETA, micro=4).collect(roles, batch, RNG))
    assert sum(float(m.weight.sum()) for m in update) == pytest.approx(1)


class Nodes:
    """Draws that are a quadrature's nodes."""

    def __init__(self, eps: Tensor) -> None:
        self.eps = eps

    def __call__(
        self, stream: str, ids: Tensor, shape: tuple[int, ...], counter: int = 0
    ) -> Tensor:
        return self.eps[ids].reshape(-1, *shape)

    def uniform(self, stream: str, ids: Tensor, counter: int = 0) -> Tensor:
        return torch.zeros(len(ids))


def test_it_goes_to_the_optimum_of_expected_utility():
    """One dimension, N(0, s²), liked with probability p = σ(g·x): the optimum is where
    E[(2p − 1)·σ(r)] is largest, r = β·κ·δ·(κ·(2x − δ)/2 + c·ε), searched on a grid. Q is 0 there:
    samples of the reference have a negative mean reward.

    x and ε are a quadrature's nodes, and each comes with both labels, weighted by probability.
    """
    t, g, beta = 0.6, 3.0, 4.0
    a = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    k, c = a * (1 - t) + 1, a * t - 1
    nodes, mass = np.polynomial.hermite_e.hermegauss(20)
    x, eps = (v.reshape(-1) for v in np.meshgrid(STD * nodes, nodes, indexing="ij"))
    weight = np.outer(mass, mass).reshape(-1) / mass.sum() ** 2

    def utility(d: float) -> float:
        r = beta * k * d * (k * (2 * x - d) / 2 + c * eps)
        return float((weight * np.tanh(g * x / 2) / (1 + np.exp(-r))).sum())

    grid = np.linspace(0, 4, 4001)
    want = grid[int(np.argmax([utility(d) for d in grid]))]
    assert 0.2 < want < 3.5

    policy = GaussianPolicy(torch.zeros(1, 1, dtype=torch.float64), STD)
    roles = {"policy": policy, "reference": copy.deepcopy(policy).requires_grad_(False)}
    x0, w, e = (torch.tensor(v).repeat(2) for v in (x, weight, eps))
    label = torch.ones_like(w)
    label[len(x) :] = -1
    share_of = (label * g * x0).sigmoid() * w
    batch = judged(x0.reshape(-1, 1, 1), label, share_of)
    method: Any = KTO(lambda u: torch.full_like(u, t), beta, micro=len(w))
    optimizer = torch.optim.LBFGS([policy.mean], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        return backward(method, roles, batch, Nodes(e))

    for _ in range(3):
        optimizer.step(closure)
    assert float(policy.mean.detach()) == pytest.approx(want, rel=5e-3)
    assert float(method.metrics()["q"]) == 0


def test_roles_and_what_is_refused():
    assert KTO().roles == {"policy": RoleSpec(trainable=True), "reference": RoleSpec()}
    wrong_labels = [{"label": torch.tensor([1.0, x])} for x in (0.0, math.nan)]
    for extra in ({}, *wrong_labels):
        batch = replace(judged(normal(2, 2, N, C), torch.ones(2)), extra=extra)
        with pytest.raises(InputError, match="label"):
            next(iter(KTO().collect(policies(), batch, RNG)))
    for wrong in ({"beta": 0}, {"micro": 0}, {"desirable": 0}, {"undesirable": -1}):
        with pytest.raises(InputError) as caught:
            KTO(**wrong)
        assert "\n" not in str(caught.value)
