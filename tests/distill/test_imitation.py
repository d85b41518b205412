"""On-policy distillation of velocities on Gaussians: one teacher, an average of several, one for
each prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distill.imitation import OnPolicyImitation
from flux2.analytic import ConditionalGaussian, Gaussian, GaussianPolicy, toy_condition
from flux2.errors import InputError
from flux2.rng import Rng
from flux2.samplers import guided, sample_euler
from flux2.schedule import StaticShift
from flux2.types import Batch, RoleSpec

N, C, STD = 4, 3, 0.6
G = torch.Generator().manual_seed(0)
A, B, NULL = (torch.randn(N, C, generator=G) for _ in range(3))
TWO = {"a": "runs/a", "b": "runs/b"}
METHOD = OnPolicyImitation(TWO, guidance=1.0, steps=3, schedule=StaticShift(3.0), micro=8)


def prompts(count: int = 20) -> Batch:
    ids = torch.arange(count)
    meta = tuple({"task": "ab"[i % 2]} for i in range(count))
    return Batch(ids, ("p",) * count, toy_condition(count, N), ids, meta, (1, N), C)


def weighed(micro: Batch, total: float) -> Batch:
    assert micro.weight is not None
    return replace(micro, weight=micro.weight / total)


def run(method: OnPolicyImitation, roles: dict, step: int = 0, count: int = 20) -> list:
    rng, noted = Rng(0, step), []
    [update] = method.collect(roles, prompts(count), rng)
    total = sum(float(m.weight.sum()) for m in update if m.weight is not None)
    for micro in update:
        loss, metrics = method.loss(roles, weighed(micro, total), rng)
        loss.backward()
        noted.append(metrics)
    return noted


def roles(student: object, **teachers: object) -> dict:
    return {"student": student, **{f"teacher_{k}": v for k, v in teachers.items()}}


GAUSSIANS = {"a": Gaussian(A, STD), "b": Gaussian(B, STD)}


@pytest.mark.parametrize("shares", [None, {"a": 3.0, "b": 1.0}])
def test_of_averaged_teachers_the_fixed_point_is_the_averaged_mean(shares):
    """Velocities of Gaussians of one variance are linear in the mean."""
    w = 0.5 if shares is None else 0.75
    student = GaussianPolicy(w * A + (1 - w) * B, STD)
    noted = run(replace(METHOD, shares=shares), roles(student, **GAUSSIANS))
    assert max(float(m["loss"]) for m in noted) < 1e-11 and float(noted[0]["speed"]) > 0.1
    assert student.mean.grad.abs().max() < 1e-5


def test_elsewhere_it_leads_there_and_arrives():
    student = GaussianPolicy(A, STD)
    optimizer = torch.optim.Adam(student.parameters(), 0.2, betas=(0.5, 0.9))
    for step in range(40):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 40)
        run(METHOD, roles(student, **GAUSSIANS), step, 6)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(student.mean.detach(), (A + B) / 2, atol=2e-2, rtol=0)


class Routed(nn.Module):
    """A student with a mean for each of two kinds of prompt, told apart by the first noise's id:
    even and odd rows."""

    def __init__(self, even: Tensor, odd: Tensor) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.stack([even, odd]))

    def forward(self, x: Tensor, t: Tensor, cond) -> Tensor:
        return Gaussian(self.means[cond.text[:, 0, 0].long() - 1], STD)(x, t)


def routed_prompts(count: int = 20) -> Batch:
    batch = prompts(count)
    text = (1.0 + (batch.ids % 2))[:, None, None]
    assert batch.cond is not None
    return replace(batch, cond=replace(batch.cond, text=text, null=None))


def test_each_prompt_has_its_teacher():
    """At the optimum of each kind of prompt there is no gradient, and swapped there is; and a
    micro-batch of one teacher's prompts asks no other."""
    asked: list[tuple[str, int]] = []

    def teacher(name: str):
        def call(x, t, cond):
            asked.append((name, len(x)))
            return GAUSSIANS[name](x, t)

        return call

    method = replace(METHOD, by="task", micro=10)
    for means, right in (((A, B), True), ((B, A), False)):
        student, rng = Routed(*means), Rng(0, 0)
        every = roles(student, a=teacher("a"), b=teacher("b"))
        [update] = method.collect(every, routed_prompts(), rng)
        losses = [method.loss(every, m, rng)[0] for m in update]
        assert (float(torch.stack(losses).detach().max()) < 1e-10) == right
    assert asked == 2 * ([("a", 10)] * 3 + [("b", 10)] * 3)


def test_a_prompt_without_a_teacher_is_refused():
    method = replace(METHOD, by="language")
    with pytest.raises(InputError, match=r"method.by=language: a prompt's is 'None'.*a, b"):
        next(iter(method.collect(roles(GaussianPolicy(A)), prompts(), Rng(0, 0))))


@pytest.mark.parametrize("own", [1.0, 2.0])
def test_the_rollout_is_the_inference_samplers_own_path(own):
    student, batch, rng = ConditionalGaussian(A, NULL, STD), prompts(), Rng(3, 7)
    method = replace(METHOD, own_guidance=own, guidance=own)
    [update] = method.collect({"student": student}, batch, rng)
    visited: list[Tensor] = []

    def watched(x, t, cond):
        visited.append(x)
        return guided(student, own)(x, t, cond)

    noise = rng("rollout", batch.ids, (N, C))
    sample_euler(watched, noise, batch.cond, method.schedule(3, N))
    for i, want in enumerate(visited):
        got = torch.cat([m.extra["x"] for m in update if int(m.extra["step"][0]) == i])
        assert torch.equal(got, want)
    assert len(visited) == 3 and not torch.equal(visited[0], visited[1])


def test_guidance_is_taken_in_or_kept():
    teacher = ConditionalGaussian(A, NULL, STD)
    only = {"teachers": {"a": "runs/a"}, "guidance": 2.0}
    took, kept = replace(METHOD, **only), replace(METHOD, own_guidance=2.0, **only)
    assert took.result == "distilled" and kept.result is None
    for method, student in ((took, teacher.guided(2.0)), (kept, teacher)):
        with torch.no_grad():
            every = roles(student, a=teacher)
            [update] = method.collect(every, prompts(), Rng(0, 0))
            assert float(method.loss(every, update[1], Rng(0, 0))[0]) < 1e-9
    assert METHOD.result == "distilled"  # no branch without a prompt was learnt
    # Guidance that is right by chance, of two wrong branches, is not taken for the teacher's.
    shift = A - NULL
    wrong = ConditionalGaussian(A + shift, NULL + 2 * shift, STD)  # at guidance 2 the same law
    with torch.no_grad():
        torch.testing.assert_close(wrong.guided(2.0).mean, teacher.guided(2.0).mean)
        every = roles(wrong, a=teacher)
        [update] = kept.collect(every, prompts(), Rng(0, 0))
        assert float(kept.loss(every, update[1], Rng(0, 0))[0]) > 0.1
    with pytest.raises(InputError, match="own_guidance"):
        replace(METHOD, own_guidance=2.0, guidance=3.0)
    with pytest.raises(InputError, match="std"):
        replace(METHOD, std=0.1, rollout="renoise")


def test_with_a_spread_it_is_the_kl_of_each_steps_law():
    """KL(N(m, s²) ‖ N(m', s²)) = ‖m − m'‖²/(2s²), a dimension, by torch."""
    student, rng, spread = Gaussian(A, STD), Rng(0, 0), 0.3
    method = replace(METHOD, teachers={"b": None}, std=spread)
    every = roles(student, b=Gaussian(B, STD))
    [update] = method.collect(every, prompts(8), rng)
    sigmas = method.schedule(3, N).sigmas
    for i, micro in enumerate(update):
        x, t = micro.extra["x"], torch.full((8,), sigmas[i])
        laws = [
            torch.distributions.Normal(x + (sigmas[i + 1] - sigmas[i]) * law(x, t), spread)
            for law in (student, Gaussian(B, STD))
        ]
        want = torch.distributions.kl_divergence(*laws).mean((1, 2)).sum()
        got, _ = method.loss(every, micro, rng)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_student_alone():
    student, teachers = GaussianPolicy(A, STD), [GaussianPolicy(m, STD) for m in (A, B)]
    run(METHOD, roles(student, a=teachers[0], b=teachers[1]))
    assert all(t.mean.grad is None for t in teachers) and student.mean.grad.abs().max() > 0


def test_chunks_change_nothing():
    def gradient(micro: int, by: str | None) -> Tensor:
        student = GaussianPolicy(NULL, STD)
        run(replace(METHOD, micro=micro, by=by), roles(student, **GAUSSIANS))
        assert student.mean.grad is not None
        return student.mean.grad

    for by in (None, "task"):
        torch.testing.assert_close(gradient(20, by), gradient(7, by), atol=1e-6, rtol=1e-5)


def test_roles():
    method = replace(METHOD, teachers={"a": "runs/a", "start": None}, ema=0.9)
    assert method.roles == {
        "student": RoleSpec(trainable=True),
        "teacher_a": RoleSpec(source="runs/a"),
        "teacher_start": RoleSpec(),
        "ema": RoleSpec(follows="student", decay=0.9),
    }
    assert [t.role for t in method.turns] == ["student"] and method.state_dict() == {}


def test_without_names_the_teacher_is_the_start():
    assert OnPolicyImitation().sources == {"start": None}
    assert OnPolicyImitation().roles["teacher_start"] == RoleSpec()


def test_wrong_settings_are_refused():
    for wrong in (
        {"teachers": {}}, {"teachers": {"a.b": None}}, {"shares": {"a": 1.0}},
        {"shares": {"a": 1.0, "b": 0.0}}, {"guidance": -1.0}, {"rollout": "heun"}, {"std": 0.0},
        {"micro": 0}, {"ema": 1.0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"method.{next(iter(wrong))}"):
            replace(METHOD, **wrong)
