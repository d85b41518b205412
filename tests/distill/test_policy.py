"""π-ID on closed forms: zero at equality, and a law of eight modes learnt in one forward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distill.policy import PolicyImitation
from flux2.analytic import ConditionalGaussian, GaussianPolicy, Mixture, toy_condition
from flux2.errors import InputError
from flux2.policy import TokenMixture
from flux2.rng import Rng
from flux2.samplers import sample_policy
from flux2.schedule import Linear, StaticShift
from flux2.types import Batch, Condition, Law, PolicyShape

N, C, STD = 4, 3, 0.6
G = torch.Generator().manual_seed(0)
PROMPTED, UNPROMPTED = torch.randn(N, C, generator=G), torch.randn(N, C, generator=G)
TEACHER = ConditionalGaussian(PROMPTED, UNPROMPTED, STD)
METHOD = PolicyImitation(2.0, 3, 1, 16, schedule=StaticShift(3.0), micro=8)


class Student(nn.Module):
    """The policy of N(mean, std²·I) data, exactly: K = 1; it is told the prompt and no other."""

    def __init__(self, mean: Tensor, std: float = STD) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), std
        self.shape = PolicyShape(1, 3, 16)

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> Law:
        assert bool((cond.text > 0).all())
        s = t[:, None, None]
        var = (1 - s) ** 2 * self.std**2 + s**2
        mean = self.mean + (1 - s) * self.std**2 / var * (x - (1 - s) * self.mean)
        log_std = (self.std * s / var.sqrt()).log().expand(len(x), N, 1)
        return TokenMixture(x, t, torch.zeros(len(x), N, 1), mean[:, :, None], log_std)


def prompts(count: int = 20, n: int = N, c: int = C) -> Batch:
    """No images: prompts are all that there is."""
    ids = torch.arange(count)
    return Batch(ids, ("p",) * count, toy_condition(count, n), ids, ({},) * count, (1, n), c)


def weighed(micro: Batch, total: float) -> Batch:
    assert micro.weight is not None
    return replace(micro, weight=micro.weight / total)


def run(method: PolicyImitation, roles: dict, step: int = 0, batch: Batch | None = None) -> list:
    """One update's losses, summed and backward; the metrics."""
    rng, noted = Rng(0, step), []
    [update] = method.collect(roles, prompts() if batch is None else batch, rng)
    total = sum(float(m.weight.sum()) for m in update if m.weight is not None)
    for micro in update:
        micro = weighed(micro, total)
        loss, metrics = method.loss(roles, micro, rng)
        loss.backward()
        noted.append(metrics)
    return noted


def guided_mean(scale: float) -> Tensor:
    return UNPROMPTED + scale * (PROMPTED - UNPROMPTED)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_no_gradient_where_the_policy_is_the_guided_teacher(scale):
    student = Student(guided_mean(scale))
    noted = run(replace(METHOD, guidance=scale), {"student": student, "teacher": TEACHER})
    assert max(float(m["loss"]) for m in noted) < 1e-10 and float(noted[0]["speed"]) > 0.1
    assert student.mean.grad.abs().max() < 1e-5


def test_elsewhere_it_leads_there():
    student = Student(PROMPTED)
    run(METHOD, {"student": student, "teacher": TEACHER})
    away = (guided_mean(2.0) - PROMPTED).flatten()
    assert torch.cosine_similarity(-student.mean.grad.flatten(), away, 0) > 0.99


def test_training_arrives_at_the_guided_teacher():
    student = Student(guided_mean(1.5))
    optimizer = torch.optim.Adam(student.parameters(), 0.2, betas=(0.5, 0.9))
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 30)
        run(METHOD, {"student": student, "teacher": TEACHER}, step, prompts(4))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(student.mean.detach(), guided_mean(2.0), atol=2e-2, rtol=0)


def test_the_rollout_is_the_inference_samplers_own_path():
    student, batch, rng = Student(PROMPTED), prompts(), Rng(3, 7)
    [update] = METHOD.collect({"student": student}, batch, rng)
    grid = METHOD.schedule(3, N)
    noise = rng("rollout", batch.ids, (N, C))
    for i in range(3):
        starts = [m.extra["x"] for m in update if int(m.extra["segment"][0]) == i]
        assert [len(s) for s in starts] == [8, 8, 4]
        x = noise
        if i:  # the sampler stopped after i segments
            walk = Walk(student, i)
            with torch.no_grad():
                sample_policy(walk, noise, batch.cond, grid, 16)
            x = walk.seen
        assert torch.equal(torch.cat(starts), x)


class Walk:
    """Keeps the state at the i-th call."""

    def __init__(self, policy: Student, at: int) -> None:
        self.inner, self.at, self.calls = policy, at, 0
        self.shape = policy.shape

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> Law:
        if self.calls == self.at:
            self.seen = x
        self.calls += 1
        return self.inner.policy(x, t, cond)


def test_states_lie_on_the_path_at_their_times():
    """Where nothing is left out, the matched states are those that the sampler goes through."""
    method, student, batch = replace(METHOD, dropout=0.0, times=3), Student(PROMPTED), prompts(6)
    rng = Rng(1, 2)
    [update] = method.collect({"student": student}, batch, rng)
    micro = update[1]  # the second segment
    sigma, after = method.schedule(3, N).sigmas[1:3]
    seen: list[tuple[Tensor, Tensor]] = []

    def teacher(x, t, cond):
        seen.append((x[: len(x) // 2], t[: len(t) // 2]))
        return TEACHER(x, t, cond)

    method.loss({"student": student, "teacher": teacher}, micro, rng)
    x0 = micro.extra["x"]
    law = student.policy(x0, torch.full((6,), sigma), micro.cond).detach()
    for x, t in seen:
        assert bool(((t <= sigma) & (t > after)).all()) and len(set(t.tolist())) > 1
        for row in range(6):
            y, at, width = x0, sigma, (after - sigma) / 16
            for m in range(1, 17):
                if abs(at - float(t[row])) < 1e-6:
                    break
                y = y + width * law.velocity(y, torch.full((6,), at))
                at = sigma + width * m
            torch.testing.assert_close(x[row], y[row], atol=1e-5, rtol=1e-5)
    [first, *rest] = seen
    assert len(rest) == 2 and not torch.equal(first[1], rest[0][1])


def test_gradients_reach_the_student_alone():
    teacher, student = GaussianPolicy(PROMPTED, STD), Student(UNPROMPTED)
    run(METHOD, {"student": student, "teacher": teacher})
    assert teacher.mean.grad is None and student.mean.grad.abs().max() > 0


def test_all_randomness_is_keyed():
    def losses(chunk: int, step: int) -> Tensor:
        student = Student(UNPROMPTED)
        run(replace(METHOD, micro=chunk), {"student": student, "teacher": TEACHER}, step)
        assert student.mean.grad is not None
        return student.mean.grad

    torch.testing.assert_close(losses(20, 0), losses(7, 0), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(losses(20, 0), losses(20, 1))


class Table(nn.Module):
    """A policy of one segment in two dimensions: pure noise says nothing of x0, so that the network
    of a perfect student is a constant."""

    def __init__(self, components: int, g: torch.Generator) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(components, 2, generator=g))
        self.logits = nn.Parameter(torch.zeros(components))
        self.log_std = nn.Parameter(torch.zeros(()))
        self.shape = PolicyShape(components, 1, 32)

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> Law:
        b = len(x)
        return TokenMixture(
            x, t, self.logits.expand(b, 1, -1), self.means.expand(b, 1, -1, -1),
            self.log_std.expand(b, 1, 1),
        )  # fmt: skip


def energy(a: Tensor, b: Tensor) -> float:
    n = len(a)
    within = [torch.cdist(v, v).sum() / (n * (n - 1)) for v in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - sum(within))


def test_eight_modes_are_learnt_in_one_forward_and_not_by_one_component():
    angles = torch.arange(8) * math.pi / 4
    teacher = Mixture(2 * torch.stack([angles.cos(), angles.sin()], 1), torch.ones(8), 0.3)
    g = torch.Generator().manual_seed(3)
    data = teacher.sample(torch.rand(800, generator=g), torch.randn(800, 1, 2, generator=g))[:, 0]
    found = {}
    for components, steps in ((8, 90), (1, 40)):
        method = PolicyImitation(1.0, 1, components, 16, 8, micro=32, schedule=Linear())
        student = Table(components, g)
        optimizer = torch.optim.Adam(student.parameters(), 0.2)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / steps)
            run(method, {"student": student, "teacher": teacher}, step, prompts(32, 1, 2))
            optimizer.step()
            optimizer.zero_grad()
        noise = torch.randn(800, 1, 2, generator=g)
        with torch.no_grad():
            drawn = sample_policy(student, noise, toy_condition(800, 1), Linear()(1, 1), 64)[:, 0]
        near = torch.cdist(drawn, teacher.means)
        share = torch.bincount(near.argmin(1)[near.amin(1) < 0.9], minlength=8) / 800
        found[components] = (energy(drawn, data), float(share.min()))
    assert found[8][0] < 0.02 and found[8][1] > 0.05
    assert found[1][0] > 0.05


def test_roles_and_result():
    method = PolicyImitation(components=5, steps=2, substeps=9, ema=0.9)
    shape = PolicyShape(5, 2, 9)
    assert method.roles["student"].policy == shape and method.roles["student"].kind == "policy"
    assert method.roles["ema"].follows == "student" and method.roles["ema"].policy == shape
    assert not method.roles["teacher"].trainable and method.roles["teacher"].kind == "velocity"
    assert [t.role for t in method.turns] == ["student"] and method.result == "distilled"
    assert "2 forwards" in method.describe() and method.state_dict() == {}


def test_wrong_settings_are_refused():
    for wrong in (
        {"guidance": -1.0}, {"components": 0}, {"substeps": 0}, {"times": 0}, {"micro": 0},
        {"dropout": 1.0}, {"ema": 1.0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"method.{next(iter(wrong))}"):
            PolicyImitation(**wrong)
    with pytest.raises(InputError):
        PolicyImitation(steps=0)
