"""The first ratio is 1: a real FLUX.2 transformer in bf16, replayed as training replays it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flux2.adapters import LoRA
from flux2.engine import share
from flux2.flow import CPS, DanceSDE, FlowSDE
from flux2.model import Flux2
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.types import Batch, Condition
from posttrain.axes import Clip, FirstSteps
from posttrain.grpo import GRPO
from tests.posttrain.toys import prompts, scored

RNG = Rng(0, 0)


def make(**kwargs: Any) -> GRPO:
    settings: dict[str, Any] = {
        "group": 4, "steps": 4, "chunk": 3, "window": FirstSteps(3), "surrogate": Clip(),
    }  # fmt: skip
    return GRPO(scored(lambda x, b: x.mean((1, 2))), **{**settings, **kwargs})


def policy(model: Flux2, lora: bool, checkpointing: bool = False) -> Any:
    """The role, with its weights moved: an adapter that is still 0 would show nothing."""
    adapter = LoRA(3) if lora else None
    roles = Roles(make().roles, model, adapter, torch.bfloat16, checkpointing, seed=5)
    with torch.no_grad():
        for k, p in enumerate(roles.parameters("policy").values()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    return roles["policy"]


def gaps(method: GRPO, role: Any, micro: list[Batch]) -> list[float]:
    """Largest |Δ log p| of each micro-batch, replayed with a graph as the loss replays it."""
    out = []
    for batch in micro:
        e, i = batch.extra, int(batch.extra["i"][0])
        grid = method.schedule(method.steps, batch.shape[0])
        _, law = method._law(method._trained(role), e["x"], batch.cond, grid, i)
        out.append(float((law.log_prob(e["x_next"]) - e["log_prob"]).detach().abs().max()))
    return out


AXES: dict[str, dict[str, Any]] = {
    "plain": {"guidance": 1.0},
    "guided": {"guidance": 4.0, "kernel": CPS()},
    "rollout-guided": {"guidance": 4.0, "train_guidance": 1.0, "kernel": DanceSDE()},
}
QUICK = (("plain", False, False), ("guided", True, True), ("rollout-guided", False, True))
ALL = [(name, lora, again) for name in AXES for lora in (False, True) for again in (False, True)]


@pytest.mark.parametrize(
    ("axes", "lora", "checkpointing"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in ALL],
)
def test_the_first_ratio_of_a_real_transformer_is_one(
    tiny: Flux2, make_batch: Any, axes: str, lora: bool, checkpointing: bool
):
    """At the first update |Δ log p| is the noise floor, and that is 0: rollout and training run the
    same code on the same micro-batches. The default clip cuts nobody."""
    role, method = policy(tiny, lora, checkpointing), make(**AXES[axes])
    (update,) = map(share, method.collect({"policy": role}, make_batch(3), RNG))
    assert len(update) == 4 * 3  # 12 samples by 3, at 3 steps
    found = gaps(method, role, update)
    assert found == [method.state_dict()["floor"]] * len(update) == [0.0] * len(update)
    for micro in update[:3]:
        _, metrics = method.loss({"policy": role}, micro, RNG)
        delta = torch.as_tensor(metrics[f"dlogp/{int(micro.extra['i'][0])}"])
        assert float(delta.detach()) == 0
        assert metrics["clip_high"] == 0 and metrics["clip_low"] == 0


def test_bf16_is_noisy_all_the_same(tiny: Flux2, make_batch: Any):
    """The zeros above are no property of the arithmetic: fp32's velocity gives other densities, and
    weights that moved by a thousandth another ratio."""
    role, method = policy(tiny, False), make(kernel=FlowSDE())
    (update,) = map(share, method.collect({"policy": role}, make_batch(3), RNG))
    exact = type(role)(role.backbone, role._switch, role.adapter, None)
    assert 1e-7 < max(gaps(method, exact, update)) < Clip().eps
    with torch.no_grad():
        for p in role.backbone.parameters():
            p *= 1.001
    assert max(gaps(method, role, update)) > 1e-7


def test_another_cut_of_the_same_samples_has_another_ratio():
    """Where rounding depends on the batch's size, as a GPU's matrix products round, densities on
    other micro-batches are off by more than a clip; on those that are trained they never are."""

    def role(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return x.tanh() * (1 + len(x) * 2**-9)  # bf16's last bit, another one at each size

    method = make(chunk=4, surrogate=Clip(1e-5))
    (update,) = map(share, method.collect({"policy": role}, prompts(3), RNG))
    assert gaps(method, role, update) == [0.0] * 9
    other = [part for micro in update for part in micro.split(3)]
    assert max(gaps(method, role, other)) > 1e-5
