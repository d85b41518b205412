"""Flow-map distillation on Gaussians, whose flow map is exact: u = (x_t − X_{t→r})/(t − r)."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from distill.consistency import FlowMapDistillation, Interval, difference, jvp
from distill.flowmap import Adaptive, Normalised, Squared, ToAnywhere, ToData, ToPhase
from flux2.analytic import ConditionalGaussian, Gaussian, toy_condition
from flux2.errors import InputError
from flux2.flow import Uniform, expand
from flux2.generate import Sampler
from flux2.rng import Rng
from flux2.samplers import sample_euler, sample_flowmap, sample_renoise
from flux2.schedule import EmpiricalShift, Linear
from flux2.types import Batch, Condition, RoleSpec

N, C, STD = 4, 3, 0.6
G = torch.Generator().manual_seed(0)
PROMPTED, UNPROMPTED = (torch.randn(N, C, generator=G, dtype=torch.float64) for _ in range(2))
TEACHER = ConditionalGaussian(PROMPTED, UNPROMPTED, STD)
PHASES = ToPhase(steps=3, schedule=Linear())
INTERVALS = [ToData(), PHASES, ToAnywhere(equal=0.3)]


def data(count: int = 64, seed: int = 1) -> Batch:
    ids, g = torch.arange(count), torch.Generator().manual_seed(seed)
    noise = torch.randn(count, N, C, generator=g, dtype=torch.float64)
    return Batch(
        ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (2, 2), C,
        x0=PROMPTED + STD * noise, weight=torch.full((count,), 1 / count),
    )  # fmt: skip


def below(interval: Interval, t: Tensor, cond: Condition) -> Tensor:
    """r by the interval's definition: 0, the grid's next σ, or what the student was told."""
    if isinstance(interval, ToData):
        return torch.zeros_like(t)
    if isinstance(interval, ToPhase):
        sigmas = interval.schedule(interval.steps, N).sigmas
        return t.new_tensor([max(s for s in sigmas if s < float(v) - 1e-6) for v in t.detach()])
    assert cond.guidance is not None
    return t - cond.guidance


class ExactMap(nn.Module):
    """The flow map of N(mean, STD²) as a student; the mean is trainable."""

    def __init__(self, mean: Tensor, interval: Interval) -> None:
        super().__init__()
        self.mean, self.interval = nn.Parameter(mean.clone()), interval

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        law, r = Gaussian(self.mean, STD), below(self.interval, t, cond)
        gap = t - r
        u = (x - law.flow(x, t, r)) / expand(gap.where(gap > 0, 1.0), x)
        return torch.where(expand(gap > 0, x), u, law(x, t))


def made(interval: Interval = PHASES, **settings) -> FlowMapDistillation:
    return FlowMapDistillation(**{"interval": interval, "distance": Squared(), **settings})


def loss_of(student, batch: Batch | None = None, **settings):
    method = made(**settings)
    roles = {"student": student, "teacher": TEACHER}
    return method.loss(roles, data() if batch is None else batch, Rng(0, 0))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("derivative", ["jvp", "differences"])
def test_the_fixed_point_is_the_exact_flow_map(derivative, interval, scale):
    """No gradient at the flow map of the guided law, and one elsewhere, downhill towards it."""
    settings = {"interval": interval, "guidance": scale, "derivative": derivative, "share": 1e-4}
    guided_mean = TEACHER.guided(scale).mean
    student = ExactMap(guided_mean, interval)
    loss, metrics = loss_of(student, **settings)
    loss.backward()
    assert float(loss.detach()) < 1e-11 and student.mean.grad.abs().max() < 1e-6
    assert float(metrics["change"]) > 1e-3  # what would be missing without the derivative

    wrong = ExactMap(guided_mean + 0.5, interval)
    loss, _ = loss_of(wrong, **settings)
    loss.backward()
    assert float(loss.detach()) > 0.01
    assert torch.cosine_similarity(-wrong.mean.grad.flatten(), -torch.ones(N * C).double(), 0) > 0.9


@pytest.mark.parametrize("derivative", ["jvp", "differences"])
def test_the_teachers_velocity_is_no_fixed_point(derivative):
    """At u = v the residual is −(t − r)·dv/dt, and it points to the mean velocity."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.push = nn.Parameter(torch.zeros(64, N, C).double())

        def forward(self, x, t, cond):
            return TEACHER(x, t, cond) + self.push

    student, batch = Plain(), data()
    loss, _ = loss_of(student, batch, interval=ToData(), guidance=1.0, derivative=derivative)
    loss.backward()
    t = Uniform()(Rng(0, 0).uniform("time", batch.ids, (3,))[:, 0]).double()
    assert batch.x0 is not None and batch.cond is not None
    noise = Rng(0, 0)("noise", batch.ids, (N, C))
    x = batch.x0 + expand(t, batch.x0) * (noise - batch.x0)
    exact = ExactMap(PROMPTED, ToData())(x, t, batch.cond).detach()
    away = exact - TEACHER(x, t, batch.cond)
    assert torch.cosine_similarity(-student.push.grad.flatten(), away.flatten(), 0) > 0.8


def test_differences_of_any_share_look_for_the_same_map():
    """The only error of a long share is the teacher's midpoint step: of order 2, and 3 on a
    Gaussian, since C_t is quadratic."""
    errors = []
    for share in (0.4, 0.2, 0.1):
        _, metrics = loss_of(
            ExactMap(TEACHER.guided(2.0).mean, PHASES), interval=PHASES, guidance=2.0, share=share
        )
        errors.append(math.sqrt(float(metrics["error"])))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[0] < 0.1 and all(2.8 < s < 3.3 for s in slopes), (errors, slopes)


class Polynomial(nn.Module):
    """u = a(s)·x + b(s), cubic in the place s of t within its phase: it can come near the flow map,
    and knows nothing of it."""

    def __init__(self, interval: ToPhase) -> None:
        super().__init__()
        self.sigmas = interval.schedule(interval.steps, N).sigmas
        self.slope = nn.Parameter(torch.zeros(interval.steps, 4).double())
        self.offset = nn.Parameter(torch.zeros(interval.steps, 4, N * C).double())

    def forward(self, x, t, cond):
        tops = t.new_tensor(self.sigmas)
        k = (tops[None] >= t.detach()[:, None] - 1e-6).sum(1) - 1  # the phase
        s = 2 * (t - tops[k + 1]) / (tops[k] - tops[k + 1]) - 1
        powers = torch.stack([s**i for i in range(4)], 1)
        slope = (powers * self.slope[k]).sum(1)
        offset = (powers[:, :, None] * self.offset[k]).sum(1)
        return expand(slope, x) * x + offset.reshape(-1, N, C)


@pytest.mark.parametrize(
    ("derivative", "distance"),
    [("jvp", Squared()), ("jvp", Normalised()), ("differences", Squared())],
)
def test_training_arrives_at_the_guided_flow_map(derivative, distance):
    """From a student that knows nothing, by its own stopped target; then three Euler steps without
    guidance are the guided ODE."""
    student, steps = Polynomial(PHASES), 300
    method = made(
        guidance=2.0, derivative=derivative, share=0.1, distance=distance, warmup=50, micro=32
    )
    optimizer = torch.optim.Adam(student.parameters(), 0.2, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for step in range(steps):
        loss, _ = method.loss(
            {"student": student, "teacher": TEACHER}, data(24, step), Rng(0, step)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
    x = torch.randn(64, N, C, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    one, zero, cond = torch.ones(64).double(), torch.zeros(64).double(), toy_condition(64, N)
    want = TEACHER.guided(2.0).flow(x, one, zero)
    with torch.no_grad():
        got = sample_euler(student, x, cond, Linear()(3, N))
    plain = sample_euler(TEACHER.guided(2.0), x, cond, Linear()(3, N))
    assert (got - want).square().mean().sqrt() < 0.03
    assert (plain - want).square().mean().sqrt() > 0.15  # what three steps of the teacher miss by


def test_the_exact_maps_samplers_draw_the_exact_law():
    """Euler on the phases' grid, jumps of any grid, and x̂0 noised anew."""
    law = TEACHER.guided(3.0)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(20_000, N, C, generator=g, dtype=torch.float64)
    cond = toy_condition(len(x), N)
    one, zero = torch.ones(len(x)).double(), torch.zeros(len(x)).double()
    want = law.flow(x, one, zero)
    with torch.no_grad():
        few = x[:50], toy_condition(50, N)
        phased = sample_euler(ExactMap(law.mean, PHASES), *few, Linear()(3, N))
        torch.testing.assert_close(phased, want[:50], atol=1e-10, rtol=0)
        for grid in (Linear()(1, N), EmpiricalShift()(4, N)):
            jumped = sample_flowmap(ExactMap(law.mean, ToAnywhere()), x, cond, grid)
            torch.testing.assert_close(jumped, want, atol=1e-10, rtol=0)
        drawn = sample_renoise(
            ExactMap(law.mean, ToData()), x, cond, Linear()(3, N),
            lambda i: torch.randn(x.shape, generator=g, dtype=torch.float64),
        )  # fmt: skip
    assert (drawn - want).abs().max() > 0.5  # not the ODE's own end
    assert (drawn.mean(0) - law.mean).abs().max() < 5 * STD / math.sqrt(len(x))
    assert (drawn.std(0) / STD - 1).abs().max() < 5 / math.sqrt(2 * len(x))


def test_the_derivatives_agree_with_the_closed_form():
    """For a fixed r, d/dt of (x − X_r)/(t − r) along the flow is (v − u)/(t − r): X_r stays."""
    law, interval = TEACHER.guided(1.0), ToAnywhere()
    t, r = torch.linspace(0.3, 1, 16).double(), torch.linspace(0, 0.25, 16).double()
    x = torch.randn(16, N, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    student, cond = ExactMap(law.mean, interval), toy_condition(16, N)

    def u(x: Tensor, t: Tensor) -> Tensor:
        return student(x, t, replace(cond, guidance=t - r))

    v, here = law(x, t), u(x, t).detach()
    want = (v - here) / expand(t - r, x)
    found = jvp(u, x, t, v)
    assert not found.requires_grad
    torch.testing.assert_close(found, want, atol=1e-10, rtol=0)
    quotient, mean = difference(u, here, law, x, t, v, torch.full_like(t, 1e-6))
    assert not quotient.requires_grad
    torch.testing.assert_close(quotient, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, v, atol=1e-5, rtol=0)


@pytest.mark.parametrize("derivative", ["jvp", "differences"])
def test_gradients_reach_the_student_alone_through_one_forward(derivative):
    graded: list[bool] = []

    class Watched(ExactMap):
        def forward(self, x, t, cond):
            graded.append(torch.is_grad_enabled())
            assert bool((cond.text > 0).all())  # never the empty prompt
            return super().forward(x, t, cond)

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(PROMPTED.clone())

        def forward(self, x, t, cond):
            assert cond.guidance is None
            return ConditionalGaussian(self.mean, UNPROMPTED, STD)(x, t, cond)

    student, teacher = Watched(UNPROMPTED, ToAnywhere()), Teacher()
    method = made(ToAnywhere(), derivative=derivative)
    loss, _ = method.loss({"student": student, "teacher": teacher}, data(), Rng(0, 0))
    loss.backward()
    assert teacher.mean.grad is None and student.mean.grad.abs().max() > 0
    assert graded == [True, False]


# -- the law of (t, r) -----------------------------------------------------------------------------


def uniforms(count: int = 4000) -> Tensor:
    return Rng(1, 2).uniform("time", torch.arange(count), (3,))


def test_phases_are_the_grids_and_begin_where_it_is_asked():
    schedule = EmpiricalShift()
    sigmas = schedule(4, 16).tensor()
    t, r = ToPhase(4, 0.3, schedule)(Uniform(7.0), uniforms(), 16)
    tops = t[:, None] == sigmas[None, :-1]
    assert float(tops.any(1).float().mean()) == pytest.approx(0.3, abs=0.03)
    k = (sigmas[None] >= t[:, None]).sum(1) - 1
    assert torch.equal(r, sigmas[k + 1]) and bool((r < t).all())
    # shift 7 is the grid's own at 16 tokens: each phase is drawn as often.
    share = torch.bincount(k, minlength=4) / len(k)
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_r_of_the_other_intervals():
    t, r = ToData()(Uniform(), uniforms(), 16)
    assert bool((r == 0).all()) and float(t.mean()) == pytest.approx(0.5, abs=0.03)
    t, r = ToAnywhere(0.25)(Uniform(), uniforms(), 16)
    assert bool((r <= t).all())
    assert float((r == t).float().mean()) == pytest.approx(0.25, abs=0.03)
    # The larger and the smaller of two uniform numbers.
    assert float(t.mean()) == pytest.approx(2 / 3, abs=0.03)
    assert float(r[r < t].mean()) == pytest.approx(1 / 3, abs=0.03)


# -- the distances ---------------------------------------------------------------------------------


def test_distances_by_hand():
    delta = torch.tensor([[[1.0, 2.0]], [[0.0, 0.1]]], requires_grad=True)
    squared = delta.detach().square()
    means = [2.5, 0.005]
    torch.testing.assert_close(Squared()(delta), torch.tensor(means))
    for power in (0.5, 1.0):
        got = Adaptive(power, 1e-3)(delta)
        sums = squared.sum((1, 2))
        torch.testing.assert_close(got.detach(), sums / (sums + 1e-3) ** power)
        (grad,) = torch.autograd.grad(got.sum(), delta)  # the weight has none
        torch.testing.assert_close(
            grad, 2 * delta.detach() / ((sums + 1e-3) ** power)[:, None, None]
        )
    (grad,) = torch.autograd.grad(Normalised(0.1)(delta).sum(), delta)
    size = squared.mean((1, 2)).sqrt()[:, None, None]
    # That of mean (u − sg[u − Δ/(|Δ| + c)])².
    torch.testing.assert_close(grad, 2 * delta.detach() / (size + 0.1) / 2)


# -- the rest --------------------------------------------------------------------------------------


def test_warm_up_begins_with_the_guided_velocity():
    student = ExactMap(PROMPTED, PHASES)
    method = made(guidance=2.0, warmup=10)
    roles, batch = {"student": student, "teacher": TEACHER}, data()
    errors = []
    for step in (0, 5, 10, 50):
        _, metrics = method.loss(roles, batch, Rng(0, step))
        errors.append((float(metrics["error"]), float(metrics["change"])))
    whole = replace(method, warmup=0)
    for step, (error, _) in zip((10, 50), errors[2:], strict=True):
        assert float(whole.loss(roles, batch, Rng(0, step))[1]["error"]) == error
    for step, (error, _) in zip((0, 5), errors[:2], strict=True):
        assert float(whole.loss(roles, batch, Rng(0, step))[1]["error"]) != error


def test_the_students_own_samples_need_no_data():
    student = ExactMap(PROMPTED, PHASES)
    sampler = Sampler(steps=3, guidance=1.0, schedule=Linear())
    method = made(own=sampler, micro=10)
    bare = replace(data(24), x0=None)
    [update] = method.collect({"student": student}, bare, Rng(0, 3))
    assert [len(m) for m in update] == [10, 10, 4]
    seed = int(Rng(0, 3).shared("own").integers(1 << 62))
    want = sampler(student, bare, seed)
    torch.testing.assert_close(torch.cat([m.x0 for m in update]), want)
    assert not want.requires_grad
    [other] = method.collect({"student": student}, bare, Rng(0, 4))
    first, second = update[0].x0, other[0].x0
    assert first is not None and second is not None and (second - first).abs().max() > 0.1
    with pytest.raises(InputError, match=r"method\.own"):
        next(iter(made().collect({}, bare, Rng(0, 0))))


def test_micro_batches_add_up():
    method, roles = made(micro=10), {
        "student": ExactMap(UNPROMPTED, PHASES), "teacher": TEACHER}  # fmt: skip
    [update] = method.collect(roles, data(), Rng(0, 0))
    whole, _ = method.loss(roles, data(), Rng(0, 0))
    parts = sum(method.loss(roles, m, Rng(0, 0))[0] for m in update)
    torch.testing.assert_close(parts, whole)


def test_roles():
    assert made().roles == {
        "student": RoleSpec(trainable=True), "teacher": RoleSpec()}  # fmt: skip
    told = made(ToAnywhere(), ema=0.9)
    assert told.roles["student"] == RoleSpec(trainable=True, embeds=True)
    assert told.roles["ema"] == RoleSpec(follows="student", decay=0.9, embeds=True)
    assert told.roles["teacher"] == RoleSpec()
    assert [t.role for t in told.turns] == ["student"] and told.state_dict() == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": -1.0}, {"derivative": "double-vjp"}, {"share": 0.0}, {"share": 1.0},
        {"warmup": -1}, {"micro": 0}, {"ema": 1.0},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match=f"method.{next(iter(wrong))}"):
        made(**wrong)


def test_wrong_parts_are_refused():
    for make in (
        lambda: ToPhase(steps=0), lambda: ToPhase(begin=1.5), lambda: ToAnywhere(1.0),
        lambda: Adaptive(power=2.0), lambda: Adaptive(floor=0.0), lambda: Normalised(0.0),
    ):  # fmt: skip
        with pytest.raises(InputError):
            make()


def test_a_network_without_a_forward_derivative_is_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            return grads[0] * 2

    x, t = torch.ones(2, 1, 1), torch.ones(2)
    with pytest.raises(InputError, match="derivative=differences"):
        jvp(lambda x, t: Opaque.apply(x), x, t, x)
    with pytest.raises(InputError, match="lost"):
        jvp(lambda x, t: x.detach(), x, t, x)
    with pytest.raises(RuntimeError, match="shape"):  # another fault keeps its own words
        jvp(lambda x, t: x.reshape(7), x, t, x)
