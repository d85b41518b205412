"""Groups of samples of a model's, judged by a reward, chunk by chunk: what stage=pairs and
stage=filter are made of.

A chunk is some prompts of one bucket. What it gave is a file, whole or absent, so that a resumed
run goes on behind those that are there; the ranks share the chunks, which are the same for any
number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.suite import begin
from flux2 import distributed
from flux2.data.loader import Collator
from flux2.data.pairs import FACTS
from flux2.data.record import Dataset, Record, UnreadableRecord
from flux2.errors import InputError
from flux2.files import digest, jsonable, read_json, write_json
from flux2.generate import Sampler
from flux2.log import progress
from flux2.runs import Interrupt, Run
from flux2.types import Batch, Calibrated, Deferred, Velocity


@dataclass(frozen=True)
class Drawn:
    """A chunk's samples. images: b 3 h w uint8, `group` of each record in succession."""

    records: Sequence[Record]
    images: Tensor
    batch: Batch


Gave = Callable[[Path, Drawn | None, Tensor], Mapping[str, Any]]
"""(the stage's folder; a chunk, None where no record could be read; its rewards, p g, NaN where
there is none) → what its file holds."""


@dataclass(frozen=True)
class Groups:
    """Draws groups and has them judged.

    Attributes:
        dataset: prompts. role: samples. group: samples a prompt. seed: of the noise.
        folder: the stage's, in its run.
    """

    dataset: Dataset
    collate: Collator
    sampler: Sampler
    role: Velocity
    reward: Any
    group: int
    seed: int
    folder: Path

    def draw(self, indices: Sequence[int]) -> Drawn | None:
        """The groups of these records; None where none of them can be read."""
        records = readable(self.dataset, indices)
        if not records:
            return None
        ids = torch.tensor([r.id for r in records])
        batch = self.collate(records, ids).repeat(self.group)
        latents = self.sampler(self.role, batch, self.seed)
        return Drawn(records, self.collate.model.codec.decode(latents, batch.grid), batch)

    def run(self, chunks: Sequence[Sequence[int]], gave: Gave) -> None:
        """This rank's chunks that are not there yet; one is scored while the next is drawn."""
        mine = range(distributed.rank(), len(chunks), distributed.size())
        todo = [n for n in mine if not chunk_file(self.folder, n).is_file()]
        waiting: Callable[[], None] | None = None
        with Interrupt() as stop:
            for number in progress(todo, self.folder.name, len(todo)):
                drawn = self.draw(chunks[number])
                scores: Callable[[], Mapping[str, Tensor]] = dict
                if drawn is not None:
                    scores = begin(self.reward, drawn.images, drawn.batch)
                if waiting is not None:
                    waiting()
                waiting = self._later(gave, number, drawn, scores)
                if stop.signum:
                    break
            if waiting is not None:
                waiting()
            if stop.signum:
                stop.abort()

    def _later(
        self, gave: Gave, number: int, drawn: Drawn | None,
        scores: Callable[[], Mapping[str, Tensor]],
    ) -> Callable[[], None]:  # fmt: skip
        """Waits for a chunk's scores and writes what it gave."""

        def keep() -> None:
            rewards = torch.zeros(0, self.group)
            if drawn is not None:
                flat = scores()["reward"].float().cpu()
                rewards = flat.unflatten(0, (len(drawn.records), self.group))
            write_json(chunk_file(self.folder, number), gave(self.folder, drawn, rewards))

        return keep


def readable(dataset: Dataset, indices: Sequence[int]) -> list[Record]:
    """The records that can be read; the others are told."""
    records = []
    for index in indices:
        try:
            records.append(dataset[index])
        except UnreadableRecord as error:
            print(f"left out record {index}: {error}", flush=True)
    return records


def chunk_file(folder: Path, number: int) -> Path:
    """What a chunk gave."""
    return folder / "chunks" / f"{number:06d}.json"


def read_chunks(folder: Path, count: int) -> list[dict[str, Any]]:
    """What all chunks gave, in order."""
    return [read_json(chunk_file(folder, n)) for n in range(count)]


def plain_meta(record: Record) -> dict[str, Any]:
    """What JSON can hold of a record's meta; arrays (masks, images) are left to the record."""
    return {k: jsonable(v) for k, v in record.meta.items() if not isinstance(v, np.ndarray)}


def split(dataset: Dataset, start: int, count: int, size: int) -> list[list[int]]:
    """Records start … start + count − 1 in chunks of one bucket and at most `size`; they depend on
    nothing else."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for index in range(start, min(start + count, len(dataset))):
        found.setdefault(dataset.bucket_of(index), []).append(index)
    return [group[at : at + size] for group in found.values() for at in range(0, len(group), size)]


def judge(cfg: Any, gave: Gave, may: str) -> tuple[Path, int]:
    """Samples and judges the groups that a stage asks for, on every rank; returns the stage's
    folder and how many chunks there are in it.

    cfg: with count, start, group, chunk, data, reward, sampler, model and engine. may: the settings
    that a resumed run may change, in words.

    Raises:
        InputError: for wrong settings, and where the folder holds what others have made.
    """
    from flux2.distributed import pick_device
    from flux2.generate import check_sampled
    from flux2.lineage import ROLES, check_lineage, init_of, trained_rewards
    from flux2.model import check_initial, load_initial
    from flux2.roles import velocity_of
    from flux2.scorer import Scorer, close
    from flux2.train import build

    check_initial(cfg)
    init = init_of(cfg)
    check_lineage(cfg, init, ROLES)
    sampler, dataset = build(cfg.sampler), build(cfg.data.dataset)
    check_sampled(cfg, init, sampler)
    reward = build(cfg.reward)
    run = Run(Path(cfg.run.dir))
    folder, scorer = run.path / cfg.stage.name, Scorer(reward)
    try:
        chunks = split(dataset, cfg.start, cfg.count, cfg.chunk)
        if not chunks:
            raise InputError(f"start={cfg.start}, and the dataset has {len(dataset)} records")
        if isinstance(reward, Deferred):
            reward.ready()
        if distributed.is_main() and (line := scorer.describe()):
            print(line, flush=True)
        model = load_initial(cfg, pick_device(cfg.engine.device))
        facts = {"model": model.info.hash, "rewards": scorer.engines, "sampler": repr(sampler),
                 "dataset": repr(dataset), "seed": cfg.seed, "group": cfg.group,
                 "chunks": digest(chunks)}  # fmt: skip
        if distributed.is_main():
            claim(folder, facts, may)
        distributed.barrier()
        collate = Collator(model, latents=False, unconditional=sampler.guidance != 1)
        role = velocity_of(model, cfg.engine.autocast)
        groups = Groups(dataset, collate, sampler, role, reward, cfg.group, cfg.seed, folder)
        calibrate(groups, chunks)
        rewards = trained_rewards(cfg, run.path, scorer.engines)
        run.update(base=asdict(model.info), rewards=rewards)
        groups.run(chunks, gave)
    finally:
        close(reward)
    distributed.barrier()
    return folder, len(chunks)


def check_counts(cfg: Any, **least: int) -> None:
    """Refuses settings below what they must at least be. Raises InputError."""
    for name, bound in least.items():
        if cfg[name] < bound:
            raise InputError(f"{name} is {cfg[name]}: it must be at least {bound}")


def claim(folder: Path, facts: Mapping[str, Any], may: str) -> None:
    """Makes the folder, or takes up what the same settings left in it. Raises InputError where
    others did. may: what may change, in words."""
    (folder / "chunks").mkdir(parents=True, exist_ok=True)
    if not (folder / FACTS).is_file():
        write_json(folder / FACTS, facts)
        return
    old = read_json(folder / FACTS)
    for name, value in jsonable(facts).items():
        if old.get(name) != value:
            raise InputError(
                f"{folder} holds what another {name} made: only {may} may change; choose another "
                "run.dir"
            )


def calibrate(groups: Groups, chunks: Sequence[Sequence[int]]) -> None:
    """Lets a reward measure what it wants to know of the model, once: a resumed run reads it."""
    reward, file = groups.reward, groups.folder / "calibration.json"
    if not isinstance(reward, Calibrated) or reward.wants is None:
        return
    known = distributed.broadcast(read_json(file) if file.is_file() else None)
    if known is not None:
        reward.load_state_dict(known)
        return
    count, times = reward.wants
    flat = [i for chunk in chunks for i in chunk]
    at = distributed.rank() * count
    own = [flat[(at + k) % len(flat)] for k in range(count)]

    def drawn() -> Iterator[tuple[Tensor, Batch]]:
        for index in own:
            one = replace(groups, group=times).draw([index])
            if one is not None:
                yield one.images, one.batch

    reward.calibrate(drawn())
    if distributed.is_main():
        write_json(file, reward.state_dict())
