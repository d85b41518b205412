"""Guidance distillation on Gaussians, where the guided velocity is that of another Gaussian."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.guidance import GuidanceDistillation
from flux2.analytic import ConditionalGaussian, Gaussian, GaussianPolicy, toy_condition
from flux2.errors import InputError
from flux2.flow import Uniform
from flux2.rng import Rng
from flux2.types import Batch, Condition, RoleSpec

N, C, STD = 4, 3, 0.6
G = torch.Generator().manual_seed(0)
PROMPTED, UNPROMPTED = torch.randn(N, C, generator=G), torch.randn(N, C, generator=G)
TEACHER = ConditionalGaussian(PROMPTED, UNPROMPTED, STD)


def data(count: int = 64, seed: int = 1) -> Batch:
    ids, g = torch.arange(count), torch.Generator().manual_seed(seed)
    return Batch(
        ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (2, 2), C,
        x0=PROMPTED + STD * torch.randn(count, N, C, generator=g),
        weight=torch.full((count,), 1 / count),
    )  # fmt: skip


def guided_mean(scale: float | Tensor) -> Tensor:
    """v_u + g·(v_c − v_u) is linear in the mean, as long as the variances agree."""
    return UNPROMPTED + scale * (PROMPTED - UNPROMPTED)


class Told(nn.Module):
    """A student that reads g: the velocity of N(at_3 + (g − 3)·slope, STD²)."""

    def __init__(self, at_3: Tensor, slope: Tensor) -> None:
        super().__init__()
        self.at_3, self.slope = nn.Parameter(at_3.clone()), nn.Parameter(slope.clone())

    def mean(self, g: float | Tensor) -> Tensor:
        return self.at_3 + (g - 3) * self.slope

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.guidance is not None
        return Gaussian(self.mean(cond.guidance[:, None, None]), STD)(x, t)


# ---------------------------------------------------------------- one strength, baked in


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_fixed_point_is_the_guided_velocity(scale):
    student = GaussianPolicy(guided_mean(scale), STD)
    method = GuidanceDistillation(scale)
    loss, metrics = method.loss({"student": student, "teacher": TEACHER}, data(), Rng(0, 0))
    loss.backward()
    assert float(loss.detach()) < 1e-11 and float(metrics["speed"]) > 0.1
    assert student.mean.grad.abs().max() < 1e-5


def test_elsewhere_there_is_a_gradient_towards_it():
    student = GaussianPolicy(PROMPTED, STD)  # the teacher without guidance: where a student starts
    roles = {"student": student, "teacher": TEACHER}
    loss, _ = GuidanceDistillation(3.0).loss(roles, data(), Rng(0, 0))
    loss.backward()
    assert float(loss.detach()) > 0.1
    downhill = -student.mean.grad.flatten()
    away = (guided_mean(3.0) - PROMPTED).flatten()
    assert torch.cosine_similarity(downhill, away, 0) > 0.99


def train(method: GuidanceDistillation, student: nn.Module, steps: int, lr: float = 0.1) -> None:
    optimizer = torch.optim.Adam(student.parameters(), lr)
    for step in range(steps):
        [update] = method.collect({}, data(32, step), Rng(0, step))
        for micro in update:
            roles = {"student": student, "teacher": TEACHER}
            method.loss(roles, micro, Rng(0, step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_arrives_at_the_guided_model():
    student = GaussianPolicy(PROMPTED, STD)
    train(GuidanceDistillation(3.0), student, 120)
    torch.testing.assert_close(student.mean.detach(), guided_mean(3.0), atol=2e-2, rtol=0)


def test_the_loss_is_the_mean_squared_distance_of_the_two_velocities():
    """By hand, at scale 1: to the plain teacher."""
    student, batch, rng = GaussianPolicy(torch.zeros(N, C), STD), data(), Rng(3, 7)
    roles = {"student": student, "teacher": TEACHER}
    loss, _ = GuidanceDistillation(1.0, density=Uniform()).loss(roles, batch, rng)
    t = Uniform()(rng.uniform("time", batch.ids))[:, None, None]
    assert batch.x0 is not None
    x = (1 - t) * batch.x0 + t * rng("noise", batch.ids, (N, C))
    flat = t.flatten()
    v = [Gaussian(m, STD)(x, flat) for m in (torch.zeros(N, C), PROMPTED)]
    assert float(loss.detach()) == pytest.approx(float((v[0] - v[1]).square().mean()), rel=1e-5)


# ---------------------------------------------------------------- any strength, embedded


@pytest.mark.parametrize("law", ["uniform", "log-uniform"])
def test_a_student_that_is_told_g_has_every_guided_model_for_its_fixed_point(law):
    student = Told(guided_mean(3.0), PROMPTED - UNPROMPTED)
    method = GuidanceDistillation((0.5, 6.0), law)
    loss, metrics = method.loss({"student": student, "teacher": TEACHER}, data(), Rng(0, 0))
    loss.backward()
    assert float(loss.detach()) < 1e-10 and float(metrics["speed"]) > 0.1
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-4


def test_training_arrives_at_every_guided_model_also_between_and_at_the_ends():
    student = Told(PROMPTED, torch.zeros(N, C))  # deaf to g: where an inserted embedder starts
    train(GuidanceDistillation((1.0, 5.0)), student, 200)
    for scale in (1.0, 2.2, 3.0, 4.5, 5.0):
        mean = student.mean(scale).detach()
        torch.testing.assert_close(mean, guided_mean(scale), atol=2e-2, rtol=0)


def test_strengths_follow_their_law_and_are_each_samples_own():
    u = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    even, prefers = (GuidanceDistillation((1.5, 6.0), law).strength(u)
                     for law in ("uniform", "log-uniform"))  # fmt: skip
    for g in (even, prefers):
        assert 1.5 <= g.min() < 1.51 and 5.99 < g.max() < 6.0
    assert float(even.mean()) == pytest.approx(3.75, abs=1e-6)
    assert float(prefers.log().mean()) == pytest.approx(np.log([1.5, 6.0]).mean(), abs=1e-6)
    seen: list[Tensor] = []

    def student(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.guidance is not None and cond.null is None
        seen.append(cond.guidance)
        return x

    method = GuidanceDistillation((1.5, 6.0))
    for step in (0, 1):
        method.loss({"student": student, "teacher": TEACHER}, data(8), Rng(0, step))
    assert len(seen[0].unique()) == 8 and not torch.equal(*seen)


def test_the_target_is_asked_at_the_students_strength():
    """A student of the wrong sign of g would have its fixed point elsewhere."""
    batch, method = data(), GuidanceDistillation((1.0, 5.0))
    found = {}

    def student(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        found.update(x=x, t=t, g=cond.guidance)
        return torch.zeros_like(x)

    _, metrics = method.loss({"student": student, "teacher": TEACHER}, batch, Rng(0, 0))
    want = Gaussian(guided_mean(found["g"][:, None, None]), STD)(found["x"], found["t"])
    assert float(metrics["loss"]) == pytest.approx(float(want.square().mean()), rel=1e-5)


# ---------------------------------------------------------------- interval and rescaling


def asked(method: GuidanceDistillation, g: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """(x: b n c, t: b, the target at g) over the whole range of t."""
    t = torch.linspace(0.02, 1, 50)
    x = torch.randn(50, N, C, generator=torch.Generator().manual_seed(5))
    cond = toy_condition(50, N)
    return x, t, method.target(TEACHER, x, t, cond, torch.full_like(t, g))


def test_outside_the_interval_there_is_no_guidance():
    """arXiv 2404.07724: eq. 5's w is 1 outside."""
    x, t, target = asked(GuidanceDistillation(4.0, interval=(0.25, 0.7)))
    inside = (t >= 0.25) & (t <= 0.7)
    assert 10 < int(inside.sum()) < 40
    plain, strong = (Gaussian(guided_mean(g), STD)(x, t) for g in (1.0, 4.0))
    torch.testing.assert_close(target[inside], strong[inside])
    torch.testing.assert_close(target[~inside], plain[~inside])


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescaling_is_that_of_the_paper(phi):
    """arXiv 2305.08891, eq. 14 to 16, sample by sample in numpy, on what the velocities say of the
    image."""
    x, t, target = asked(GuidanceDistillation(4.0, rescale=phi))
    for k in range(len(t)):
        at = slice(k, k + 1)
        pos, neg = (Gaussian(m, STD)(x[at], t[at])[0].double().numpy()
                    for m in (PROMPTED, UNPROMPTED))  # fmt: skip
        here, time = x[k].double().numpy(), float(t[k])
        x_pos, x_cfg = here - time * pos, here - time * (neg + 4.0 * (pos - neg))
        rescaled = x_cfg * x_pos.std() / x_cfg.std()
        final = phi * rescaled + (1 - phi) * x_cfg
        got = here - time * target[k].double().numpy()
        np.testing.assert_allclose(got, final, atol=1e-5)
        assert phi < 1 or got.std() == pytest.approx(x_pos.std(), rel=1e-4)


def test_without_guidance_rescaling_changes_nothing():
    x, t, target = asked(GuidanceDistillation(1.0, rescale=1.0), g=1.0)
    torch.testing.assert_close(target, Gaussian(PROMPTED, STD)(x, t), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the rest


def test_gradients_reach_the_student_alone():
    teacher, student = GaussianPolicy(PROMPTED, STD), GaussianPolicy(UNPROMPTED, STD)
    roles = {"student": student, "teacher": teacher}
    GuidanceDistillation(2.0).loss(roles, data(), Rng(0, 0))[0].backward()
    assert teacher.mean.grad is None and student.mean.grad.abs().max() > 0


def test_the_student_sees_the_prompt_alone_and_the_teacher_no_strength():
    class Student(GaussianPolicy):
        def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
            assert len(x) == 64 and bool((cond.text > 0).all()) and cond.null is None
            return super().forward(x, t)

    def teacher(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        assert cond.guidance is None and len(x) == 128
        return TEACHER(x, t, cond)

    batch = data()
    # As the loader gives it once the model has the embedder: both halves with a strength.
    strong = torch.full((64,), 3.0)
    assert batch.cond is not None and batch.cond.null is not None
    null = replace(batch.cond.null, guidance=strong)
    batch = replace(batch, cond=replace(batch.cond, guidance=strong, null=null))
    roles = {"student": Student(PROMPTED, STD), "teacher": teacher}
    GuidanceDistillation(3.0).loss(roles, batch, Rng(0, 0))


def test_micro_batches_add_up():
    method, roles = GuidanceDistillation((1.0, 5.0), micro=10), {
        "student": Told(PROMPTED, UNPROMPTED), "teacher": TEACHER}  # fmt: skip
    [update] = method.collect(roles, data(), Rng(0, 0))
    assert [len(m) for m in update] == [10] * 6 + [4]
    whole, _ = method.loss(roles, data(), Rng(0, 0))
    parts = sum(method.loss(roles, m, Rng(0, 0))[0] for m in update)
    torch.testing.assert_close(parts, whole)


def test_roles_and_result():
    baked, told = GuidanceDistillation(3), GuidanceDistillation((1.0, 5.0))
    assert baked.roles == {"student": RoleSpec(trainable=True), "teacher": RoleSpec(embeds=False)}
    student = RoleSpec(trainable=True, embeds=True, strength=3.0)
    assert told.roles == {"student": student, "teacher": RoleSpec(embeds=False)}
    assert replace(told, default=1.5).roles["student"].strength == 1.5
    assert [t.role for t in told.turns] == ["student"] and told.state_dict() == {}
    assert (baked.result, told.result) == ("distilled", "guidance-distilled")
    assert GuidanceDistillation.accepts == ("base",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -1.0}, {"scale": float("nan")}, {"scale": [3, 3]}, {"scale": [5.0, 1.0]},
        {"scale": [1.0]}, {"scale": [1.0, float("inf")]}, {"law": "normal"},
        {"scale": [0, 5], "law": "log-uniform"}, {"default": 3.0},
        {"scale": [1, 5], "default": 6.0}, {"interval": [0.5, 0.5]}, {"interval": [0.1]},
        {"interval": [-0.1, 0.5]}, {"rescale": 1.1}, {"rescale": -0.1}, {"micro": 0},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError, match=f"method.{list(wrong)[-1]}"):
        GuidanceDistillation(**wrong)


def test_no_empty_prompt_is_refused():
    batch = data()
    assert batch.cond is not None
    bare = replace(batch, cond=replace(batch.cond, null=None))
    with pytest.raises(InputError, match="empty prompt"):
        GuidanceDistillation(3.0).loss({"student": TEACHER, "teacher": TEACHER}, bare, Rng(0, 0))
