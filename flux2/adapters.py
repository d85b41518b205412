"""LoRA by role: adapters on one shared backbone, switched by argument and never left switched.

peft keeps the active adapter in each layer, and its own switches also flip `requires_grad`, which
makes a backward pass that is still to come drop gradients without a word. Here a role's forward
sets the two fields that a layer reads and puts them back, also inside the recomputation of
activation checkpointing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux2 import quantise
from flux2.errors import InputError
from flux2.rng import keyed

DEFAULT_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out",
)  # fmt: skip
"""Attention and MLP of both streams, and both projections of the single-stream blocks: leaving
those out is the reported cause of weak klein LoRAs."""


@dataclass(frozen=True)
class LoRA:
    """LoRA's shape (arXiv 2106.09685): ΔW = alpha / rank · B A."""

    rank: int = 16
    alpha: float = 16.0
    targets: Sequence[str] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"adapter.rank is {self.rank}: it must be at least 1")


def add(backbone: nn.Module, lora: LoRA, name: str, seed: int = 0) -> None:
    """Puts a fresh adapter on the backbone; it starts as the identity (B = 0), and A is drawn from
    `seed`."""
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore
        target_modules=_matching(backbone, lora.targets),
    )
    # peft draws A from torch's global generator, which nothing else of a run touches or seeds.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Several adapters are the purpose.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        torch.default_generator.manual_seed(int(keyed(seed, "adapter", name).integers(1 << 62)))
        backbone.add_adapter(config, adapter_name=name)  # pyright: ignore


def _matching(backbone: nn.Module, targets: Sequence[str]) -> list[str]:
    """Paths of the linear layers that `targets` name by their ends. peft would take `attn.to_out`
    for the double-stream blocks' list of that name, too, and refuse it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    linear = [k for k, m in backbone.named_modules() if isinstance(m, nn.Linear | BaseTunerLayer)]
    found = {t: [k for k in linear if f".{k}".endswith(f".{t}")] for t in targets}
    for target, paths in found.items():
        if not paths:
            raise InputError(
                f"adapter.targets: the model has no linear layer {target!r}: leave it out"
            )
    return sorted({k for paths in found.values() for k in paths})


def parameters(backbone: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their path in the backbone."""
    return {k: p for k, p in backbone.named_parameters() if f".{name}." in k and "lora_" in k}


def _layers(backbone: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]


class Switch:
    """Runs a backbone with one adapter, or with none."""

    def __init__(self, backbone: nn.Module) -> None:
        self._layers = _layers(backbone)

    @contextmanager
    def __call__(self, name: str | None) -> Iterator[None]:
        """Inside, the layers apply adapter `name` (None: the bare weights)."""
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        try:
            yield
        finally:
            for layer, (active, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled


def deltas(backbone: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight, fp32, by the layer's path."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        path: layer.get_delta_weight(name).float()  # pyright: ignore
        for path, layer in backbone.named_modules()
        if isinstance(layer, BaseTunerLayer) and name in layer.lora_A  # pyright: ignore
    }


@torch.no_grad()
def merged(backbone: nn.Module, name: str | None) -> dict[str, Tensor]:
    """The backbone's weights under diffusers' plain names, fp32, with adapter `name` folded in."""
    out: dict[str, Tensor] = {}
    for key, value in quantise.state_dict(backbone).items():
        if "lora_" not in key:
            out[key.replace(".base_layer", "")] = value.float().clone()
    if name is not None:
        for path, delta in deltas(backbone, name).items():
            out[f"{path}.weight"] += delta
    return out
