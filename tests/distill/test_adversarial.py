"""The adversarial term: who learns from it, in which direction, and what its penalty measures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill._common import Renoise
from distill.adversarial import Adversarial
from distill.dmd import DMD
from flux2.adapters import LoRA
from flux2.analytic import toy_condition
from flux2.errors import InputError
from flux2.flow import Uniform, interpolate
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.types import Batch

N, C, B = 2, 3, 48
A = torch.randn(C, generator=torch.Generator().manual_seed(0))


class Identity:
    """A teacher whose hidden states are its input."""

    def __call__(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.zeros_like(x)

    def features(self, x: Tensor, t: Tensor, cond: Any, block: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), x


def head() -> nn.Linear:
    layer = nn.Linear(C, 1, bias=False)
    layer.weight.data.copy_(A[None])
    return layer


def batch() -> Batch:
    ids, g = torch.arange(B), torch.Generator().manual_seed(1)
    made = torch.randn(B, N, C, generator=g)
    extra = {"x0": made, "sigma": torch.ones(B), "after": torch.zeros(B)}
    return Batch(
        ids, ("p",) * B, toy_condition(B, N), ids, ({},) * B, (1, N), C,
        x0=made + 1.0, weight=torch.full((B,), 1 / B), extra=extra,
    )  # fmt: skip


def noised(critic: Adversarial, x0: Tensor, stream: str) -> Tensor:
    """The law by hand: one τ and ε a sample, keyed by the stream."""
    ids = torch.arange(B)
    u = Rng(0, 0).uniform(stream, ids)
    tau = critic.law(u, torch.ones(B), torch.zeros(B))
    return interpolate(x0, Rng(0, 0)(stream, ids, (N, C)), tau)


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_losses_by_hand(kind):
    critic, data = Adversarial(0.3, 1, kind, r1=2.0, r1_std=0.05), batch()
    roles = {"teacher": Identity(), "head": head()}
    loss, notes = critic.loss(roles, data, Rng(0, 0))

    def verdict(x0: Tensor, stream: str = "head") -> Tensor:
        return noised(critic, x0, stream) @ A  # a number of each token

    real, made = verdict(data.x0), verdict(data.extra["x0"])
    near = verdict(data.x0 + 0.05 * Rng(0, 0)("r1", data.ids, (N, C)))
    if kind == "hinge":
        want = (1 - real).clamp(min=0) + (1 + made).clamp(min=0)
    else:
        want = (1 + (-real).exp()).log() + (1 + made.exp()).log()
    want = want + 2.0 * (real - near) ** 2
    torch.testing.assert_close(loss, want.mean())
    assert float(notes["head/data"]) == pytest.approx(float(real.mean()), abs=1e-6)
    term = critic.term(roles, data.extra["x0"], data, Rng(0, 0))
    judged = verdict(data.extra["x0"], "judge")
    want = -judged if kind == "hinge" else (1 + (-judged).exp()).log()
    torch.testing.assert_close(term, 0.3 * want.mean(1))


def test_the_student_follows_the_head():
    critic, data = Adversarial(1.0, 1, law=Renoise(Uniform(), 0.0, 1.0)), batch()
    roles = {"teacher": Identity(), "head": head()}
    x0 = data.extra["x0"].clone().requires_grad_()
    critic.term(roles, x0, data, Rng(0, 0)).sum().backward()
    assert x0.grad is not None
    # −D falls along A, by (1 − τ)/N a token.
    share = 1 - critic.law(Rng(0, 0).uniform("judge", data.ids), torch.ones(B), torch.zeros(B))
    want = -(share / N)[:, None, None] * A.expand(B, N, C)
    torch.testing.assert_close(x0.grad, want)


def test_training_the_head_tells_data_from_what_is_made():
    critic, data = Adversarial(1.0, 1, law=Renoise(Uniform(), 0.0, 0.5)), batch()
    roles = {"teacher": Identity(), "head": nn.Linear(C, 1)}
    optimizer = torch.optim.Adam(roles["head"].parameters(), 0.05)
    notes = {}
    for step in range(80):
        optimizer.zero_grad()
        loss, notes = critic.loss(roles, data, Rng(0, step))
        loss.backward()
        optimizer.step()
    assert float(notes["head/data"]) > float(notes["head/student"]) + 1


@pytest.mark.parametrize("lora", [True, False])
def test_on_flux2_no_gradient_reaches_another_role(tiny, make_batch, lora):
    """Through the real transformer, with adapters on one backbone and with copies."""
    dmd = DMD(guidance=2.0, steps=2, micro=2, critic=Adversarial(0.5, 1))
    roles = Roles(dmd.roles, tiny, LoRA(2) if lora else None, None)
    with torch.no_grad():  # a fresh adapter's A has no gradient while its B is 0
        for name in ("student", "fake"):
            for p in roles.parameters(name).values():
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    (update,) = dmd.collect(roles, make_batch(2), Rng(0, 0))
    (micro,) = [replace(m, weight=m.weight / 2) for m in update]
    for turn in dmd.turns:
        roles.activate(turn.role)
        loss, notes = turn.loss(roles, micro, Rng(0, 0))
        loss.backward()
        roles.activate(None)
        assert all(math.isfinite(float(v)) for v in notes.values())
        for name in roles.trainable:
            grads = [p.grad for p in roles.parameters(name).values() if p.grad is not None]
            assert bool(grads) == (name == turn.role), (turn.role, name)
            if grads:
                assert sum(float(g.abs().sum()) for g in grads) > 0
            for p in roles.parameters(name).values():
                p.grad = None
        assert all(p.grad is None for p in roles.backbones.parameters())


def test_without_data_it_says_so():
    with pytest.raises(InputError, match=r"data\.collate\.latents=true"):
        Adversarial().loss({}, replace(batch(), x0=None), Rng(0, 0))
    for wrong in ({"loss_kind": "wgan"}, {"weight": 0.0}, {"r1": -1.0}, {"r1_std": 0.0}):
        with pytest.raises(InputError, match=r"method\.critic"):
            Adversarial(**wrong)
