"""Records → batches: what is encoded, what is dropped, what cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from flux2.data.loader import Collator, Loader, stack_images
from flux2.data.record import UnreadableRecord
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.latents import grid_ids, reference_ids


@dataclass(frozen=True)
class Broken:
    """A world in which some files are damaged."""

    world: SignWorld
    bad: frozenset[int]

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int):
        if index in self.bad:
            raise UnreadableRecord(f"{index}.png is truncated")
        return self.world[index]

    def bucket_of(self, index: int):
        return self.world.bucket_of(index)


def test_images_are_stacked_channels_first():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    out = stack_images([image, image])
    assert out.shape == (2, 3, 2, 3) and out[1, 2, 1, 0] == image[1, 0, 2]


def test_a_batch_holds_what_its_records_say(tiny):
    world = SignWorld("train", length=20, tasks={"compose": 1.0})
    records = [world[5], world[11]]
    batch = Collator(tiny, images=True, unconditional=True)(records, torch.tensor([8, 9]))
    assert batch.ids.tolist() == [8, 9] and batch.groups.tolist() == [5, 11]
    assert batch.grid == (4, 4) and batch.shape == (16, 128)
    assert batch.weight.sum() == 1 and len(batch.meta) == 2
    assert torch.equal(batch.images[1], torch.from_numpy(records[1].target).permute(2, 0, 1))
    x0 = tiny.codec.encode(batch.images)
    torch.testing.assert_close(batch.x0, x0)
    cond = batch.cond
    torch.testing.assert_close(cond.text, tiny.text([r.prompt for r in records]))
    torch.testing.assert_close(cond.null.text, tiny.text(["", ""]))
    assert torch.equal(cond.ids[1], grid_ids((4, 4)))
    assert torch.equal(cond.ref_ids[1], reference_ids([(4, 4), (4, 4)]))
    for k in range(2):
        one = tiny.codec.encode(stack_images([r.references[k] for r in records]))
        torch.testing.assert_close(cond.ref[:, 16 * k : 16 * (k + 1)], one)
    torch.testing.assert_close(cond.null.ref, cond.ref)
    for record, meta in zip(records, batch.meta, strict=True):
        assert np.array_equal(meta["source"], record.references[-1])
        assert np.array_equal(meta["mask"], record.mask)


def test_parts_are_left_out_when_not_wanted(tiny):
    record = SignWorld("train", length=1)[0]
    batch = Collator(tiny, text=False, latents=False)([record], torch.arange(1))
    assert batch.cond is None and batch.x0 is None and batch.images is None
    with pytest.raises(InputError, match="target"):
        Collator(tiny)([replace(record, target=None)], torch.arange(1))


def test_dropped_captions_are_the_empty_prompt_and_no_other_is_touched(tiny):
    world = SignWorld("train", length=3)
    records = [world[i] for i in range(3)]
    batch = Collator(tiny)(records, torch.arange(3), [False, True, False])
    want = tiny.text([records[0].prompt, "", records[2].prompt])
    torch.testing.assert_close(batch.cond.text, want)
    torch.testing.assert_close(tiny.text([records[1].prompt]),
                               Collator(tiny)(records, torch.arange(3)).cond.text[1:2])  # fmt: skip


def dropped(loader: Loader, steps) -> dict[int, list[bool]]:
    empty = loader.collate.model.text([""])[0]
    return {s: [torch.equal(row, empty) for row in loader(s).cond.text] for s in steps}


def test_dropout_is_keyed_by_seed_and_step(tiny):
    world, collate = SignWorld("train", length=64), Collator(tiny, latents=False)

    def loader(p: float, seed: int = 0) -> Loader:
        return Loader(world, collate, 8, seed, caption_dropout=p)

    forwards = dropped(loader(0.4), range(24))
    assert dropped(loader(0.4), reversed(range(24))) == forwards
    flat = [d for row in forwards.values() for d in row]
    assert 0.28 < sum(flat) / len(flat) < 0.52
    assert len({tuple(row) for row in forwards.values()}) > 12  # not one pattern for all steps
    assert dropped(loader(0.4, seed=1), range(24)) != forwards
    assert not any(d for row in dropped(loader(0.0), range(4)).values() for d in row)
    assert all(d for row in dropped(loader(1.0), range(4)).values() for d in row)


def test_a_step_is_a_batch_whatever_came_before(tiny):
    world = SignWorld("train", length=30, tasks={"t2i": 1.0, "move": 1.0})
    collate = Collator(tiny)
    a, b = Loader(world, collate, 4, seed=3), Loader(world, collate, 4, seed=3)
    first = [a(s) for s in range(6)]
    for step in (5, 2, 0):
        again = b(step)
        assert again.prompts == first[step].prompts and torch.equal(again.x0, first[step].x0)
    assert {len(batch) for batch in first} == {4}


def test_unreadable_records_are_counted_told_once_and_replaced(tiny, capsys):
    data = Broken(SignWorld("train", length=8), frozenset({2, 5}))
    loader = Loader(data, Collator(tiny, latents=False), 4, seed=0)
    for step in range(6):  # three epochs
        batch = loader(step)
        assert len(batch) == 4 and not {2, 5} & set(batch.groups.tolist())
    assert loader.unreadable == {2, 5}
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [f"left out record {i}: {i}.png is truncated" for i in (2, 5)]


def test_a_batch_without_any_readable_record_is_refused(tiny):
    data = Broken(SignWorld("train", length=4), frozenset(range(4)))
    with pytest.raises(InputError, match="could be read"):
        Loader(data, Collator(tiny), 2, seed=0)(0)


def test_a_wrong_dropout_is_refused(tiny):
    with pytest.raises(InputError, match="caption_dropout"):
        Loader(SignWorld("train", length=4), Collator(tiny), 2, 0, caption_dropout=1.5)
