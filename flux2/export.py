"""Exports that the ecosystem opens: a folder in diffusers' layout."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flux2 import adapters
from flux2.latents import to_float
from flux2.model import Flux2
from flux2.roles import Roles


@torch.no_grad()
def measure_statistics(vae: torch.nn.Module, images: Iterable[Tensor]) -> None:
    """Sets `vae.bn`'s running mean and variance to those of the images' latents, exactly.

    images: batches b 3 h w uint8.
    """
    count, total, square = 0, 0.0, 0.0
    weight = next(vae.parameters())
    for batch in images:
        z = vae.encode(to_float(batch).to(weight)).latent_dist.mode()  # pyright: ignore
        tokens = rearrange(z.double(), "b c (h p) (w q) -> (b h w) (c p q)", p=2, q=2)
        count += len(tokens)
        total = total + tokens.sum(0)
        square = square + tokens.square().sum(0)
    mean = total / count
    bn = vae.bn
    bn.running_mean.copy_(mean)  # pyright: ignore
    bn.running_var.copy_((square / count - mean**2) * count / (count - 1))  # pyright: ignore


def export_autoencoder(model: Flux2, images: Iterable[Tensor], folder: Path) -> Path:
    """Writes folder/vae with its latent statistics measured on `images`."""
    measure_statistics(model.vae.eval(), images)
    with _replacing(folder) as temporary:
        model.vae.save_pretrained(temporary / "vae")  # pyright: ignore
    return folder


def export_pipeline(
    model: Flux2, roles: Roles, name: str, folder: Path, dtype: torch.dtype
) -> Path:
    """Writes a folder that Flux2KleinPipeline opens, with role `name` as its transformer.

    Adapters are merged in fp32 before the weights are rounded to `dtype`. The latent statistics
    stay fp32: bf16 would move every latent.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    role = roles[name]
    source = role.backbone
    transformer: Any = Flux2Transformer2DModel.from_config(source.config)
    transformer.load_state_dict(adapters.merged(source, role.adapter))
    vae = copy.deepcopy(model.vae)
    mean, variance = vae.bn.running_mean.clone(), vae.bn.running_var.clone()  # pyright: ignore
    vae.to(dtype)
    vae.bn.float()  # pyright: ignore
    vae.bn.running_mean.copy_(mean)  # pyright: ignore
    vae.bn.running_var.copy_(variance)  # pyright: ignore
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="exponential", shift=3.0
    )
    with _replacing(folder) as temporary:
        transformer.to(dtype).save_pretrained(temporary / "transformer")
        vae.save_pretrained(temporary / "vae")  # pyright: ignore
        copy.deepcopy(model.text.encoder).to(dtype).save_pretrained(temporary / "text_encoder")  # pyright: ignore
        model.text.tokenizer.save_pretrained(temporary / "tokenizer")
        scheduler.save_pretrained(temporary / "scheduler")
        index = {
            "_class_name": "Flux2KleinPipeline",
            "is_distilled": model.info.role == "distilled",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", type(model.text.encoder).__name__],
            "tokenizer": ["transformers", type(model.text.tokenizer).__name__],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        }
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


class _replacing:
    """A folder that appears whole, or not at all, in place of an older one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._temporary = folder, folder.with_name(f".{folder.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self._temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._temporary.rename(self._folder)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)
