"""Files are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from flux2.errors import InputError
from flux2.files import (
    digest,
    disk_fault,
    jsonable,
    read_json,
    sha256_of,
    write_bytes,
    write_json,
)


def test_json_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))
        )
    write_bytes(tmp_path / "x", b"content")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert (tmp_path / "x").read_bytes() == b"content"


def test_jsonable():
    value = {"nan": math.nan, "inf": [math.inf, 1.5], 3: Path("a"), "t": torch.tensor(2.0)}
    assert jsonable(value) == {"nan": None, "inf": [None, 1.5], "3": "a", "t": 2.0}
    assert jsonable(np.array([1, 2])) == [1, 2] and jsonable(np.float64("nan")) is None
    with pytest.raises(TypeError, match="set"):
        jsonable({1})


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_what_is_no_json_object_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_hashes(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    assert sha256_of(paths) == [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
    assert digest({"a": 1, "b": 2}) == digest(json.loads('{"b": 2, "a": 1}')) != digest({"a": 1})


def test_a_full_disk_is_told_from_other_errors():
    from safetensors import SafetensorError

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
    assert disk_fault(full) == "No space left on device: metrics.jsonl"
    assert disk_fault(OSError(errno.EFBIG, "cannot write checkpoint x")) == (
        "cannot write checkpoint x"
    )
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    assert disk_fault(SafetensorError(text)) == text
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("while closing") from error
    except RuntimeError as error:
        assert disk_fault(error) == "No space left on device: metrics.jsonl"
    for other in (FileNotFoundError(errno.ENOENT, "absent"), RuntimeError("boom"), None,
                  SafetensorError("no such file (os error 2)")):  # fmt: skip
        assert disk_fault(other) is None
