"""Representation alignment on a tiny FLUX.2: what it reads, what it moves, and that it resumes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flux2.adapters import LoRA
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.engine import Engine, share
from flux2.errors import InputError
from flux2.optim import LearningRate, TurnAdamW
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.types import Batch, RoleSpec
from posttrain.alignment import Alignment
from posttrain.sft import FlowMatching


class Toy:
    """The colours of each quarter of a token's pixels, less their mean: 12 numbers."""

    dim = 12

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        size = images.shape[-1] // grid[1] // 2
        pooled = avg_pool2d(images.float() / 255 - 0.5, size)
        return rearrange(pooled, "b c (r i) (q j) -> b (r q) (c i j)", i=2, j=2)


def batch_of(tiny: Any, count: int = 4, start: int = 0, task: str = "t2i") -> Batch:
    world = SignWorld("train", length=100, tasks={task: 1.0})
    records = [world[start + i] for i in range(count)]
    return Collator(tiny, images=True)(records, torch.arange(count))


def method(block: int = 1, weight: float = 0.5, **kwargs: Any) -> FlowMatching:
    return FlowMatching(align=Alignment(Toy(), block, weight), **{"micro": 3, **kwargs})


def engine_of(tiny: Any, of: FlowMatching, lora: LoRA | None = None, **kwargs: Any) -> Engine:
    roles = Roles(of.roles, copy.deepcopy(tiny), lora, None, **kwargs)
    named = {name: roles.parameters(name) for name in roles.trainable}
    optimizer = TurnAdamW(roles=named, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    return Engine(roles, optimizer, LearningRate(0, "constant", 10, 0.0), 1.0)


def run(engine: Engine, of: FlowMatching, batch: Batch, steps: int) -> list[float]:
    """The loop's steps on one batch; the mean cosine of each."""
    seen = []
    for step in range(engine.step, steps):
        rng, cosines = Rng(0, 0), []  # the same times and noise: the loss must fall
        for update in map(share, of.collect(engine.roles, batch, rng)):
            for turn in of.turns:
                with engine.turn(turn.role):
                    for k, micro in enumerate(update, 1):
                        loss, metrics = turn.loss(engine.roles, micro, rng)
                        engine.backward(loss, last=k == len(update))
                        cosines += [metrics["alignment"].detach()] if turn.role == "model" else []
        engine.step = step + 1
        seen.append(float(torch.stack(cosines).mean()))
    return seen


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("task", ["t2i", "recolour"])
def test_hidden_states_are_the_target_tokens_own(tiny, block: int, task: str):
    """Against what the transformer itself hands on; with references in the row, too."""
    batch = batch_of(tiny, 2, task=task)
    role = Roles({"model": RoleSpec()}, tiny, None, None)["model"]
    t, n = torch.tensor([0.3, 0.8]), batch.shape[0]
    seen: list[Tensor] = []
    body = role.backbone
    after = [body.single_transformer_blocks[0], body.norm_out][block - 1]
    handle = after.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", (*args, None)[0])),
        with_kwargs=True,
    )
    x = torch.randn(2, *batch.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v, states = role.features(x, t, batch.cond, block)
        handle.remove()
        torch.testing.assert_close(v, role(x, t, batch.cond))
    assert not body.transformer_blocks[0]._forward_hooks  # nothing is left behind
    text = batch.cond.text.shape[1] if block == 1 else 0  # the last layers see image tokens alone
    torch.testing.assert_close(states, seen[0][:, text : text + n])
    assert (batch.cond.ref is not None) == (task == "recolour")
    with pytest.raises(InputError, match="1 to 2"):
        role.features(x, t, batch.cond, 3)


@pytest.mark.parametrize("block", [1, 2])
def test_gradients_reach_the_blocks_before_it_alone(tiny, block: int):
    batch = batch_of(tiny)
    align = Alignment(Toy(), block)
    roles = engine_of(tiny, FlowMatching(align=align)).roles
    x, t = torch.randn(len(batch), *batch.shape), torch.full((len(batch),), 0.5)
    _, extra, _ = align(roles, x, t, batch.cond, batch)
    extra.sum().backward()
    body = roles["model"].backbone
    for k, stack in enumerate((body.transformer_blocks, body.single_transformer_blocks), 1):
        grads = [p.grad for p in stack.parameters() if p.grad is not None]
        assert any(bool(g.any()) for g in grads) == (k <= block)
    assert all(bool(p.grad.any()) for p in roles.parameters("projector").values())
    assert body.proj_out.weight.grad is None


def test_the_loss_is_the_flows_less_the_cosine(tiny):
    """L + λ·(−cos), with the cosine written out."""
    batch, of = batch_of(tiny), method(weight=0.7)
    roles = engine_of(tiny, of).roles
    with torch.no_grad():
        both, told = of.loss(roles, batch, Rng(0, 3))
        alone, _ = FlowMatching().loss(roles, batch, Rng(0, 3))
        (h, y), *_ = of.align._kept
        p = roles["projector"](h)
    cosine = (p * y).sum(-1) / (p.norm(dim=-1) * y.norm(dim=-1))
    torch.testing.assert_close(told["alignment"], cosine.mean())
    torch.testing.assert_close(both, alone - 0.7 * cosine.mean())
    torch.testing.assert_close(y, Toy()(batch.images, batch.grid))


def test_a_turn_moves_its_own_role_and_the_alignment_rises(tiny):
    batch, of = batch_of(tiny), method(weight=2.0)
    engine = engine_of(tiny, of)
    before = {n: [p.clone() for p in engine.roles.parameters(n).values()] for n in engine.updates}
    seen = run(engine, of, batch, 12)
    assert seen[-1] > seen[0] + 0.2
    assert engine.updates == {"model": 12, "projector": 12}
    for name, old in before.items():
        new = engine.roles.parameters(name).values()
        assert any(not torch.equal(a, b) for a, b in zip(old, new, strict=True)), name


def test_the_model_learns_from_it_and_not_the_projector_alone(tiny):
    """With the model's weights held still, the same steps align less."""
    batch, of = batch_of(tiny), method(weight=5.0)
    whole = run(engine_of(tiny, of), of, batch, 8)[-1]
    engine = engine_of(tiny, of)
    for p in engine.roles.parameters("model").values():
        p.register_hook(torch.zeros_like)
    assert run(engine, of, batch, 8)[-1] < whole - 0.01


def test_a_resumed_run_is_the_same(tiny):
    batch, of = batch_of(tiny), method(ema=0.9)
    whole, half = engine_of(tiny, of), engine_of(tiny, of)
    run(whole, of, batch, 4)
    run(half, of, batch, 2)
    tensors = {k: v.clone() for k, v in half.tensors()}
    assert any(k.startswith("projector/") for k in tensors)
    assert any(k.startswith("optimizer/projector/") for k in tensors)
    again = engine_of(tiny, of)
    again.load(half.state_dict(), tensors)
    run(again, of, batch, 4)
    last = dict(again.tensors())
    for name, want in whole.tensors():
        torch.testing.assert_close(last[name], want, rtol=0, atol=0)


def test_beside_adapters_and_under_checkpointing(tiny):
    """The projector is whole beside a LoRA; recomputed activations give the same gradients."""
    batch, of = batch_of(tiny), method()
    engine = engine_of(tiny, of, LoRA(4))
    assert engine.roles.trainable == ("model", "projector")
    assert all("lora_" in k for k in engine.roles.parameters("model"))
    grads = []
    for checkpointing in (False, True):
        roles = engine_of(tiny, of, LoRA(4), checkpointing=checkpointing).roles
        with torch.no_grad():
            for p in roles.parameters("model").values():
                p.add_(0.05)
        of.loss(roles, batch, Rng(0, 3))[0].backward()
        grads.append([p.grad for n in of.roles for p in roles.parameters(n).values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_projectors_start_alike_for_one_seed(tiny):
    one, same, other = (engine_of(tiny, method(), seed=s).roles["projector"] for s in (1, 1, 2))
    assert torch.equal(one[0].weight, same[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    assert one(torch.zeros(2, 5, 64)).shape == (2, 5, 12)


def test_what_does_not_fit_is_refused(tiny):
    for wrong in ({"block": 0}, {"weight": 0.0}, {"weight": float("nan")}):
        with pytest.raises(InputError, match=f"align.{next(iter(wrong))}"):
            Alignment(Toy(), **wrong)
    of, batch = method(), batch_of(tiny)
    roles = engine_of(tiny, of).roles
    with pytest.raises(InputError, match=r"collate\.images"):
        of.loss(roles, replace(batch, images=None), Rng(0, 0))
    of.align.features = lambda images, grid: torch.zeros(len(images), 3, 12)
    with pytest.raises(InputError, match="one for each"):
        of.loss(roles, batch, Rng(0, 0))
