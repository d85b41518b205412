"""Records → the batch of a step, encoded for a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flux2 import distributed
from flux2.data.cache import RowCache
from flux2.data.captions import PROMPT, check_weights, pick_caption
from flux2.data.order import adaptive_part, describe_all, digest
from flux2.data.record import Dataset, Record, UnreadableRecord
from flux2.data.sampler import IndexSampler
from flux2.errors import InputError
from flux2.latents import grid_ids, reference_ids
from flux2.model import Flux2
from flux2.rng import keyed
from flux2.text import attention_mask, text_ids
from flux2.types import Batch, Condition


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """h w 3 uint8 each → b 3 h w uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Collator:
    """Encodes records of one bucket with a model.

    Attributes:
        text: make the condition; off for the autoencoder.
        latents: encode targets; off where the method makes its own samples.
        images: keep target pixels.
        unconditional: also make the unconditional branch, for classifier-free guidance.
        cache: where latents and text features are kept; None encodes them each time.
    """

    model: Flux2
    text: bool = True
    latents: bool = True
    images: bool = False
    unconditional: bool = False
    cache: RowCache | None = None

    def __call__(
        self,
        records: Sequence[Record],
        ids: Tensor,
        dropped: Sequence[bool] = (),
        kinds: Sequence[str] = (),
    ) -> Batch:
        """ids: b sample ids; dropped: whose captions become the empty prompt; kinds: of what kind
        their prompts are, where a record has several captions. Pairs become their winners in x0 and
        images, with `loser` and `margin` in extra; see also `_judged`."""
        codec = self.model.codec
        targets = [r.target if r.preference is None else r.preference[0] for r in records]
        if any(t is None for t in targets):
            raise InputError("a record has no target image: give data with images, or with sizes")
        pixels = stack_images([t for t in targets if t is not None])
        grid = (pixels.shape[-2] // codec.patch, pixels.shape[-1] // codec.patch)
        # A sample is judged by what was asked for, whatever the model is given in its place.
        prompts = tuple(str(r.meta.get("original_prompt", r.prompt)) for r in records)
        drop = [i for i in range(len(records)) if i < len(dropped) and dropped[i]]
        return Batch(
            ids=ids,
            prompts=prompts,
            cond=self._condition(records, drop, kinds, grid) if self.text else None,
            groups=torch.tensor([r.id for r in records]),
            meta=tuple(truth(r) for r in records),
            grid=grid,
            channels=codec.mean.numel(),
            x0=self._encode("target", records, pixels) if self.latents else None,
            images=pixels if self.images else None,
            weight=torch.full((len(records),), 1 / len(records)),
            extra=self._judged(records),
        )

    def _judged(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """Of pairs, whose target is the winner: the losers' latents, where latents are made, and
        the margin: b. Of records that all have a `label` of 1 or −1 in their meta: that, b."""
        out: dict[str, Tensor] = {}
        pairs = [r.preference for r in records if r.preference is not None]
        if pairs and len(pairs) < len(records):
            raise InputError("a batch has pairs and single images: give data of one kind")
        if pairs:
            losers = stack_images([p[1] for p in pairs])
            if self.latents:
                out["loser"] = self._encode("loser", records, losers)
            out["margin"] = torch.tensor([p[2] for p in pairs], device=self.model.device)
        labels = [r.meta.get("label") for r in records]
        if all(type(x) is int and x in (1, -1) for x in labels):
            out["label"] = torch.tensor(labels, dtype=torch.float32, device=self.model.device)
        return out

    def _rows(
        self, name: str, records: Sequence[Record], make: Callable[[list[int]], Tensor]
    ) -> Tensor:
        """make(positions), through the cache where there is one."""
        if self.cache is None:
            return make(list(range(len(records))))
        return self.cache(name, [r.id for r in records], make).to(self.model.device)

    def _encode(self, name: str, records: Sequence[Record], pixels: Tensor) -> Tensor:
        codec, device = self.model.codec, self.model.device
        return self._rows(name, records, lambda k: codec.encode(pixels[k].to(device)))

    def _features(self, records: Sequence[Record], kinds: Sequence[str]) -> Tensor:
        """The prompts' features, b s d; the cache has a column of each kind of caption."""
        text, device = self.model.text, self.model.device

        def rows(column: str, part: Sequence[Record]) -> Tensor:
            return self._rows(column, part, lambda k: text([part[i].prompt for i in k], device))

        if not kinds:
            return rows("text", records)
        found: dict[int, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            mine = [k for k, other in enumerate(kinds) if other == kind]
            column = "text" if kind == PROMPT else f"text-{digest(kind)}"
            found.update(zip(mine, rows(column, [records[k] for k in mine]), strict=True))
        return torch.stack([found[k] for k in range(len(records))])

    def _condition(
        self,
        records: Sequence[Record],
        dropped: Sequence[int],
        kinds: Sequence[str],
        grid: tuple[int, int],
    ) -> Condition:
        device, text = self.model.device, self.model.text
        b, features = len(records), self._features(records, kinds)
        if dropped:
            features = features.clone()
            features[list(dropped)] = text([""], device)
        ref = ref_ids = None
        if records[0].references:
            count = len(records[0].references)
            images = [stack_images([r.references[k] for r in records]) for k in range(count)]
            encoded = [self._encode(f"reference{k}", records, x) for k, x in enumerate(images)]
            ref = torch.cat(encoded, 1)
            patch = self.model.codec.patch
            grids = [(i.shape[0] // patch, i.shape[1] // patch) for i in records[0].references]
            ref_ids = reference_ids(grids, device).expand(b, -1, -1)
        ids = grid_ids(grid, device=device).expand(b, -1, -1)
        prompts = ["" if k in set(dropped) else r.prompt for k, r in enumerate(records)]
        real, empty = self._real(prompts), self._real([""])
        keep = slice(None)
        if real is not None and empty is not None:
            keep = trimmed(real, *([empty] if self.unconditional else []))
        shared = {
            "text_ids": text_ids(b, text.max_length, device)[:, keep],
            "ids": ids,
            "ref": ref,
            "ref_ids": ref_ids,
            "guidance": self._embedded(b),
        }
        image = ids.shape[1] + (0 if ref is None else ref.shape[1])

        def mask(real: Tensor | None) -> Tensor | None:
            return None if real is None else attention_mask(real[:, keep].expand(b, -1), image)

        null = None
        if self.unconditional:
            none = text([""], device)[:, keep].expand(b, -1, -1)
            null = Condition(text=none, mask=mask(empty), **shared)
        return Condition(text=features[:, keep], null=null, mask=mask(real), **shared)

    def _embedded(self, b: int) -> Tensor | None:
        """The guidance strength for a transformer that takes one: b."""
        strength = self.model.info.guidance
        return None if strength is None else torch.full((b,), strength, device=self.model.device)

    def _real(self, prompts: Sequence[str]) -> Tensor | None:
        """Which tokens are not padding, b s bool, where the model hides padding; else None."""
        text = self.model.text
        return text.mask(prompts, self.model.device) if text.mask_padding else None


def trimmed(*masks: Tensor) -> slice:
    """The stretch of tokens outside which there is padding in every row of every mask, each b s.

    What is hidden from attention changes no other token, so that a batch need not carry it. Where
    padding takes part in attention, as in the reference pipelines, cutting it would be another
    model.
    """
    used = torch.cat(masks).any(0).nonzero()[:, 0]
    return slice(int(used[0]), int(used[-1]) + 1)


def truth(record: Record) -> dict[str, object]:
    """The record's ground truth; with references also those, `source` (the one that an edit
    changes: the last) and, if there is one, the edit's `mask`."""
    meta = dict(record.meta)
    if record.references:
        meta |= {"references": record.references, "source": record.references[-1]}
    if record.mask is not None and record.references:
        meta["mask"] = record.mask
    return meta


def check_group_lengths(mask_padding: bool) -> None:
    """Raises InputError where batches cannot become shorter: padding is not hidden."""
    if not mask_padding:
        raise InputError(
            "data.group_lengths saves nothing: padding takes part in attention, and every prompt "
            "has all its tokens; set model.mask_padding=true, or data.group_lengths=false"
        )


@dataclass
class Loader:
    """This rank's rows of the global batch of a step, by its number.

    Unreadable records are counted, told once each, and replaced by the next readable one of the
    batch.

    Attributes:
        dataset, collate, batch_size, seed: of the run.
        caption_dropout: share of the captions that become the empty prompt.
        captions: kind → weight, for records with several (`flux2.data.captions`); None: prompts.
        group_lengths: prompts of like length come in one batch; only where padding is hidden.
        unreadable: indices of the records that could not be read.

    Raises:
        InputError: numbers out of range, or group_lengths where batches cannot become shorter.
    """

    dataset: Dataset
    collate: Collator
    batch_size: int
    seed: int
    caption_dropout: float = 0.0
    captions: Mapping[str, float] | None = None
    group_lengths: bool = False
    unreadable: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise InputError(f"data.caption_dropout is {self.caption_dropout}: give 0 to 1")
        if self.captions is not None:
            check_weights(self.captions)
        if self.group_lengths:
            check_group_lengths(self.collate.model.text.mask_padding)
        lengths = self._lengths if self.group_lengths else None
        self._sampler = IndexSampler(self.dataset, self.batch_size, self.seed, lengths)
        self._adaptive = adaptive_part(self.dataset)
        if self.batch_size % distributed.size():
            raise InputError(
                f"data.batch_size is {self.batch_size} and there are {distributed.size()} ranks: "
                "give a multiple"
            )

    def __call__(self, step: int) -> Batch:
        """The rows of a step; the same for the same (seed, step), however many ranks share them."""
        indices = self._sampler(step)
        share = self.batch_size // distributed.size()
        mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
        records, ids = self._read(indices, mine), torch.arange(len(indices))[mine]
        u = keyed(self.seed, "caption_dropout", step).random(len(indices))
        dropped = (u[mine] < self.caption_dropout).tolist()
        if self.captions is None:
            return self.collate(records, ids, dropped)
        u = keyed(self.seed, "captions", step).random(len(indices))[mine]
        pairs = zip(records, u.tolist(), strict=True)
        return self._captioned([pick_caption(r, self.captions, x) for r, x in pairs], ids, dropped)

    def _captioned(
        self, records: Sequence[Record], ids: Tensor, dropped: Sequence[bool] = ()
    ) -> Batch:
        """Of records whose captions are picked."""
        return self.collate(records, ids, dropped, [str(r.meta["caption"]) for r in records])

    def fill(self) -> None:
        """Encodes every record into the cache, with each of its captions; the ranks share the
        work."""
        chunks = [b[k : k + 16] for b in self._sampler.buckets for k in range(0, len(b), 16)]
        mine = chunks[distributed.rank() :: distributed.size()]
        for chunk in tqdm(mine, desc="encoding", leave=False, dynamic_ncols=True, disable=None):
            records = [r for r in map(self._one, chunk.tolist()) if r is not None]
            if not records:
                continue
            ids = torch.arange(len(records))
            if self.captions is None:
                self.collate(records, ids)
            for kind in (k for k, w in (self.captions or {}).items() if w > 0):
                self._captioned([pick_caption(r, {kind: 1.0}, 0.0) for r in records], ids)
        distributed.barrier()

    # -- what learns from scores -----------------------------------------------------------------

    def observe(self, ids: Tensor, scores: Tensor) -> Mapping[str, float]:
        """Tells data that resample what a step's samples scored; all ranks call it together.

        ids: b int64, `Batch.groups`; scores: b, NaN where there is none → numbers for the log, {}
        where nothing learns from it.
        """
        return {} if self._adaptive is None else self._adaptive.observe(ids, scores)

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume; {} where the step says it all."""
        return {} if self._adaptive is None else self._adaptive.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of state_dict. Raises InputError where one of the two runs resamples."""
        if bool(state) != (self._adaptive is not None):
            did, does = ("did", "does not") if state else ("did not", "does")
            raise InputError(f"the run {did} resample its data, and this {does}: take what it had")
        if self._adaptive is not None:
            self._adaptive.load_state_dict(state)

    # -- reading ---------------------------------------------------------------------------------

    def _lengths(self) -> np.ndarray:
        """Tokens of every record's prompt: n int64."""
        prompts = ["" if r is None else r.prompt for r in describe_all(self.dataset)]
        text, counts = self.collate.model.text, []
        for k in range(0, len(prompts), 512):
            counts += text.mask(prompts[k : k + 512]).sum(1).tolist()
        return np.asarray(counts)

    def _read(self, indices: Sequence[int], mine: slice) -> list[Record]:
        found = {k: self._one(indices[k]) for k in range(len(indices))[mine]}
        if all(found.values()):
            return [r for r in found.values() if r is not None]
        # What stands in for a record must not depend on the number of ranks.
        everyone = [found[k] if k in found else self._one(i) for k, i in enumerate(indices)]
        readable = [r for r in everyone if r is not None]
        if not readable:
            raise InputError("no record of a whole batch could be read: check data")
        return [r or readable[k % len(readable)] for k, r in found.items()]

    def _one(self, index: int) -> Record | None:
        """A record; None where it cannot be read."""
        try:
            return self.dataset[index]
        except UnreadableRecord as error:
            if index not in self.unreadable:
                print(f"left out record {index}: {error}", file=sys.stderr)
            self.unreadable.add(index)
            return None
