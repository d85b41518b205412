"""DiffusionNFT on a Gaussian policy: its gradients against closed forms, and what it learns."""

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
from flux2.rng import Rng
from flux2.schedule import Linear
from flux2.types import Batch, Condition, RoleSpec
from posttrain.advantages import GroupRelative
from posttrain.axes import Anchor
from posttrain.nft import NFT

N, C = 4, 3
RNG = Rng(5, 0)
LOOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}


def prompts(count: int) -> Batch:
    ids = torch.arange(count)
    return Batch(ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (2, 2), C)


def linear(x: Tensor, batch: Batch) -> Tensor:
    return x.mean((1, 2))


def make(reward: Callable[[Tensor, Batch], Tensor] = linear, **kwargs: Any) -> NFT:
    def score(x: Tensor, batch: Batch) -> Any:
        scores = {"reward": reward(x, batch)}
        return lambda: scores

    settings = {"group": 8, "steps": 6, "chunk": 8, "schedule": Linear()}
    return NFT(score, **{**settings, **kwargs})  # pyright: ignore[reportArgumentType]


def pair(train_std: bool = False) -> dict[str, Any]:
    start = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) + 0.5
    policy = GaussianPolicy(start, 0.8, train_std)
    return {"policy": policy, "old": copy.deepcopy(policy)}


def backward(method: NFT, roles: Mapping[str, Any], update: Sequence[Batch]) -> float:
    total = 0.0
    for micro in update:
        loss, _ = method.loss(roles, micro, RNG)
        loss.backward()
        total += float(loss.detach())
    return total


def follow(roles: Mapping[str, Any], spec: RoleSpec) -> None:
    """old ← decay·old + (1 − decay)·policy, as an engine does it."""
    with torch.no_grad():
        pairs = zip(roles["old"].parameters(), roles["policy"].parameters(), strict=True)
        for old, new in pairs:
            old.lerp_(new, 1 - spec.decay)


def train(method: NFT, roles: dict[str, Any], steps: int, lr: float) -> None:
    """The training loop in small."""
    live = [p for p in roles["policy"].parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(live, lr)
    for step in range(steps):
        for update in map(share, method.collect(roles, prompts(4), Rng(0, step))):
            optimizer.zero_grad()
            backward(method, roles, update)
            if update:
                optimizer.step()
                follow(roles, method.roles["old"])


class Free:
    """A velocity that is a parameter itself: the gradient of a loss in v, by autograd."""

    def __init__(self, v: Tensor) -> None:
        self.v = v

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return self.v


def one(r: float, count: int = 3) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """A micro-batch whose optimality is r, with the t, x_t and target velocity of its draw."""
    ids = torch.arange(count)
    x0 = torch.randn(count, N, C, generator=torch.Generator().manual_seed(1))
    extra = {"r": torch.full((count,), r), "k": torch.zeros_like(ids)}
    batch = replace(prompts(count), x0=x0, weight=torch.full((count,), 1 / count), extra=extra)
    t = make().density(RNG.uniform("time", ids, counter=0))[:, None, None]
    eps = RNG("noise", ids, (N, C), counter=0)
    return batch, t, (1 - t) * x0 + t * eps, eps - x0


def gradient(
    r: float, v: Tensor, v_old: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor, Mapping[str, Any]]:
    """∂loss/∂v, the loss and its metrics."""
    v = v.clone().requires_grad_()
    roles = {"policy": Free(v), "old": Free(v_old), "reference": Free(v_old + 1)}
    loss, metrics = make(**kwargs).loss(roles, one(r)[0], RNG)
    loss.backward()
    assert v.grad is not None
    return v.grad, loss.detach(), metrics


V_OLD = torch.randn(3, N, C, generator=torch.Generator().manual_seed(2))


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("r", [1.0, 0.5, 0.2, 0.0])
def test_the_gradient_at_the_old_policy_is_weighted_flow_matching(beta, r):
    """Where v = v_old both branches have the error x̂0 − x0 = −t·(v − u), u = ε − x0, and pull v
    opposite ways: ∇ = (2r − 1)·β·∇ t²‖v − u‖²/(t·mean|v − u|), its denominator held. At r = ½ the
    reward says nothing and nothing moves; r = 1 imitates, r = 0 does the reverse."""
    _, t, _, u = one(r)
    v = V_OLD.clone().requires_grad_()
    scale = (t * (v - u)).abs().mean((1, 2), keepdim=True).detach()
    matching = ((t * (v - u)) ** 2 / scale).mean((1, 2)).mean()
    matching.backward()
    assert v.grad is not None and v.grad.abs().max() > 1e-3
    found, loss, _ = gradient(r, V_OLD, V_OLD, beta=beta)
    torch.testing.assert_close(found, (2 * r - 1) * beta * v.grad, **LOOSE)
    torch.testing.assert_close(loss, matching.detach(), **LOOSE)


def test_the_loss_is_the_papers_where_policy_and_old_differ():
    """Eq. 5 with its normalisation, written out for one sample at a time."""
    batch, t, x, _ = one(0.7)
    v, beta, total = V_OLD + 0.4, 0.6, 0.0
    assert batch.x0 is not None
    for i in range(3):
        plus = (1 - beta) * V_OLD[i] + beta * v[i]
        minus = (1 + beta) * V_OLD[i] - beta * v[i]
        for part, branch in ((0.7, plus), (0.3, minus)):
            gap = (x[i] - t[i] * branch - batch.x0[i]).flatten()
            total += part * float(gap @ gap / gap.abs().sum()) / 3
    _, loss, metrics = gradient(0.7, v, V_OLD, beta=beta)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(metrics["drift"].detach(), torch.tensor(0.16))


def test_the_anchor_adds_its_squared_distance():
    """The reference lies 1 away: the loss grows by kl·1, the gradient by kl·2·(v − v_ref)/dim."""
    plain, base, _ = gradient(0.8, V_OLD, V_OLD)
    held, loss, metrics = gradient(0.8, V_OLD, V_OLD, anchor=Anchor(0.5, "velocity"))
    torch.testing.assert_close(loss - base, torch.tensor(0.5), **LOOSE)
    pull = torch.full_like(V_OLD, 0.5 * 2 * -1 / (N * C) / 3)
    torch.testing.assert_close(held - plain, pull, **LOOSE)
    torch.testing.assert_close(metrics["kl"].detach(), torch.tensor(1.0))
    assert "reference" in make(anchor=Anchor(0.5, "velocity")).roles
    assert "reference" not in make().roles


def test_loss_and_gradient_do_not_depend_on_the_chunks():
    found = []
    for chunk in (8, 12, 32):
        roles, method = pair(), make(chunk=chunk, times=2)
        with torch.no_grad():
            roles["old"].mean.add_(0.1)
        (update,) = map(share, method.collect(roles, prompts(4), RNG))
        assert roles["policy"].mean.grad is None
        total = torch.tensor(backward(method, roles, update))
        found.append((total, roles["policy"].mean.grad))
        assert roles["old"].mean.grad is None
    assert found[0][1].abs().max() > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], **LOOSE)


# -- the rollout ---------------------------------------------------------------------------------


def test_samples_are_the_old_policys():
    roles = pair()
    with torch.no_grad():
        roles["policy"].mean.add_(100)
    (update,) = map(share, make(chunk=32).collect(roles, prompts(4), RNG))
    x0 = update[0].x0
    assert x0 is not None and not x0.requires_grad
    assert float((x0.mean(0) - roles["old"].mean.detach()).abs().max()) < 1


def test_optimality_is_the_advantage_on_the_unit_interval():
    """r̃ = A/(2·A_max) + ½; scores 0 … 7 of a group have mean 3.5 and variance 5.25."""
    method = make(lambda x, b: (b.ids % 8).float(), chunk=32, advantage=GroupRelative(1.2))
    (update,) = map(share, method.collect(pair(), prompts(2), RNG))
    a = (torch.arange(8) - 3.5) / (math.sqrt(5.25) + 1e-4)
    want = (a.clamp(-1.2, 1.2) / 2.4 + 0.5).repeat(2)
    torch.testing.assert_close(update[0].extra["r"], want)
    assert want.min() == 0 and want.max() == 1


def test_each_sample_is_trained_at_several_times():
    method = make(chunk=16, times=3)
    (update,) = map(share, method.collect(pair(), prompts(4), RNG))
    assert [int(m.extra["k"][0]) for m in update] == [0, 1, 2, 0, 1, 2]
    losses = [float(method.loss(pair(), m, RNG)[0].detach()) for m in update[:3]]
    assert len(set(losses)) == 3


def spoiled(x: Tensor, batch: Batch) -> Tensor:
    """Prompt 0 is flat, prompt 1 is not scored, prompt 2 misses its third member."""
    score = linear(x, batch)
    score = score.where(batch.groups != 0, torch.tensor(1.0))
    score = score.where(batch.groups != 1, torch.tensor(math.nan))
    return score.where(batch.ids != 2 * 8 + 2, torch.tensor(math.nan))


@pytest.mark.parametrize("chunk", [5, 8, 32])
def test_weights_sum_to_one_over_the_update(chunk):
    method, seen = make(spoiled, chunk=chunk, times=2), 0
    (update,) = map(share, method.collect(pair(), prompts(4), RNG))
    weights = torch.cat([m.weight for m in update if m.weight is not None])
    assert float(weights.sum()) == pytest.approx(1)
    for micro in update:
        assert micro.weight is not None
        dead = (micro.groups < 2) | (micro.ids == 18)
        assert not micro.weight[dead].any() and (micro.weight[~dead] > 0).all()
        seen += int((~dead).sum())
    assert seen == 15 * 2
    metrics = method.metrics()
    assert metrics["groups_flat"] == 0.5 and metrics["rewards_missing"] == pytest.approx(9 / 32)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_batch_that_says_nothing_moves_nothing(value):
    roles, method = pair(), make(lambda x, batch: torch.full((len(batch),), value))
    before = roles["policy"].mean.detach().clone()
    assert list(map(share, method.collect(roles, prompts(4), RNG))) == [[]]
    train(method, roles, steps=2, lr=1.0)
    torch.testing.assert_close(roles["policy"].mean.detach(), before, atol=0, rtol=0)


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_linear_reward_moves_the_mean_its_way_and_the_old_policy_follows(sign):
    roles, method = pair(), make(lambda x, b: sign * linear(x, b), chunk=32, times=2)
    start = roles["policy"].mean.detach().clone()
    train(method, roles, steps=40, lr=0.02)
    moved = [sign * float((roles[n].mean.detach() - start).mean()) for n in ("policy", "old")]
    assert moved[0] > 0.2
    assert 0.8 * moved[0] < moved[1] <= moved[0]


def test_a_reward_for_small_samples_lowers_their_energy():
    """The energy of N(m, s²) is m² + s²: the mean goes to 0 and the spread shrinks."""
    roles = pair(train_std=True)
    method = make(lambda x, b: -x.square().mean((1, 2)), chunk=32, times=2)
    policy = roles["policy"]

    def parts() -> tuple[float, float]:
        return float(policy.mean.detach().square().mean()), float(policy.log_std.detach().exp())

    before = parts()
    train(method, roles, steps=60, lr=0.02)
    after = parts()
    assert after[0] < 0.5 * before[0] and after[1] < 0.9 * before[1]


def test_the_anchor_holds_the_policy():
    far = []
    for kl in (0.0, 1.0):
        roles, method = pair(), make(chunk=32, anchor=Anchor(kl, "velocity"))
        roles["reference"] = copy.deepcopy(roles["policy"])
        start = roles["policy"].mean.detach().clone()
        train(method, roles, steps=40, lr=0.02)
        far.append(float((roles["policy"].mean.detach() - start).mean()))
    assert far[0] > 3 * abs(far[1])


# -- what is declared and refused ----------------------------------------------------------------


def test_the_old_role_follows_the_policy():
    method = make(decay=0.7)
    assert method.roles == {
        "policy": RoleSpec(trainable=True), "old": RoleSpec(follows="policy", decay=0.7),
    }  # fmt: skip
    assert [turn.role for turn in method.turns] == ["policy"]


@pytest.mark.parametrize(
    "wrong",
    [{"group": 1}, {"steps": 0}, {"beta": 0.0}, {"beta": -1.0}, {"chunk": 0},
     {"times": 0}, {"decay": 1.0}, {"decay": -0.1}, {"anchor": Anchor(0.1, "mean")}],
)  # fmt: skip
def test_wrong_settings_are_refused_at_construction(wrong):
    with pytest.raises(InputError) as caught:
        make(**wrong)
    assert "\n" not in str(caught.value)
