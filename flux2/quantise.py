"""The frozen base in 4 or 8 bits, under LoRA: NF4 (QLoRA, arXiv 2305.14314), fp8 and int8.

    nf4    bitsandbytes: blocks of 64 values, double-quantised scales     0.516 bytes a weight
    fp8    torchao: e4m3, an fp32 scale for each output row               1.0
    int8   torchao: symmetric, an fp32 scale for each output row          1.0

The linear layers inside the blocks are turned, 97 % of klein-4b. Embedders, the shared modulation,
norms and `proj_out` keep their dtype: they are small, and what they compute reaches every token.

diffusers' own quantizers work while it loads a folder; they refuse NF4 on a CPU, and do not see
weights that come from a single file or lie on a previous run's. torchao's layers keep each
dequantised weight for the backward pass, as large as the weights that were saved; these do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flux2.errors import InputError

NAMES = ("nf4", "fp8", "int8")
FP8_CAPABILITY = (8, 9)
"""Of the first GPUs with e4m3 (Ada, Hopper)."""
_BLOCK, _NESTED = 64, 256  # NF4: weights a scale, scales a scale of scales


def check(name: str | None, device: torch.device) -> None:
    """Refuses what this machine cannot run, before a weight is read.

    Args:
        name: nf4, fp8, int8, or None for no quantisation.
        device: where the base will be.

    Raises:
        InputError: an unknown name, a missing library, or hardware without the format.
    """
    if name is None:
        return
    if name not in NAMES:
        raise InputError(f"model.quantise is {name!r}: choose from {', '.join(NAMES)}, or null")
    library = "bitsandbytes" if name == "nf4" else "torchao"
    try:
        _bitsandbytes() if name == "nf4" else _torchao()
    except ImportError:
        raise InputError(
            f"model.quantise={name} needs {library}: pip install {library}, or set it to null"
        ) from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"model.quantise={name} runs on cuda and cpu, not {device.type}")
    if name == "fp8" and device.type == "cuda":
        have = torch.cuda.get_device_capability(device)
        if have < FP8_CAPABILITY:
            raise InputError(
                f"model.quantise=fp8 needs a GPU of compute capability 8.9 and this one has "
                f"{have[0]}.{have[1]}: use int8 or nf4"
            )


def check_use(name: str | None, engine: str, adapter: bool) -> None:
    """Refuses a use of a quantised base that cannot train.

    Args:
        engine: engine.kind: none, ddp or deepspeed. Packed weights cannot be sharded.
        adapter: whether LoRA is trained; packed weights have no gradients.
    """
    if name is None:
        return
    if not adapter:
        raise InputError(f"model.quantise={name} freezes the weights: add adapter=lora")
    if engine not in ("none", "ddp"):
        raise InputError(f"model.quantise={name} cannot be sharded: choose engine=none or ddp")


def layers(transformer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(path, layer) of the linear layers that are quantised: those inside the blocks."""
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks." in path:
            yield path, module


def apply(transformer: nn.Module, name: str, device: torch.device) -> None:
    """Quantises a frozen transformer in place, layer by layer, and puts those layers on `device`.

    Called while the weights are in host memory, the device never holds more of them unquantised
    than one layer. The rest of the transformer is left where it is. Adapters come afterwards.
    """
    for path, layer in list(layers(transformer)):
        parent, _, child = path.rpartition(".")
        make = _nf4 if name == "nf4" else _packed
        setattr(transformer.get_submodule(parent), child, make(layer, name, device))


def stored_bytes(name: str, shape: tuple[int, int]) -> int:
    """Bytes that a quantised weight of this shape (out, in) takes, scales included."""
    rows, columns = shape
    if name != "nf4":
        return rows * columns + 4 * rows
    scales = -(-rows * columns // _BLOCK)
    nested = 4 * -(-scales // _NESTED) + 4  # fp32 scales of the scales, and their offset
    return -(-rows * columns // 2) + scales + nested + 4 * (16 + 256)  # and both code books


def weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight as it computes with it, out × in, fp32; dequantised if need be."""
    if isinstance(layer, Packed):
        return layer.dequantised()
    packed: Any = layer.weight
    state = getattr(packed, "quant_state", None)
    if state is None:
        return packed.detach().float()
    return _bitsandbytes().functional.dequantize_4bit(packed.data, state).float()


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed."""
    return isinstance(layer, Packed) or getattr(layer, "quant_state", None) is not None


def state_dict(module: nn.Module) -> dict[str, Tensor]:
    """module.state_dict() with each packed weight as what it stands for, fp32, under its plain
    name."""
    packed = {path: m for path, m in module.named_modules() if is_quantised(m)}
    out = {}
    for key, value in module.state_dict().items():
        if not any(key.startswith(f"{path}.") for path in _parents(key, packed)):
            out[key] = value
    out.update({f"{path}.weight": weight(m) for path, m in packed.items()})
    return out


def _parents(key: str, packed: dict[str, nn.Module]) -> list[str]:
    """Packed layers above a key; a key has few ancestors, and a model many layers."""
    names = key.split(".")
    ancestors = (".".join(names[:i]) for i in range(1, len(names)))
    return [a for a in ancestors if a in packed]


# ---------------------------------------------------------------- layers


class Packed(nn.Linear):
    """A frozen linear layer whose weight is fp8 or int8 with a scale for each row.

    Plain buffers hold it, so that copies, moves and state dicts are torch's own. x is computed in
    autocast's dtype, or in its own.
    """

    qweight: Tensor
    scale: Tensor

    def __init__(self, packed: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(packed.shape[1], packed.shape[0], bias=False, device="meta")
        self.register_parameter("weight", None)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # pyright: ignore
        self.format = packed.dtype
        # As bytes, which `.to(dtype)` leaves alone; by the name that peft looks for.
        self.register_buffer("qweight", packed.view(torch.uint8))
        self.register_buffer("scale", scale)

    def steps(self, dtype: torch.dtype) -> Tensor:
        """The weight in units of its rows' scales, out × in: exact in bf16."""
        return self.qweight.view(self.format).to(dtype)

    def dequantised(self) -> Tensor:
        """out × in, fp32."""
        return self.steps(torch.float32) * self.scale

    def forward(self, input: Tensor) -> Tensor:
        """… in → … out."""
        out: Any = _FrozenLinear.apply(_cast(input), self)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ with a gradient for x alone. W is dequantised anew in the backward pass: kept, it would
    be as large as before it was quantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Packed) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            # The scales, rounded to bf16, would turn whole rows: they meet the product in fp32.
            return (x @ layer.steps(x.dtype).T).mul_(layer.scale.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        layer: Packed = ctx.layer
        return (grad * layer.scale.T).to(grad.dtype) @ layer.steps(grad.dtype), None


def _cast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a linear layer."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _packed(layer: nn.Linear, name: str, device: torch.device) -> Packed:
    quantization = _torchao()
    one = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    one.weight = nn.Parameter(layer.weight.data.to(device), requires_grad=False)
    configs = {
        "fp8": quantization.Float8WeightOnlyConfig,
        "int8": quantization.Int8WeightOnlyConfig,
    }
    quantization.quantize_(one, configs[name]())
    result: Any = one.weight
    rows = result.scale.reshape(-1, 1).float()
    bias = None if layer.bias is None else layer.bias.data.to(device)
    return Packed(result.qdata, rows, bias)


def _nf4(layer: nn.Linear, name: str, device: torch.device) -> nn.Module:
    bnb, kind = _bitsandbytes(), _nf4_class()
    new = kind(
        layer.in_features, layer.out_features, bias=False, quant_type="nf4",
        compress_statistics=True, device="meta",
    )  # fmt: skip
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    new.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True,
        module=new,
    )  # fmt: skip
    return new.to(device)


def _nf4_class() -> Any:
    """bitsandbytes' layer, computing in autocast's dtype or in x's own."""
    bnb = _bitsandbytes()

    class Linear4bit(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            # Else it takes the dtype of the first x that it sees, for good; and on CPUs with
            # AVX512-BF16 it repacks its weight in a pass without gradients, after which gradients
            # are silently wrong.
            self.compute_type_is_set, self.support_avx512bf16_for_cpu = True, False
            x = _cast(x)
            self.compute_dtype = x.dtype
            return super().forward(x)

    return Linear4bit


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def _torchao() -> Any:
    from torchao import quantization

    return quantization
