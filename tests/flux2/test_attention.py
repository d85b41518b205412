"""Our processors against diffusers' own, and what they mend."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

from flux2 import attention
from flux2.adapters import Switch
from flux2.attention import BatchedPosEmbed
from flux2.errors import InputError
from flux2.latents import grid_ids
from flux2.roles import VelocityRole
from flux2.text import text_ids
from flux2.types import Condition


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition(tiny, b: int, grid=(2, 3), s: int = 5) -> Condition:
    return Condition(
        text=draw(b, s, tiny.text.dim, seed=3),
        text_ids=text_ids(b, s),
        ids=grid_ids(grid).expand(b, -1, -1),
    )


def stock_of(model: torch.nn.Module) -> Flux2Transformer2DModel:
    stock = Flux2Transformer2DModel.from_config(model.config)
    stock.load_state_dict(model.state_dict())
    return stock.eval()


@torch.no_grad()
def forward_stock(stock, x, t, cond: Condition, mask=None) -> torch.Tensor:
    return stock(
        hidden_states=x, encoder_hidden_states=cond.text, timestep=t, img_ids=cond.ids,
        txt_ids=cond.text_ids, return_dict=False, joint_attention_kwargs=mask,
    )[0]  # fmt: skip


@torch.no_grad()
def forward(tiny, x, t, cond: Condition) -> torch.Tensor:
    return VelocityRole(tiny.transformer, Switch(tiny.transformer), None, None)(x, t, cond)


@pytest.mark.parametrize("backend", [None, "_native_math"])
def test_equals_stock_where_ids_are_equal(tiny, backend):
    attention.install(tiny.transformer, backend)
    x, t, cond = draw(2, 6, 128), torch.tensor([0.3, 0.9]), condition(tiny, 2)
    want = forward_stock(stock_of(tiny.transformer), x, t, cond)
    got = forward(tiny, x, t, cond)
    assert want.std() > 0.05
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradients_equal_stock(tiny):
    x, t, cond = draw(2, 6, 128), torch.tensor([0.3, 0.9]), condition(tiny, 2)
    stock = stock_of(tiny.transformer)
    tiny.transformer.requires_grad_(True)
    role = VelocityRole(tiny.transformer, Switch(tiny.transformer), None, None)
    role(x, t, cond).square().sum().backward()
    stock(
        hidden_states=x, encoder_hidden_states=cond.text, timestep=t, img_ids=cond.ids[0],
        txt_ids=cond.text_ids[0], return_dict=False,
    )[0].square().sum().backward()  # fmt: skip
    want = {k: p.grad for k, p in stock.named_parameters()}
    for name, p in tiny.transformer.named_parameters():
        torch.testing.assert_close(p.grad, want[name], atol=1e-4, rtol=1e-4, msg=name)


def test_angles_equal_stock():
    ids = torch.cat([grid_ids((3, 4)), grid_ids((2, 6), t=20)])
    want = Flux2PosEmbed(2000, (8, 8, 8, 8))(ids)
    got = BatchedPosEmbed(2000, (8, 8, 8, 8))(ids[:, None, None].expand(-1, 2, -1, -1))
    for g, w in zip(got, want, strict=True):
        assert g.shape == (24, 2, 32)
        torch.testing.assert_close(g[:, 0], w, atol=1e-6, rtol=0)
        torch.testing.assert_close(g[:, 1], w, atol=1e-6, rtol=0)


def test_ids_per_sample_equal_separate_forwards_and_stock_is_wrong(tiny):
    """One batch of a 2 × 3 and a 3 × 2 target: as many tokens, other places."""
    x, t, cond = draw(2, 6, 128), torch.tensor([0.3, 0.9]), condition(tiny, 2)
    ids = torch.stack([grid_ids((2, 3)), grid_ids((3, 2))])
    cond = Condition(cond.text, cond.text_ids, ids)
    got = forward(tiny, x, t, cond)
    alone = torch.cat([forward(tiny, x[i : i + 1], t[i : i + 1], cond.select(slice(i, i + 1)))
                       for i in range(2)])  # fmt: skip
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
    stock = stock_of(tiny.transformer)
    with torch.no_grad():
        alone_stock = torch.cat(
            [forward_stock(stock, x[i : i + 1], t[i : i + 1], cond.select(slice(i, i + 1)))
             for i in range(2)]
        )  # fmt: skip
        together = forward_stock(stock, x, t, cond)
    torch.testing.assert_close(got, alone_stock, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[0], alone_stock[0], atol=1e-5, rtol=1e-5)
    assert (together[1] - alone_stock[1]).abs().max() > 1e-3  # diffusers 0.42: silently wrong


def test_masking_padding_equals_truncating(tiny):
    x, t, cond = draw(2, 6, 128), torch.tensor([0.3, 0.9]), condition(tiny, 2, s=8)
    mask = torch.ones(2, 8 + 6, dtype=torch.bool)
    mask[:, 5:8] = False
    masked = forward(tiny, x, t, Condition(cond.text, cond.text_ids, cond.ids, mask=mask))
    short = Condition(cond.text[:, :5], cond.text_ids[:, :5], cond.ids)
    torch.testing.assert_close(masked, forward(tiny, x, t, short), atol=1e-5, rtol=1e-5)
    assert (forward(tiny, x, t, cond) - masked).abs().max() > 1e-3  # padding does take part


def test_mask_per_sample(tiny):
    """Unequal text lengths in one batch, each as if alone."""
    x, t, cond = draw(2, 6, 128), torch.tensor([0.3, 0.9]), condition(tiny, 2, s=8)
    mask = torch.ones(2, 8 + 6, dtype=torch.bool)
    mask[0, 3:8] = False
    got = forward(tiny, x, t, Condition(cond.text, cond.text_ids, cond.ids, mask=mask))
    one = Condition(cond.text[:1, :3], cond.text_ids[:1, :3], cond.ids[:1])
    torch.testing.assert_close(got[:1], forward(tiny, x[:1], t[:1], one), atol=1e-5, rtol=1e-5)
    two = cond.select(slice(1, 2))
    torch.testing.assert_close(got[1:], forward(tiny, x[1:], t[1:], two), atol=1e-5, rtol=1e-5)


def test_time_and_guidance_stay_apart_under_autocast(tiny):
    """1000 t in bf16 has three digits: neighbouring times would be one."""
    x, cond = draw(2, 6, 128)[:1].expand(2, -1, -1), condition(tiny, 1).repeat(2)
    role = VelocityRole(tiny.transformer, Switch(tiny.transformer), None, torch.bfloat16)
    with torch.no_grad():
        a, b = role(x, torch.tensor([0.901, 0.902]), cond)
    assert not torch.equal(a, b)


def test_an_unknown_backend_is_refused(tiny):
    with pytest.raises(InputError, match="choose from"):
        attention.install(copy.deepcopy(tiny.transformer), "no_such_backend")
