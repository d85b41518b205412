"""Blocks measured on a tiny real model, in which some are known not to matter."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from eval.importance import Importance, picture, plain, removal, told
from flux2 import depth
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.flow import interpolate
from flux2.generate import Sampler
from flux2.model import load_model
from flux2.rng import Rng
from flux2.roles import velocity_of
from flux2.samplers import guided

WORLD = SignWorld("heldout", length=8, seed=78, tasks={"t2i": 1.0})
IMPORTANCE = Importance(WORLD, Sampler(steps=4, guidance=2.0), samples=3, times=2, chunk=2)


@pytest.fixture(scope="module")
def _deep(tiny_config):
    torch.set_num_threads(1)
    shape = {"num_layers": 2, "num_single_layers": 3}
    cfg = OmegaConf.merge(tiny_config, {"architecture": {"transformer": shape}})
    model = load_model(cfg, torch.device("cpu"))
    with torch.no_grad():  # random blocks hardly change anything otherwise
        for name, p in model.transformer.named_parameters():
            if "transformer_blocks" in name and p.ndim > 1:
                p.mul_(3)
    return model


@pytest.fixture
def deep(_deep):
    return copy.deepcopy(_deep, {id(_deep.text): _deep.text})


def silenced(model, *names: str):
    """Blocks that add nothing: their outputs' weights are zero."""
    with torch.no_grad():
        for name in names:
            block = model.transformer.get_submodule(name)
            outs = ("attn.to_out", "attn.to_out.0", "attn.to_add_out", "ff.linear_out",
                    "ff_context.linear_out")  # fmt: skip
            for path, part in block.named_modules():
                if path in outs and isinstance(part, torch.nn.Linear):
                    part.weight.zero_()
    return model


def measured(model, wanted, **changes):
    return replace(IMPORTANCE, **changes).measure(model, velocity_of(model), wanted)


def test_blocks_that_do_nothing_are_the_least_important(deep):
    silenced(deep, "transformer_blocks.0", "single_transformer_blocks.1")
    before = copy.deepcopy(deep.transformer.state_dict())
    for by in ("greedy", "damage", "influence"):
        kept, rows = measured(deep, (1, 2), by=by)
        assert kept == ((1,), (0, 2)), by
        assert [(r.kind, r.number, r.removed) for r in rows if r.removed] == [
            ("double", 0, 1), ("single", 1, 2)
        ]  # fmt: skip
        quiet = [r for r in rows if r.removed]
        assert all(r.alone == 0 and r.after == 0 for r in quiet)
        assert all(r.influence == pytest.approx(0, abs=1e-6) for r in quiet)
        loud = [r for r in rows if not r.removed]
        assert all(r.alone > 1e-3 and r.influence > 1e-5 and r.after is None for r in loud)
    after = deep.transformer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_damage_and_influence_by_hand(deep):
    """One block, every record and σ, against the shorter model itself and written-out states."""
    role, chosen = velocity_of(deep), ((0, 1), (0, 2))
    probes = list(IMPORTANCE.probes(deep, role))
    damage = IMPORTANCE.damage(deep, role, probes, chosen)
    influence = IMPORTANCE.influence(deep, role, probes)
    short = copy.copy(deep)
    short.transformer = depth.shortened(deep.transformer, chosen)
    sigmas = Sampler(steps=4).grid(16).sigmas
    assert IMPORTANCE.sigmas(16) == [float(sigmas[0]), float(sigmas[2])]
    collate, changes, cosines = Collator(deep, unconditional=True), [], []
    for k, sigma in enumerate(IMPORTANCE.sigmas(16)):
        batch = collate([WORLD[i] for i in range(3)], torch.arange(3))
        eps = Rng(1234, 0)("importance", batch.ids, batch.shape, counter=k)
        t = torch.full((3,), sigma)
        x = interpolate(batch.x0, eps, t)
        with torch.no_grad():
            v, w = (guided(velocity_of(m), 2.0)(x, t, batch.cond) for m in (deep, short))
            states = role.states(x, t, batch.cond, (3, 4))[1]
        changes += [float((b - a).norm() / a.norm()) for a, b in zip(v, w, strict=True)]
        cosines.append(torch.nn.functional.cosine_similarity(*states, dim=-1).mean())
    assert damage == pytest.approx(sum(changes) / 6, rel=1e-4) and damage > 1e-3
    assert influence[3] == pytest.approx(1 - float(sum(cosines)) / 2, rel=1e-3)


def test_it_does_not_depend_on_chunks_and_is_the_same_again(deep):
    first, rows = measured(deep, (1, 2))
    again, same = measured(deep, (1, 2))
    assert first == again and rows == same
    other, close = measured(deep, (1, 2), chunk=3)
    assert other == first
    for a, b in zip(rows, close, strict=True):
        assert (a.alone, a.influence) == pytest.approx((b.alone, b.influence), rel=1e-4, abs=1e-6)
    assert len({r.alone for r in rows}) == 5


def test_greedy_sees_that_two_blocks_do_the_same():
    """Two blocks of which one is enough: each alone is dispensable, both together are not."""

    def damage(blocks):
        gone = {("s", i) for i in range(4)} - {("s", i) for i in blocks[1]}
        lost = 0.01 * (("s", 0) in gone) + 0.02 * (("s", 1) in gone) + 0.5 * (("s", 3) in gone)
        return lost + 0.1 * (("s", 2) in gone) + 5.0 * ({("s", 0), ("s", 1)} <= gone)

    whole = ((0, 1), (0, 1, 2, 3))
    alone = {(1, i): damage(((0, 1), tuple(k for k in range(4) if k != i))) for i in range(4)}
    alone |= {(0, i): 9.0 for i in range(2)}
    greedy, gone = removal(whole, (2, 2), damage, None, alone)
    assert greedy == ((0, 1), (1, 3))
    assert gone == {(1, 0): (1, 0.01), (1, 2): (2, pytest.approx(0.11))}
    once, ended = removal(whole, (2, 2), damage, alone)
    assert once == ((0, 1), (2, 3)) and ended[(1, 1)] == (2, pytest.approx(5.03))
    nothing, none = removal(whole, (2, 4), damage, None)
    assert nothing == whole and none == {}


def test_what_is_told(deep, tmp_path):
    _, rows = measured(deep, (1, 2))
    text = told(rows)
    assert len(text.splitlines()) == 2 + 5 and text.count("kept") == 3
    assert "double 1" in text and plain(rows)[0]["kind"] == "double"
    with Image.open(picture(rows, tmp_path / "a" / "importance.png")) as image:
        assert image.width > image.height > 100


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"samples": 0}, "importance.samples"),
        ({"samples": 9}, "its data have 8"),
        ({"times": 0}, "importance.times"),
        ({"chunk": 0}, "importance.chunk"),
        ({"by": "size"}, "importance.by"),
    ],
)
def test_wrong_settings_are_refused(wrong, says):
    with pytest.raises(InputError, match=says) as refused:
        replace(IMPORTANCE, **wrong)
    assert "\n" not in str(refused.value)
