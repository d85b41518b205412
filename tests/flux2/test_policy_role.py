"""A policy on the tiny transformer: as a role, in a checkpoint, sampled, exported, opened again."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from omegaconf import OmegaConf
from torch import Tensor

from distill.policy import PolicyImitation
from flux2.adapters import LoRA
from flux2.engine import Engine
from flux2.errors import InputError
from flux2.export import Target, check_target, export_run
from flux2.generate import Sampler, check_sampled
from flux2.latents import grid_ids
from flux2.model import load_model
from flux2.optim import LearningRate, TurnAdamW
from flux2.policy import PolicyRole
from flux2.rehearsal import rehearse
from flux2.results import check_not_policy
from flux2.rng import Rng
from flux2.roles import Roles, VelocityRole, velocity_of
from flux2.samplers import sample_policy
from flux2.schedule import EmpiricalShift
from flux2.text import text_ids
from flux2.types import Batch, Condition, PolicyShape, RoleSpec

SHAPE = PolicyShape(3, 2, 4)
SPECS = {
    "student": RoleSpec(trainable=True, kind="policy", policy=SHAPE),
    "teacher": RoleSpec(),
    "ema": RoleSpec(kind="policy", policy=SHAPE, follows="student", decay=0.5),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition(tiny, b: int, tokens: tuple[int, int] = (2, 3)) -> Condition:
    cond = Condition(
        text=draw(b, 5, tiny.text.dim, seed=3),
        text_ids=text_ids(b, 5),
        ids=grid_ids(tokens).expand(b, -1, -1),
    )
    return replace(cond, null=replace(cond, text=-cond.text))


def prompts(tiny, b: int = 4) -> Batch:
    ids = torch.arange(b)
    return Batch(ids, ("p",) * b, condition(tiny, b), ids, ({},) * b, (2, 3))


def build(tiny, lora: bool, specs=None) -> Roles:
    return Roles(specs or SPECS, tiny, LoRA(4) if lora else None, None)


def engine_of(roles: Roles) -> Engine:
    named = {name: roles.parameters(name) for name in roles.trainable}
    return Engine(roles, TurnAdamW(named, 1e-2), LearningRate(), 0.0)


def train(tiny, engine: Engine, steps: int, method: PolicyImitation) -> None:
    for step in range(engine.step, engine.step + steps):
        rng = Rng(0, step)
        for update in method.collect(engine.roles, prompts(tiny), rng):
            with engine.turn("student"):
                for micro in update:
                    micro = replace(micro, weight=micro.weight / (4 * len(update)))
                    loss, _ = method.loss(engine.roles, micro, rng)
                    engine.backward(loss, last=micro is update[-1])
        engine.step = step + 1


METHOD = PolicyImitation(2.0, 2, 3, 4, times=1, ema=0.5)


@pytest.mark.parametrize("lora", [True, False])
def test_it_starts_as_the_models_velocity_and_owns_a_head(tiny, lora):
    x, t, cond = draw(2, 6, 128), torch.tensor([1.0, 0.7]), condition(tiny, 2)
    with torch.no_grad():
        bare = velocity_of(tiny)(x, t, cond)
        roles = build(tiny, lora)
        for name in SPECS:
            torch.testing.assert_close(roles[name](x, t, cond), bare, atol=2e-6, rtol=1e-5)
    owned = roles.parameters("student")
    heads = {k for k in owned if k.startswith("head.")}
    assert heads == {"head.weight", "head.bias"} and len(owned) > 2
    assert owned["head.weight"].shape == (3 * 129 + 1, 64)
    assert all(("lora_" in k) == lora for k in owned if k not in heads)
    assert roles["student"].head is not roles["ema"].head
    assert roles.parameters("teacher") == {} and isinstance(roles["teacher"], VelocityRole)
    # The teacher stays what it was, whatever the student becomes.
    with torch.no_grad():
        for p in owned.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        assert torch.equal(roles["teacher"](x, t, cond), bare)
        assert (roles["student"](x, t, cond) - bare).abs().max() > 1e-2


@pytest.mark.parametrize("lora", [True, False])
def test_a_turn_trains_the_student_whole_and_alone(tiny, lora):
    engine = engine_of(build(tiny, lora))
    before = {k: v.clone() for k, v in engine.roles.tensors()}
    body = dict(engine.roles["teacher"].backbone.named_parameters())
    frozen = {k: p.clone() for k, p in body.items() if "lora_" not in k}
    train(tiny, engine, 2, METHOD)
    after = dict(engine.roles.tensors())
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert {"student/head.weight", "student/head.bias", "ema/head.weight"} <= moved
    assert sum(k.startswith("student/") for k in moved) > 4
    assert frozen and all(torch.equal(body[k], v) for k, v in frozen.items())


def test_a_resumed_run_is_the_run(tiny):
    copies = [copy.deepcopy(tiny, {id(tiny.text): tiny.text}) for _ in range(2)]
    whole, first, second = (engine_of(build(m, True)) for m in (tiny, *copies))
    train(tiny, whole, 3, METHOD)
    train(tiny, first, 2, METHOD)
    second.load(first.state_dict(), {k: v.clone() for k, v in first.tensors()})
    train(tiny, second, 1, METHOD)
    want = dict(whole.tensors())
    for key, value in second.tensors():
        assert torch.equal(value, want[key]), key


def test_the_sampler_takes_a_policy_for_one(tiny):
    role, batch = build(tiny, True)["student"], prompts(tiny)
    sampler = Sampler(steps=2, guidance=1.0, chunk=3)
    got = sampler(role, batch, seed=7)
    noise = Rng(7, 0)("sample", batch.ids, batch.shape)
    with torch.no_grad():
        want = sample_policy(role, noise, batch.cond, EmpiricalShift()(2, 6), SHAPE.substeps)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for wrong in ({"guidance": 3.0}, {"guidance": 1.0, "solver": "heun"}):
        with pytest.raises(InputError, match="guidance=1 solver=euler"):
            Sampler(steps=2, **wrong)(role, batch, seed=7)


@pytest.mark.parametrize("lora", [True, False])
def test_an_export_is_opened_by_us_and_refused_by_diffusers(tiny, tiny_config, tmp_path, lora):
    engine = engine_of(build(tiny, lora))
    train(tiny, engine, 1, METHOD)
    folder = export_run(
        tiny, engine.roles, "student", tmp_path / "export", torch.float32, role="distilled"
    )
    about = json.loads((folder / "policy.json").read_text())
    assert (about["components"], about["segments"], about["substeps"]) == (3, 2, 4)
    assert about["schedule"] == "EmpiricalShift()"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["policy"] == {"components": 3, "segments": 2, "substeps": 4}
    for opener in (DiffusionPipeline, Flux2KleinPipeline):
        with pytest.raises(Exception, match="Policy"):
            opener.from_pretrained(folder, local_files_only=True)
    cfg = OmegaConf.merge(tiny_config, {"path": str(folder), "role": "distilled"})
    opened = load_model(cfg, torch.device("cpu"))
    assert opened.head is not None
    again, batch = velocity_of(opened), prompts(tiny)
    assert isinstance(again, PolicyRole)
    sampler = Sampler(steps=2, guidance=1.0)
    torch.testing.assert_close(
        sampler(again, batch, 7), sampler(engine.roles["student"], batch, 7), atol=1e-4, rtol=1e-4
    )
    training = OmegaConf.create({"model": cfg})
    with pytest.raises(InputError, match="is a policy student"):
        check_not_policy(training, None)
    check_sampled(training, None, sampler)  # by its files alone, before its weights are read
    for wrong in (Sampler(steps=2, guidance=3.0), Sampler(2, 1.0, "heun")):
        with pytest.raises(InputError, match="sampled with guidance=1 solver=euler"):
            check_sampled(training, None, wrong)
    check_sampled(OmegaConf.create({"model": tiny_config}), None, Sampler(steps=2, guidance=3.0))


def test_the_plan_knows_its_forwards():
    found = rehearse(
        lambda: METHOD, 4, scored=False, latents=False, images=False, unconditional=True,
        guidance=False, references=False,
    )  # fmt: skip
    assert found.micros == {"student": 2}  # segments
    assert [(c.rows, c.graded) for c in found.turns["student"]] == [(4, True), (8, False)]
    assert [(c.rows, c.graded) for c in found.collected] == [(4, False)]


def test_other_formats_are_refused(tiny):
    head = build(tiny, True)["student"].head
    for name in ("single", "lora-diffusers"):
        with pytest.raises(InputError, match="its transformer and its head"):
            check_target(Target(name, torch.float32, head=head), ["proj_out"])
