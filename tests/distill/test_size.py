"""Healing on a small residual network whose every state is written down."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distill.size import Size, apart
from flux2.analytic import Gaussian, toy_condition
from flux2.errors import InputError
from flux2.flow import Uniform
from flux2.rng import Rng
from flux2.types import Batch, RoleSpec

N, C = 4, 6
DEPTH = (2, 4)


class Stack(nn.Module):
    """h ← h + t·W_k·h from x on, and the last state is the velocity."""

    def __init__(self, matrices: list[Tensor], depth: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.ParameterList(m.clone() for m in matrices)
        self.depth, self.asked = depth, []

    def states(self, x, t, cond, blocks):
        self.asked = list(blocks)
        out, scale = [x], t[:, None, None] + cond.text[:, :1, :1]
        for w in self.layers:
            out.append(out[-1] + scale * out[-1] @ w)
        return out[-1], [out[k] for k in blocks]

    def forward(self, x, t, cond):
        return self.states(x, t, cond, ())[0]


def matrices(count: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(C, C, generator=g) for _ in range(count)]


def data(count: int = 24, seed: int = 1) -> Batch:
    ids, g = torch.arange(count), torch.Generator().manual_seed(seed)
    weight = torch.rand(count, generator=g)
    return Batch(
        ids, ("p",) * count, toy_condition(count, N), ids, ({},) * count, (2, 2), C,
        x0=torch.randn(count, N, C, generator=g), weight=weight / weight.sum(),
    )  # fmt: skip


def roles(keep: tuple[tuple[int, ...], tuple[int, ...]], layers: list[Tensor] | None = None):
    every = layers or matrices(sum(DEPTH))
    mine = [every[i] for i in keep[0]] + [every[DEPTH[0] + i] for i in keep[1]]
    return {
        "student": Stack(mine, (len(keep[0]), len(keep[1]))),
        "teacher": Stack(every, DEPTH).requires_grad_(False),
    }


ALL = ((0, 1), (0, 1, 2, 3))
HALF = ((0,), (0, 2))


@pytest.mark.parametrize("match", ["group", "own"])
def test_a_student_with_every_block_has_no_loss_and_no_gradient(match):
    both = roles(ALL)
    loss, metrics = Size(ALL, match=match).loss(both, data(), Rng(0, 0))
    loss.backward()
    assert float(loss.detach()) == 0 == float(metrics["output"]) == float(metrics["features"])
    assert all(not p.grad.any() for p in both["student"].parameters())


def test_blocks_that_do_nothing_are_no_loss_in_either_match():
    """Removed identities: outputs and all states agree, whichever of two like states is meant."""
    layers = matrices(sum(DEPTH))
    for gone in (1, 3, 5):  # double 1, single 1 and 3
        layers[gone] = torch.zeros(C, C)
    for match in ("group", "own"):
        loss, _ = Size(HALF, match=match).loss(roles(HALF, layers), data(), Rng(0, 0))
        assert float(loss.detach()) == 0
    # And where one of them does something, both terms say so.
    layers[3] = matrices(1, seed=9)[0]
    _, metrics = Size(HALF).loss(roles(HALF, layers), data(), Rng(0, 0))
    assert float(metrics["output"]) > 1e-3 and float(metrics["features"]) > 1e-3


@pytest.mark.parametrize(
    ("match", "keep", "pairs"),
    [
        ("own", HALF, [(1, 1), (2, 3), (3, 5)]),
        ("group", HALF, [(1, 2), (2, 4), (3, 6)]),
        ("own", ((1,), (0, 3)), [(1, 2), (2, 3), (3, 6)]),
        ("group", ((1,), (0, 3)), [(1, 2), (2, 5), (3, 6)]),
        ("group", ((0,), (2,)), [(1, 4), (2, 6)]),  # single 0 and 1 went with double 0's group
    ],
)
def test_which_states_are_matched(match, keep, pairs):
    method = Size(keep, match=match)
    assert method.pairs(DEPTH) == pairs
    both = roles(keep)
    method.loss(both, data(), Rng(0, 0))
    assert both["student"].asked == [j for j, _ in pairs]
    assert both["teacher"].asked == [m for _, m in pairs]


def test_the_loss_by_hand():
    """Against the three sums written out, for uneven weights."""
    keep, batch, rng = ((1,), (0, 3)), data(), Rng(3, 7)
    both = roles(keep)
    method = Size(keep, features=0.3, task=0.2, density=Uniform())
    loss, metrics = method.loss(both, batch, rng)
    t = Uniform()(rng.uniform("time", batch.ids))
    eps = rng("noise", batch.ids, (N, C))
    assert batch.x0 is not None and batch.weight is not None
    x = (1 - t)[:, None, None] * batch.x0 + t[:, None, None] * eps
    # On the teacher's way: after double 1; after single 2, for single 0 has 1 and 2 behind it.
    v_t, (a, b, c) = both["teacher"].states(x, t, batch.cond, (2, 5, 6))
    v_s, (p, q, r) = both["student"].states(x, t, batch.cond, (1, 2, 3))
    gap = torch.stack([
        ((mine - its) ** 2).sum(-1) / (its**2).sum(-1) for mine, its in ((p, a), (q, b), (r, c))
    ])  # fmt: skip
    each = ((v_s - v_t) ** 2).mean((1, 2)) + 0.3 * gap.mean((0, 2))
    each = each + 0.2 * ((v_s - eps + batch.x0) ** 2).mean((1, 2))
    torch.testing.assert_close(loss, (batch.weight * each).sum())
    assert float(metrics["features"]) == pytest.approx(float(gap.detach().mean()), rel=1e-5)


def test_gradients_reach_the_student_alone():
    both = roles(HALF)
    for p in both["teacher"].parameters():
        p.requires_grad_(True)  # the method itself must not reach it
    loss, _ = Size(HALF).loss(both, data(), Rng(0, 0))
    loss.backward()
    assert all(p.grad is None for p in both["teacher"].parameters())
    assert all(p.grad.abs().max() > 0 for p in both["student"].parameters())


def test_without_features_only_outputs_count_and_no_state_is_asked_for():
    both = roles(HALF)
    loss, metrics = Size(HALF, features=0.0).loss(both, data(), Rng(0, 0))
    assert both["teacher"].asked == both["student"].asked == []
    assert set(metrics) == {"loss", "output"} and float(loss.detach()) > 0


def test_a_tokens_features_are_measured_by_its_own_norm():
    g = torch.Generator().manual_seed(0)
    mine, theirs = torch.randn(3, N, C, generator=g), torch.randn(3, N, C, generator=g)
    scale = torch.tensor([1.0, 1e3, 1.0, 10.0])[None, :, None]
    torch.testing.assert_close(apart(scale * mine, scale * theirs), apart(mine, theirs))
    torch.testing.assert_close(apart(2 * theirs, theirs), torch.ones(3))


def test_the_task_alone_is_flow_matching():
    """Where the student is the data's own velocity, its task loss is the data's irreducible one."""

    class Known(Stack):
        def states(self, x, t, cond, blocks):
            return Gaussian(torch.zeros(N, C), 1.0)(x, t), []

    both = {"student": Known([], DEPTH), "teacher": Known([], DEPTH)}
    _, metrics = Size(HALF, features=0.0, task=1.0, density=Uniform()).loss(
        both, data(4096), Rng(0, 0)
    )
    # For N(0, I): E‖v* − (ε − x0)‖² per dimension is 2 − (2t−1)²/C_t = 1/C_t, C_t = (1−t)² + t².
    t = torch.linspace(0, 1, 10001)
    want = float((1 / ((1 - t) ** 2 + t**2)).mean())
    assert float(metrics["task"]) == pytest.approx(want, rel=0.02) and metrics["output"] == 0


def test_healing_brings_the_student_to_the_teacher():
    """A linear world, in which two removed maps can be taken up by the kept ones."""
    layers = matrices(sum(DEPTH))
    both = roles(HALF, [0.3 * m for m in layers])
    method = Size(HALF, density=Uniform())
    optimizer = torch.optim.Adam(both["student"].parameters(), 0.02)
    seen = []
    for step in range(150):
        [update] = method.collect({}, data(32, step), Rng(0, step))
        assert len(update) == 1
        loss, _ = method.loss(both, update[0], Rng(0, step))
        loss.backward()
        seen.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(seen[-10:]) < 0.15 * sum(seen[:3]) / 3 * 10


def test_micro_batches_add_up():
    method, both = Size(HALF, micro=10), roles(HALF)
    [update] = method.collect(both, data(), Rng(0, 0))
    assert [len(m) for m in update] == [10, 10, 4]
    whole, _ = method.loss(both, data(), Rng(0, 0))
    parts = sum(method.loss(both, m, Rng(0, 0))[0] for m in update)
    torch.testing.assert_close(parts, whole)


def test_roles_and_result():
    method = Size([[0], [0, 2]])  # as Hydra gives it
    assert method.roles == {
        "student": RoleSpec(trainable=True, blocks=((0,), (0, 2))),
        "teacher": RoleSpec(),
    }
    assert [t.role for t in method.turns] == ["student"]
    assert Size.result is None and method.state_dict() == {}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"blocks": None}, "method.blocks"),
        ({"blocks": [[0]]}, "method.blocks"),
        ({"blocks": [[0], []]}, "method.blocks"),
        ({"features": -1.0}, "method.features"),
        ({"task": float("nan")}, "method.task"),
        ({"match": "first"}, "method.match"),
        ({"micro": 0}, "method.micro"),
    ],
)
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(InputError, match=says) as refused:
        Size(**{"blocks": HALF, **wrong})
    assert "\n" not in str(refused.value)


def test_another_prompt_is_another_target():
    """Teacher and student see the same condition: dropped captions reach both."""
    both, batch = roles(HALF), data()
    dropped = replace(batch, cond=replace(batch.cond, text=-batch.cond.text))
    with_prompt, without = (Size(HALF).loss(both, b, Rng(0, 0))[0] for b in (batch, dropped))
    assert not torch.isclose(with_prompt, without)
