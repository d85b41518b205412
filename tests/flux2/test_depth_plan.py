"""The plan of a smaller student beside its whole teacher: counted exactly, and its hidden states as
a real loss keeps them."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import run
from distill.size import Size
from flux2 import adapters
from flux2.activations import Pass, emptied, fake, follow
from flux2.errors import InputError
from flux2.footprint import Engine, Footprint
from flux2.passes import Call, Setting, Shape, _network, _sample, velocity_curve
from flux2.rehearsal import rehearse
from flux2.roles import VelocityRole
from flux2.types import RoleSpec

KLEIN, HALF = 3_875_544_576, 2_157_973_504
"""Parameters with 5 + 20 blocks and with 3 + 10."""
SHAPE = {"in_channels": 128, "attention_head_dim": 32, "num_attention_heads": 4,
         "joint_attention_dim": 96, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
         "axes_dims_rope": [8, 8, 8, 8], "guidance_embeds": False}  # fmt: skip


def composed(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(run.CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture(scope="module")
def klein() -> Footprint:
    cfg = composed("stage=size", "model=klein-4b-base", "optim=adamw", "evaluation=none",
                   "data.batch_size=8", "method.micro=8")  # fmt: skip
    return Footprint(cfg, size=(512, 512, 0), brief=True)


def test_klein_at_half_the_blocks_is_counted_on_the_meta_device(klein):
    assert klein.trainable == HALF
    # The whole less 2 double-stream and 10 single-stream blocks, by their own sizes.
    body = klein.parts["transformer"]
    kinds = (body.transformer_blocks, body.single_transformer_blocks)
    double, single = (sum(p.numel() for p in blocks[0].parameters()) for blocks in kinds)
    assert KLEIN - 2 * double - 10 * single == HALF
    assert not any(p.device.type != "meta" for p in klein.network.parameters())
    stays, host = klein._stays(Engine("none"), 1)
    assert stays["frozen base"] == 2 * KLEIN and stays["trained weights"] == 4 * HALF
    assert stays["optimizer states"] == 8 * HALF and host["checkpoint or export"] >= 4 * HALF
    sharded, _ = klein._stays(Engine("deepspeed", 3, True), 8)
    assert sharded["frozen base"] == 2 * KLEIN // 8
    assert sharded["trained weights"] == 2 * HALF // 8


def test_the_students_pass_is_shorter_than_the_teachers(klein):
    calls = (Call(8, False, "frozen", 13), Call(8, True, "trained", 13))
    assert klein.rehearsal(8).turns == {"student": calls}
    found = klein.predict(Engine("none"), 1, True)
    other = composed("stage=sft", "model=klein-4b-base", "evaluation=none",
                     "data.batch_size=8", "method.micro=8")  # fmt: skip
    sft = Footprint(other, size=(512, 512, 0), brief=True).predict(Engine("none"), 1, True)
    states = 13 * 8 * 32 * 32 * 3072 * 4  # of one network, fp32
    mine, theirs = found.passing["pass of student"], sft.passing["pass of model"]
    assert theirs * HALF / KLEIN * 0.6 < mine < theirs * HALF / KLEIN + 3.5 * states


@pytest.mark.slow
def test_a_share_and_blocks_that_are_given_are_planned_alike():
    counts = {
        Footprint(composed("stage=size", *more), cuda=False, brief=True).trainable
        for more in (("keep=0.5",), ("keep={double: 1, single: 2}",),
                     ("method.blocks=[[1],[0,3]]",))
    }  # fmt: skip
    assert counts == {4_768_000}
    with pytest.raises(InputError, match="keeps all"):
        Footprint(composed("stage=size", "keep=1.0"), cuda=False)


@pytest.mark.parametrize(
    ("half", "checkpointing"),
    [(True, True), *(pytest.param(*both, marks=pytest.mark.slow)
                     for both in ((False, False), (False, True), (True, False)))],
)  # fmt: skip
def test_hidden_states_are_counted_as_a_loss_keeps_them(half, checkpointing):
    """Against the forwards and differences of a real student and teacher, on fake tensors."""
    whole = {**SHAPE, "num_layers": 2, "num_single_layers": 3}
    short = {**whole, "num_layers": 1, "num_single_layers": 2}
    autocast = torch.bfloat16 if half else None
    setting = Setting(torch.float32, torch.float32, autocast=autocast,
                      checkpointing=checkpointing, cuda=False)  # fmt: skip
    shape, rows = Shape(512, 512, 16), 2
    pairs = Size(((1,), (0, 2))).pairs((2, 3))
    calls = (Call(rows, False, "frozen", 3), Call(rows, True, "trained", 3))
    planned = velocity_curve(whole, calls, shape, setting, short=short)
    bare = velocity_curve(
        whole, [Call(c.rows, c.graded, c.owner) for c in calls], shape, setting, short=short
    )
    networks = {"trained": _network(short, "trained", setting),
                "frozen": _network(whole, "frozen", setting)}  # fmt: skip
    with fake(False) as tracker:
        roles = {
            name: VelocityRole(emptied(n), adapters.Switch(n), None, autocast)
            for name, n in networks.items()
        }
        if checkpointing:
            networks["trained"].enable_gradient_checkpointing(roles["trained"].checkpointed)
        x, t, cond = _sample(whole, rows, shape, False)

        def forwards():
            with torch.no_grad():
                target, theirs = roles["frozen"].states(x, t, cond, [m for _, m in pairs])
            v, mine = roles["trained"].states(x, t, cond, [j for j, _ in pairs])
            return [v - target, *(h - g for h, g in zip(mine, theirs, strict=True))]

        inputs = [x, t, cond.text, cond.text_ids, cond.ids]
        real = follow(Pass(list(networks.values()), forwards, inputs), tracker, {})
    assert planned.peak() == pytest.approx(real.peak(), rel=0.03)
    # What is there over the whole pass, of which the states are a seventh.
    spans = [sum(c.other) for c in (planned, real, bare)]
    assert spans[0] == pytest.approx(spans[1], rel=0.05) and spans[2] < 0.9 * spans[1]


def test_roles_of_several_depths_are_refused():
    two = [RoleSpec(trainable=True, blocks=((0,), (0,))), RoleSpec(trainable=True)]
    cfg = composed("stage=size", "method.blocks=[[0],[0]]")
    footprint = Footprint(cfg, cuda=False, brief=True)
    with pytest.raises(InputError, match="one number of blocks"):
        footprint._shorter(two)
    assert footprint._shorter([RoleSpec(trainable=True), RoleSpec()]) is None


def test_a_rehearsed_role_knows_its_depth():
    want = {"scored": False, "latents": True, "images": False, "unconditional": False,
            "guidance": False, "references": False, "depth": (2, 4)}  # fmt: skip
    found = rehearse(lambda **_: Size(((0,), (1, 2)), micro=3), 5, **want)
    assert found.turns["student"] == (
        Call(3, False, "frozen", 3), Call(3, True, "trained", 3)
    )  # fmt: skip
    assert found.micros == {"student": 2}
    plain = rehearse(lambda **_: Size(((0,), (1, 2)), features=0.0), 5, **want)
    assert plain.turns["student"] == (Call(5, False, "frozen"), Call(5, True, "trained"))
