"""Turn-wise optimizers against torch's own, one role at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from flux2.errors import InputError
from flux2.optim import LearningRate, TurnAdamW, TurnMuon, global_norm


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def role(seed: int) -> dict[str, nn.Parameter]:
    shapes = {"block.w": (6, 4), "block.conv": (4, 3, 3, 3), "block.norm": (5,), "head": (3, 4)}
    return {k: nn.Parameter(draw(*s, seed=seed + i)) for i, (k, s) in enumerate(shapes.items())}


def two() -> dict[str, dict[str, nn.Parameter]]:
    return {"student": role(0), "fake": role(10)}


def adamw(roles) -> TurnAdamW:
    return TurnAdamW(roles, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)


def muon(roles) -> TurnMuon:
    return TurnMuon(roles, lr=0.02, adamw_lr=1e-2, momentum=0.9, weight_decay=0.1)


def grade(roles, seed: int, zeros: str | None = None) -> None:
    for name, group in roles.items():
        for i, p in enumerate(group.values()):
            p.grad = draw(*p.shape, seed=seed + i) * (0.0 if name == zeros else 1.0)


@pytest.mark.parametrize("make", [adamw, muon])
def test_the_idle_role_moves_exactly_nothing(make):
    """Though it has momentum from an earlier turn, weight decay, and zeros for gradients."""
    roles = two()
    optimizer = make(roles)
    for name in roles:
        optimizer.active = name
        grade(roles, 50)
        optimizer.step()
    before = {k: p.detach().clone() for k, p in roles["fake"].items()}
    student = {k: p.detach().clone() for k, p in roles["student"].items()}
    optimizer.active = "student"
    for k in range(4):
        grade(roles, 60 + k, zeros="fake")
        optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in roles["fake"].items())
    assert all(not torch.equal(p, student[k]) for k, p in roles["student"].items())
    # A plain optimizer does move it: the test can fail.
    plain = make({"fake": roles["fake"]})
    plain.active = "fake"
    grade({"fake": roles["fake"]}, 0, zeros="fake")
    plain.step()
    assert not torch.equal(roles["fake"]["block.w"], before["block.w"])


@pytest.mark.parametrize("make", [adamw, muon])
def test_turns_do_not_disturb_each_other(make):
    """Interleaved turns give each role what it would have had alone."""
    together, alone = two(), {name: {name: group} for name, group in two().items()}
    joint = make(together)
    single = {name: make(r) for name, r in alone.items()}
    for k in range(5):
        for name in ("fake", "student", "fake"):
            grade(together, 10 * k)
            joint.active = name
            joint.step()
            grade(alone[name], 10 * k)
            single[name].active = name
            single[name].step()
    for name, group in together.items():
        for key, p in group.items():
            assert torch.equal(p, alone[name][name][key]), (name, key)


def test_one_role_equals_torchs_adamw():
    roles, other = {"model": role(0)}, role(0)
    mine = adamw(roles)
    mine.active = "model"
    torchs = torch.optim.AdamW(other.values(), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1)
    for k in range(5):
        grade(roles, 10 * k)
        grade({"model": other}, 10 * k)
        mine.step()
        torchs.step()
    assert all(torch.equal(p, other[k]) for k, p in roles["model"].items())


def test_one_role_equals_torchs_muon_with_convolutions_as_matrices():
    roles, other = {"model": role(0)}, role(0)
    flat = nn.Parameter(other["block.conv"].detach().flatten(1).clone())
    mine = muon(roles)
    mine.active = "model"
    torchs = torch.optim.Muon(
        [other["block.w"], flat], lr=0.02, momentum=0.9, weight_decay=0.1
    )
    rest = torch.optim.AdamW(
        [other["block.norm"], other["head"]], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0
    )
    for k in range(5):
        grade(roles, 10 * k)
        grade({"model": other}, 10 * k)
        flat.grad = other["block.conv"].grad.flatten(1)
        mine.step()
        torchs.step()
        rest.step()
    other["block.conv"] = nn.Parameter(flat.detach().reshape(4, 3, 3, 3))
    for key, p in roles["model"].items():
        torch.testing.assert_close(p, other[key], atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["block.lora_A", "head"])
def test_muon_takes_matrices_alone_and_none(name):
    """LoRA leaves nothing to AdamW, and a head alone nothing to Muon."""
    mine, other = nn.Parameter(draw(4, 3, seed=1)), nn.Parameter(draw(4, 3, seed=1))
    optimizer = muon({"model": {name: mine}})
    optimizer.active = "model"
    alone: torch.optim.Optimizer = (
        torch.optim.AdamW([other], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
        if name == "head"
        else torch.optim.Muon([other], lr=0.02, momentum=0.9, weight_decay=0.1)
    )
    for k in range(3):
        mine.grad, other.grad = draw(4, 3, seed=20 + k), draw(4, 3, seed=20 + k)
        optimizer.step()
        alone.step()
    torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-6)
    assert optimizer.state_of(mine) and [g["role"] for g in optimizer.param_groups] == ["model"]


@pytest.mark.parametrize("make", [adamw, muon])
def test_its_state_resumes_exactly(make):
    first = two()
    a = make(first)

    def run(optimizer, roles, begin: int, end: int) -> None:
        for k in range(begin, end):
            optimizer.active = ("student", "fake")[k % 2]
            grade(roles, 10 * k)
            optimizer.step()

    run(a, first, 0, 4)
    second = copy.deepcopy(first)
    b = make(second)
    for name, group in first.items():
        for key, parameter in group.items():
            state = copy.deepcopy(a.state_of(parameter))
            assert state
            b.set_state(second[name][key], state, updates=2)
    run(a, first, 4, 8)
    run(b, second, 4, 8)
    for name, group in first.items():
        assert all(torch.equal(p, second[name][k]) for k, p in group.items()), name


def test_muon_refuses_what_it_cannot_share():
    w = nn.Parameter(draw(4, 3, 3, 3, seed=0).to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="contiguous"):
        TurnMuon({"model": {"block.conv": w, "head": nn.Parameter(torch.ones(2))}}, 0.02, 1e-3)


def test_constant_rate_with_warmup():
    rate = LearningRate(warmup=3)
    assert [rate(k) for k in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_rate():
    rate = LearningRate(decay="linear", total=10)
    assert [round(rate(k), 6) for k in (0, 1, 5, 9, 10, 50)] == [1.0, 0.9, 0.5, 0.1, 0.0, 0.0]
    warm = LearningRate(warmup=2, decay="linear", total=10)
    assert [round(warm(k), 6) for k in (1, 2, 6, 10)] == [round(2 / 3, 6), 1.0, 0.5, 0.0]


def test_cosine_rate():
    rate = LearningRate(decay="cosine", total=8)
    for k in range(9):
        assert rate(k) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * k / 8))
    assert rate(20) == 0


def test_a_held_rate_is_the_same_for_every_total_until_it_decays():
    rate = LearningRate(warmup=2, decay="linear", total=100, hold=0.6)
    assert [rate(k) for k in (2, 30, 60)] == [1, 1, 1]
    assert [rate(k) for k in (70, 80, 100)] == pytest.approx([0.75, 0.5, 0.0])
    longer = LearningRate(warmup=2, decay="linear", total=200, hold=0.6)
    assert all(rate(k) == longer(k) for k in range(61))
    shorter = LearningRate(warmup=30, decay="linear", total=40, hold=0.6)  # the warm-up is longer
    assert [shorter(k) for k in (30, 35, 40)] == pytest.approx([1.0, 0.5, 0.0])


def test_wrong_rates_are_refused():
    with pytest.raises(InputError, match="decay"):
        LearningRate(decay="exponential")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="hold"):
        LearningRate(hold=1.0)


def test_global_norm():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert global_norm([a, b, c]) == 5
    assert global_norm([c]) == 0
