"""References: their statistics, and caches that are used only for what they were made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.images import read_image
from eval.sets.reference import Reference, Statistics
from flux2.data.record import Record, UnreadableRecord
from flux2.data.signs import SignWorld
from flux2.errors import InputError


@dataclass
class Colours:
    """An extractor: the mean colour of each image."""

    engine: str = "colours:ab12()"
    dim: int = 3
    licence: str = "none"
    seen: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.seen += len(images)
        return images.float().mean((2, 3))

    def embed(self, images: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass
class Listed:
    """Records made of images; None cannot be read."""

    images: list[np.ndarray | None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        image = self.images[index]
        if image is None:
            raise UnreadableRecord("broken")
        return Record(index, "", image)

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        return self[index].bucket


def pictures(n: int, seed: int = 0, size: int = 8) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(n)]


def test_statistics_by_hand() -> None:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 4))).float()
    found = Statistics.of(x, keep=7)
    np.testing.assert_allclose(found.mean, x.double().mean(0))
    np.testing.assert_allclose(found.cov, np.cov(x.numpy().astype(float).T))
    assert found.n == 30 and found.cov.dtype == torch.float64
    # Seven, evenly spaced: the records may be sorted.
    torch.testing.assert_close(found.features, x[[0, 4, 8, 12, 17, 21, 25]])
    torch.testing.assert_close(Statistics.of(x).features, x)
    for bad in (x[:1], torch.full((3, 2), float("nan"))):
        with pytest.raises(InputError, match="finite"):
            Statistics.of(bad)


def test_of_a_dataset_in_order_with_sizes_mixed_and_the_unreadable_left_out() -> None:
    images = [*pictures(70), None, *pictures(3, 1, 16), *pictures(2, 2)]
    extractor = Colours()
    found = Reference(Listed(images)).statistics(extractor)
    wanted = torch.tensor(np.stack([i.mean((0, 1)) for i in images if i is not None]))
    torch.testing.assert_close(found.features.double(), wanted, atol=1e-4, rtol=0)
    assert found.n == extractor.seen == 75


def test_of_the_sign_world() -> None:
    reference = Reference(SignWorld("heldout", 5), count=4)
    found = reference.statistics(Colours())
    wanted = [SignWorld("heldout", 5)[i].target.mean((0, 1)) for i in range(4)]
    np.testing.assert_allclose(found.features, wanted, atol=1e-3)
    assert reference.statistics(Colours()) is found  # in memory


def test_the_hash_is_of_the_images() -> None:
    images = pictures(5)
    same = Reference(Listed(list(images))).hash
    assert Reference(Listed(images)).hash == same and len(same) == 12
    changed = [i.copy() for i in images]
    changed[3][0, 0, 0] ^= 1
    others = [
        Reference(Listed(changed)).hash,
        Reference(Listed(images[::-1])).hash,
        Reference(Listed(images), count=4).hash,
        Reference(Listed([i.reshape(4, 16, 3) for i in images])).hash,
    ]
    assert len({same, *others}) == 5


def test_of_a_folder(tmp_path: Path) -> None:
    images = pictures(4)
    (tmp_path / "sub").mkdir()
    for name, image in zip(("a.png", "b.png", "sub/c.png", ".hidden.png"), images, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    reference = Reference(folder=str(tmp_path))
    found = reference.statistics(Colours())
    np.testing.assert_allclose(found.features, [i.mean((0, 1)) for i in images[:3]], atol=1e-3)
    before = reference.hash
    Image.fromarray(images[3]).save(tmp_path / "b.png")
    assert Reference(folder=str(tmp_path)).hash != before
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.png cannot be read"):
        Reference(folder=str(tmp_path)).statistics(Colours())


def test_an_image_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(pictures(1)[0][:4]).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (8, 4, 3)


def cached(folder: Path, extractor: Colours, images: list[np.ndarray], **other: int) -> Statistics:
    return Reference(Listed(list(images)), cache=str(folder), **other).statistics(extractor)


def test_a_cache_is_used_for_what_it_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, extractor = pictures(6), Colours()
    first = cached(tmp_path, extractor, images)
    assert "no statistics yet" in capsys.readouterr().out
    [file] = tmp_path.glob("*.safetensors")
    said = json.loads(file.with_suffix(".json").read_text())
    assert said["engine"] == extractor.engine and said["n"] == said["count"] == 6
    assert said["images"] == Reference(Listed(list(images))).hash and "created" in said
    again = cached(tmp_path, extractor, images)
    assert extractor.seen == 6 and capsys.readouterr().out == ""
    for name in ("mean", "cov", "features"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert again.n == 6


def test_a_cache_of_something_else_is_made_anew_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, extractor = pictures(6), Colours()
    cached(tmp_path, extractor, images)
    [file] = tmp_path.glob("*.safetensors")
    changes = {
        "images": lambda: cached(tmp_path, extractor, pictures(6, 9)),
        "count": lambda: cached(tmp_path, extractor, pictures(6, 9), count=5),
        "keep": lambda: cached(tmp_path, extractor, pictures(6, 9), count=5, keep=3),
    }
    for key, make in changes.items():
        capsys.readouterr()
        seen = extractor.seen
        found = make()
        out = capsys.readouterr().out
        assert f"was made with {key}" in out and out.count("\n") == 1, out
        assert extractor.seen > seen
        np.testing.assert_allclose(found.mean, make().mean)
    # Another extractor has a file of its own, and a damaged one is no reason to fail.
    cached(tmp_path, Colours("other:cd34()"), images)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    file.write_bytes(file.read_bytes()[:100])
    seen = extractor.seen
    cached(tmp_path, extractor, images)
    assert extractor.seen == seen + 6


@dataclass
class Counted(Listed):
    """Says how often it is read, and nothing of it in its repr."""

    name: str = "a"
    reads: int = field(default=0, repr=False)

    def __repr__(self) -> str:
        return f"Counted({self.name})"

    def __getitem__(self, index: int) -> Record:
        self.reads += 1
        return super().__getitem__(index)


def test_the_hash_is_kept_for_what_the_data_say_of_themselves(tmp_path: Path) -> None:
    data = Counted(list(pictures(4)))
    wanted = Reference(data).hash
    for count in (8, 8):  # four for each hash that was computed
        assert Reference(data, cache=str(tmp_path)).hash == wanted and data.reads == count
    other = Counted(list(pictures(4, 1)), "b")
    assert Reference(other, cache=str(tmp_path)).hash == Reference(other).hash != wanted
    [file] = [f for f in tmp_path.glob("images-*") if wanted in f.read_text()]
    file.write_text("{")
    assert Reference(data, cache=str(tmp_path)).hash == wanted and data.reads == 12


def test_the_hash_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    folder, cache = tmp_path / "images", tmp_path / "cache"
    folder.mkdir()
    for k, image in enumerate(pictures(3)):
        Image.fromarray(image).save(folder / f"{k}.png")

    def found() -> str:
        return Reference(folder=str(folder), cache=str(cache)).hash

    before = found()
    assert found() == before == Reference(folder=str(folder)).hash
    Image.fromarray(pictures(1, 7)[0]).save(folder / "1.png")
    assert found() == Reference(folder=str(folder)).hash != before


def test_what_is_no_reference(tmp_path: Path) -> None:
    data = Listed(pictures(3))
    with pytest.raises(InputError, match="one of the two"):
        Reference()
    with pytest.raises(InputError, match="one of the two"):
        Reference(data, str(tmp_path))
    with pytest.raises(InputError, match=r"count is 1"):
        Reference(data, count=1)
    with pytest.raises(InputError, match="no folder"):
        Reference(folder=str(tmp_path / "none"))
    with pytest.raises(InputError, match="0 images"):
        Reference(folder=str(tmp_path))

    class Promptly(Listed):
        def __getitem__(self, index: int) -> Record:
            return Record(index, "a prompt")

    with pytest.raises(InputError, match="record 0 has no target"):
        _ = Reference(Promptly(pictures(3))).hash
