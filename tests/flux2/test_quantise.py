"""Quantised bases: against the libraries' own dequantisation, under LoRA, with gradients."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux2 import adapters, quantise
from flux2.errors import InputError
from flux2.roles import VelocityRole

CPU = torch.device("cpu")
ERROR = {"nf4": (0.05, 0.12), "fp8": (0.01, 0.04), "int8": (0.002, 0.02)}
"""Relative error of normally distributed weights: 4 bits, 3 bits of mantissa, 8 bits linear."""


@pytest.fixture(autouse=True)
def _libraries() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a.float() - b.float()).norm() / b.float().norm()).detach())


def one(name: str, shape: tuple[int, int] = (96, 256)) -> tuple[nn.Module, Tensor]:
    """A block of one linear layer, quantised, and its weight before."""
    g = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"transformer_blocks": nn.Sequential(nn.Linear(shape[1], shape[0]))})
    layer: Any = model["transformer_blocks"][0]  # pyright: ignore
    layer.weight = nn.Parameter(0.02 * torch.randn(shape, generator=g), requires_grad=False)
    before = layer.weight.detach().clone()
    quantise.apply(model, name, CPU)
    return model["transformer_blocks"][0], before  # pyright: ignore


def lora(model: nn.Module) -> dict[str, nn.Parameter]:
    """A trainable adapter that is not the identity."""
    adapters.add(model, adapters.LoRA(rank=4), "policy")
    g = torch.Generator().manual_seed(5)
    named = adapters.parameters(model, "policy")
    for key, p in named.items():
        p.requires_grad_(True)
        if "lora_B" in key:
            p.data.copy_(0.02 * torch.randn(p.shape, generator=g))
    return named


@pytest.mark.parametrize("name", quantise.NAMES)
def test_weights_are_what_the_library_makes_of_them(name: str) -> None:
    layer, before = one(name)
    mine = quantise.weight(layer)
    if name == "nf4":
        import bitsandbytes.functional as F

        theirs = F.dequantize_4bit(*F.quantize_4bit(before, quant_type="nf4", blocksize=64,
                                                    compress_statistics=True))  # fmt: skip
    else:
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        other: Any = nn.Linear(256, 96, bias=False)
        other.weight = nn.Parameter(before.clone(), requires_grad=False)
        quantize_(other, {"fp8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}[name]())
        theirs = other.weight.dequantize()
    torch.testing.assert_close(mine, theirs.float(), rtol=1e-6, atol=1e-9)
    low, high = ERROR[name]
    assert low < relative(mine, before) < high


@pytest.mark.parametrize("name", quantise.NAMES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_dequantised_weight(
    name: str, autocast: torch.dtype | None
) -> None:
    layer, _ = one(name)
    plain = nn.functional.linear
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias: Any = layer.bias
    for graded in (False, True):  # a pass without gradients must not change the next one
        with torch.set_grad_enabled(graded), torch.autocast(
            "cpu", autocast, enabled=autocast is not None
        ):
            out = layer(x)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        expected = plain(x, quantise.weight(layer), bias)
    assert out.dtype == expected.dtype
    tolerance = 1e-5 if autocast is None else 1e-2
    assert relative(out, expected) < tolerance
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (mine,) = torch.autograd.grad((out.float() * probe).sum(), x)
    (theirs,) = torch.autograd.grad((expected.float() * probe).sum(), x)
    assert relative(mine, theirs) < tolerance


@pytest.mark.parametrize("name", quantise.NAMES)
def test_nothing_of_a_weights_full_size_is_kept_for_the_backward_pass(name: str) -> None:
    layer, before = one(name)
    kept: list[int] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    x = torch.randn(2, 256, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        layer(x)
    assert sum(kept) < 2 * before.numel()  # bf16


@pytest.mark.parametrize("name", quantise.NAMES)
def test_lora_trains_through_a_quantised_transformer(name: str, tiny, make_batch) -> None:
    """Output and every LoRA gradient equal those on the dequantised base; the loss falls."""
    packed, plain = tiny.transformer, copy.deepcopy(tiny.transformer)
    quantise.apply(packed, name, CPU)
    for path, layer in quantise.layers(plain):
        layer.weight.data.copy_(quantise.weight(packed.get_submodule(path)))
    batch = make_batch(2)
    x, t = batch.x0, torch.tensor([0.3, 0.8])
    grads, outs, trained = [], [], {}
    for model in (packed, plain):
        trained = lora(model)
        role = VelocityRole(model, adapters.Switch(model), "policy", None)
        out = role(x, t, batch.cond)
        out.square().mean().backward()
        outs.append(out)
        grads.append(torch.cat([p.grad.flatten() for p in trained.values()]))
        assert len(trained) > 10 and all(float(p.grad.norm()) > 0 for p in trained.values())
    assert relative(outs[0], outs[1]) < 1e-5
    assert relative(grads[0], grads[1]) < 1e-4
    assert {k for k, p in packed.named_parameters() if p.requires_grad} == set(trained)
    role = VelocityRole(packed, adapters.Switch(packed), "policy", None)
    mine = list(adapters.parameters(packed, "policy").values())
    optimizer, losses = torch.optim.AdamW(mine, lr=1e-2), []
    for _ in range(8):
        loss = (role(x, t, batch.cond) - x).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3


def test_what_is_quantised_and_how_close_the_model_stays(tiny, make_batch) -> None:
    """Linear layers of the blocks, nothing else; the finer the format, the smaller the error."""
    batch, t = make_batch(2), torch.tensor([0.3, 0.8])

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return VelocityRole(model, adapters.Switch(model), None, None)(
                batch.x0, t, batch.cond
            )

    exact, errors = run(tiny.transformer), {}
    for name in quantise.NAMES:
        model = copy.deepcopy(tiny.transformer)
        linear = {k for k, m in model.named_modules() if isinstance(m, nn.Linear)}
        inside = {k for k in linear if k.startswith(("transformer_bl", "single_transformer_bl"))}
        quantise.apply(model, name, CPU)
        done = {k for k, m in model.named_modules() if quantise.is_quantised(m)}
        assert done == inside and {"proj_out", "x_embedder", "context_embedder"} <= linear - done
        errors[name] = relative(run(model), exact)
    assert errors["nf4"] < 0.05
    assert errors["int8"] < errors["fp8"] < errors["nf4"]


@pytest.mark.parametrize("name", quantise.NAMES)
def test_state_dict_has_plain_names_and_dequantised_weights(name: str, tiny) -> None:
    plain = tiny.transformer.state_dict()
    model = copy.deepcopy(tiny.transformer)
    quantise.apply(model, name, CPU)
    state = quantise.state_dict(model)
    assert set(state) == set(plain)
    for key, value in state.items():
        assert value.shape == plain[key].shape
        assert relative(value, plain[key]) < ERROR[name][1] if plain[key].any() else True
    adapters.add(model, adapters.LoRA(rank=2), "policy")
    renamed = {k.replace(".base_layer", "") for k in quantise.state_dict(model) if "lora_" not in k}
    assert renamed == set(plain)


@pytest.mark.parametrize("name", quantise.NAMES)
@pytest.mark.parametrize("shape", [(96, 256), (40, 48), (7, 9)])
def test_stored_bytes_are_what_is_stored(name: str, shape: tuple[int, int]) -> None:
    layer, _ = one(name, shape)
    if name == "nf4":
        state: Any = layer.weight.quant_state  # pyright: ignore
        tensors = [layer.weight, state.absmax, state.code, state.offset, state.state2.absmax,
                   state.state2.code]  # fmt: skip
    else:
        tensors = list(layer.buffers())
    kept = sum(t.numel() * t.element_size() for t in tensors)  # pyright: ignore
    assert kept == quantise.stored_bytes(name, shape)


def test_a_copy_computes_the_same(tiny, make_batch) -> None:
    batch = make_batch(1)
    for name in quantise.NAMES:
        model = copy.deepcopy(tiny.transformer)
        quantise.apply(model, name, CPU)
        one_, two = (
            VelocityRole(m, adapters.Switch(m), None, None)(
                batch.x0, torch.tensor([0.5]), batch.cond
            )
            for m in (model, copy.deepcopy(model))
        )
        assert torch.equal(one_, two)


def test_wrong_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    quantise.check(None, CPU)
    for name in quantise.NAMES:
        quantise.check(name, CPU)
    with pytest.raises(InputError, match="choose from nf4, fp8, int8"):
        quantise.check("nf5", CPU)
    with pytest.raises(InputError, match="not mps"):
        quantise.check("nf4", torch.device("mps"))
    for have, fine in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, have=have: have)
        if fine:
            quantise.check("fp8", torch.device("cuda"))
        else:
            with pytest.raises(InputError, match=r"8\.9 and this one has 8\.0"):
                quantise.check("fp8", torch.device("cuda"))
        quantise.check("int8", torch.device("cuda"))


@pytest.mark.parametrize(("name", "library"), [("nf4", "bitsandbytes"), ("fp8", "torchao")])
def test_a_missing_library_is_one_line(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(wanted: str, *args: Any, **kwargs: Any) -> Any:
        if wanted.split(".")[0] == library:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=f"needs {library}: pip install {library}"):
        quantise.check(name, CPU)


def test_a_quantised_base_takes_lora_and_no_sharding() -> None:
    quantise.check_use(None, "deepspeed", False)
    quantise.check_use("nf4", "none", True)
    quantise.check_use("nf4", "ddp", True)
    with pytest.raises(InputError, match="adapter=lora"):
        quantise.check_use("nf4", "none", False)
    with pytest.raises(InputError, match="engine=none or ddp"):
        quantise.check_use("nf4", "deepspeed", True)
