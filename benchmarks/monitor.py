"""What the hack monitor costs on the nano model, in seconds of one core.

    python benchmarks/monitor.py

Seconds of the processor and not of the clock, so that a busy machine says the same: the dials of a
step's images, and the parts of one held-out check.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import OmegaConf

from eval.dials import ImageDials
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.generate import Sampler
from flux2.log import table
from flux2.model import load_model
from flux2.roles import velocity_of
from rewards.signs import SignReward
from rewards.spelling import SpellingReward

ROOT = Path(__file__).resolve().parents[1]


def seconds(call: Callable[[], object], times: int) -> float:
    """Of one core, for one call; the first call is not counted."""
    call()
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    cfg = OmegaConf.load(ROOT / "conf" / "model" / "nano.yaml")
    cfg.path = str(ROOT / "experiments" / "nano" / "base")
    model = load_model(cfg, torch.device("cpu"))
    world = SignWorld("heldout", length=64, loose=0.0)
    collate = Collator(model, latents=False, unconditional=True)
    role, sampler = velocity_of(model, "bf16"), Sampler(steps=8, guidance=3.0)
    batch = collate([world[i] for i in range(48)], torch.arange(48))
    latents = sampler(role, batch, 0)
    images = model.codec.decode(latents, batch.grid)
    rows = [
        ("sampling 48", seconds(lambda: sampler(role, batch, 0), 1)),
        ("decoding 48", seconds(lambda: model.codec.decode(latents, batch.grid), 3)),
    ]
    metrics = {"dials": ImageDials(), "attributes": SignReward(), "spelling": SpellingReward()}
    for name, metric in metrics.items():
        rows.append((f"{name} of 48", seconds(lambda m=metric: m(images, batch), 5)))
    print(table(["part", "s of a core"], [[name, f"{s:.3f}"] for name, s in rows]))


if __name__ == "__main__":
    main()
