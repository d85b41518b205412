"""LoRA against its equation, and the switch that must never stay switched."""

from __future__ import annotations

import copy

import pytest
import torch

from flux2 import adapters
from flux2.adapters import LoRA, Switch
from flux2.errors import InputError


@torch.no_grad()
def noise(parameters, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.copy_(0.3 * torch.randn(p.shape, generator=g))


def layer_of(tiny):
    return tiny.transformer.single_transformer_blocks[0].attn.to_qkv_mlp_proj


def test_a_layer_computes_the_papers_equation(tiny):
    """W x + alpha / rank · B A x."""
    adapters.add(tiny.transformer, LoRA(rank=4, alpha=6.0), "policy")
    noise(adapters.parameters(tiny.transformer, "policy"), 0)
    layer, x = layer_of(tiny), torch.randn(3, 64)
    a, b = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    assert a.shape[0] == 4
    with Switch(tiny.transformer)("policy"):
        got = layer(x)
    want = x @ layer.base_layer.weight.T + 6.0 / 4 * (x @ a.T @ b.T)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_default_targets_are_all_matrices_of_the_blocks(tiny):
    matrices = {
        name.removesuffix(".weight")
        for name, p in tiny.transformer.named_parameters()
        if "transformer_blocks" in name and p.ndim == 2
    }
    adapters.add(tiny.transformer, LoRA(2), "policy")
    assert set(adapters.deltas(tiny.transformer, "policy")) == matrices
    assert any("single" in m and m.endswith("to_out") for m in matrices)


def test_a_fresh_adapter_is_the_identity_and_keyed_by_its_seed(tiny):
    drawn = []
    for k, (name, seed) in enumerate((("a", 7), ("a", 7), ("a", 8), ("b", 7))):
        model = copy.deepcopy(tiny)
        torch.manual_seed(k)  # the global generator has no say, and is not moved
        state = torch.get_rng_state()
        adapters.add(model.transformer, LoRA(2), name, seed)
        assert torch.equal(state, torch.get_rng_state())
        assert all((d == 0).all() for d in adapters.deltas(model.transformer, name).values())
        drawn.append(layer_of(model).lora_A[name].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


def test_switch_restores_what_was_also_nested_and_after_an_error(tiny):
    adapters.add(tiny.transformer, LoRA(2), "a")
    adapters.add(tiny.transformer, LoRA(2), "b")
    for k, name in enumerate(("a", "b")):
        noise(adapters.parameters(tiny.transformer, name), k)
    switch, layer, x = Switch(tiny.transformer), layer_of(tiny), torch.randn(2, 64)
    outer = layer(x)
    with switch("a"):
        a = layer(x)
        with switch(None):
            base = layer(x)
            with switch("b"):
                b = layer(x)
            assert torch.equal(layer(x), base)
        assert torch.equal(layer(x), a)
        with pytest.raises(KeyError), switch("b"):
            raise KeyError
        assert torch.equal(layer(x), a)
    assert torch.equal(layer(x), outer)
    assert torch.equal(base, layer.base_layer(x))
    assert not torch.allclose(a, b) and not torch.allclose(a, base)


def test_switching_leaves_requires_grad_alone(tiny):
    adapters.add(tiny.transformer, LoRA(2), "a")
    adapters.add(tiny.transformer, LoRA(2), "b")
    before = {n: p.requires_grad for n, p in tiny.transformer.named_parameters()}
    switch = Switch(tiny.transformer)
    for name in ("a", None, "b"):
        with switch(name):
            assert {n: p.requires_grad for n, p in tiny.transformer.named_parameters()} == before


def test_merged_weights_have_plain_names_and_the_delta(tiny):
    names = set(tiny.transformer.state_dict())
    before = {k: v.clone() for k, v in tiny.transformer.state_dict().items()}
    adapters.add(tiny.transformer, LoRA(rank=4, alpha=6.0), "policy")
    noise(adapters.parameters(tiny.transformer, "policy"), 0)
    merged = adapters.merged(tiny.transformer, "policy")
    assert set(merged) == names
    layer = layer_of(tiny)
    delta = 1.5 * layer.lora_B["policy"].weight @ layer.lora_A["policy"].weight
    key = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    torch.testing.assert_close(merged[key], before[key] + delta, atol=1e-6, rtol=1e-5)
    plain = adapters.merged(tiny.transformer, None)
    assert all(torch.equal(plain[k], before[k]) for k in names)


def test_a_rank_below_one_is_refused():
    with pytest.raises(InputError, match="rank"):
        LoRA(rank=0)


def test_an_unknown_target_is_refused(tiny):
    with pytest.raises(InputError, match="no_such_layer"):
        adapters.add(tiny.transformer, LoRA(2, targets=("to_q", "no_such_layer")), "a")
