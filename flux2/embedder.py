"""A second number for a transformer that takes the time alone: FLUX.2's guidance embedder.

What goes in is the strength of guidance (FLUX.2 [dev]) or any other number of the order of 1, such
as the interval of a flow map. Its last layer begins at zero, so that what the network says does not
change by a bit until that layer is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from flux2.rng import keyed

LAYERS = ("guidance_embedder.linear_1", "guidance_embedder.linear_2")
"""Its linear layers, as LoRA's targets name them."""


def has(backbone: Any) -> bool:
    """Whether a transformer takes a second number."""
    return bool(backbone.config.guidance_embeds)


def trained(names: Iterable[str]) -> bool:
    """Whether weights of these names, a transformer's own or an adapter's, are its as well."""
    names = list(names)
    return all(any(f".{layer}." in f".{name}" for name in names) for layer in LAYERS)


def targets(others: Sequence[str]) -> tuple[str, ...]:
    """LoRA's targets with its layers among them."""
    return (*others, *(layer for layer in LAYERS if layer not in others))


def insert(backbone: Any, seed: int) -> None:
    """Gives a transformer without it the embedder: the first layer drawn from `seed`, the last one
    zero, both in the dtype and where its embedder of the time lies."""
    embedding = backbone.time_guidance_embed
    model: Any = embedding.timestep_embedder
    first, last = model.linear_1.weight, model.linear_2.weight
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(keyed(seed, "embedder").integers(1 << 62)))
        fresh = type(model)(first.shape[1], first.shape[0], sample_proj_bias=False)
    nn.init.zeros_(fresh.linear_2.weight)
    embedding.guidance_embedder = fresh.to(last.device, last.dtype).requires_grad_(
        last.requires_grad
    )
    backbone.register_to_config(guidance_embeds=True)
