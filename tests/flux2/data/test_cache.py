"""Rows on disk equal fresh ones, and are never stale or torn."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from flux2.data.cache import RowCache, fingerprint
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld


class Maker:
    """Rows that tell which were made."""

    def __init__(self, ids: list[int], shape=(2, 3)) -> None:
        self.ids, self.shape, self.made = ids, shape, []

    def __call__(self, positions: list[int]) -> torch.Tensor:
        asked = [self.ids[k] for k in positions]
        self.made += asked
        return torch.stack([torch.full(self.shape, i + 0.1) for i in asked])


def ask(cache: RowCache, ids: list[int], name: str = "target"):
    maker = Maker(ids)
    rows = cache(name, ids, maker)
    want = torch.stack([torch.full((2, 3), i + 0.1) for i in ids]).half().float()
    assert torch.equal(rows, want) and rows.dtype == torch.float32
    return maker.made


def test_rows_are_made_once_and_equal_fresh_ones_through_fp16(tmp_path):
    cache = RowCache(tmp_path, "key", 10)
    assert ask(cache, [3, 1, 7]) == [3, 1, 7]
    assert ask(cache, [7, 2, 3]) == [2]
    assert ask(cache, [1, 2]) == []
    assert ask(cache, [1, 2], name="text") == [1, 2]  # a column of its own
    again = RowCache(tmp_path, "key", 10)  # another process
    assert ask(again, [1, 3, 4]) == [4]
    assert ask(RowCache(tmp_path, "other", 10), [1]) == [1]


def test_a_record_twice_in_a_batch(tmp_path):
    cache = RowCache(tmp_path, "key", 10)
    ask(cache, [4, 4, 5])
    assert ask(cache, [5, 4, 4]) == []


def test_a_torn_row_is_made_again(tmp_path):
    """Killed between writing a row and marking it: half of a row is there, without a mark."""
    cache = RowCache(tmp_path, "key", 10)
    ask(cache, [0, 1, 2])
    rows, done = cache._open["target"]
    rows[1, 0] = -5
    done[1] = 0
    rows.flush()
    done.flush()
    again = RowCache(tmp_path, "key", 10)
    assert ask(again, [0, 1, 2]) == [1]


def test_a_row_is_marked_after_it_is_written(tmp_path, monkeypatch):
    cache = RowCache(tmp_path, "key", 10)
    ask(cache, [0])
    rows, done = cache._open["target"]

    class Full(np.ndarray):
        def __setitem__(self, key, value):
            raise OSError("disk full")

    cache._open["target"] = (rows.view(Full), done)
    with pytest.raises(OSError):
        cache("target", [1], Maker([1]))
    assert done[0] == 1 and done[1] == 0


def test_killed_between_the_two_files(tmp_path):
    """Marks without rows: nothing is taken for whole."""
    cache = RowCache(tmp_path, "key", 10)
    ask(cache, [0, 1])
    cache._file("target", "rows").unlink()
    assert ask(RowCache(tmp_path, "key", 10), [0, 1]) == [0, 1]


def test_two_processes_that_begin_together_lose_nothing(tmp_path):
    """Both find the column absent and create it; the second must not wipe the first one's rows."""
    a, b = RowCache(tmp_path, "key", 10), RowCache(tmp_path, "key", 10)

    class Slow(Maker):
        def __call__(self, positions):
            assert ask(a, [0, 1]) == [0, 1]  # meanwhile, in the other process
            return super().__call__(positions)

    rows = b("target", [2], Slow([2]))
    assert rows[0, 0, 0] == torch.tensor(2.1).half()
    assert ask(RowCache(tmp_path, "key", 10), [0, 1, 2]) == []
    assert ask(a, [0, 1, 2]) == []


def test_the_key_changes_with_weights_buffers_and_settings(tiny):
    def key(model, *facts) -> str:
        return fingerprint(*facts, modules=(model.vae, model.text.encoder))

    world = SignWorld("train", length=10)
    base = key(tiny, world, 24)
    assert base == key(tiny, SignWorld("train", length=10), 24) and len(base) == 16
    others = [key(tiny, world, 25), key(tiny, SignWorld("train", length=10, loose=0.2), 24)]
    changed = copy.deepcopy(tiny)
    changed.vae.bn.running_var[0] += 1e-3
    others.append(key(changed, world, 24))
    changed = copy.deepcopy(tiny)
    next(changed.text.encoder.parameters()).data[0, 0] += 1e-3
    others.append(key(changed, world, 24))
    changed = copy.deepcopy(tiny)
    next(changed.vae.parameters()).data[0] += 1e-3
    others.append(key(changed, world, 24))
    assert len({base, *others}) == 6
    assert fingerprint(modules=(torch.nn.Linear(2, 2).bfloat16(),))  # any dtype


def test_a_cached_batch_equals_a_fresh_one(tiny, tmp_path):
    world = SignWorld("train", length=20, tasks={"compose": 1.0})
    records = [world[i] for i in (3, 9)]
    ids = torch.arange(2)
    fresh = Collator(tiny)(records, ids, [False, True])
    cached = Collator(tiny, cache=RowCache(tmp_path, "key", 20))
    for _ in range(2):  # made, then read
        got = cached(records, ids, [False, True])
        for name in ("text", "ref"):
            want = getattr(fresh.cond, name)
            torch.testing.assert_close(getattr(got.cond, name), want, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(got.x0, fresh.x0, atol=2e-3, rtol=1e-3)
    # The dropped caption's row in the cache is the prompt's own, not the empty prompt's.
    kept = cached(records, ids)
    want = tiny.text([r.prompt for r in records])
    torch.testing.assert_close(kept.cond.text, want, atol=2e-3, rtol=1e-3)
