"""The derivative of a flow map through the real transformer: three ways that must agree."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd.functional import jvp as double_vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.consistency import FlowMapDistillation, difference, jvp
from distill.flowmap import Squared, ToAnywhere, ToData
from flux2 import quantise
from flux2.adapters import LoRA
from flux2.errors import InputError
from flux2.folders import scheduler_config
from flux2.generate import Sampler
from flux2.latents import grid_ids
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.samplers import sample_euler, sample_flowmap, sample_renoise
from flux2.schedule import EmpiricalShift, empirical_mu
from flux2.text import text_ids
from flux2.types import Batch, Condition, RoleSpec

METHOD = FlowMapDistillation(ToAnywhere(equal=0.3), Squared(), guidance=2.0)


def inputs(tiny, b: int = 2, dtype: torch.dtype = torch.float32):
    """x, t, r and a direction; the condition has references and padding."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(b, 5 + 6 + 4, dtype=torch.bool)
    mask[0, 3:5] = False
    cond = Condition(
        text=torch.randn(b, 5, tiny.text.dim, generator=g, dtype=dtype),
        text_ids=text_ids(b, 5),
        ids=grid_ids((2, 3)).expand(b, -1, -1),
        ref=torch.randn(b, 4, 128, generator=g, dtype=dtype),
        ref_ids=grid_ids((2, 2)).expand(b, -1, -1) + 10,
        mask=mask,
    )
    x, v = (torch.randn(b, 6, 128, generator=g, dtype=dtype) for _ in range(2))
    return x, torch.linspace(0.5, 0.9, b, dtype=dtype), torch.full((b,), 0.2, dtype=dtype), v, cond


def stirred(tiny, lora: bool, **kwargs) -> Roles:
    """Roles whose adapter, or embedder of the interval, is no longer without effect."""
    roles = Roles(METHOD.roles, tiny, LoRA(4) if lora else None, **{"autocast": None, **kwargs})
    g = torch.Generator().manual_seed(3)
    for name, p in roles.parameters("student").items():
        if "lora_B" in name or "guidance_embedder.linear_2" in name:
            p.data.add_(0.02 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return roles


@pytest.mark.parametrize("lora", [True, False])
def test_forward_mode_central_differences_and_double_vjp_agree(tiny, lora, monkeypatch):
    """In fp64: what calls for fp32 on its way through roles, diffusers and peft gets fp64 here. The
    adapter, the time, the interval through its embedder, references, masked text."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    tiny.transformer.double()
    roles = stirred(tiny, lora, checkpointing=True)
    x, t, r, v, cond = inputs(tiny, dtype=torch.float64)

    def u(x, t):
        return roles["student"](x, t, replace(cond, guidance=t - r))

    here = u(x, t).detach()
    assert here.dtype == torch.float64
    forward = jvp(u, x, t, v)
    size = forward.abs().max()
    assert forward.dtype == torch.float64 and not forward.requires_grad and size > 1
    with sdpa_kernel(SDPBackend.MATH):
        _, twice = double_vjp(u, (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(forward, twice, atol=1e-10 * float(size), rtol=0)
    h = 1e-7  # the time embedding turns by up to 1000 rad a unit of t
    with torch.no_grad():
        central = (u(x + h * v, t + h) - u(x - h * v, t - h)) / (2 * h)
    torch.testing.assert_close(forward, central, atol=1e-6 * float(size), rtol=0)
    back, _ = difference(u, here, lambda x, t: v, x, t, v, torch.full_like(t, 1e-8))
    torch.testing.assert_close(forward, back, atol=1e-4 * float(size), rtol=0)


def test_every_input_takes_part(tiny):
    """A derivative that missed x, t or the interval would differ."""
    roles = stirred(tiny, True)
    x, t, r, v, cond = inputs(tiny)

    def u(x, t, moving=True):
        return roles["student"](x, t, replace(cond, guidance=(t if moving else t.detach()) - r))

    whole = jvp(u, x, t, v)
    for other in (
        jvp(u, x, t, 0 * v),
        jvp(lambda x, t: u(x, t.detach()), x, t, v),
        jvp(lambda x, t: u(x, t, False), x, t, v),
        jvp(lambda x, t: u(x, t, True), x, t, -v),
    ):
        assert (other - whole).abs().max() > 1e-3 * whole.abs().max()


def test_half_precision_and_checkpointing_keep_it(tiny):
    x, t, r, v, cond = inputs(tiny)
    found = []
    for settings in ({}, {"checkpointing": True}, {"autocast": torch.bfloat16}):
        fresh = copy.deepcopy(tiny, {id(tiny.text): tiny.text})
        roles = stirred(fresh, True, **settings)
        told = replace(cond, guidance=t - r)
        found.append(jvp(lambda x, t, s=roles["student"], c=told: s(x, t, c), x, t, v))
    exact, checkpointed, half = found
    torch.testing.assert_close(checkpointed, exact, atol=1e-5, rtol=1e-5)
    assert float((half - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("derivative", ["jvp", "differences"])
def test_a_step_on_the_real_model(tiny, make_batch, derivative, lora):
    """The loss falls along its own gradient, and the teacher's weights get none."""
    roles = Roles(METHOD.roles, tiny, LoRA(4) if lora else None, None, checkpointing=True)
    method, batch = replace(METHOD, derivative=derivative, warmup=4), make_batch(3)
    loss, metrics = method.loss(roles, batch, Rng(0, 1))
    loss.backward()
    mine = {p for p in roles.parameters("student").values() if p.grad is not None}
    graded = {p for p in roles.backbones.parameters() if p.grad is not None}
    assert mine == graded and float(metrics["change"]) > 0
    # A warm-up of 4 at step 0: the target is the guided velocity, which does not move.
    start, _ = method.loss(roles, batch, Rng(0, 0))
    for p in mine:
        p.grad = None
    start.backward()
    with torch.no_grad():
        norm = sum(p.grad.square().sum() for p in mine if p.grad is not None).sqrt()
        for p in mine:
            if p.grad is not None:
                p.sub_(1e-2 * p.grad / norm)
    after, _ = method.loss(roles, batch, Rng(0, 0))
    assert float(after.detach()) < float(start.detach())


def test_a_quantised_base_is_told_what_to_do(tiny):
    pytest.importorskip("torchao")
    quantise.apply(tiny.transformer, "int8", torch.device("cpu"))
    roles = Roles(replace(METHOD, interval=ToData()).roles, tiny, LoRA(4), None)
    x, t, _, v, cond = inputs(tiny)
    with pytest.raises(InputError, match="quantised weights"):
        jvp(lambda x, t: roles["student"](x, t, cond), x, t, v)
    back, _ = difference(
        lambda x, t: roles["student"](x, t, cond), x * 0, lambda x, t: v, x, t, v,
        torch.full_like(t, 0.1),
    )  # fmt: skip
    assert bool(back.isfinite().all())


def test_the_sampler_tells_the_student_its_interval(tiny):
    """solver=flowmap: x ← x − (σ − σ')·u with cond.guidance = σ − σ', by hand."""
    roles = stirred(tiny, True)
    _, _, _, _, cond = inputs(tiny)
    ids = torch.arange(2)
    batch = Batch(ids, ("", ""), cond, ids, ({}, {}), (2, 3))
    sampler = Sampler(steps=2, guidance=1.0, solver="flowmap")
    got = sampler(roles["student"], batch, seed=5)
    x = Rng(5, 0)("sample", ids, (6, 128))
    grid = sampler.grid(6)
    with torch.no_grad():
        torch.testing.assert_close(sample_flowmap(roles["student"], x, cond, grid), got)
        for a, b in ((0, 1), (1, 2)):
            gap = torch.full((2,), grid.sigmas[a] - grid.sigmas[b])
            t = torch.full((2,), grid.sigmas[a])
            x = x - gap[0] * roles["student"](x, t, replace(cond, guidance=gap))
    torch.testing.assert_close(got, x)
    with pytest.raises(InputError, match="guidance"):
        Sampler(steps=2, guidance=2.0, solver="flowmap")


def test_diffusers_scheduler_noises_anew_as_ours_does(tiny):
    """FlowMatchEulerDiscreteScheduler with what an export writes, from torch's global generator."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    cond, (steps, tokens) = inputs(tiny)[-1], (4, 6)
    role = Roles({"base": RoleSpec()}, tiny, None, None)["base"]
    x = torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(1))
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**scheduler_config(EmpiricalShift(), True))
    ramp = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(sigmas=ramp, mu=empirical_mu(tokens, steps))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        theirs = x
        for time in scheduler.timesteps:
            v = role(theirs, (time / 1000).expand(2), cond)
            theirs = scheduler.step(v, time, theirs, return_dict=False)[0]
        torch.manual_seed(7)
        grid = EmpiricalShift()(steps, tokens)
        ours = sample_renoise(role, x, cond, grid, lambda i: torch.randn(x.shape))
        plain = sample_euler(role, x, cond, grid)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (plain - theirs).abs().max() > 0.1
