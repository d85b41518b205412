"""How much each block of a transformer matters: what is lost when it is skipped.

    damage(B)    = mean of ‖v_B(x_t, t, c) − v(x_t, t, c)‖ / ‖v(x_t, t, c)‖ over records and σ
    influence(k) = 1 − mean of cos(h_k−1, h_k) over records, σ and target tokens

v_B is the guided velocity of the transformer with the blocks B alone, x_t latents of held-out
records with noise, at σ's of the sampler's own grid. `influence` is ShortGPT's (Men et al., arXiv
2403.03853), from one forward for all blocks; it does not know what the rest makes of a block's
change.

Blocks are removed one by one, each time the one whose removal leaves the least damage beside those
that are gone already (by=greedy). by=damage and by=influence take the order of the whole model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flux2 import depth, distributed
from flux2.data.loader import Collator
from flux2.data.record import Dataset, Record
from flux2.depth import KINDS, Blocks
from flux2.errors import InputError
from flux2.flow import interpolate
from flux2.generate import Sampler, rank_chunks
from flux2.log import COLOURS, table
from flux2.model import Flux2
from flux2.rng import Rng
from flux2.roles import VelocityRole
from flux2.samplers import guided
from flux2.types import Batch, Condition

WAYS = ("greedy", "damage", "influence")
Place = tuple[int, int]
"""(0 double or 1 single, number)."""


@dataclass(frozen=True)
class Row:
    """A block.

    Attributes:
        kind: double or single. number: among its kind.
        influence, alone: see above; alone: the damage where it alone is skipped.
        removed: the how-manieth that went, from 1; None: it is kept.
        after: damage with it and all before it gone; None where it is kept.
    """

    kind: str
    number: int
    influence: float
    alone: float
    removed: int | None = None
    after: float | None = None


@dataclass(frozen=True)
class Probe:
    """Held-out latents on their way at one σ, and what the whole transformer says there."""

    ids: Tensor
    own: int
    column: int
    x: Tensor
    t: Tensor
    cond: Condition
    v: Tensor


@dataclass(frozen=True)
class Importance:
    """Measures blocks and says which are to be kept.

    Attributes:
        dataset: held-out records with images. samples: the first so many of them.
        sampler: whose σ's and guidance count. times: how many σ's, spread over its grid.
        by: greedy, damage or influence.
        chunk: samples of a forward, guided ones twice. seed: of the noise.
    """

    dataset: Dataset
    sampler: Sampler
    samples: int = 32
    times: int = 4
    by: str = "greedy"
    chunk: int = 32
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, value in (
            ("samples", self.samples), ("times", self.times), ("chunk", self.chunk)
        ):  # fmt: skip
            if value < 1:
                raise InputError(f"importance.{name} is {value}: it must be at least 1")
        if self.by not in WAYS:
            raise InputError(f"importance.by is {self.by!r}: choose from {', '.join(WAYS)}")
        if self.samples > len(self.dataset):
            raise InputError(
                f"importance.samples is {self.samples}, and its data have {len(self.dataset)}"
            )

    @torch.no_grad()
    def measure(
        self, model: Flux2, role: VelocityRole, wanted: tuple[int, int]
    ) -> tuple[Blocks, list[Row]]:
        """The blocks to keep, `wanted` of each kind, and a row for each block; all ranks together,
        the same on each. role: the model's."""
        probes = list(self.probes(model, role))
        whole = depth.all_blocks(role.depth)

        def damage(blocks: Blocks) -> float:
            return self.damage(model, role, probes, blocks)

        places: list[Place] = [(kind, i) for kind in (0, 1) for i in whole[kind]]
        influence = dict(zip(places, self.influence(model, role, probes), strict=True))
        alone = {p: damage(_without(whole, p)) for p in places}
        order = {"greedy": None, "damage": alone, "influence": influence}[self.by]
        kept, gone = removal(whole, wanted, damage, order, alone)
        rows = [
            Row(KINDS[p[0]], p[1], influence[p], alone[p], *gone.get(p, (None, None)))
            for p in places
        ]
        return distributed.broadcast((kept, rows))

    def probes(self, model: Flux2, role: VelocityRole) -> Iterator[Probe]:
        """This rank's share: every record at every σ."""
        collate = Collator(model, unconditional=self.sampler.guidance != 1)
        records: list[Record] = [self.dataset[i] for i in range(self.samples)]
        call = guided(role, self.sampler.guidance)
        for part, own in rank_chunks(records, self.chunk):
            batch: Batch = collate(part, torch.tensor([r.id for r in part]))
            if batch.x0 is None or batch.cond is None:
                raise InputError("importance.dataset has no images: give records with targets")
            x0, rng = batch.x0, Rng(self.seed, 0)
            for k, sigma in enumerate(self.sigmas(batch.shape[0])):
                t = torch.full((len(batch),), sigma, device=x0.device)
                eps = rng("importance", batch.ids, batch.shape, counter=k).to(x0.device)
                x = interpolate(x0, eps, t)
                v = call(x, t, batch.cond)
                yield Probe(batch.ids, own, k, x, t, batch.cond, v)

    def sigmas(self, tokens: int) -> list[float]:
        """`times` of the sampler's σ's above 0, the first among them, evenly by their number."""
        grid = [float(s) for s in self.sampler.grid(tokens).sigmas if s > 0]
        count = min(self.times, len(grid))
        return [grid[k * len(grid) // count] for k in range(count)]

    @torch.no_grad()
    def damage(
        self, model: Flux2, role: VelocityRole, probes: Sequence[Probe], blocks: Blocks
    ) -> float:
        """damage(B) of the blocks that are left; all ranks together."""
        call = guided(role, self.sampler.guidance)
        with depth.only(model.transformer, blocks):
            changes = [(call(p.x, p.t, p.cond) - p.v, p.v) for p in probes]
        ratios = [d.flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1) for d, v in changes]
        return self._mean(probes, ratios)

    @torch.no_grad()
    def influence(self, model: Flux2, role: VelocityRole, probes: Sequence[Probe]) -> list[float]:
        """influence(k) of every block, double-stream ones first, with the prompt; all ranks
        together."""
        total = sum(role.depth)
        found: list[list[Tensor]] = [[] for _ in range(total)]
        entered: list[Tensor] = []
        embedder: Any = model.transformer.x_embedder
        handle = embedder.register_forward_hook(lambda *call: entered.append(call[-1]))
        try:
            for p in probes:
                entered.clear()
                _, states = role.states(p.x, p.t, p.cond, range(1, total + 1))
                before = entered[0][:, : p.x.shape[1]].float()
                for k, state in enumerate(states):
                    found[k].append(1 - cosine_similarity(before, state, dim=-1).mean(1))
                    before = state
        finally:
            handle.remove()
        return [self._mean(probes, values) for values in found]

    def _mean(self, probes: Sequence[Probe], values: Sequence[Tensor]) -> float:
        """Over all records and σ's, in an order that does not depend on the ranks. values: b of
        each probe."""
        mine = [
            (p.column, i, x)
            for p, value in zip(probes, values, strict=True)
            for i, x in list(zip(p.ids.tolist(), value.double().tolist(), strict=True))[: p.own]
        ]
        every = sorted(x for rank in distributed.gather_objects(mine) for x in rank)
        return sum(x for _, _, x in every) / len(every)


def removal(
    whole: Blocks,
    wanted: tuple[int, int],
    damage: Callable[[Blocks], float],
    order: Mapping[Place, float] | None,
    first: Mapping[Place, float] | None = None,
) -> tuple[Blocks, dict[Place, tuple[int, float]]]:
    """Removes blocks until `wanted` of each kind are left.

    Args:
        damage: blocks that are left → what is lost.
        order: each block's importance, the least goes first; None: measured anew each time.
        first: the damage of each block's removal from the whole, where it is known already.

    Returns:
        what is left; and for each block that went, the how-manieth it was and the damage then.
    """
    kept, gone = whole, {}
    while (len(kept[0]), len(kept[1])) != wanted:
        may = [(k, i) for k in (0, 1) if len(kept[k]) > wanted[k] for i in kept[k]]
        if order is None:
            known = first if kept == whole and first is not None else None
            value = known or {p: damage(_without(kept, p)) for p in may}
        else:
            value = order
        least = min(may, key=lambda p: (value[p], p))
        kept = _without(kept, least)
        after = value[least] if order is None else damage(kept)
        gone[least] = (len(gone) + 1, after)
    return kept, gone


def _without(blocks: Blocks, place: Place) -> Blocks:
    double, single = (
        tuple(i for i in mine if (kind, i) != place) for kind, mine in enumerate(blocks)
    )
    return double, single


# ---------------------------------------------------------------- what is told


def told(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    header = ["block", "influence", "damage alone", "removed", "damage then"]
    cells = [
        [
            f"{r.kind} {r.number}", f"{r.influence:.4f}", f"{r.alone:.4f}",
            "kept" if r.removed is None else str(r.removed),
            "" if r.after is None else f"{r.after:.4f}",
        ]
        for r in rows
    ]  # fmt: skip
    return table(header, cells)


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for JSON."""
    return [asdict(r) for r in rows]


def picture(rows: Sequence[Row], path: Path) -> Path:
    """Draws each block's damage alone, kept ones and removed ones apart, to the PNG `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = max(4.8, 0.32 * len(rows) + 1.6)
    figure = Figure(figsize=(width, 2.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no window, and none of pyplot's global state
    axes = figure.add_subplot()
    for name, colour, chosen in (
        ("kept", COLOURS[0], [r.removed is None for r in rows]),
        ("removed", COLOURS[1], [r.removed is not None for r in rows]),
    ):
        at = [k for k, mine in enumerate(chosen) if mine]
        axes.bar(at, [rows[k].alone for k in at], color=colour, label=name)
    axes.set_xticks(range(len(rows)), [f"{r.kind[0]}{r.number}" for r in rows], fontsize=7)
    axes.set_ylabel("‖Δv‖ / ‖v‖ without it")
    axes.set_xlabel("block: d double-stream, s single-stream")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
