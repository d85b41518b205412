"""What tests/distill/test_size_ranks.py runs on one process and on two ranks: blocks measured, and
a model with fewer of them trained.

    torchrun --nproc-per-node 2 size_job.py MODEL.yaml FOLDER ENGINE:CASE:STEPS:FOLDER …
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parents[1] / "flux2"))
import ranks_job  # pyright: ignore[reportMissingImports]

from distill.size import Size
from eval.importance import Importance, plain
from flux2 import distributed
from flux2.data.signs import SignWorld
from flux2.files import write_json
from flux2.generate import Sampler
from flux2.model import Flux2, load_model
from flux2.roles import velocity_of

HALF = ((1,), (0, 2))
ranks_job.CASES["size"] = ranks_job.Case(lambda: Size(HALF, task=0.1, micro=1), False, True)


def measure(model: Flux2, folder: Path) -> None:
    """Three records, which two ranks cannot share evenly."""
    world = SignWorld("heldout", length=8, seed=78, tasks={"t2i": 1.0})
    found = Importance(world, Sampler(steps=4, guidance=2.0), samples=3, times=2, chunk=1)
    kept, rows = found.measure(model, velocity_of(model), (1, 2))
    write_json(folder / f"rank{distributed.rank()}.json", {"kept": kept, "rows": plain(rows)})


def main(model: str, folder: str, *jobs: str) -> None:
    """Both."""
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    loaded = load_model(OmegaConf.load(model), torch.device("cpu"))
    measure(loaded, Path(folder))
    for job in jobs:
        kind, case, steps, place = job.split(":", 3)
        ranks_job.run(loaded, kind, case, Path(place), int(steps))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
