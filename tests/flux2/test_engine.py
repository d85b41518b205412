"""Turns: one update of one role, clipped, weighted, skipped when not finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux2 import distributed
from flux2.adapters import LoRA
from flux2.distributed import pick_device
from flux2.engine import Engine, share
from flux2.errors import InputError
from flux2.optim import LearningRate, TurnAdamW, TurnMuon
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.types import RoleSpec
from posttrain.sft import FlowMatching

SPECS = {
    "student": RoleSpec(trainable=True),
    "fake": RoleSpec(trainable=True),
    "ema": RoleSpec(follows="student", decay=0.5),
    "teacher": RoleSpec(),
}


def adamw(named):
    return TurnAdamW(named, lr=1e-2, weight_decay=0.1)


def muon(named):
    return TurnMuon(named, lr=1e-2, adamw_lr=1e-2, weight_decay=0.1)


def build(tiny, lora=True, make=adamw, specs=None, clip=0.0, rate=None) -> Engine:
    roles = Roles(specs or SPECS, tiny, LoRA(2) if lora else None, None)
    named = {name: roles.parameters(name) for name in roles.trainable}
    return Engine(roles, make(named), rate or LearningRate(), clip)


def copy_of(engine: Engine, name: str) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in engine.roles.parameters(name).items()}


def same(engine: Engine, name: str, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[k]) for k, p in engine.roles.parameters(name).items())


def loss_of(engine: Engine, name: str, batch) -> torch.Tensor:
    x = torch.randn(len(batch), *batch.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((len(batch),), 0.5)
    return engine.roles[name](x, t, batch.cond).square().mean()


@pytest.mark.parametrize(("lora", "make"), [(True, adamw), (False, adamw), (False, muon)])
def test_idle_roles_move_exactly_nothing(tiny, make_batch, lora, make):
    engine, batch = build(tiny, lora, make), make_batch(2)
    for name in ("fake", "student"):  # both have momentum
        with engine.turn(name):
            engine.backward(loss_of(engine, name, batch), last=True)
    fake, student = copy_of(engine, "fake"), copy_of(engine, "student")
    frozen = {k: v.clone() for k, v in tiny.transformer.state_dict().items() if "lora" not in k}
    for _ in range(3):
        with engine.turn("student"):
            engine.backward(loss_of(engine, "student", batch), last=True)
    assert same(engine, "fake", fake) and not same(engine, "student", student)
    now = tiny.transformer.state_dict()
    assert all(torch.equal(now[k], v) for k, v in frozen.items())
    assert engine.updates == {"fake": 1, "student": 4}


def test_a_loss_through_another_role_leaves_it_no_gradient(tiny, make_batch):
    """DMD-like: the student's loss passes through the fake score; the fake's turn starts clean."""
    batch = make_batch(2)

    def run(through: bool) -> dict[str, torch.Tensor]:
        import copy

        engine = build(copy.deepcopy(tiny), clip=0.0)
        with engine.turn("student"):
            loss = loss_of(engine, "student", batch)
            if through:
                loss = loss + loss_of(engine, "fake", batch)
            engine.backward(loss, last=True)
        with engine.turn("fake"):
            engine.backward(loss_of(engine, "fake", batch), last=True)
        return copy_of(engine, "fake")

    clean, through = run(False), run(True)
    assert all(torch.equal(clean[k], through[k]) for k in clean)


def test_followers_advance_after_their_leaders_update_only(tiny, make_batch):
    engine, batch = build(tiny), make_batch(2)
    ema, start = copy_of(engine, "ema"), copy_of(engine, "student")
    with engine.turn("fake"):
        engine.backward(loss_of(engine, "fake", batch), last=True)
    assert same(engine, "ema", ema)
    with engine.turn("student"):
        engine.backward(loss_of(engine, "student", batch), last=True)
    for (k, mean), p in zip(
        engine.roles.parameters("ema").items(), engine.roles.parameters("student").values(),
        strict=True,
    ):  # fmt: skip
        want = (start[k.replace(".ema.", ".student.")] + p) / 2
        torch.testing.assert_close(mean, want, atol=1e-7, rtol=1e-5)


def test_an_empty_turn_updates_nothing(tiny, make_batch):
    engine, batch = build(tiny), make_batch(2)
    with engine.turn("student"):
        engine.backward(loss_of(engine, "student", batch), last=True)
    before = copy_of(engine, "student"), copy_of(engine, "ema")
    engine.metrics()
    with engine.turn("student"):
        pass
    assert same(engine, "student", before[0]) and same(engine, "ema", before[1])
    assert engine.updates["student"] == 1 and engine.metrics() == {}


def test_gradients_that_are_not_finite_are_skipped_and_counted(tiny, make_batch):
    engine, batch = build(tiny), make_batch(2)
    before = copy_of(engine, "student")
    with engine.turn("student"):
        engine.backward(loss_of(engine, "student", batch) * float("inf"), last=True)
    assert same(engine, "student", before) and engine.updates["student"] == 0
    assert engine.metrics()["student/skipped"] == 1
    with engine.turn("student"):  # nothing of it remains
        engine.backward(loss_of(engine, "student", batch), last=True)
    assert not same(engine, "student", before) and engine.metrics()["student/skipped"] == 0
    assert all(p.isfinite().all() for p in engine.roles.parameters("student").values())


def test_clip_scales_the_whole_roles_gradient(tiny, make_batch):
    """AdamW's first update is blind to scale, so that the gradient itself is looked at."""
    seen: list[float] = []

    class Spy(TurnAdamW):
        def step(self, closure=None):
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            seen.append(float(torch.stack([g.norm() for g in grads]).norm()))
            return super().step(closure)

    batch, make = make_batch(2), lambda named: Spy(named, lr=0.0)
    engine = build(tiny, False, make, {"student": RoleSpec(trainable=True)}, clip=0.5)
    for scale in (100.0, 1e-6):
        with engine.turn("student"):
            engine.backward(scale * loss_of(engine, "student", batch), last=True)
        norm = engine.metrics()["student/grad_norm"]
        assert seen[-1] == pytest.approx(min(norm, 0.5), rel=1e-4)
    assert norm < 0.5


def test_every_roles_rate_is_that_of_the_step(tiny, make_batch):
    """A role that is updated every other step ends its decay with the run, as the others do."""
    rate = LearningRate(decay="linear", total=4)
    engine, batch = build(tiny, rate=rate), make_batch(1)
    rates: dict[str, list[float]] = {"student": [], "fake": []}
    for step in range(4):
        engine.step = step
        for name in ("fake", "student") if step % 2 else ("fake",):
            with engine.turn(name):
                engine.backward(loss_of(engine, name, batch), last=True)
            rates[name].append(engine.metrics()[f"{name}/lr"])
    assert rates["fake"] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    assert rates["student"] == pytest.approx([0.75e-2, 0.25e-2])


def test_weighted_micro_batches_equal_one_big_batch(tiny, make_batch):
    """Unequal weights, unequal sizes: the loss is Σ weight · loss, divided by nothing."""
    batch = replace(make_batch(5), weight=torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]))
    rng, gradients = Rng(0, 0), []
    for size in (5, 2, 1):
        import copy

        roles = Roles({"model": RoleSpec(trainable=True)}, copy.deepcopy(tiny), None, None)
        method = FlowMatching(micro=size)
        (update,) = method.collect(roles, batch, rng)
        assert [len(m) for m in update] == {5: [5], 2: [2, 2, 1], 1: [1] * 5}[size]
        for micro in update:
            method.loss(roles, micro, rng)[0].backward()
        gradients.append([p.grad for p in roles.parameters("model").values()])
    for other in gradients[1:]:
        for got, want in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert any(g.abs().max() > 1e-3 for g in gradients[0])


def test_sharing_scales_weights_and_leaves_out_what_has_none(make_batch):
    batch = make_batch(5)
    weight = torch.tensor([0.0, 0.0, 3.0, 1.0, 4.0])
    shared = share(replace(batch, weight=weight).split(2))
    assert [m.weight.tolist() for m in shared] == [[0.375, 0.125], [0.5]]
    assert [m.ids.tolist() for m in shared] == [[2, 3], [4]]
    assert share(replace(batch, weight=0 * weight).split(2)) == [] and share([]) == []


def test_a_rank_with_less_repeats_its_last_micro_batch_without_weight(make_batch, monkeypatch):
    """As on the second of two ranks, of which the first has three micro-batches of weight 2."""
    batch = make_batch(2)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [(3, 6.0), mine])
    first = replace(batch, weight=torch.tensor([1.0, 1.0]))
    shared = share([first, replace(batch, weight=torch.zeros(2))])
    assert [m.weight.tolist() for m in shared] == [[0.125, 0.125], [0, 0], [0, 0]]
    none = share([replace(batch, weight=torch.zeros(2))])
    assert [m.weight.tolist() for m in none] == [[0, 0]] * 3


def test_gradients_reach_the_active_role_alone(tiny, make_batch):
    engine, batch = build(tiny), make_batch(2)
    with engine.turn("student"):
        loss = loss_of(engine, "student", batch) + loss_of(engine, "fake", batch)
        engine.backward(loss, last=True)
        assert all(p.grad is None for p in engine.roles.parameters("fake").values())
    for name in ("student", "fake"):
        assert all(p.requires_grad for p in engine.roles.parameters(name).values())


def test_what_is_trained_is_fp32_over_a_bf16_base(tiny, make_batch):
    """An update of 1e-4 relative would vanish in bf16."""
    tiny.transformer.to(torch.bfloat16)
    roles = Roles(SPECS, tiny, None, torch.bfloat16)
    for name in ("student", "fake", "ema"):
        assert {p.dtype for p in roles.parameters(name).values()} == {torch.float32}
    assert {p.dtype for p in roles.backbones["base"].parameters()} == {torch.bfloat16}


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device("auto").type in ("cpu", "cuda")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="CUDA"):
            pick_device("cuda:0")
