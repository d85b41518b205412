"""DMD on Gaussians and mixtures, where every score and every fixed point is known."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill._common import Path, Renoise, effective_guidance, shorten, simulate
from distill.dmd import DMD
from flux2.analytic import (
    AffinePolicy,
    ConditionalGaussian,
    Gaussian,
    GaussianPolicy,
    Mixture,
    toy_condition,
)
from flux2.engine import share
from flux2.errors import InputError
from flux2.flow import Uniform, interpolate
from flux2.rng import Rng
from flux2.samplers import sample_euler, sample_renoise
from flux2.schedule import Grid, Linear, StaticShift
from flux2.types import Batch

N, C, STD = 2, 3, 0.7
G = torch.Generator().manual_seed(0)
PROMPTED = torch.randn(N, C, generator=G, dtype=torch.float64)
UNPROMPTED = torch.randn(N, C, generator=G, dtype=torch.float64)
TEACHER = ConditionalGaussian(PROMPTED, UNPROMPTED, STD)
HALF = Renoise(Uniform(), 0.0, 0.5)
WHOLE = Renoise(Uniform(), 0.0, 1.0)


def prompts(count: int = 64) -> Batch:
    ids = torch.arange(count)
    return Batch(ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (1, N), C)


def one_step(mean: Tensor, std: float = STD) -> AffinePolicy:
    """A student of one step that makes N(mean, std²): x̂0 = x − v(x) = std·x + mean."""
    student = AffinePolicy(mean, std, Grid((1.0, 0.0)))
    student.slope.data.fill_(1 - std)
    student.offset.data.copy_(-mean[None])
    return student


def method(**kwargs: Any) -> DMD:
    given: dict[str, Any] = {"steps": 1, "schedule": Linear(), "match": WHOLE, "normalise": False}
    return DMD(**(given | kwargs))


def update_of(dmd: DMD, roles: Any, count: int = 64, step: int = 0) -> list[Batch]:
    (update,) = dmd.collect(roles, prompts(count), Rng(0, step))
    return share(list(update))


def student_gradient(dmd: DMD, roles: Any, count: int = 64) -> tuple[Tensor, dict[str, Any]]:
    """−∂L/∂mean of a one-step student, summed over what it was told."""
    roles["student"].zero_grad()
    notes: dict[str, Any] = {}
    for micro in update_of(dmd, roles, count):
        loss, metrics = dmd.student_loss(roles, micro, Rng(0, 0))
        loss.backward()
        notes = dict(metrics)
    # x̂0 = … − offset: the mean moves against the offset.
    return roles["student"].offset.grad[0].clone(), notes


@pytest.mark.parametrize("normalise", [True, False])
def test_where_fake_and_real_agree_nothing_moves(normalise):
    roles = {"student": one_step(PROMPTED), "fake": Gaussian(PROMPTED, STD), "teacher": TEACHER}
    downhill, notes = student_gradient(method(guidance=1.0, normalise=normalise), roles)
    assert downhill.abs().max() == 0 and float(notes["dmd/delta"]) == 0


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("scale", [0.0, 2.5, 4.0])
def test_the_fixed_point_with_guidance_is_the_guided_law(scale, normalise):
    law = TEACHER.guided(scale)
    roles = {"student": one_step(law.mean), "fake": law, "teacher": TEACHER}
    downhill, _ = student_gradient(method(guidance=scale, normalise=normalise), roles)
    assert downhill.abs().max() < 1e-7  # for each x by itself, not on average: k is the same


def test_elsewhere_the_pull_is_k_times_the_gap():
    """x̂_fake − x̂_real = k(τ)·(m_fake − m_real), k = τ²/C_τ, and a step reduces the gap."""
    gap = torch.full((N, C), 0.3, dtype=torch.float64)
    fake = Gaussian(PROMPTED + gap, STD)
    roles = {"student": one_step(fake.mean), "fake": fake, "teacher": TEACHER}
    downhill, _ = student_gradient(method(guidance=1.0), roles, 4096)
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    k = (u**2 / ((1 - u) ** 2 * STD**2 + u**2)).mean()
    torch.testing.assert_close(downhill, -k * gap / (N * C), rtol=0.02, atol=0)
    assert (fake.mean + downhill - PROMPTED).norm() < gap.norm()


def test_the_decoupled_laws_set_the_guidance():
    """α = 4, s = 0.7, τ_CA on [0, ½], τ_DM on [0, 1]: 2.25; integrated here a second way."""
    grid = Grid((1.0, 0.0))
    told = effective_guidance(4.0, WHOLE, HALF, grid, STD, normalise=False)
    assert abs(told - 2.25) < 0.01
    a, c = 1 + STD**2, STD**2  # C = a·τ² − 2c·τ + c

    def integral(high: float, count: int = 200_000) -> float:
        return sum(
            (t := (i + 0.5) * high / count) ** 2 / (a * t * t - 2 * c * t + c)
            for i in range(count)
        ) / count  # fmt: skip

    assert abs(told - (1 + 3 * integral(0.5) / integral(1.0))) < 1e-4
    assert effective_guidance(4.0, WHOLE, None, grid, STD, False) == 4.0
    assert effective_guidance(1.0, WHOLE, HALF, grid, STD, False) == 1.0


@pytest.mark.parametrize("normalise", [True, False])
def test_the_decoupled_fixed_point_is_where_it_was_told(normalise):
    dmd = method(guidance=4.0, augment=HALF, normalise=normalise, std=STD)
    alpha = effective_guidance(4.0, WHOLE, HALF, Grid((1.0, 0.0)), STD, normalise)
    # The normaliser is w(τ) alone where the guidance moves the image by less than its spread.
    apart = PROMPTED - UNPROMPTED if not normalise else 0.01 * (PROMPTED - UNPROMPTED)
    teacher = ConditionalGaussian(PROMPTED, PROMPTED - apart, STD)
    pulls = {}
    for at in (1.0, alpha, 4.0):
        law = teacher.guided(at)
        roles = {"student": one_step(law.mean), "fake": law, "teacher": teacher}
        downhill, notes = student_gradient(dmd, roles, 6144)
        pulls[at] = float((downhill * apart).sum())
    # Below it the mean is pushed on, above it back.
    assert pulls[1.0] > 0 > pulls[4.0]
    assert abs(pulls[alpha]) < 0.03 * pulls[1.0]
    assert float(notes["dmd/cos"]) < 0


@pytest.mark.parametrize("augment", [None, HALF])
def test_turns_arrive_there(augment):
    """Fake score and student, each by its own turn, from the teacher's conditional law."""
    dmd = method(guidance=3.0, augment=augment, every=2, micro=64)
    alpha = effective_guidance(3.0, WHOLE, augment, Grid((1.0, 0.0)), STD, False)
    student, fake = one_step(PROMPTED), GaussianPolicy(PROMPTED.clone(), STD, train_std=True)
    roles = {"student": student, "fake": fake, "teacher": TEACHER}
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), 0.02, betas=(0.0, 0.99)),
        "fake": torch.optim.Adam(fake.parameters(), 0.04),
    }
    settled = []
    for step in range(600):
        if step == 400:
            for o in optimizers.values():
                o.param_groups[0]["lr"] *= 0.1
        for turn in dmd.turns:
            if (step + 1) % turn.every:
                continue
            optimizers[turn.role].zero_grad()
            for micro in update_of(dmd, roles, 64, step):
                turn.loss(roles, micro, Rng(0, step))[0].backward()
            optimizers[turn.role].step()
        if step >= 500:
            settled.append((-student.offset.detach()[0], 1 - student.slope.detach().flatten()))
    mean = torch.stack([m for m, _ in settled]).mean(0)
    std = float(torch.stack([s for _, s in settled]).mean())
    want = TEACHER.guided(alpha).mean
    assert (mean - want).norm() < 0.12 * (want - PROMPTED).norm()
    assert abs(std - STD) < 0.1


def test_a_turn_leaves_the_other_roles_without_gradient():
    student, fake = one_step(PROMPTED), GaussianPolicy(PROMPTED + 0.5, STD, train_std=True)
    real = GaussianPolicy(PROMPTED.clone(), STD, train_std=True)
    roles = {"student": student, "fake": fake, "teacher": real}
    dmd = method(guidance=1.0, micro=64)
    (micro,) = update_of(dmd, roles)
    dmd.student_loss(roles, micro, Rng(0, 0))[0].backward()
    assert student.offset.grad is not None and student.offset.grad.abs().max() > 0
    assert all(p.grad is None for r in (fake, real) for p in r.parameters())
    student.zero_grad(set_to_none=True)
    dmd.fake_loss(roles, micro, Rng(0, 0))[0].backward()
    assert fake.mean.grad is not None and fake.mean.grad.abs().max() > 0
    assert all(p.grad is None for r in (student, real) for p in r.parameters())


@pytest.mark.parametrize("rollout", ["euler", "renoise"])
def test_the_simulated_path_is_the_samplers_bit_for_bit(rollout):
    grid, batch, rng = StaticShift(5.0)(4, N), prompts(), Rng(3, 7)
    student = Gaussian(PROMPTED, STD)
    path = simulate(student, batch, grid, rollout, rng)

    def noise(i: int) -> Tensor:
        return rng("rollout", batch.ids, batch.shape, counter=i)

    steps: list[Tensor] = []

    def spy(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        steps.append(x)
        return student(x, t, cond)

    cond = batch.cond
    assert cond is not None
    if rollout == "euler":
        end = sample_euler(spy, noise(0), cond, grid)
    else:
        end = sample_renoise(spy, noise(0), cond, grid, lambda i: noise(i + 1))
    assert len(steps) == 4 and all(map(torch.equal, path.x, steps))
    torch.testing.assert_close(path.x0[-1], end, rtol=0, atol=1e-12)
    again: Path = simulate(student, batch.select(torch.arange(5, 9)), grid, rollout, rng)
    assert torch.equal(again.x, path.x[:, 5:9])  # a sample's path is its own


def test_the_loss_sees_the_step_that_was_drawn_and_its_sigma():
    dmd, batch = method(steps=4, schedule=StaticShift(5.0), micro=64), prompts()
    roles = {"student": Gaussian(PROMPTED, STD)}
    (micro,) = next(iter(dmd.collect(roles, batch, Rng(0, 0))))
    grid = StaticShift(5.0)(4, N)
    path = simulate(roles["student"], batch, grid, "euler", Rng(0, 0))
    found = set()
    for row in range(64):
        k = [float(s) for s in grid.tensor()].index(float(micro.extra["sigma"][row]))
        found.add(k)
        assert float(micro.extra["after"][row]) == float(grid.tensor()[k + 1])
        assert torch.equal(micro.extra["x"][row], path.x[k, row])
        assert torch.equal(micro.extra["x0"][row], path.x0[k, row])
    assert found == {0, 1, 2, 3}


def test_laws_of_tau_stay_in_their_range():
    u = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    sigma, after = torch.full((1000,), 0.8), torch.full((1000,), 0.5)
    for within, low, high in (("all", 0.02, 0.98), ("cleaner", 0.02, 0.8), ("noisier", 0.5, 0.98)):
        tau = Renoise(within=within)(u, sigma, after)
        assert low <= float(tau.min()) < low + 0.01 and high - 0.01 < float(tau.max()) <= high
    for end in (0.7, 0.97):  # FLUX.2's steps end there
        tau = Renoise(within="noisier")(u, torch.ones(1000), torch.full((1000,), end))
        assert end <= float(tau.min()) and float(tau.max()) < 1
    tiny = Renoise(within="cleaner")(u, torch.full((1000,), 0.01), after)
    assert float(tiny.min()) > 0 and float(tiny.max()) <= 0.01


class Slope:
    """R = a·x̂: a reward whose gradient is the same everywhere; every third sample has no score."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def check_gradient(self) -> None:
        return

    def differentiable(self, latents: Tensor, batch: Batch) -> Tensor:
        reward = (latents * self.a).sum((1, 2))
        return torch.where(batch.ids % 3 == 2, torch.nan, reward)


def test_a_reward_moves_the_fixed_point_by_its_slope():
    """E[k]·(m − m_c)/dim = λ·a, two thirds of it where a third has no score."""
    a = torch.randn(N, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    k = float((u**2 / ((1 - u) ** 2 * STD**2 + u**2)).mean())
    law = Gaussian(PROMPTED + 2 / 3 * 0.05 * N * C * a / k, STD)
    roles = {"student": one_step(law.mean), "fake": law, "teacher": TEACHER}
    rewarded = method(guidance=1.0, score=Slope(a), reward=0.05, cap=math.inf)
    downhill, notes = student_gradient(rewarded, roles, 4095)
    without, _ = student_gradient(method(guidance=1.0), roles, 4095)
    assert downhill.norm() < 0.02 * without.norm()
    assert math.isfinite(float(notes["reward"])) and float(notes["reward_capped"]) == 0


def test_a_pull_is_shortened_and_never_spreads_what_is_not_finite():
    pull = torch.ones(3, 2, 2) * torch.tensor([0.5, 4.0, math.nan])[:, None, None]
    short = shorten(pull, 1.0)
    assert torch.equal(short, torch.tensor([0.5, 1.0, 0.0])[:, None, None].expand(3, 2, 2))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"guidance": -1.0}, "method.guidance"),
        ({"rollout": "heun"}, "method.rollout"),
        ({"every": 0}, "method.every"),
        ({"steps": 0}, "steps"),
        ({"ema": 1.0}, "method.ema"),
        ({"cap": 0.0}, "method.cap"),
    ],
)
def test_wrong_settings_are_one_line(wrong, says):
    with pytest.raises(InputError, match=says) as error:
        DMD(**wrong)
    assert "\n" not in str(error.value)


def test_wrong_laws_are_one_line():
    for wrong in ({"low": 0.5, "high": 0.5}, {"within": "below"}, {"high": 1.5}):
        with pytest.raises(InputError, match="renoising law"):
            Renoise(**wrong)


def test_roles_and_turns():
    plain = DMD()
    assert list(plain.roles) == ["student", "fake", "teacher"]
    assert [(t.role, t.every) for t in plain.turns] == [("fake", 1), ("student", 5)]
    assert DMD(ema=0.99).roles["ema"].follows == "student"
    assert "guidance 3" in plain.describe()
    assert "amounts to" in DMD(augment=HALF).describe()


# ---------------------------------------------------------------- a mixture of 8 modes


ANGLES = 2 * math.pi * torch.arange(8) / 8
RING = Mixture(torch.stack([ANGLES.cos(), ANGLES.sin()], 1) * 2, torch.ones(8), 0.15)


class Net(nn.Module):
    """A small velocity over two numbers, of x and t."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes = ((2 + 16, 128), (128, 128), (128, 2))
            self.layers = nn.ModuleList(nn.Linear(*s) for s in sizes)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        wave = t[:, None].float() * math.pi * 2.0 ** torch.arange(-1, 7).float()
        h = torch.cat([x.flatten(1).float(), wave.sin(), wave.cos()], 1)
        for layer in self.layers[:-1]:
            h = nn.functional.silu(layer(h))
        return self.layers[-1](h).view_as(x)


def points(count: int, start: int = 0) -> Batch:
    ids = torch.arange(start, start + count)
    return Batch(ids, ("p",) * count, toy_condition(count, 1), ids, ({},) * count, (1, 1), 2)


def coverage(x: Tensor) -> tuple[int, float]:
    """Modes with at least a third of their share of near samples, and the share that is near."""
    gaps = torch.cdist(x.flatten(1), RING.means)
    near, mode = gaps.min(1)
    counts = torch.bincount(mode[near < 0.5], minlength=8)
    return int((counts > len(x) / 24).sum()), float((near < 0.5).float().mean())


def energy_distance(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten(1), b.flatten(1)
    own = torch.cdist(a, a).mean() + torch.cdist(b, b).mean()
    return float(2 * torch.cdist(a, b).mean() - own)


def fitted(seed: int, steps: int = 800) -> Net:
    """A network that has learnt the ring's velocity: where student and fake score begin."""
    net = Net(seed)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        x0 = RING.sample(torch.rand(256, generator=g), torch.randn(256, 1, 2, generator=g))
        t, eps = torch.rand(256, generator=g), torch.randn(256, 1, 2, generator=g)
        optimizer.zero_grad()
        x = interpolate(x0, eps, t)
        (net(x, t) - RING(x, t)).square().mean().backward()
        optimizer.step()
    return net


def samples(student: Net, grid: Grid) -> Tensor:
    return simulate(student, points(1024, 10_000), grid, "euler", Rng(9, 9)).x0[-1]


def distil(student: Net, frozen_fake: bool, steps: int = 1000) -> Tensor:
    """A student of two steps of the ring → 1024 of its samples."""
    schedule = StaticShift(3.0)
    dmd = DMD(guidance=1.0, steps=2, schedule=schedule, every=3, micro=256)
    fake, student = copy.deepcopy(student), copy.deepcopy(student)
    roles = {"student": student, "fake": fake, "teacher": RING}
    optimizers = {
        "student": torch.optim.Adam(student.parameters(), 5e-4, betas=(0.0, 0.99)),
        "fake": torch.optim.Adam(fake.parameters(), 2e-3, betas=(0.0, 0.99)),
    }
    for step in range(steps):
        (update,) = dmd.collect(roles, points(256), Rng(0, step))
        for turn in dmd.turns:
            if (step + 1) % turn.every or (frozen_fake and turn.role == "fake"):
                continue
            optimizers[turn.role].zero_grad()
            for micro in share(list(update)):
                turn.loss(roles, micro, Rng(0, step))[0].backward()
            optimizers[turn.role].step()
    return samples(student, schedule(2, 1))


@pytest.mark.slow
def test_eight_modes_are_covered_and_without_a_fake_score_they_are_not():
    g, net = torch.Generator().manual_seed(5), fitted(1)
    real = RING.sample(torch.rand(1024, generator=g), torch.randn(1024, 1, 2, generator=g))
    before = samples(net, StaticShift(3.0)(2, 1))
    made, frozen = distil(net, False), distil(net, True)
    modes, near = coverage(made)
    assert modes == 8 and near > 0.6
    assert energy_distance(made, real) < min(0.06, 0.5 * energy_distance(before, real))
    assert not energy_distance(frozen, real) < 1  # pulled by the teacher alone, it runs away
