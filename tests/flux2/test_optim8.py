"""AdamW in 8 bits against torch's AdamW, role by role, and through plain tensors and back."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux2.errors import InputError
from flux2.optim import TurnAdamW
from flux2.optim8 import TurnAdamW8bit, state_bytes

pytest.importorskip("bitsandbytes")


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """A matrix in 8 bits, one with a short last block, and a vector that stays fp32."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"w": (64, 96), "odd": (67, 79), "b": (17,)}
    return {k: nn.Parameter(0.1 * torch.randn(s, generator=g)) for k, s in shapes.items()}


def targets() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    return {k: torch.randn(p.shape, generator=g) for k, p in parameters().items()}


def descend(optimizer: Any, group: dict[str, nn.Parameter], steps: int, role: str = "a") -> float:
    """The loss after `steps` updates of a quadratic whose curvatures span two decades."""
    optimizer.active, goal, loss = role, targets(), torch.zeros(())
    for _ in range(steps):
        terms = [
            (torch.logspace(-1, 1, p.numel()).view_as(p) * (p - goal[k]).square()).mean()
            for k, p in group.items()
        ]
        loss = torch.stack(terms).sum()
        loss.backward()
        optimizer.step()
        for p in group.values():
            p.grad = None
    return float(loss.detach())


def test_it_converges_as_fp32_adamw_does() -> None:
    settings = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.001}
    exact, packed = parameters(), parameters()
    begun = descend(TurnAdamW({"a": exact}, **settings), exact, 1)
    one = descend(TurnAdamW({"a": exact}, **settings), exact, 150)
    two = descend(TurnAdamW8bit({"a": packed}, **settings), packed, 151)
    assert one < 0.02 * begun and two < 0.02 * begun
    gap = torch.cat([(exact[k] - packed[k]).detach().flatten() for k in exact]).norm()
    size = torch.cat([p.detach().flatten() for p in exact.values()]).norm()
    assert float(gap) < 0.05 * float(size)


def test_the_first_update_is_adamws() -> None:
    """Δ = −lr·(sign(g) + λ·w), whatever the code of the moments: m̂ = g and v̂ = g²."""
    group = parameters()
    before = {k: p.detach().clone() for k, p in group.items()}
    optimizer = TurnAdamW8bit({"a": group}, lr=0.01, weight_decay=0.1)
    optimizer.active = "a"
    for p in group.values():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).sign() * 0.5
    optimizer.step()
    for k, p in group.items():
        assert p.grad is not None
        expected = before[k] - 0.01 * (p.grad.sign() + 0.1 * before[k])
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-5)


def test_idle_roles_do_not_move() -> None:
    mine, idle = parameters(), parameters(1)
    optimizer = TurnAdamW8bit({"a": mine, "b": idle}, lr=0.1, weight_decay=0.1)
    descend(optimizer, idle, 2, "b")  # so that it has momentum
    before = {k: p.detach().clone() for k, p in idle.items()}
    states = {k: optimizer.state_of(p) for k, p in idle.items()}
    kept = {k: {n: v.clone() for n, v in s.items()} for k, s in states.items()}
    for p in idle.values():
        p.grad = torch.zeros_like(p)  # as sharded engines fill them
    descend(optimizer, mine, 3, "a")
    for k, p in idle.items():
        assert torch.equal(p, before[k])
        for n, v in optimizer.state_of(p).items():
            assert torch.equal(v, kept[k][n])


def test_states_go_through_plain_tensors_bit_for_bit() -> None:
    group = parameters()
    optimizer = TurnAdamW8bit({"a": group}, lr=0.05)
    descend(optimizer, group, 4)
    saved = {k: {n: v.clone() for n, v in optimizer.state_of(p).items()} for k, p in group.items()}
    weights = {k: p.detach().clone() for k, p in group.items()}
    assert saved["w"]["state1"].dtype == torch.uint8 and set(saved["b"]) == {"state1", "state2"}
    assert all(type(v) is Tensor for s in saved.values() for v in s.values())
    descend(optimizer, group, 3)
    again = {k: nn.Parameter(v) for k, v in weights.items()}
    resumed = TurnAdamW8bit({"a": again}, lr=0.05)
    for k, p in again.items():
        resumed.set_state(p, saved[k], 4)
    descend(resumed, again, 3)
    for k, p in again.items():
        assert torch.equal(p, group[k])
        for n, v in resumed.state_of(p).items():
            assert torch.equal(v, optimizer.state_of(group[k])[n])


def test_state_bytes_are_what_is_kept() -> None:
    group = parameters()
    optimizer = TurnAdamW8bit({"a": group}, lr=0.1)
    assert optimizer.state_of(group["w"]) == {}
    descend(optimizer, group, 1)
    for p in group.values():
        kept = sum(v.numel() * v.element_size() for v in optimizer.state_of(p).values())
        assert kept == state_bytes(p.numel())


def test_another_optimizers_state_is_refused() -> None:
    group = parameters()
    optimizer = TurnAdamW8bit({"a": group}, lr=0.1)
    theirs = {"exp_avg": torch.zeros(64, 96), "exp_avg_sq": torch.zeros(64, 96)}
    with pytest.raises(InputError, match="resume with the optimizer"):
        optimizer.set_state(group["w"], theirs, 3)


def test_settings_out_of_range_and_a_missing_library_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match="learning rate"):
        TurnAdamW8bit({"a": parameters()}, lr=-1.0)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install bitsandbytes"):
        TurnAdamW8bit({"a": parameters()}, lr=0.1)
