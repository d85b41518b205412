"""The inserted embedder: no effect at the start, its own role's alone afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux2 import embedder
from flux2.adapters import LoRA
from flux2.latents import grid_ids
from flux2.roles import Roles
from flux2.text import text_ids
from flux2.types import Condition, RoleSpec

SPECS = {
    "student": RoleSpec(trainable=True, embeds=True),
    "teacher": RoleSpec(),
    "average": RoleSpec(follows="student", decay=0.5, embeds=True),
}


def inputs(tiny, b: int = 3):
    g = torch.Generator().manual_seed(0)
    cond = Condition(
        text=torch.randn(b, 5, tiny.text.dim, generator=g),
        text_ids=text_ids(b, 5),
        ids=grid_ids((2, 3)).expand(b, -1, -1),
    )
    return torch.randn(b, 6, 128, generator=g), torch.linspace(0.2, 0.9, b), cond


@pytest.mark.parametrize("lora", [True, False])
def test_it_begins_without_effect_and_stays_the_roles_own(tiny, lora):
    x, t, cond = inputs(tiny)
    with torch.no_grad():
        before = Roles({"only": RoleSpec()}, tiny, None, None)["only"](x, t, cond)
    roles = Roles(SPECS, tiny, LoRA(4) if lora else None, None)
    strong = replace(cond, guidance=torch.tensor([1.5, 3.0, 6.0]))
    for name in ("student", "average"):
        assert torch.equal(roles[name](x, t, strong), before)
    roles["student"](x, t, strong).square().sum().backward()
    mine = {k: p for k, p in roles.parameters("student").items() if "guidance_embedder" in k}
    assert mine and any(p.grad is not None and p.grad.abs().max() > 0 for p in mine.values())
    with torch.no_grad():
        for p in roles.parameters("student").values():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    roles.follow("student")
    with torch.no_grad():
        near, far = (
            roles["student"](x, t, replace(cond, guidance=torch.full((3,), g))) for g in (1.5, 6.0)
        )
        assert not torch.allclose(near, far)  # the number is read
        assert torch.equal(roles["teacher"](x, t, cond), before)
        average = roles["average"](x, t, strong)
        assert not torch.equal(average, before)
        assert not torch.equal(average, roles["student"](x, t, strong))


def test_a_number_for_a_role_that_takes_none_is_an_error_and_the_reverse(tiny):
    x, t, cond = inputs(tiny)
    roles = Roles(SPECS, tiny, LoRA(4), None)
    with pytest.raises(ValueError, match="embedder"):
        roles["teacher"](x, t, replace(cond, guidance=torch.ones(3)))
    with pytest.raises(ValueError, match="embedder"):
        roles["student"](x, t, cond)


def test_the_same_seed_gives_the_same_embedder(tiny):
    import copy

    twins = [copy.deepcopy(tiny.transformer) for _ in range(3)]
    for twin, seed in zip(twins, (5, 5, 6), strict=True):
        embedder.insert(twin, seed)
    first, same, other = (t.time_guidance_embed.guidance_embedder.linear_1.weight for t in twins)
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert all(embedder.has(t) for t in twins) and not embedder.has(tiny.transformer)
