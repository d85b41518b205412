"""What is where in an image: a feature for each of a grid's places, for representation alignment.

A network here is a function of images and a grid, b 3 h w uint8 and (rows, columns) → b (rows
columns) d fp32, row by row, without gradients. The grid is that of the transformer's tokens, so
images are resized to as many patches as there are tokens, and nothing is cropped.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from einops import rearrange
from torch import Tensor

from flux2.distributed import pick_device
from flux2.errors import InputError
from rewards.base import Unavailable
from rewards.nets import signnet
from rewards.nets.preprocess import Preprocess, check_uint8
from rewards.nets.weights import config_of, load, weights_folder

_DEFAULTS: Final = {
    "size": {"shortest_edge": 224}, "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}  # fmt: skip


class Dinov2Patches:
    """DINOv2's patch tokens after the last layer norm (Oquab et al. 2023), by transformers.

    Args:
        path: a folder or hub id of a transformers Dinov2Model, e.g. facebook/dinov2-base.
        device: "auto" takes CUDA where there is one.
        batch_size: images at once.

    Raises:
        Unavailable: the weights are not at hand. InputError: they are another model's.
    """

    def __init__(self, path: str, device: str = "auto", batch_size: int = 32) -> None:
        self._folder = weights_folder(path)
        config = config_of(self._folder, "dinov2")
        self.dim = int(config.get("hidden_size", 768))
        self.patch = int(config.get("patch_size", 14))
        self.licence = f"{path}: Apache-2.0 as Meta published DINOv2"
        self._preprocess = Preprocess.read(self._folder, _DEFAULTS)
        self._device, self._batch_size = pick_device(device), batch_size

    @functools.cached_property
    def _model(self) -> Any:
        from transformers import Dinov2Model

        return load(Dinov2Model, self._folder, self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """images: b 3 h w uint8 → b (rows columns) d."""
        check_uint8(images)
        size = (grid[0] * self.patch, grid[1] * self.patch)
        resize, parts = replace(self._preprocess, short=None, crop=None, size=size), []
        for part in images.split(self._batch_size):
            pixels = resize(part.to(self._device).float() / 255)
            tokens = self._model(pixel_values=pixels).last_hidden_state
            parts.append(tokens[:, 1:].float())  # without the class token
        return torch.cat(parts)


class SignPatches:
    """The sign world's own: the 96 channels of `rewards.nets.signnet` before they are flattened, 4
    by 4 places.

    Args:
        path: a folder with model.safetensors; None takes the shipped one.
        device: "auto" takes CUDA where there is one.

    Raises:
        Unavailable: the folder has no weights.
    """

    dim = 96
    licence = "Apache-2.0, trained on drawn signs (experiments/nano/signnet.yaml)"

    def __init__(self, path: str | None = None, device: str = "auto") -> None:
        self._folder = signnet.FOLDER if path is None else Path(path).expanduser()
        if not (self._folder / signnet.WEIGHTS).is_file():
            raise Unavailable(
                f"no file {self._folder / signnet.WEIGHTS}: train it, python run.py "
                "experiment=nano/signnet"
            )
        self._preprocess = Preprocess(size=(signnet.SIZE, signnet.SIZE))
        self._device = pick_device(device)

    @functools.cached_property
    def _model(self) -> signnet.SignNet:
        return signnet.load(self._folder).to(self._device)

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """images: b 3 h w uint8 → b (rows columns) 96. Raises InputError for another grid than 4 by
        4."""
        check_uint8(images)
        if tuple(grid) != (4, 4):
            raise InputError(f"SignPatches sees 4 × 4 places and tokens are {grid}: align=dinov2")
        pixels = self._preprocess(images.to(self._device).float() / 255)
        return rearrange(self._model.trunk(2 * pixels - 1), "b d r c -> b (r c) d")
