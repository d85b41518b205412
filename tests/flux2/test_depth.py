"""Fewer blocks: the same weights, a config that says so, and roles and exports that keep it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from omegaconf import OmegaConf

from flux2 import depth, sources
from flux2.adapters import LoRA
from flux2.errors import InputError
from flux2.export import export_run
from flux2.latents import grid_ids
from flux2.model import cut, load_model, with_transformer
from flux2.roles import Roles, VelocityRole, velocity_of
from flux2.text import text_ids
from flux2.types import Condition, RoleSpec

CPU = torch.device("cpu")
HALF = ((1,), (0, 2))
SPECS = {
    "student": RoleSpec(trainable=True, blocks=HALF),
    "average": RoleSpec(follows="student", decay=0.5),
    "teacher": RoleSpec(),
}


@pytest.fixture(scope="module")
def deep_config(tiny_config):
    """The tiny model with two double-stream and three single-stream blocks."""
    shape = {"num_layers": 2, "num_single_layers": 3}
    return OmegaConf.merge(tiny_config, {"architecture": {"transformer": shape}})


@pytest.fixture(scope="module")
def _deep(deep_config):
    torch.set_num_threads(1)
    return load_model(deep_config, CPU)


@pytest.fixture
def deep(_deep):
    return copy.deepcopy(_deep, {id(_deep.text): _deep.text})


def inputs(model, b: int = 2):
    g = torch.Generator().manual_seed(0)
    cond = Condition(
        text=torch.randn(b, 5, model.text.dim, generator=g),
        text_ids=text_ids(b, 5),
        ids=grid_ids((2, 3)).expand(b, -1, -1),
    )
    return torch.randn(b, 6, 128, generator=g), torch.linspace(0.2, 0.9, b), cond


def velocity(model, transformer=None):
    other = model if transformer is None else with_transformer(model, transformer)
    with torch.no_grad():
        return velocity_of(other)(*inputs(model))


def test_all_blocks_are_the_same_bit_for_bit(deep):
    whole = depth.shortened(deep.transformer, depth.all_blocks((2, 3)))
    assert torch.equal(velocity(deep, whole), velocity(deep))
    own, theirs = whole.state_dict(), deep.transformer.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    assert not {v.data_ptr() for v in own.values()} & {v.data_ptr() for v in theirs.values()}


def test_some_blocks_are_those_of_diffusers_own_smaller_model(deep, tmp_path):
    """Weights renamed by hand into a model that diffusers itself makes of this depth."""
    short = depth.shortened(deep.transformer, HALF)
    assert depth.depth_of(short) == (1, 2) == depth.depth_in(short.state_dict())
    assert (short.config.num_layers, short.config.num_single_layers) == (1, 2)
    assert (deep.transformer.config.num_layers, depth.depth_of(deep.transformer)) == (2, (2, 3))
    renamed = {}
    for key, value in deep.transformer.state_dict().items():
        for old, new in (
            ("transformer_blocks.1.", "transformer_blocks.0."),
            ("single_transformer_blocks.0.", "single_transformer_blocks.0."),
            ("single_transformer_blocks.2.", "single_transformer_blocks.1."),
        ):
            if key.startswith(old):
                renamed[key.replace(old, new)] = value
        if "transformer_blocks." not in key:
            renamed[key] = value
    config = {**deep.transformer.config, "num_layers": 1, "num_single_layers": 2}
    theirs = Flux2Transformer2DModel.from_config(config)
    theirs.load_state_dict(renamed)
    x, t, cond = inputs(deep)
    with torch.no_grad():
        want = theirs.eval()(
            hidden_states=x, encoder_hidden_states=cond.text, timestep=t, img_ids=cond.ids[0],
            txt_ids=cond.text_ids[0], guidance=None, return_dict=False,
        )[0]  # fmt: skip
    torch.testing.assert_close(velocity(deep, short), want, atol=1e-5, rtol=1e-5)
    assert (velocity(deep) - want).abs().max() > 1e-3


def test_skipping_is_the_shorter_model_and_leaves_no_trace(deep):
    whole, names = velocity(deep), list(deep.transformer.state_dict())
    with depth.only(deep.transformer, HALF):
        again = depth.shortened(deep.transformer, ((0,), (0, 1)))  # all of those that are left
        skipped = velocity(deep)
        assert torch.equal(skipped, velocity(deep, again))
    assert torch.equal(skipped, velocity(deep, depth.shortened(deep.transformer, HALF)))
    with pytest.raises(RuntimeError, match="odd"), depth.only(deep.transformer, HALF):
        raise RuntimeError("odd")
    assert torch.equal(velocity(deep), whole) and list(deep.transformer.state_dict()) == names


def test_states_after_several_blocks_come_from_one_forward(deep):
    x, t, cond = inputs(deep)
    role = velocity_of(deep)
    assert role.depth == (2, 3)
    with torch.no_grad():
        v, states = role.states(x, t, cond, (2, 3, 5))
        for block, state in zip((2, 3, 5), states, strict=True):
            again, alone = role.features(x, t, cond, block)
            assert torch.equal(alone, state) and torch.equal(again, v)
        assert not torch.equal(states[0], states[1])
        body = deep.transformer  # the last block's states go through the last layers alone
        out = body.norm_out(states[-1], body.time_guidance_embed(1000 * t, None))
        torch.testing.assert_close(body.proj_out(out), v, atol=1e-5, rtol=1e-5)
    for wrong in (0, 6):
        with pytest.raises(InputError, match="1 to 5"):
            role.states(x, t, cond, (1, wrong))
    assert not any(m._forward_hooks for m in deep.transformer.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_role_with_fewer_blocks_has_a_backbone_of_its_own(deep, checkpointing):
    before = velocity(deep)
    short = velocity(deep, depth.shortened(deep.transformer, HALF))
    roles = Roles(SPECS, deep, None, None, checkpointing)
    x, t, cond = inputs(deep)
    with torch.no_grad():
        assert torch.equal(roles["teacher"](x, t, cond), before)
        for name in ("student", "average"):
            assert torch.equal(roles[name](x, t, cond), short) and roles[name].depth == (1, 2)
    with torch.no_grad():
        target = roles["teacher"].states(x, t, cond, (3,))[1][0]
    v, states = roles["student"].states(x, t, cond, (1, 2, 3))
    (v.square().sum() + (states[1] - target).square().sum()).backward()
    assert all(p.grad is None for p in deep.transformer.parameters())
    with torch.no_grad():
        moved = 0
        for p in roles.parameters("student").values():
            if p.grad is not None:
                moved += 1
                p.sub_(1e-4 * p.grad)
    assert moved > 10
    roles.follow("student")
    with torch.no_grad():
        student, average = (roles[n](x, t, cond) for n in ("student", "average"))
        assert not torch.equal(student, short) and not torch.equal(average, student)
        assert torch.equal(roles["teacher"](x, t, cond), before)


def test_checkpointing_gives_the_same_gradients(deep):
    grads = []
    for checkpointing in (False, True):
        mine = copy.deepcopy(deep, {id(deep.text): deep.text})
        roles = Roles(SPECS, mine, None, None, checkpointing)
        x, t, cond = inputs(deep)
        v, states = roles["student"].states(x, t, cond, (1, 3))
        roles["teacher"](x, t, cond)  # another role in between
        (v.square().mean() + sum(s.square().mean() for s in states)).backward()
        grads.append([p.grad for p in roles.parameters("student").values()])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_lora_cannot_have_fewer_blocks(deep):
    with pytest.raises(InputError, match="adapter=null") as refused:
        Roles(SPECS, deep, LoRA(4), None)
    assert "\n" not in str(refused.value)


def test_the_export_is_a_smaller_folder_that_diffusers_opens(deep, deep_config, tmp_path):
    roles = Roles(SPECS, deep, None, None)
    with torch.no_grad():
        for p in roles.parameters("student").values():
            p.add_(0.01)  # what was trained, and not what it began as
    x, t, cond = inputs(deep)
    with torch.no_grad():
        want = roles["student"](x, t, cond)
    folder = export_run(deep, roles, "student", tmp_path / "export", torch.float32)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert (config["num_layers"], config["num_single_layers"]) == (1, 2)
    opened = Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        got = opened(
            hidden_states=x, encoder_hidden_states=cond.text, timestep=t, img_ids=cond.ids[0],
            txt_ids=cond.text_ids[0], guidance=None, return_dict=False,
        )[0]  # fmt: skip
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # conf/model says how deep the whole one is, and takes the run's shorter folder all the same.
    cfg = OmegaConf.merge(deep_config, {"path": str(folder)})
    again = load_model(cfg, CPU)
    with torch.no_grad():
        torch.testing.assert_close(velocity_of(again)(x, t, cond), want, atol=1e-6, rtol=1e-6)
    assert again.info.parameters == sum(p.numel() for p in opened.parameters())
    # A folder that no run made is not: another model is more likely.
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="num_layers"):
        load_model(cfg, CPU)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="num_attention_heads"):
        sources.check_config(folder / "transformer", "transformer",
                             {"num_attention_heads": 3, "num_layers": 2})  # fmt: skip


def test_a_deeper_folder_than_asked_for_is_refused(deep, tmp_path):
    folder = export_run(
        deep, Roles({"m": RoleSpec()}, deep, None, None), "m", tmp_path / "e", torch.float32
    )
    with pytest.raises(InputError, match="num_single_layers 3"):
        sources.check_config(folder / "transformer", "transformer", {"num_single_layers": 2})


def test_a_model_is_cut_to_the_weights_that_are_to_come(deep):
    short = depth.shortened(deep.transformer, HALF)
    before = deep.info.parameters
    cut(deep, deep.transformer.state_dict())
    assert depth.depth_of(deep.transformer) == (2, 3) and deep.info.parameters == before
    cut(deep, short.state_dict())
    deep.transformer.load_state_dict(short.state_dict())
    assert torch.equal(velocity(deep), velocity(deep, short))
    assert deep.info.parameters == sum(p.numel() for p in short.parameters()) < before


@pytest.mark.parametrize(
    ("keep", "there", "want"),
    [
        (0.5, (2, 4), (1, 2)),
        (0.5, (5, 20), (3, 10)),
        (0.1, (2, 4), (1, 1)),
        ({"double": 1, "single": 0.75}, (2, 4), (1, 3)),
        ({"double": 2, "single": 1}, (2, 4), (2, 1)),
    ],
)
def test_how_many_are_kept(keep, there, want):
    assert depth.counts(keep, there) == want


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (1.0, "keeps all"), (0.0, "share above 0"), (1.5, "share above 0"), ("half", "'half'"),
        (-1, "-1"), ({"double": 0, "single": 2}, "0 double"), ({"double": 1}, "double and single"),
        ({"double": 3, "single": 2}, "3 double"), (True, "True"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_wrong_counts_are_refused(keep, says):
    with pytest.raises(InputError, match=says) as refused:
        depth.counts(keep, (2, 4))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ([[], [0]], "no double"), ([[0], []], "no single"), ([[2], [0]], "double block 2"),
        ([[0], [0, 4]], "single block 4"), ([[-1], [0]], "block -1"), ([[0, 0], [1]], "ascending"),
        ([[1, 0], [1]], "ascending"), ([[0]], "two lists"), ("01", "two lists"),
        ([0, 1], "two lists"), ([["0"], [1]], "ascending"), ([[True], [1]], "ascending"),
    ],
)  # fmt: skip
def test_wrong_blocks_are_refused(blocks, says):
    with pytest.raises(InputError, match=says) as refused:
        depth.checked(blocks, (2, 4))
    assert "\n" not in str(refused.value)


def test_velocity_role_is_what_methods_ask_for(deep):
    from flux2.types import Features

    role: Features = VelocityRole(deep.transformer, velocity_of(deep)._switch, None, None)
    assert role.depth == (2, 3)
