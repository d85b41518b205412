"""The nano model that is shipped: it opens in diffusers, draws what we draw, and has learned."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from omegaconf import OmegaConf
from PIL import Image

from flux2.adapters import Switch
from flux2.data.loader import Collator, stack_images
from flux2.data.signs import SignWorld
from flux2.generate import Sampler
from flux2.model import Flux2, load_model
from flux2.rng import Rng
from flux2.roles import VelocityRole
from rewards.ocr import OCRReward, RapidReader
from rewards.signs import SignMetric

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "nano" / "base"


@pytest.fixture(scope="module")
def nano() -> Flux2:
    cfg = OmegaConf.load(ROOT / "conf" / "model" / "nano.yaml")
    cfg.path, cfg.vae_autocast, cfg.attention = str(FOLDER), "fp32", None
    return load_model(cfg, torch.device("cpu"))


def velocity(model: Flux2) -> VelocityRole:
    return VelocityRole(model.transformer, Switch(model.transformer), None, None)


def test_size() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25e6


@pytest.mark.parametrize("task", ["t2i", "replace", "compose"])
def test_pipeline_draws_the_same(nano: Flux2, task: str) -> None:
    """Same noise, steps and guidance, fp32: diffusers' own pipeline, opened from the folder."""
    pipeline = Flux2KleinPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    record = SignWorld("heldout", tasks={task: 1.0})[3]
    sampler = Sampler(steps=4, guidance=3.0)
    batch = Collator(nano, latents=False, unconditional=True)([record], torch.tensor([3]))
    ours = nano.codec.decode_float(sampler(velocity(nano), batch, seed=5), batch.grid)
    noise = Rng(5, 0)("sample", batch.ids, batch.shape)
    theirs: Any = pipeline(
        prompt=record.prompt,
        image=[Image.fromarray(r) for r in record.references] or None,
        height=64,
        width=64,
        latents=noise.transpose(1, 2).reshape(1, 128, 4, 4),
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=24,
        output_type="pt",
    ).images
    assert (theirs - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4


def test_reconstructions_are_read(nano: Flux2) -> None:
    """The autoencoder keeps held-out words legible: the ceiling of every score."""
    world = SignWorld("heldout", loose=0.0, seed=5)
    records = [world[i] for i in range(64)]
    batch = Collator(nano, text=False)(records, torch.arange(64))
    assert batch.x0 is not None
    drawn = stack_images([r.target for r in records if r.target is not None])
    with OCRReward(partial(RapidReader, region=True), workers=0) as read:
        truth = read(drawn, batch)["ocr_exact"].mean()
        again = read(nano.codec.decode(batch.x0, batch.grid), batch)["ocr_exact"].mean()
    assert again >= 0.95 * truth > 0.9


def test_base_has_learned_and_leaves_room(nano: Flux2) -> None:
    """Held-out words at guidance 3: colours and shapes right, about half of the words."""
    world = SignWorld("heldout", loose=0.0, seed=5)
    records = [world[i] for i in range(64)]
    batch = Collator(nano, latents=False, unconditional=True)(records, torch.arange(64))
    images = nano.codec.decode(Sampler(8, 3.0)(velocity(nano), batch, seed=5), batch.grid)
    signs = SignMetric()(images, batch)
    for name in ("ground_colour", "ink_colour", "count", "place", "shape"):
        assert signs[name].nanmean() > 0.9, name
    with OCRReward(partial(RapidReader, region=True), workers=0) as read:
        assert 0.3 < read(images, batch)["ocr_exact"].mean() < 0.75


def test_references_matter(nano: Flux2) -> None:
    """An edit keeps what it must: shown another source, the model draws another picture."""
    world = SignWorld("heldout", tasks={"move": 1.0}, loose=0.0)
    records = [world[i] for i in range(16)]
    batch = Collator(nano, latents=False, unconditional=True)(records, torch.arange(16))
    images = nano.codec.decode(Sampler(8, 2.0)(velocity(nano), batch, seed=5), batch.grid)
    scores = SignMetric()(images, batch)
    assert scores["ground_colour"].nanmean() > 0.9 and scores["identity"].nanmean() > 0.8
