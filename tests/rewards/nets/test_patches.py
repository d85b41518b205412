"""Features of places: the network's own tokens, in the order of the grid, and nothing cropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from einops import rearrange
from transformers import Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from flux2.data.signs import SignWorld
from flux2.errors import InputError
from rewards.base import Unavailable
from rewards.nets import signnet
from rewards.nets.features import SignNet
from rewards.nets.patches import Dinov2Patches, SignPatches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32,
        patch_size=8,
    )  # fmt: skip
    model = Dinov2Model(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 36}, crop_size=32, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)
    return folder


def images(h: int, w: int, count: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, h, w), generator=g, dtype=torch.uint8)


def test_dinos_tokens_are_those_of_the_patches(dino):
    """2 × 4 patches of 8 pixels of a 16 × 32 image, which is not resized at all."""
    pixels = images(16, 32)
    net = Dinov2Patches(str(dino), device="cpu", batch_size=2)
    got = net(pixels, (2, 4))
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    with torch.no_grad():
        whole = Dinov2Model.from_pretrained(dino)(pixel_values=(pixels / 255 - mean) / std)
    torch.testing.assert_close(got, whole.last_hidden_state[:, 1:], rtol=1e-4, atol=1e-5)
    assert got.shape == (3, 8, 24) and net.dim == 24 and not got.requires_grad


def test_a_place_is_told_by_what_stands_there(dino):
    """A change in one quarter of the image changes that token of a 2 × 2 grid most."""
    before = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    net = Dinov2Patches(str(dino), device="cpu")
    for k, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        after = before.clone()
        after[:, 0, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 255
        moved = (net(after, (2, 2)) - net(before, (2, 2))).norm(dim=-1)[0]
        assert int(moved.argmax()) == k


def test_signs_places_are_what_signnet_flattens():
    records = [SignWorld("train", length=9)[i] for i in range(5)]
    pixels = torch.stack([torch.from_numpy(r.target).permute(2, 0, 1) for r in records])
    places = SignPatches(device="cpu")(pixels, (4, 4))
    assert places.shape == (5, 16, 96)
    net = signnet.load(signnet.FOLDER)
    flat = rearrange(places, "b (r c) d -> b (d r c)", r=4)
    torch.testing.assert_close(net.neck(flat), SignNet(device="cpu")(pixels))


def test_what_is_missing_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="4 × 4"):
        SignPatches(device="cpu")(images(64, 64), (8, 8))
    with pytest.raises(Unavailable, match="no file"):
        SignPatches(str(tmp_path))
    with pytest.raises((Unavailable, InputError)):
        Dinov2Patches(str(tmp_path))
