"""Records → batches: what is encoded, what is dropped, what cannot be read."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from flux2.adapters import Switch
from flux2.data.cache import RowCache
from flux2.data.difficulty import Resampled
from flux2.data.loader import Collator, Loader, check_group_lengths, stack_images, trimmed
from flux2.data.mixture import Mixture, Reconstruction
from flux2.data.record import UnreadableRecord
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.latents import grid_ids, reference_ids
from flux2.nano import build_text_encoder, build_tokenizer
from flux2.roles import VelocityRole
from flux2.samplers import guided
from flux2.text import TextEncoder
from tests.flux2.data.toys import Told


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


# ---------------------------------------------------------------- captions


@dataclass(frozen=True)
class Captioned:
    """Signs with a caption besides the prompt, and every third with another one."""

    world: SignWorld

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int):
        record = self.world[index]
        captions = {"short": f"sign {index}"} | ({"user": "pls"} if index % 3 == 0 else {})
        return replace(record, meta={**record.meta, "captions": captions})

    def bucket_of(self, index: int):
        return self.world.bucket_of(index)


def test_captions_are_drawn_by_seed_step_and_sample(tiny):
    data, collate = Captioned(SignWorld(length=32)), Collator(tiny, latents=False)

    def loader(seed: int = 0, **more) -> Loader:
        return Loader(data, collate, 8, seed, captions={"prompt": 1.0, "short": 1.0}, **more)

    batches = [loader()(step) for step in range(12)]
    kinds = Counter(m["caption"] for b in batches for m in b.meta)
    assert kinds.total() == 96 and 30 < kinds["short"] < 66
    for batch in batches:
        for group, prompt, meta in zip(batch.groups.tolist(), batch.prompts, batch.meta,
                                       strict=True):  # fmt: skip
            want = data.world[group].prompt if meta["caption"] == "prompt" else f"sign {group}"
            assert prompt == want
        torch.testing.assert_close(batch.cond.text, tiny.text(batch.prompts))
    again = loader()
    assert [again(s).prompts for s in (7, 3)] == [batches[7].prompts, batches[3].prompts]
    assert loader(seed=1)(0).prompts != batches[0].prompts
    patterns = {tuple(m["caption"] for m in b.meta) for b in batches}
    assert len(patterns) > 6  # not one for all steps
    plain = Loader(data, collate, 8, 0)(0)
    assert plain.prompts == tuple(data.world[i].prompt for i in plain.groups.tolist())


def test_cached_captions_are_those_that_were_drawn(tiny, tmp_path):
    data, weights = Captioned(SignWorld(length=12)), {"prompt": 1.0, "short": 1.0, "user": 1.0}
    cache = RowCache(tmp_path, "key", len(data))
    loader = Loader(data, Collator(tiny, cache=cache), 4, 0, captions=weights)
    fresh = Loader(data, Collator(tiny), 4, 0, captions=weights)
    for step in range(9):  # what one step has put there, another finds
        got, want = loader(step), fresh(step)
        assert got.prompts == want.prompts
        torch.testing.assert_close(got.cond.text, want.cond.text, atol=2e-3, rtol=1e-2)


def test_filling_encodes_every_caption(tiny, tmp_path, monkeypatch):
    data, weights = Captioned(SignWorld(length=6)), {"prompt": 1.0, "user": 1.0, "long": 0.0}
    cache = RowCache(tmp_path, "key", len(data))
    loader = Loader(data, Collator(tiny, cache=cache), 3, 0, captions=weights)
    loader.fill()

    class Freed(TextEncoder):
        def __init__(self) -> None:
            vars(self).update(vars(tiny.text) | {"encoder": None, "_seen": {}})

    freed = copy.copy(tiny)
    freed.text = Freed()
    late = Loader(data, Collator(freed, cache=cache), 3, 0, captions=weights)
    assert {m["caption"] for step in range(8) for m in late(step).meta} == {"prompt", "user"}


def test_wrong_weights_of_captions_are_refused(tiny):
    with pytest.raises(InputError, match=r"data\.captions"):
        Loader(SignWorld(length=4), Collator(tiny), 2, 0, captions={"short": -1.0})


# ---------------------------------------------------------------- padding


@pytest.fixture(params=["right", "left"])
def hiding(request, tiny):
    """A model that hides padding, and a transformer that reads its features: klein's text is
    padded on the right, dev's on the left."""
    text = copy.copy(tiny.text)
    if request.param == "left":
        eye = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
               "num_attention_heads": 1, "head_dim": 16, "image_size": 28,
               "patch_size": 14}  # fmt: skip
        body = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 32,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
                "sliding_window": None}  # fmt: skip
        tokenizer = build_tokenizer(40, "mistral3")
        config = {"model_type": "mistral3", "text_config": body, "vision_config": eye}
        text = TextEncoder(build_text_encoder(config, len(tokenizer), 0), tokenizer, 40)
    text.max_length, text.mask_padding, text._seen = 40, True, {}
    model = copy.copy(tiny)
    model.text = text
    return model


def velocity(model) -> VelocityRole:
    return VelocityRole(model.transformer, Switch(model.transformer), None, None)


def test_cutting_hidden_padding_changes_no_velocity(hiding, monkeypatch):
    data = SignWorld(length=6, tasks={"move": 1.0})
    records = [data[i] for i in range(6)]

    def batch():
        return Collator(hiding, unconditional=True)(records, torch.arange(6), [False, True] * 3)

    short = batch()
    monkeypatch.setattr("flux2.data.loader.trimmed", lambda *masks: slice(None))
    whole = batch()
    assert whole.cond.text.shape[1] == 40
    longest = int(hiding.text.mask(["", *(r.prompt for r in records[::2])]).sum(1).max())
    assert short.cond.text.shape[1] == longest < 40
    # Tokens keep the places that they had.
    places = short.cond.text_ids[0, :, 3].tolist()
    assert places == (list(range(longest)) if hiding.text.family == "qwen3"
                      else list(range(40 - longest, 40)))  # fmt: skip
    x, t = torch.randn(6, 16, 128, generator=torch.Generator().manual_seed(0)), torch.rand(6)
    for scale in (1.0, 3.0):
        role = guided(velocity(hiding), scale)
        with torch.no_grad():
            a, b = role(x, t, short.cond), role(x, t, whole.cond)
        assert b.std() > 0.01
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_padding_that_takes_part_is_not_cut_and_may_not_be(hiding):
    hiding.text.mask_padding = False
    data = SignWorld(length=3)
    batch = Collator(hiding)([data[i] for i in range(3)], torch.arange(3))
    assert batch.cond.text.shape[1] == 40 and batch.cond.mask is None
    keep = trimmed(hiding.text.mask(batch.prompts))
    cut = replace(batch.cond, text=batch.cond.text[:, keep], text_ids=batch.cond.text_ids[:, keep])
    x, t = torch.randn(3, 16, 128, generator=torch.Generator().manual_seed(0)), torch.rand(3)
    with torch.no_grad():
        a, b = (velocity(hiding)(x, t, c) for c in (cut, batch.cond))
    assert (a - b).abs().max() > 1e-3  # another model


def test_grouped_lengths_cut_more(hiding):
    metas = [{"prompt": "red " * (1 + 5 * (i % 4))} for i in range(64)]
    data = Told(metas, (64,))
    collate = Collator(hiding, latents=False)

    def tokens(grouped: bool) -> int:
        loader = Loader(data, collate, 4, 0, group_lengths=grouped)
        batches = [loader(step) for step in range(16)]
        assert Counter(i for b in batches for i in b.groups.tolist()) == Counter(range(64))
        return sum(b.cond.text[..., 0].numel() for b in batches)

    assert tokens(True) < 0.85 * tokens(False)


def test_grouping_lengths_without_hidden_padding_is_refused(tiny):
    with pytest.raises(InputError, match="mask_padding"):
        Loader(SignWorld(length=4), Collator(tiny), 2, 0, group_lengths=True)
    with pytest.raises(InputError, match="mask_padding"):
        check_group_lengths(False)
    check_group_lengths(True)


# ---------------------------------------------------------------- datasets over datasets


def test_a_mixtures_rows_in_a_cache_are_its_own(tiny, tmp_path):
    worlds = [SignWorld(length=4, seed=k) for k in range(3)]
    parts = {"a": worlds[0], "b": worlds[1], "again": Reconstruction(worlds[2])}
    data = Mixture({n: {"dataset": d, "weight": 1.0} for n, d in parts.items()})
    cache = RowCache(tmp_path, "key", len(data))
    cached, fresh = (Loader(data, Collator(tiny, cache=c), 2, 0) for c in (cache, None))
    cached.fill()
    seen: set[int] = set()
    for step in range(12):
        got, want = cached(step), fresh(step)
        seen.update(want.groups.tolist())
        assert torch.equal(got.groups, want.groups) and got.prompts == want.prompts
        torch.testing.assert_close(got.x0, want.x0, atol=5e-3, rtol=5e-3)
        if got.cond.ref is not None:
            torch.testing.assert_close(got.cond.ref, got.x0, atol=5e-3, rtol=5e-3)
    assert seen == set(range(12))


def test_scores_go_to_data_that_resample_and_survive_a_resume(tiny):
    def loader() -> Loader:
        return Loader(Resampled(SignWorld(length=8)), Collator(tiny, latents=False), 4, 0)

    one = loader()
    ids = torch.tensor([1, 1, 2, 2])
    assert one.observe(ids, torch.tensor([0.0, 1.0, 0.0, 0.0]))["prompts_seen"] == 0.25
    two = loader()
    fresh = [two(s).groups.tolist() for s in range(20)]
    two.load_state_dict(one.state_dict())
    later = [two(s).groups.tolist() for s in range(20)]
    assert later == [one(s).groups.tolist() for s in range(20)] != fresh
    plain = Loader(SignWorld(length=8), Collator(tiny), 4, 0)
    assert plain.observe(ids, torch.zeros(4)) == {} == plain.state_dict()
    plain.load_state_dict({})
    with pytest.raises(InputError, match="did not resample"):
        two.load_state_dict({})
    with pytest.raises(InputError, match="this does not"):
        plain.load_state_dict(one.state_dict())
