"""Advantage-weighted matching on a Gaussian policy: its gradient, its ratio, and its optimum."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2.analytic import GaussianPolicy, toy_condition
from flux2.engine import share
from flux2.errors import InputError
from flux2.flow import Uniform
from flux2.losses import Noised
from flux2.rng import Rng
from flux2.schedule import Linear
from flux2.types import Batch, RoleSpec
from posttrain.awm import AWM
from posttrain.axes import Anchor

N, C, STD = 4, 3, 0.8
D = N * C
RNG = Rng(5, 0)


def prompts(count: int) -> Batch:
    ids = torch.arange(count)
    return Batch(ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (2, 2), C)


def linear(x: Tensor, batch: Batch) -> Tensor:
    return x.mean((1, 2))


def make(reward: Callable[[Tensor, Batch], Tensor] = linear, **kwargs: Any) -> AWM:
    def score(x: Tensor, batch: Batch) -> Any:
        scores = {"reward": reward(x, batch)}
        return lambda: scores

    settings = {"group": 8, "steps": 6, "chunk": 8, "schedule": Linear(), "density": Uniform()}
    return AWM(score, **{**settings, **kwargs})  # pyright: ignore[reportArgumentType]


def policy(train_std: bool = False) -> GaussianPolicy:
    start = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) + 0.5
    return GaussianPolicy(start, STD, train_std)


def backward(method: AWM, roles: Mapping[str, Any], update: Sequence[Batch]) -> float:
    total = 0.0
    for micro in update:
        loss, _ = method.loss(roles, micro, RNG)
        loss.backward()
        total += float(loss.detach())
    return total


def test_the_gradient_at_ratio_one_is_the_weighted_matchings():
    """∇ Σ w·A·ℓ with v = a·(x − (1 − t)·m) − m, a = (t − (1 − t)·s²)/C_t, by hand."""
    role, method = policy(), make()
    (update,) = map(share, method.collect({"policy": role}, prompts(4), RNG))
    loss = backward(method, {"policy": role}, update)
    want = torch.zeros(N, C)
    for micro in update:
        assert micro.x0 is not None and micro.weight is not None
        t = RNG.uniform("time", micro.ids)[:, None, None]
        eps = RNG("noise", micro.ids, (N, C))
        var = (1 - t) ** 2 * STD**2 + t**2
        a = (t - (1 - t) * STD**2) / var
        x = (1 - t) * micro.x0 + t * eps
        m = role.mean.detach()
        gap = a * (x - (1 - t) * m) - m - (eps - micro.x0)
        slope = -(a * (1 - t) + 1)  # dv/dm
        weight = (micro.weight * micro.extra["advantage"])[:, None, None]
        want = want + (weight * 2 * gap * slope / D).sum(0)
    assert role.mean.grad is not None and role.mean.grad.abs().max() > 1e-3
    torch.testing.assert_close(role.mean.grad, want, atol=1e-6, rtol=1e-4)
    weights = torch.cat([m.weight * m.extra["advantage"] for m in update])
    assert loss == pytest.approx(-float(weights.sum()), abs=1e-6)


def matching(method: AWM, role: Any, micro: Batch) -> Tensor:
    """ℓ of the micro-batch at its own noise level: b."""
    at = Noised.draw(micro, method.density, RNG, int(micro.extra["k"][0]))
    return at.matching(role(at.x, at.t, micro.cond)).detach()


def test_later_updates_see_the_same_noise_and_the_old_matching():
    role, method = policy(), make(updates=2, times=2, eps=1e-3)
    roles, optimizer, seen = {"policy": role}, torch.optim.SGD(role.parameters(), 0.5), []
    for update in map(share, method.collect(roles, prompts(4), RNG)):
        optimizer.zero_grad()
        ratios = []
        for micro in update:
            now = matching(method, role, micro)
            ratios.append((micro.extra["old"] - now).exp())
            loss, metrics = method.loss(roles, micro, RNG)
            loss.backward()
            seen.append(float(metrics["clip_high"]) + float(metrics["clip_low"]))
        spread = (torch.cat(ratios) - 1).abs().max()
        assert spread < 1e-6 if not seen[len(update) :] else spread > 1e-3
        optimizer.step()
    assert not any(seen[: len(seen) // 2]) and any(seen[len(seen) // 2 :])


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True)],
)
def test_clipping_stops_the_gradient_on_the_right_side(ratio, advantage, moves):
    role, method = policy(), make(eps=0.2)
    (update,) = map(share, method.collect({"policy": role}, prompts(4), RNG))
    micro = update[0]
    error = matching(method, role, micro)
    extra = {**micro.extra, "old": error + math.log(ratio),
             "advantage": torch.full_like(error, advantage)}  # fmt: skip
    loss, _ = method.loss({"policy": role}, replace(micro, extra=extra), RNG)
    loss.backward()
    assert bool(role.mean.grad.abs().max() > 1e-6) is moves
    effective = ratio if moves else (1.2 if advantage > 0 else 0.8)
    assert float(loss.detach()) == pytest.approx(-effective * advantage * float(micro.weight.sum()))


def test_it_goes_to_the_anchored_optimum():
    """With a linear reward and β·‖Δv‖² to N(m, s²) the optimum is N(m + c·s/(β·√D), s²).

    E[A·∇ℓ] = −2κ²·c·s/√D / D a coordinate and the anchor's gradient 2βκ²·Δm/D, with one κ(t) that
    cancels; c = E[std of a group]/s. The spread has no reason to move.
    """
    group, beta = 32, 1.0
    c = math.sqrt(2 / group) * math.gamma(group / 2) / math.gamma((group - 1) / 2)
    role = policy(train_std=True)
    reference = copy.deepcopy(role).requires_grad_(False)
    roles = {"policy": role, "reference": reference}
    # Many steps: few Euler steps draw narrower than the law that the policy stands for.
    method = make(group=group, steps=50, chunk=256, times=2, anchor=Anchor(beta, "velocity"))
    optimizer = torch.optim.Adam(role.parameters(), 0.02)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, 250)
    for step in range(250):
        for update in map(share, method.collect(roles, prompts(8), Rng(0, step))):
            optimizer.zero_grad()
            for micro in update:
                method.loss(roles, micro, Rng(0, step))[0].backward()
            optimizer.step()
        rates.step()
    shift = (role.mean - reference.mean).detach()
    want = c * STD / (beta * math.sqrt(D))
    assert float(shift.mean()) == pytest.approx(want, rel=0.08)
    assert float((shift - want).abs().max()) < 0.3 * want
    assert float(role.log_std.detach().exp()) == pytest.approx(STD, rel=0.06)


def test_a_batch_that_says_nothing_moves_nothing():
    role, method = policy(), make(lambda x, batch: torch.full((len(batch),), math.nan))
    assert list(map(share, method.collect({"policy": role}, prompts(4), RNG))) == [[]]
    assert method.metrics()["rewards_missing"] == 1


def test_roles_and_what_is_refused():
    assert make().roles == {"policy": RoleSpec(trainable=True)}
    assert "ema" in make(anchor=Anchor(0.1, "velocity", "ema")).roles
    for wrong in ({"group": 1}, {"eps": 0}, {"times": 0}, {"updates": 0}, {"steps": 0},
                  {"anchor": Anchor(0.1, "mean")}):  # fmt: skip
        with pytest.raises(InputError) as caught:
            make(**wrong)
        assert "\n" not in str(caught.value)
