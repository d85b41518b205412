"""Earlier runs as frozen roles: an adapter that is lent, or a backbone of its own."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from distill.imitation import OnPolicyImitation
from flux2 import adapters
from flux2.adapters import LoRA
from flux2.checkpoint import weights_hash, write_checkpoint
from flux2.errors import InputError
from flux2.export import export_run
from flux2.files import write_json
from flux2.footprint import _lends
from flux2.latents import grid_ids
from flux2.lineage import find_init
from flux2.results import check_same_teachers, check_source, lent, sources_of, taught
from flux2.roles import Roles
from flux2.text import text_ids
from flux2.types import Condition, PolicyShape, RoleSpec

HASH = "0123456789abcdef"
SHAPE = {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_out.0", "linear_in"]}
SEVERAL = {
    "student": RoleSpec(trainable=True),
    "teacher_a": RoleSpec(source="a"),
    "teacher_b": RoleSpec(source="b"),
}


def inputs(tiny) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(0)
    cond = Condition(
        text=torch.randn(2, 5, tiny.text.dim, generator=g),
        text_ids=text_ids(2, 5),
        ids=grid_ids((2, 3)).expand(2, -1, -1),
    )
    return torch.randn(2, 6, 128, generator=g), torch.tensor([0.9, 0.3]), cond


def known(model):
    """A model whose weights have a hash, as those from files have."""
    return replace(model, info=replace(model.info, hash=HASH))


def twin(model):
    return copy.deepcopy(model, {id(model.text): model.text})


def made(
    folder: Path, tiny, tiny_config, lora: bool, seed: int, init: Path | None = None, **said
) -> Tensor:
    """A run's directory, as its stage leaves it; the velocity of what it trained."""
    model = twin(tiny)
    shape = LoRA(2, 4.0, SHAPE["targets"]) if lora else None
    specs = {"policy": RoleSpec(trainable=True), "reference": RoleSpec()}
    roles = Roles(specs, model, shape, None)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in roles.parameters("policy").values():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
        v = roles["policy"](*inputs(tiny))
    folder.mkdir()
    write_checkpoint(folder / "checkpoints", 3, roles.tensors(), {}, {"step": 3})
    cfg = {"model": tiny_config, "adapter": SHAPE if lora else None, "seed": 0,
           "init_from": None if init is None else str(init)}  # fmt: skip
    OmegaConf.save(OmegaConf.create(cfg), folder / "config.yaml")
    start = "" if init is None else weights_hash(init / "checkpoints" / "step_000003")
    write_json(folder / "manifest.json", {
        "id": folder.name, "stage": "nft", "model": "tiny", "trained": ["policy"], "parents": [],
        "base": {"hash": HASH, "start": start, "guidance_embeds": False},
        "rewards": [f"reward of {folder.name}"], **said,
    })  # fmt: skip
    return v


def specs(a: Path, b: Path) -> dict[str, RoleSpec]:
    return {**SEVERAL, "teacher_a": RoleSpec(source=str(a)), "teacher_b": RoleSpec(source=str(b))}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_two_runs_beside_the_student(tiny, tiny_config, tmp_path, mode):
    """A LoRA run and a full one, whether the student is trained whole or not."""
    a, b = tmp_path / "a", tmp_path / "b"
    want = {"teacher_a": made(a, tiny, tiny_config, True, 1),
            "teacher_b": made(b, tiny, tiny_config, False, 2)}  # fmt: skip
    x, t, cond = inputs(tiny)
    model = known(twin(tiny))
    roles = Roles(specs(a, b), model, LoRA(4) if mode == "lora" else None, None)
    with torch.no_grad():
        for name, v in want.items():
            torch.testing.assert_close(roles[name](x, t, cond), v, atol=1e-6, rtol=1e-5)
        for p in roles.parameters("student").values():
            p.add_(0.1)
        for name, v in want.items():
            torch.testing.assert_close(roles[name](x, t, cond), v, atol=1e-6, rtol=1e-5)
    assert [_lends(str(p)) for p in (a, b, tmp_path)] == [True, False, False]
    # The LoRA run lies on the shared backbone; nothing of either is trained or in a checkpoint.
    assert roles["teacher_a"].adapter == "teacher_a"
    assert roles["teacher_a"].backbone is model.transformer
    assert roles["teacher_b"].adapter is None
    assert roles["teacher_b"].backbone is not model.transformer
    assert {k.split("/")[0] for k, _ in roles.tensors()} == {"student"}
    mine = {id(p) for p in roles.parameters("student").values()}
    assert {id(p) for p in roles.backbones.parameters() if p.requires_grad} == mine
    roles.activate("student")
    roles["student"](x, t, cond).square().sum().backward()
    assert all(p.grad is None for p in roles.backbones.parameters() if id(p) not in mine)


def test_an_adapter_on_other_weights_is_merged_into_its_own(tiny, tiny_config, tmp_path):
    """Run b began where run a ended; the student begins at the base, or at a."""
    a, b = tmp_path / "a", tmp_path / "b"
    first = made(a, tiny, tiny_config, True, 1)
    middle = twin(tiny)
    found = adapters.LoRA(2, 4.0, SHAPE["targets"])
    adapters.add(middle.transformer, found, "policy")
    from flux2.checkpoint import load_checkpoint
    from flux2.model import network_of

    stored = load_checkpoint(a / "checkpoints" / "step_000003", verify=False).tensors
    for key, p in adapters.parameters(middle.transformer, "policy").items():
        p.data.copy_(stored[f"policy/{key}"])
    moved = replace(
        tiny, transformer=network_of(tiny, adapters.merged(middle.transformer, "policy"))
    )
    want = made(b, moved, tiny_config, True, 2, init=a)
    x, t, cond = inputs(tiny)
    for model, shared in ((known(twin(tiny)), False), (known(twin(moved)), True)):
        if shared:
            start = weights_hash(a / "checkpoints" / "step_000003")
            model = replace(model, info=replace(model.info, start=start))
        roles = Roles(specs(a, b), model, LoRA(4), None)
        assert (roles["teacher_b"].adapter is not None) == shared
        assert (roles["teacher_a"].adapter is not None) != shared
        with torch.no_grad():
            for name, v in (("teacher_a", first), ("teacher_b", want)):
                torch.testing.assert_close(roles[name](x, t, cond), v, atol=1e-5, rtol=1e-4)


def test_an_export_is_a_teacher(tiny, tmp_path):
    model = twin(tiny)
    roles = Roles({"model": RoleSpec(trainable=True)}, model, None, None)
    with torch.no_grad():
        for p in roles.parameters("model").values():
            p.mul_(1.1)
        want = roles["model"](*inputs(tiny))
    lineage = {"model": "tiny", "trained": ["model"], "stage": "sft"}
    folder = export_run(model, roles, "model", tmp_path / "e", torch.float32, lineage=lineage)
    only = {"student": RoleSpec(trainable=True), "teacher": RoleSpec(source=str(folder))}
    got = Roles(only, known(tiny), LoRA(2), None)["teacher"]
    with torch.no_grad():
        torch.testing.assert_close(got(*inputs(tiny)), want, atol=1e-5, rtol=1e-4)


def test_what_cannot_teach_is_refused_before_weights_are_read(tiny, tiny_config, tmp_path):
    made(tmp_path / "a", tiny, tiny_config, True, 1)
    with pytest.raises(InputError, match="is of tiny and the model is nano"):
        check_source(str(tmp_path / "a"), "nano")
    made(tmp_path / "p", tiny, tiny_config, True, 1, policy={"components": 8})
    made(tmp_path / "v", tiny, tiny_config, True, 1, trained=["autoencoder"])
    for name in "pv":
        with pytest.raises(InputError, match="trained no velocity"):
            check_source(str(tmp_path / name), "tiny")
    with pytest.raises(InputError, match="is no run"):
        check_source(str(tmp_path), "tiny")


def test_what_a_manifest_says_of_teachers(tiny, tiny_config, tmp_path):
    made(tmp_path / "a", tiny, tiny_config, True, 1)
    made(tmp_path / "b", tiny, tiny_config, True, 2)
    method = OnPolicyImitation({k: str(tmp_path / k) for k in "ab"})
    found = sources_of(method.roles, "tiny")
    assert set(found) == {"teacher_a", "teacher_b"}
    assert taught(found) == ["reward of a", "reward of b"]
    said = lent(method.roles, found)
    assert said == {"teachers": {n: i.parent() for n, i in found.items()}}
    check_same_teachers(SimpleNamespace(allow=[]), said, found)
    changed = {"teacher_a": find_init(tmp_path / "b")}
    cfg = OmegaConf.create({"allow": []})
    with pytest.raises(InputError, match="other weights than when the run began"):
        check_same_teachers(cfg, said, changed)
    cfg.allow = ["base"]
    check_same_teachers(cfg, said, changed)
    shape = PolicyShape(2, 3, 4)
    policy = {"student": RoleSpec(trainable=True, kind="policy", policy=shape)}
    assert lent(policy, {}) == {"policy": {"components": 2, "segments": 3, "substeps": 4}}
    assert lent({"m": RoleSpec(trainable=True)}, {}) == {}
