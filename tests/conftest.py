"""Shared fixtures: a tiny FLUX.2 with random weights, of the nano model's own architecture."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.model import Flux2, load_model
from flux2.types import Batch

CONF = Path(__file__).parents[1] / "conf"
LONGEST = ("test_stages.py", "test_kill.py", "test_style.py", "test_zero.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a worker takes the next file when it is done with one, and a long
    one that is left for the end would keep the others waiting."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_config():
    """conf/model/nano-scratch, with one block of each kind and two heads."""
    cfg = OmegaConf.load(CONF / "model" / "nano-scratch.yaml")
    small = {
        "name": "tiny",
        "vae_autocast": "fp32",
        "architecture": {
            "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
            "vae": {"block_out_channels": [8, 8, 8, 16]},
            "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
                             "num_key_value_heads": 2},
        },
    }  # fmt: skip
    return OmegaConf.merge(cfg, small)


@pytest.fixture(scope="session")
def _tiny(tiny_config) -> Flux2:
    torch.set_num_threads(1)
    model = load_model(tiny_config, torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    # Latent statistics that are not the identity: else a test of the normalisation cannot fail.
    model.vae.bn.running_mean.copy_(torch.randn(128, generator=g))
    model.vae.bn.running_var.copy_(torch.rand(128, generator=g) + 0.5)
    model.codec = type(model.codec)(model.vae)
    return model


@pytest.fixture
def tiny(_tiny) -> Flux2:
    """A copy of its own: adapters and training may change it. The text encoder is shared."""
    memo = {id(_tiny.text): _tiny.text}
    return copy.deepcopy(_tiny, memo)


@pytest.fixture
def make_batch(tiny):
    """(size, task, first index) → an encoded batch of signs, with its unconditional branch."""

    def make(size: int, task: str = "t2i", start: int = 0) -> Batch:
        world = SignWorld("train", length=1000, tasks={task: 1.0})
        records = [world[start + i] for i in range(size)]
        return Collator(tiny, unconditional=True)(records, torch.arange(size))

    return make
