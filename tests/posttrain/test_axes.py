"""Windows, surrogates, anchors and advantages, each against a closed form or numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2.analytic import Gaussian, toy_condition
from flux2.errors import InputError
from flux2.flow import DanceSDE, FlowSDE, Transition
from flux2.rng import Rng
from flux2.schedule import Linear
from flux2.types import RoleSpec
from posttrain.advantages import GroupRelative, PerReward, WinRate, group_advantages
from posttrain.axes import (
    AllSteps,
    Anchor,
    Clip,
    FirstHalf,
    FirstSteps,
    Guard,
    RandomSteps,
    Replayed,
    SlidingWindow,
    TrustRegion,
)

NAN = math.nan
RNG = Rng(3, 0)


# -- windows -------------------------------------------------------------------------------------


def test_windows_by_hand():
    grid = Linear()(6, 1)
    assert AllSteps()(grid, RNG) == (0, 1, 2, 3, 4)
    assert FirstSteps(3)(grid, RNG) == (0, 1, 2)
    assert FirstSteps(2, skip=3)(grid, RNG) == (3, 4)
    assert FirstHalf()(grid, RNG) == (0, 1, 2) and FirstHalf()(Linear()(5, 1), RNG) == (0, 1, 2)


def test_random_steps_are_a_share_drawn_anew():
    grid, window = Linear()(9, 1), RandomSteps(0.5)
    drawn = [window(grid, Rng(1, step)) for step in range(200)]
    assert all(len(set(d)) == 4 and d == tuple(sorted(d)) for d in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=9)
    assert counts[8] == 0 and (counts[:8] > 70).all()  # 100 each, expected
    assert window(grid, Rng(1, 7)) == drawn[7]
    assert RandomSteps(0.01)(grid, RNG) and len(RandomSteps(1.0)(grid, RNG)) == 8


def test_a_sliding_window_moves_and_rolls_back():
    grid = Linear()(7, 1)  # steps 0 … 5 may be noisy
    seen = [SlidingWindow(2, 2, every=3)(grid, Rng(0, step)) for step in range(15)]
    assert seen == [(0, 1)] * 3 + [(2, 3)] * 3 + [(4, 5)] * 3 + [(0, 1)] * 3 + [(2, 3)] * 3
    stays = SlidingWindow(3, 2, every=1, rollback=False)
    assert [stays(grid, Rng(0, s)) for s in (0, 1, 2, 9)] == [
        (0, 1, 2), (2, 3, 4), (3, 4, 5), (3, 4, 5),
    ]  # fmt: skip
    assert SlidingWindow(6)(grid, Rng(0, 50)) == (0, 1, 2, 3, 4, 5)


def test_no_window_takes_the_last_step():
    grid = Linear()(6, 1)
    for window in (FirstSteps(6), FirstSteps(2, skip=4), SlidingWindow(6)):
        with pytest.raises(InputError, match="stays noiseless"):
            window(grid, RNG)
    for window in (AllSteps(), FirstHalf(), RandomSteps()):
        with pytest.raises(InputError, match="stays noiseless"):
            window(Linear()(1, 1), RNG)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [(FirstSteps, {"count": 0}), (FirstSteps, {"skip": -1}), (RandomSteps, {"share": 0}),
     (RandomSteps, {"share": 1.1}), (SlidingWindow, {"count": 0}), (SlidingWindow, {"every": 0}),
     (Clip, {"eps": 0}), (Guard, {"eps": -1}), (TrustRegion, {"delta": 0}),
     (Anchor, {"space": "x"}), (Anchor, {"to": "self"}), (Anchor, {"weight": -1}),
     (Anchor, {"decay": 1.0}), (PerReward, {"weights": {}})],
)  # fmt: skip
def test_wrong_axes_are_refused(make: Any, wrong: dict):
    with pytest.raises(InputError, match="method"):
        make(**wrong)


# -- surrogates ----------------------------------------------------------------------------------


def moved(gap: float | Tensor, z: Tensor, std: float = 0.3, dt: float = -0.1) -> Replayed:
    """A step drawn with noise z (b n c) whose mean has since moved by `gap`."""
    mean = torch.zeros_like(z)
    new = Transition((mean + gap).requires_grad_(), std)
    x_next = mean + std * z
    old = Transition(mean, std)
    return Replayed(new, mean, new.log_prob(x_next) - old.log_prob(x_next), dt)


def noise(b: int = 6, n: int = 40, c: int = 5) -> Tensor:
    return torch.randn(b, n, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_log_ratio_of_a_moved_mean():
    """Δ log p = mean(z)·δ − δ²/2 with δ = gap/std: the clip's bias, which the guard takes out."""
    z = noise()
    step, delta = moved(0.06, z), 0.2
    want = z.mean((1, 2)) * delta - delta**2 / 2
    torch.testing.assert_close(step.delta.detach(), want)
    torch.testing.assert_close(step.drift.detach(), torch.full((6,), delta**2, dtype=z.dtype))


def test_clip_is_ppos():
    z, a = noise(), torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    step = moved(0.06, z)
    loss, cut = Clip(0.01)(step, a)
    ratio, loss = step.delta.exp().detach(), loss.detach()
    for k in range(6):
        r, adv = float(ratio[k]), float(a[k])
        assert float(loss[k]) == pytest.approx(-min(r * adv, min(max(r, 0.99), 1.01) * adv))
        assert float(cut["clip_high"][k]) == float(r > 1.01 and adv > 0)
        assert float(cut["clip_low"][k]) == float(r < 0.99 and adv < 0)


def test_the_guards_ratio_is_the_noises_product_with_the_move():
    """exp(mean z·Δμ): without bias, and (over −dt) with a gradient that no step's std scales."""
    z, a = noise(), torch.ones(6, dtype=torch.float64)
    for std, dt in ((0.3, -0.1), (0.05, -0.02)):
        step = moved(0.002, z, std, dt)
        loss, _ = Guard(eps=10.0)(step, a)
        torch.testing.assert_close(loss.detach(), -(z * 0.002).mean((1, 2)).exp() / -dt)
    straight = moved(0.0, z, 0.3, -1.0)
    loss, _ = Guard(eps=1e-9)(straight, a)
    (grad,) = torch.autograd.grad(loss.sum(), straight.new.mean)
    torch.testing.assert_close(grad, -z / z[0].numel())  # of the mean, whatever std is


def test_a_trust_region_bounds_the_drift_and_lets_it_come_back():
    z = noise()
    a = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    near = moved(0.3 * 0.04, z)
    loss, cut = TrustRegion(0.05)(near, a)
    torch.testing.assert_close(loss, -near.delta.exp() * a)
    assert not cut["clip_high"].any() and not cut["clip_low"].any()
    far = moved(0.3 * 0.06, z)
    loss, cut = TrustRegion(0.05)(far, a)
    ratio = far.delta.exp()
    on = ((a > 0) & (ratio >= 1)) | ((a < 0) & (ratio <= 1))
    assert on.any() and not on.all()
    assert (loss[on] == 0).all() and (loss[~on] != 0).all()
    torch.testing.assert_close(cut["clip_high"] + cut["clip_low"], on.float())
    (grad,) = torch.autograd.grad(loss.sum(), far.new.mean)
    assert not grad[on].any() and grad[~on].any()


@pytest.mark.parametrize("shape", [(4, 3), (1024, 128)])
def test_a_trust_region_means_the_same_at_every_resolution(shape):
    """δ is per dimension; the sampled log-ratio's spread δ/√D is not."""
    z = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
    up = torch.full((8,), 1.0)
    _, inside = TrustRegion(0.05)(moved(0.3 * 0.049, z), up)
    assert not inside["clip_high"].any()
    step = moved(0.3 * 0.051, z)
    _, outside = TrustRegion(0.05)(step, up)
    torch.testing.assert_close(outside["clip_high"], (step.delta >= 0).float())


def test_at_ratio_one_all_surrogates_have_reinforces_gradient():
    z, a = noise(), torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    std, dt = 0.3, -0.1
    reinforce = -a[:, None, None] * z / (std * z[0].numel())  # of −A·log p, averaged
    for surrogate, scale in ((Clip(), 1.0), (TrustRegion(), 1.0), (Guard(), std / -dt)):
        step = moved(0.0, z, std, dt)
        (grad,) = torch.autograd.grad(surrogate(step, a)[0].sum(), step.new.mean)
        torch.testing.assert_close(grad, reinforce * scale)


# -- anchors -------------------------------------------------------------------------------------


def test_anchors_name_their_roles():
    assert Anchor().roles == {}
    assert Anchor(0.1).roles == {"reference": RoleSpec()}
    assert Anchor(0.1, to="ema", decay=0.9).roles == {"ema": RoleSpec(follows="policy", decay=0.9)}
    Anchor(0.0, "mean").needs_velocity()
    with pytest.raises(InputError, match="this method has none"):
        Anchor(0.1, "mean").needs_velocity()


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE()])
def test_the_divergence_in_mean_space_holds_dt(kernel):
    """A step's KL at one σ is proportional to the step's length, as an SDE's is (Girsanov): a
    trajectory's sum, and with it β, does not depend on the number of steps."""
    one, two = Gaussian(torch.zeros(1, 1), 0.8), Gaussian(torch.full((1, 1), 0.1), 0.8)
    x, t = torch.full((1, 1, 1), 0.3, dtype=torch.float64), torch.tensor([0.5]).double()
    found = []
    for steps in (200, 400):
        laws = [kernel(x, m(x, t), Linear()(steps, 1), steps // 2) for m in (one, two)]
        found.append(float(laws[0].kl(laws[1])) * steps)
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_velocities_to_a_guided_anchor():
    cond = toy_condition(2, 3)

    def anchor(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.zeros_like(x) + cond.text[:, :1, :1]  # 1 with the prompt, −1 without

    x, t = torch.zeros(2, 3, 4), torch.full((2,), 0.5)
    v = torch.full((2, 3, 4), 2.0)
    plain = Anchor(1.0, "velocity").velocity({"reference": anchor}, x, t, cond, v)
    assert plain.tolist() == [1.0, 1.0]
    held = Anchor(1.0, "velocity", guidance=2.0).velocity({"reference": anchor}, x, t, cond, v)
    assert held.tolist() == [1.0, 1.0]  # −1 + 2·2 = 3, one away from 2
    half = Anchor(1.0, "velocity", guidance=1.5).velocity({"reference": anchor}, x, t, cond, v)
    assert half.tolist() == [0.0, 0.0]  # −1 + 1.5·2 = 2


# -- advantages ----------------------------------------------------------------------------------

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def test_group_relative_is_of_the_sum():
    scores = {"reward": torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])}
    found, want = GroupRelative()(scores, GROUPS), group_advantages(scores["reward"], GROUPS)
    assert found.value.tolist() == want.value.tolist() and found.flat == 0.5


def test_per_reward_gives_small_spreads_their_weight():
    """Summed, a reward of spread 100 drowns one of spread .01; normalised by itself it does not."""
    big, small = torch.tensor([0.0, 100.0, 0.0, 100.0]), torch.tensor([0.01, 0.0, 0.0, 0.01])
    scores = {"reward": big + small, "a": big, "b": small}
    groups = torch.zeros(4, dtype=torch.int64)
    found = PerReward({"a": 1.0, "b": 1.0})(scores, groups)
    # A_a = (−1, 1, −1, 1), A_b ≈ (1, −1, −1, 1): the sum is (0, 0, −2, 2), its std √2.
    want = torch.tensor([0.0, 0.0, -2.0, 2.0]) / math.sqrt(2)
    torch.testing.assert_close(found.value, want, atol=0.02, rtol=0)
    summed = group_advantages(scores["reward"], groups).value
    torch.testing.assert_close(summed, torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=1e-3, rtol=0)


def test_per_reward_masks_failures_and_leaves_out_what_is_not_asked():
    a = torch.tensor([0.0, 1.0, NAN, 0.0, 1.0, 2.0])
    b = torch.tensor([3.0, 1.0, 2.0, NAN, NAN, NAN])  # group 1 is not asked for b
    found = PerReward({"a": 1.0, "b": 0.5})({"reward": a, "a": a, "b": b}, GROUPS)
    assert found.valid.tolist() == [True, True, False, True, True, True]
    assert found.value[2] == 0 and found.missing == pytest.approx(1 / 6)
    assert found.value[0] < 0 < found.value[1] and found.value[3] < found.value[4] < found.value[5]
    every = {"reward": a, "a/reward": a, "b/reward": b, "b/other": a}
    same = PerReward({"a/reward": 1.0, "b/reward": 1.0})(every, GROUPS)
    assert PerReward()(every, GROUPS).value.tolist() == same.value.tolist()
    with pytest.raises(InputError, match="choose from reward"):
        PerReward({"c": 1.0})({"reward": a}, GROUPS)


def test_win_rates_know_order_and_not_size():
    r = torch.tensor([0.1, 0.2, 9.0, 0.5, 0.5, NAN])
    found = WinRate()({"reward": r}, GROUPS)
    rates = torch.tensor([0.0, 0.5, 1.0])
    want = (rates - 0.5) / (rates.std(correction=0) + 1e-4)
    torch.testing.assert_close(found.value[:3], want)
    assert not found.valid[3:].any() and found.flat == 0.5  # a tie says nothing
    close = WinRate(margin=0.15)({"reward": r}, GROUPS)
    torch.testing.assert_close(close.value[0], close.value[1])
