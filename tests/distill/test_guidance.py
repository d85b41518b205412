"""Baked guidance on Gaussians, where the guided velocity is that of another Gaussian."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.guidance import BakedGuidance
from flux2.analytic import ConditionalGaussian, Gaussian, GaussianPolicy, toy_condition
from flux2.errors import InputError
from flux2.flow import Uniform
from flux2.rng import Rng
from flux2.types import Batch, RoleSpec

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


def guided_mean(scale: float) -> Tensor:
    """v_u + g·(v_c − v_u) is linear in the mean, as long as the variances agree."""
    return UNPROMPTED + scale * (PROMPTED - UNPROMPTED)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_the_fixed_point_is_the_guided_velocity(scale):
    student = GaussianPolicy(guided_mean(scale), STD)
    method = BakedGuidance(scale)
    loss, metrics = method.loss({"student": student, "teacher": TEACHER}, data(), Rng(0, 0))
    loss.backward()
    assert float(loss.detach()) < 1e-11 and float(metrics["speed"]) > 0.1
    assert student.mean.grad.abs().max() < 1e-5


def test_elsewhere_there_is_a_gradient_towards_it():
    student = GaussianPolicy(PROMPTED, STD)  # the teacher without guidance: where a student starts
    loss, _ = BakedGuidance(3.0).loss({"student": student, "teacher": TEACHER}, data(), Rng(0, 0))
    loss.backward()
    assert float(loss.detach()) > 0.1
    downhill = -student.mean.grad.flatten()
    away = (guided_mean(3.0) - PROMPTED).flatten()
    assert torch.cosine_similarity(downhill, away, 0) > 0.99


def test_training_arrives_at_the_guided_model():
    student = GaussianPolicy(PROMPTED, STD)
    method, optimizer = BakedGuidance(3.0), torch.optim.Adam(student.parameters(), 0.1)
    for step in range(120):
        [update] = method.collect({}, data(32, step), Rng(0, step))
        for micro in update:
            loss, _ = method.loss({"student": student, "teacher": TEACHER}, micro, Rng(0, step))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(student.mean.detach(), guided_mean(3.0), atol=2e-2, rtol=0)


def test_scale_one_matches_the_plain_teacher():
    """By hand: the mean squared distance of the two velocities, without the empty prompt."""
    student, batch, rng = GaussianPolicy(torch.zeros(N, C), STD), data(), Rng(3, 7)
    bare = replace(batch, cond=replace(batch.cond, null=None))
    roles = {"student": student, "teacher": TEACHER}
    loss, _ = BakedGuidance(1.0, Uniform()).loss(roles, bare, rng)
    t = Uniform()(rng.uniform("time", batch.ids))[:, None, None]
    assert batch.x0 is not None
    x = (1 - t) * batch.x0 + t * rng("noise", batch.ids, (N, C))
    flat = t.flatten()
    v = [Gaussian(m, STD)(x, flat) for m in (torch.zeros(N, C), PROMPTED)]
    assert float(loss.detach()) == pytest.approx(float((v[0] - v[1]).square().mean()), rel=1e-5)


def test_gradients_reach_the_student_alone():
    teacher, student = GaussianPolicy(PROMPTED, STD), GaussianPolicy(UNPROMPTED, STD)
    loss, _ = BakedGuidance(2.0).loss({"student": student, "teacher": teacher}, data(), Rng(0, 0))
    loss.backward()
    assert teacher.mean.grad is None and student.mean.grad.abs().max() > 0


def test_the_student_sees_the_prompt_alone():
    class Witness(GaussianPolicy):
        def forward(self, x: Tensor, t: Tensor, cond=None) -> Tensor:
            assert len(x) == 64 and bool((cond.text > 0).all())
            return super().forward(x, t)

    roles = {"student": Witness(PROMPTED, STD), "teacher": TEACHER}
    BakedGuidance(3.0).loss(roles, data(), Rng(0, 0))


def test_micro_batches_add_up():
    method, roles = BakedGuidance(3.0, micro=10), {
        "student": GaussianPolicy(PROMPTED, STD), "teacher": TEACHER}  # fmt: skip
    [update] = method.collect(roles, data(), Rng(0, 0))
    assert [len(m) for m in update] == [10] * 6 + [4]
    whole, _ = method.loss(roles, data(), Rng(0, 0))
    parts = sum(method.loss(roles, m, Rng(0, 0))[0] for m in update)
    torch.testing.assert_close(parts, whole)


def test_roles_and_result():
    method = BakedGuidance()
    assert method.roles == {"student": RoleSpec(trainable=True), "teacher": RoleSpec()}
    assert [t.role for t in method.turns] == ["student"]
    assert BakedGuidance.result == "distilled" and method.state_dict() == {}


def test_wrong_settings_are_refused():
    for wrong in ({"scale": -1.0}, {"scale": float("nan")}, {"micro": 0}):
        with pytest.raises(InputError, match=f"method.{next(iter(wrong))}"):
            BakedGuidance(**wrong)
    batch = data()
    bare = replace(batch, cond=replace(batch.cond, null=None))
    with pytest.raises(InputError, match="empty prompt"):
        BakedGuidance(3.0).loss({"student": TEACHER, "teacher": TEACHER}, bare, Rng(0, 0))
