"""FLUX.2's weights in two layouts: diffusers' names and those of the original files, and LoRA in
both.

    original                                    diffusers
    img_in, txt_in                              x_embedder, context_embedder
    time_in, guidance_in                        time_guidance_embed.{timestep,guidance}_embedder
    *_modulation*.lin                           *_modulation*.linear
    double_blocks.i                             transformer_blocks.i
      {img,txt}_attn.qkv                          attn.to_{q,k,v}, attn.add_{q,k,v}_proj
      {img,txt}_attn.proj, {img,txt}_mlp.{0,2}    attn.to_{out.0,add_out}, ff*.linear_{in,out}
    single_blocks.i                             single_transformer_blocks.i
      linear1, linear2                            attn.to_qkv_mlp_proj, attn.to_out
    *norm.{query,key}_norm.scale                attn.norm_*.weight
    final_layer.linear                          proj_out
    final_layer.adaLN_modulation.1              norm_out.linear, its shift and scale halves swapped

Tensors are described before they are made, so that a large model is cast, fused, merged and written
one tensor at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flux2.errors import InputError

_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
SWAPPED = "norm_out.linear"
"""The original file has (shift, scale), diffusers (scale, shift)."""
PREFIXES = {"diffusers": "transformer.", "original": "diffusion_model."}


@dataclass(frozen=True)
class Layer:
    """A layer of the original layout and the diffusers layers whose rows it joins."""

    original: str
    diffusers: tuple[str, ...]

    @property
    def swapped(self) -> bool:
        """Whether the halves of its rows trade places."""
        return self.diffusers == (SWAPPED,)

    @property
    def suffix(self) -> str:
        """The original name of its weight: norms have a scale."""
        return "scale" if self.original.endswith("_norm") else "weight"


def layers(names: Iterable[str]) -> tuple[Layer, ...]:
    """The layers of a model, in order, given any of its weights' names in either layout."""
    names = list(names)

    def count(*prefixes: str) -> int:
        found = (re.match(rf"(?:{'|'.join(prefixes)})\.(\d+)\.", n) for n in names)
        return max((int(m[1]) + 1 for m in found if m), default=0)

    def tied(value: str | tuple[str, ...]) -> tuple[str, ...]:
        return (value,) if isinstance(value, str) else value

    out = [Layer(k, (v,)) for k, v in _OUTER.items()]
    for table, old, new in (
        (_DOUBLE, "double_blocks", "transformer_blocks"),
        (_SINGLE, "single_blocks", "single_transformer_blocks"),
    ):
        for i in range(count(old, new)):
            for k, v in table.items():
                out.append(Layer(f"{old}.{i}.{k}", tuple(f"{new}.{i}.{p}" for p in tied(v))))
    return tuple(out)


def swap_halves(weight: Tensor) -> Tensor:
    """(a, b) → (b, a), halves of the rows."""
    return torch.cat(weight.chunk(2)[::-1])


# ---------------------------------------------------------------- weights


@dataclass(frozen=True)
class Part:
    """A tensor that is made when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor, dtype: torch.dtype | None = None) -> Part:
        """An existing tensor; floating-point ones are cast to `dtype` when they are made."""
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return Part(tuple(tensor.shape), kept, lambda: tensor.detach().to(kept))


def merged(
    weights: Mapping[str, Tensor], adapter: Adapter | None, dtype: torch.dtype
) -> dict[str, Part]:
    """Weights by diffusers' names in `dtype`, `adapter` folded in in fp32 before rounding.

    Raises:
        InputError: quantised weights, or an adapter for another model.
    """
    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise InputError(
                f"{name} is quantised and cannot be exported whole: set model.quantise=null, or "
                "export the adapter alone"
            )
    out = {name: Part.of(weight, dtype) for name, weight in weights.items()}
    for path in adapter.pairs if adapter is not None else ():
        assert adapter is not None
        weight = weights.get(f"{path}.weight")
        a, b = adapter.pairs[path]
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise InputError(f"the adapter is for another model: {path} does not fit")
        shape = tuple(weight.shape)
        out[f"{path}.weight"] = Part(shape, dtype, _fold(weight, adapter, path, dtype))
    return out


def _fold(
    weight: Tensor, adapter: Adapter, path: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        delta = adapter.delta(path)
        return (weight.detach().to(delta.device, torch.float32) + delta).to(dtype)

    return make


def original(parts: Mapping[str, Part]) -> dict[str, Part]:
    """diffusers' layout → the original one.

    Raises:
        InputError: names that are not those of a FLUX.2.
    """
    out: dict[str, Part] = {}
    rest = dict(parts)
    for layer in layers(parts):
        names = [f"{k}.weight" for k in layer.diffusers]
        if not layer.original.startswith("guidance_in") or names[0] in parts:
            sources = [rest.pop(n, None) for n in names]
            if (first := sources[0]) is None or None in sources:
                raise InputError(f"the weights are no FLUX.2's: {names} are not all there")
            rows = sum(s.shape[0] for s in sources if s is not None)
            make = _join(layer, [s for s in sources if s is not None])
            name = f"{layer.original}.{layer.suffix}"
            out[name] = Part((rows, *first.shape[1:]), first.dtype, make)
    if rest:
        raise InputError(f"the weights are no FLUX.2's: {min(rest)} has no place in it")
    return out


def _join(layer: Layer, sources: Sequence[Part]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        whole = torch.cat([s.make() for s in sources]) if len(sources) > 1 else sources[0].make()
        return swap_halves(whole) if layer.swapped else whole

    return make


def to_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' layout → the original one, all at once."""
    return {k: p.make() for k, p in original({k: Part.of(v) for k, v in weights.items()}).items()}


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original layout → diffusers'; fused layers become views.

    Raises:
        InputError: names that are not those of a FLUX.2.
    """
    out: dict[str, Tensor] = {}
    rest = dict(weights)
    for layer in layers(weights):
        weight = rest.pop(f"{layer.original}.{layer.suffix}", None)
        if weight is None:
            if layer.original.startswith("guidance_in"):
                continue
            raise InputError(f"the weights are no FLUX.2's: {layer.original} is missing")
        weight = swap_halves(weight) if layer.swapped else weight
        chunks = weight.chunk(len(layer.diffusers))
        out |= {f"{k}.weight": c for k, c in zip(layer.diffusers, chunks, strict=True)}
    if rest:
        raise InputError(f"the weights are no FLUX.2's: {min(rest)} has no place in it")
    return out


# ---------------------------------------------------------------- LoRA


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA as plain tensors: ΔW = scale · B A.

    Attributes:
        pairs: (A: r k, B: m r) by the layer's path in diffusers' model, fp32.
        scale: alpha / rank.
    """

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float

    @staticmethod
    def read(tensors: Mapping[str, Tensor], scale: float) -> Adapter:
        """peft's names, `<path>.lora_A[.<role>].weight`.

        Raises:
            InputError: another name, or half of a pair.
        """
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", name)
            if found is None:
                raise InputError(f"{name} is no weight of a LoRA: give the weights of an adapter")
            halves.setdefault(found[1], {})[found[2]] = tensor
        for path, pair in halves.items():
            if len(pair) != 2:
                raise InputError(f"the LoRA has only one half of {path}: restore the file")
        return Adapter({k: (v["A"], v["B"]) for k, v in sorted(halves.items())}, scale)

    def delta(self, path: str) -> Tensor:
        """What it adds to a layer's weight: m k, fp32."""
        a, b = self.pairs[path]
        return self.scale * (b.detach().float() @ a.detach().float())


def lora_diffusers(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, the file's metadata) as diffusers writes them itself."""
    out: dict[str, Tensor] = {}
    for path, (a, b) in adapter.pairs.items():
        out[f"{PREFIXES['diffusers']}{path}.lora_A.weight"] = a
        out[f"{PREFIXES['diffusers']}{path}.lora_B.weight"] = b
    ranks = {path: a.shape[0] for path, (a, _) in adapter.pairs.items()}
    rank = next(iter(ranks.values()))
    other = {k: r for k, r in ranks.items() if r != rank}
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank * adapter.scale,
        "target_modules": sorted(adapter.pairs),
        "rank_pattern": other,
        "alpha_pattern": {k: r * adapter.scale for k, r in other.items()},
    }
    packed = {f"{PREFIXES['diffusers']}{k}": v for k, v in config.items()}
    return out, {"lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}


def check_lora_original(paths: Iterable[str]) -> None:
    """Refuses an adapter that original-layout keys cannot carry.

    Raises:
        InputError: it has a target on norm_out.linear, whose halves readers of these keys do not
            swap back.
    """
    if SWAPPED in paths:
        raise InputError(
            f"lora-original cannot carry an adapter on {SWAPPED}: programs that read it forget to "
            "swap its halves; choose lora-diffusers, or merge it into a whole model"
        )


def lora_original(adapter: Adapter) -> dict[str, Tensor]:
    """Keys of the original layout, the scale folded into B.

    q, k and v of rank r are one layer there; their adapters become one of rank 3r with a
    block-diagonal B, which is exact.

    Raises:
        InputError: see check_lora_original.
    """
    check_lora_original(adapter.pairs)
    out: dict[str, Tensor] = {}
    known: set[str] = set()
    for layer in layers(adapter.pairs):
        pairs = [adapter.pairs.get(k) for k in layer.diffusers]
        known |= set(layer.diffusers)
        present = [p for p in pairs if p is not None]
        if not present:
            continue
        # A projection that has no adapter has as many rows as its siblings, and ΔW = 0.
        rows = present[0][1].shape[0]
        ranks = [0 if p is None else p[0].shape[0] for p in pairs]
        a = torch.cat([p[0].detach().float() for p in present])
        b = a.new_zeros(rows * len(pairs), sum(ranks))
        for i, pair in enumerate(pairs):
            if pair is not None:
                left = sum(ranks[:i])
                block = adapter.scale * pair[1].detach().float()
                b[i * rows : (i + 1) * rows, left : left + ranks[i]] = block
        name = f"{PREFIXES['original']}{layer.original}"
        out |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    if unknown := set(adapter.pairs) - known:
        raise InputError(f"the adapter is no FLUX.2's: {min(unknown)} has no place in it")
    return out


def read_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Adapter:
    """A LoRA file of either layout, as `lora_diffusers` and `lora_original` write them.

    Raises:
        InputError: other keys, or an alpha that was not folded in.
    """
    if all(k.startswith(PREFIXES["diffusers"]) for k in tensors):
        prefix = PREFIXES["diffusers"]
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        rank, alpha = config.get(f"{prefix}r", 1), config.get(f"{prefix}lora_alpha", 1)
        plain = {k.removeprefix(prefix): v for k, v in tensors.items()}
        return Adapter.read(plain, alpha / rank)
    if not all(k.startswith(PREFIXES["original"]) for k in tensors):
        raise InputError("the LoRA's keys begin neither with transformer. nor diffusion_model.")
    fused = Adapter.read({k.removeprefix(PREFIXES["original"]): v for k, v in tensors.items()}, 1.0)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers(fused.pairs):
        if layer.original in fused.pairs:
            check_lora_original(layer.diffusers)
            a, b = fused.pairs[layer.original]
            chunks = zip(layer.diffusers, b.chunk(len(layer.diffusers)), strict=True)
            pairs |= {path: (a, chunk) for path, chunk in chunks}
    if unknown := set(fused.pairs) - {layer.original for layer in layers(fused.pairs)}:
        raise InputError(f"the LoRA is no FLUX.2's: {min(unknown)} has no place in it")
    return Adapter(pairs, 1.0)
