"""Tensors in files: parts, memory that is shared or lent, reading by name."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from flux2.errors import InputError
from flux2.shards import Tensors, read_safetensors, write_share

BIG = 1 << 30


def test_parts_hold_at_most_so_many_bytes_and_together_everything(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}  # 40 bytes each
    tensors["large"] = torch.arange(100.0)
    share = write_share(tmp_path, 3, tensors, max_bytes=100)
    assert share.fault is None and set(share.index) == set(tensors)
    assert sorted(share.files) == [f"weights-00003-0000{i}.safetensors" for i in range(5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(share.files)
    for name in share.files:
        held = read_safetensors(tmp_path / name)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 100
    got = Tensors(tmp_path, share.index)
    assert all(torch.equal(got[name], value) for name, value in tensors.items())


def test_memory_that_is_lent_may_be_used_again(tmp_path):
    buffer = torch.empty(4)

    def gathered():
        for i in range(3):
            buffer.fill_(i)
            yield f"t{i}", buffer
            buffer.fill_(-1)

    share = write_share(tmp_path, 0, gathered(), BIG)
    got = Tensors(tmp_path, share.index)
    assert [got[f"t{i}"].tolist() for i in range(3)] == [[i] * 4 for i in range(3)]


def test_tensors_that_share_memory_views_and_empty_ones_survive(tmp_path):
    table = torch.randn(4, 6)
    tensors = {"in": table, "out": table, "view": table.T, "row": table[1], "none": table[:0],
               "scalar": torch.tensor(2.5), "half": table.bfloat16()}  # fmt: skip
    got = Tensors(tmp_path, write_share(tmp_path, 0, tensors, BIG).index)
    for name, value in tensors.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def test_only_the_files_that_are_asked_for_are_read(tmp_path):
    tensors = {"a": torch.ones(10), "b": torch.zeros(10)}
    share = write_share(tmp_path, 0, tensors, max_bytes=40)
    (tmp_path / share.index["b"]).write_bytes(b"torn")
    got = Tensors(tmp_path, share.index)
    assert "b" in got and len(got) == 2 and set(got) == {"a", "b"}  # without a look at it
    assert torch.equal(got["a"], torch.ones(10))
    assert set(got.select(lambda name: name == "a")) == {"a"}
    with pytest.raises(InputError, match=share.index["b"]):
        got["b"]
    with pytest.raises(KeyError):
        got["c"]


def test_changes_in_place_stay_in_memory(tmp_path):
    share = write_share(tmp_path, 0, {"a": torch.ones(10)}, BIG)
    Tensors(tmp_path, share.index)["a"].zero_()
    assert torch.equal(Tensors(tmp_path, share.index)["a"], torch.ones(10))


@pytest.mark.parametrize("fails", [0, 1])
def test_a_fault_is_kept_and_the_rest_is_consumed(tmp_path, monkeypatch, fails):
    """Other ranks wait in the gathers that an iterable makes, whatever becomes of this one's
    disk."""
    import safetensors.torch

    real, calls, seen = safetensors.torch.save_file, [], []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > fails:
            (tmp_path / "half").write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    def gathered():
        for i in range(6):
            seen.append(i)
            yield f"t{i}", torch.ones(10)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    share = write_share(tmp_path, 0, gathered(), max_bytes=80)
    assert isinstance(share.fault, OSError) and share.fault.errno == errno.ENOSPC
    assert share.fault.strerror == os.strerror(errno.ENOSPC)
    assert seen == list(range(6)) and len(calls) == fails + 1


def test_other_faults_are_kept_as_they_are(tmp_path):
    share = write_share(tmp_path, 0, [("a", torch.ones(1)), ("a", torch.ones(1))], BIG)
    assert isinstance(share.fault, ValueError) and "named a" in str(share.fault)

    def broken():
        yield "a", torch.ones(1)
        raise RuntimeError("boom")

    share = write_share(tmp_path, 0, broken(), BIG)
    assert isinstance(share.fault, RuntimeError) and str(share.fault) == "boom"


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_corrupt_safetensors_are_one_line(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="absent"):
        read_safetensors(tmp_path / "absent.safetensors")
