"""safetensors files written tensor by tensor, read by safetensors itself."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flux2 import folders
from flux2.formats import Part

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(4, 2).bfloat16(),
    "count": torch.tensor(7),
    "odd": torch.randn(7, 3).t(),  # not contiguous
    "empty": torch.zeros(0, 4),
    "half": torch.randn(3).half(),
}


def test_safetensors_reads_what_was_written(tmp_path):
    parts = {k: Part.of(v) for k, v in TENSORS.items()}
    digest = folders.write(tmp_path / "x.safetensors", parts, {"format": "pt", "note": "é"})
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        assert back[name].dtype == want.dtype and torch.equal(back[name], want)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
    assert hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest() == digest


def test_the_order_of_tensors_and_metadata_does_not_show(tmp_path):
    parts = {k: Part.of(v, torch.bfloat16) for k, v in TENSORS.items()}
    notes = {"z": "1", "a": "2", "format": "pt"}
    one = folders.write(tmp_path / "one", parts, notes)
    two = folders.write(
        tmp_path / "two", dict(reversed(parts.items())), dict(reversed(notes.items()))
    )
    assert one == two
    assert load_file(tmp_path / "one")["b"].dtype == torch.bfloat16
    assert load_file(tmp_path / "one")["count"] == 7  # integers are not rounded


def test_tensors_are_made_one_at_a_time(tmp_path):
    alive: list[str] = []

    class Loud:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self) -> torch.Tensor:
            alive.append(self.name)
            return torch.ones(2)

    parts = {k: Part((2,), torch.float32, Loud(k)) for k in "ba"}
    assert alive == []
    folders.write(tmp_path / "x", parts, {})
    assert alive == ["a", "b"]


def test_a_tensor_of_another_shape_than_announced_is_an_error(tmp_path):
    parts = {"x": Part((3,), torch.float32, lambda: torch.ones(2))}
    with pytest.raises(ValueError, match="announced"):
        folders.write(tmp_path / "x", parts, {})
