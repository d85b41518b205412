"""Images from a model: the sampler as configuration describes it, and stage=sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2 import distributed
from flux2.errors import InputError
from flux2.rng import Rng
from flux2.samplers import (
    guided,
    sample_euler,
    sample_flowmap,
    sample_heun,
    sample_policy,
    sample_renoise,
)
from flux2.schedule import EmpiricalShift, Grid, Schedule
from flux2.types import Batch, Policy, Velocity

SOLVERS = {
    "euler": sample_euler, "heun": sample_heun, "renoise": sample_renoise,
    "flowmap": sample_flowmap,
}  # fmt: skip


@dataclass(frozen=True)
class Sampler:
    """How images are drawn; the same object before and after, in evaluation and in stage=sample.

    Attributes:
        steps: N. guidance: classifier-free; 1 is none.
        solver: euler, heun, renoise, or flowmap for a student that is told its interval.
        chunk: samples at a time.
    """

    steps: int = 50
    guidance: float = 4.0
    solver: str = "euler"
    chunk: int = 64
    schedule: Schedule = field(default_factory=EmpiricalShift)

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InputError(f"sampler.solver is {self.solver!r}: choose from {', '.join(SOLVERS)}")
        if self.chunk < 1:
            raise InputError(f"sampler.chunk is {self.chunk}: it must be at least 1")
        if self.guidance < 0:
            raise InputError(
                f"sampler.guidance is {self.guidance}: it must be at least 0 (1: none)"
            )
        if self.solver == "flowmap" and self.guidance != 1:
            raise InputError("sampler.solver=flowmap has no guidance: set sampler.guidance=1")
        self.schedule(self.steps, 1)

    @property
    def forwards(self) -> int:
        """Of the transformer, for one image."""
        solver = 2 * self.steps - 1 if self.solver == "heun" else self.steps
        return solver * (1 if self.guidance == 1 else 2)

    def check_policy(self) -> None:
        """A policy brings its own integration, and its guidance is in it. Raises InputError."""
        if self.guidance != 1 or self.solver != "euler":
            raise InputError(
                f"sampler.guidance={self.guidance:g} sampler.solver={self.solver}: a policy "
                "student is sampled with guidance=1 solver=euler"
            )

    def grid(self, tokens: int) -> Grid:
        """The sigmas for a target of so many tokens."""
        return self.schedule(self.steps, tokens)

    @torch.no_grad()
    def __call__(
        self,
        velocity: Velocity,
        batch: Batch,
        seed: int,
        done: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Latents b n c of a batch, whose noise is keyed by (seed, sample id) alone."""
        if isinstance(velocity, Policy):
            self.check_policy()
        rng, grid, out = Rng(seed, 0), self.grid(batch.shape[0]), []
        call = guided(velocity, self.guidance)
        for part in batch.split(self.chunk):
            assert part.cond is not None
            device = part.cond.text.device

            def noise(i: int, part: Batch = part, device: torch.device = device) -> Tensor:
                return rng("sample", part.ids, part.shape, counter=i).to(device)

            if isinstance(velocity, Policy):
                x = sample_policy(velocity, noise(0), part.cond, grid, velocity.shape.substeps)
            elif self.solver == "renoise":
                x = sample_renoise(call, noise(0), part.cond, grid, lambda i: noise(i + 1))
            else:
                x = SOLVERS[self.solver](call, noise(0), part.cond, grid)
            out.append(x)
            if done is not None:
                done(len(part))
        return torch.cat(out)


def sample_together(
    sampler: Sampler,
    velocity: Velocity,
    batch: Batch,
    seed: int,
    done: Callable[[int], object] | None = None,
) -> Tensor:
    """Latents b n c of a batch that every rank has whole and of which each samples its share: equal
    numbers of forwards, and the same samples as from one process. All ranks get all."""
    share = -(-len(batch) // distributed.size())
    mine = torch.arange(share) + distributed.rank() * share
    part = batch.select(mine.clamp(max=len(batch) - 1))
    return distributed.gather(sampler(velocity, part, seed, done))[: len(batch)]


def buckets(records: list[Any]) -> Iterator[list[Any]]:
    """Records by bucket, in order of first occurrence."""
    found: dict[Any, list[Any]] = {}
    for record in records:
        found.setdefault(record.bucket, []).append(record)
    yield from found.values()


def rank_chunks(records: list[Any], most: int) -> Iterator[tuple[list[Any], int]]:
    """This rank's records in chunks of one bucket and at most `most`, each with how many of them
    are its own; the others repeat the last. Every rank has as many chunks of equal sizes, so that
    sharded weights are gathered by all together."""
    size, rank = distributed.size(), distributed.rank()
    for group in buckets(records):
        for at in range(0, len(group), most * size):
            part = group[at : at + most * size]
            share = -(-len(part) // size)
            mine = part[rank * share : (rank + 1) * share]
            yield mine + [part[-1]] * (share - len(mine)), len(mine)


def check_sampled(cfg: Any, init: Any, sampler: Sampler) -> None:
    """Refuses a sampler that what cfg and `init` (`flux2.lineage.init_of`) start from cannot be
    drawn by. Raises InputError."""
    from flux2.results import policy_of

    if policy_of(cfg, init) is not None:
        sampler.check_policy()


def sample(cfg: Any) -> Mapping[str, Any]:
    """stage=sample: images of `prompts`, or of a dataset's first records, with what made them."""
    from PIL import Image

    from flux2.data.loader import Collator
    from flux2.data.record import Record
    from flux2.distributed import pick_device
    from flux2.lineage import ROLES, check_lineage, init_of, schedule_hash, trained_rewards
    from flux2.log import grid as picture
    from flux2.model import check_initial, load_initial
    from flux2.roles import velocity_of
    from flux2.runs import Run
    from flux2.train import build

    if cfg.count < 1:
        raise InputError(f"count is {cfg.count}: it must be at least 1")
    check_initial(cfg)
    init = init_of(cfg)
    check_lineage(cfg, init, ROLES)
    sampler: Sampler = build(cfg.sampler)
    check_sampled(cfg, init, sampler)
    run, device = Run(Path(cfg.run.dir)), pick_device(cfg.engine.device)
    if cfg.prompts:
        blank = blank_image(cfg.height, cfg.width)
        records = [Record(i, str(p), blank) for i, p in enumerate(cfg.prompts)]
    else:
        dataset = build(cfg.data.dataset)
        records = [dataset[i] for i in range(min(cfg.count, len(dataset)))]
        cfg.count = 1
    model = load_initial(cfg, device)
    role = velocity_of(model, cfg.engine.autocast)
    collate = Collator(model, latents=False, unconditional=sampler.guidance != 1)
    images, captions, notes = [], [], []
    for group in buckets(records):
        rows = [r for r in group for _ in range(cfg.count)]
        ids = torch.tensor([r.id * cfg.count + k for r in group for k in range(cfg.count)])
        batch = collate(rows, ids)
        latents = sample_together(sampler, role, batch, cfg.seed)
        if not distributed.is_main():
            continue
        pixels = model.codec.decode(latents, batch.grid).cpu()
        for row, ident, image in zip(rows, ids.tolist(), pixels, strict=True):
            name = f"{ident:05d}.png"
            (run.path / "samples").mkdir(exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(run.path / "samples" / name)
            notes.append({"file": name, "prompt": row.prompt, "seed": cfg.seed, "id": ident})
        images.append(pixels)
        captions += [r.prompt for r in rows]
    if not distributed.is_main():
        return {}
    lines = "".join(json.dumps(n) + "\n" for n in notes)
    (run.path / "samples" / "samples.jsonl").write_text(lines)
    path = run.path / "samples" / "grid.png"
    if len({i.shape[1:] for i in images}) == 1:
        picture(torch.cat(images)[:64], captions[:64], None).save(path)
        print(f"{len(notes)} images in {path.parent}, together in {path}")
    run.update(
        schedule_hash=schedule_hash(sampler.schedule), rewards=trained_rewards(cfg, run.path, ())
    )
    return {"stage": "sample", "images": len(notes), "folder": str(path.parent)}


def blank_image(height: int, width: int) -> Any:
    """A target that only says its size. Raises InputError unless both are multiples of 16."""
    import numpy as np

    if height < 16 or width < 16 or height % 16 or width % 16:
        raise InputError(f"height={height} width={width}: give multiples of 16, at least 16")
    return np.zeros((height, width, 3), np.uint8)
