"""Readers of users' own data, on files written here."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from flux2.data.loader import Loader
from flux2.data.readers import Folder, Jsonl, Prompts, nearest_size
from flux2.data.record import UnreadableRecord
from flux2.errors import InputError
from flux2.train import build

CONF = Path(__file__).parents[3] / "conf/data"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def paint(path: Path, size: tuple[int, int], colour: Any = RED, **save: Any) -> Path:
    """A flat image of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)
    return path


def captioned(root: Path, name: str, size: tuple[int, int] = (64, 64), **kwargs: Any) -> Path:
    file = paint(root / name, size, **kwargs)
    file.with_suffix(".txt").write_text(f"a picture named {file.stem}\n")
    return file


def lines(path: Path, *objects: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [o if isinstance(o, str) else json.dumps(o, ensure_ascii=False) for o in objects]
    path.write_text("".join(t + "\n" for t in text), encoding="utf-8")
    return path


def refused(match: str, make: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        make(*args, **kwargs)
    assert "\n" not in str(caught.value)


# -- folders -------------------------------------------------------------------------------------


def test_folder_is_in_order_of_paths_with_captions_and_passes_over_hidden_files(tmp_path):
    captioned(tmp_path, "b.PNG", colour=GREEN)
    captioned(tmp_path, "sub/a.jpg")
    captioned(tmp_path, "a.webp", colour=BLUE, lossless=True)
    (tmp_path / "._a.png").write_bytes(b"not an image")
    (tmp_path / ".cache").mkdir()
    paint(tmp_path / ".cache/x.png", (8, 8))
    (tmp_path / "notes.md").write_text("passed over")
    data = Folder(str(tmp_path))
    assert [data[i].meta["file"] for i in range(len(data))] == ["a.webp", "b.PNG", "sub/a.jpg"]
    assert [data[i].id for i in range(3)] == [0, 1, 2]
    assert data[1].prompt == "a picture named b"
    target = data[1].target
    assert target is not None and target.shape == (64, 64, 3) and target.dtype == np.uint8
    assert (target == np.array(GREEN)).all()
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((300, 200), (32, 48)), ((200, 300), (48, 32)), ((100, 100), (48, 48)), ((8, 8), (48, 48))],
)
def test_an_image_goes_to_the_bucket_of_nearest_aspect(tmp_path, size, bucket):
    captioned(tmp_path, "a.png", size)
    data = Folder(str(tmp_path), sizes=[[48, 48], [32, 48], [48, 32]])
    assert data.bucket_of(0) == (*bucket, 0) == data[0].bucket


def test_among_sizes_of_one_aspect_the_nearest_in_area_is_taken():
    sizes = [(64, 64), (256, 256), (512, 512), (64, 128)]
    assert [nearest_size((s, s), sizes) for s in (10, 90, 230, 5000)] == [
        (64, 64), (64, 64), (256, 256), (512, 512),
    ]  # fmt: skip


def test_resizing_covers_and_cuts_the_overhang_evenly(tmp_path):
    """Bands of a wide image: the outer ones lie outside the centre square, and vanish."""
    wide = np.zeros((128, 256, 3), np.uint8)
    wide[:, :56], wide[:, 56:128], wide[:, 128:200], wide[:, 200:] = RED, GREEN, BLUE, RED
    Image.fromarray(wide).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("bands")
    target = Folder(str(tmp_path), sizes=[[64, 64]])[0].target
    assert target is not None and not target[..., 0].any()
    assert (target[:, :28] == GREEN).all() and (target[:, 36:] == BLUE).all()


def test_resizing_is_lanczos_of_the_whole_then_a_cut(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (96, 160, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("noise")
    whole = Image.fromarray(noise).resize((80, 48), Image.Resampling.LANCZOS)
    target = Folder(str(tmp_path), sizes=[[48, 48]])[0].target
    assert target is not None
    np.testing.assert_array_equal(target, np.asarray(whole)[:, 16:64])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_turns_image_and_bucket(tmp_path, name):
    """Orientation 6: stored lying on its left side; upright, its left column is on top."""
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :32], stored[:, 32:] = (250, 250, 250), (5, 5, 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / name, exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("turned")
    data = Folder(str(tmp_path), sizes=[[32, 64], [64, 32]])
    assert data.bucket_of(0) == (64, 32, 0) == data[0].bucket
    target = data[0].target
    assert target is not None and target[:28].min() > 200 and target[36:].max() < 50


def test_every_mode_becomes_rgb(tmp_path):
    """Transparent parts show white; 16 bits of grey keep their range; palettes and grey work."""
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 16, 8))
    deep = Image.fromarray(np.full((16, 16), 128 * 257, np.uint16))
    palette = Image.new("RGB", (16, 16), GREEN).quantize(4)
    for name, image in {"a": clear, "b": deep, "c": palette, "d": Image.new("L", (16, 16), 7),
                        "e": Image.new("1", (16, 16), 1)}.items():  # fmt: skip
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    data = Folder(str(tmp_path), sizes=[[16, 16]])
    found = [cast(np.ndarray, data[i].target) for i in range(5)]
    assert (found[0][:7] == BLUE).all() and (found[0][9:] == 255).all()
    assert (found[1] == 128).all() and (found[2] == GREEN).all()
    assert (found[3] == 7).all() and (found[4] == 255).all()


def test_folder_refuses_what_it_cannot_use(tmp_path):
    refused("is no folder", Folder, str(tmp_path / "none"))
    refused("holds no image", Folder, str(tmp_path))
    image = paint(tmp_path / "a.png", (16, 16))
    refused(r"a\.txt is missing", Folder, str(tmp_path))
    image.with_suffix(".txt").write_text(" \n")
    refused(r"a\.txt is empty", Folder, str(tmp_path))
    image.with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    refused(r"a\.txt is not UTF-8", Folder, str(tmp_path))
    image.with_suffix(".txt").write_text("fine")
    paint(tmp_path / "a.jpg", (16, 16))
    refused(r"a\.png has the same caption file as a\.jpg", Folder, str(tmp_path))


@pytest.mark.parametrize(
    "sizes", [[], [[64]], [[64, 60]], [[0, 64]], [[-16, 64]], [[64.0, 64]], [[True, 64]]]
)
def test_wrong_sizes_are_refused(tmp_path, sizes):
    captioned(tmp_path, "a.png")
    refused("multiples of 16|sizes is empty", Folder, str(tmp_path), sizes=sizes)


def test_the_stamp_follows_captions_and_files_and_stands_in_the_repr(tmp_path):
    """A cache's key is made of the repr: stale rows would be read under an unchanged one."""
    file = captioned(tmp_path, "a.png")
    stamps = [Folder(str(tmp_path)).stamp]
    assert Folder(str(tmp_path)).stamp == stamps[0]
    file.with_suffix(".txt").write_text("another caption")
    stamps.append(Folder(str(tmp_path)).stamp)
    os.utime(file, (1, 1))
    stamps.append(Folder(str(tmp_path)).stamp)
    assert len(set(stamps)) == 3
    assert stamps[-1] in repr(Folder(str(tmp_path)))
    sizes = [Folder(str(tmp_path), sizes=s) for s in ([[64, 64]], [[32, 32]])]
    assert repr(sizes[0]) != repr(sizes[1])


# -- unreadable images ---------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more pixels than Pillow's limit."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        tagged = kind + body
        return struct.pack(">I", len(body)) + tagged + struct.pack(">I", zlib.crc32(tagged))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def truncated(path: Path) -> bytes:
    paint(path, (64, 64), colour=GREEN)
    return path.read_bytes()[:-40]


@pytest.mark.filterwarnings("default")  # the reader itself makes Pillow's warning an error
@pytest.mark.parametrize("sizes", [[[64, 64]], [[64, 64], [32, 64]]])
def test_damaged_images_are_unreadable_at_access_and_only_there(tmp_path, sizes):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    bad = {
        "a.png": (b"not an image", "cannot identify"),
        "b.png": (b"", "cannot identify"),
        "c.png": (truncated(tmp_path / "c.png"), "truncated"),
        "d.png": (bomb(10_000, 10_000), "decompression bomb"),
        "e.png": (bomb(60_000, 60_000), "decompression bomb"),
        "f.png": (postscript, "cannot identify"),
        "g.png": (paint(tmp_path / "g.tiff", (8, 8)).read_bytes(), "cannot identify"),
    }
    for name, (content, _) in bad.items():
        captioned(tmp_path, name)
        (tmp_path / name).write_bytes(content)
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None and limit < 10_000 * 10_000
    data = Folder(str(tmp_path), sizes=sizes)
    for i, name in enumerate(sorted(bad)):
        assert len(data.bucket_of(i)) == 3
        with pytest.raises(UnreadableRecord, match=f"{name}: .*{bad[name][1]}"):
            data[i]


def test_an_image_that_vanished_is_unreadable(tmp_path):
    file = captioned(tmp_path, "a.png")
    data = Folder(str(tmp_path))
    file.unlink()
    with pytest.raises(UnreadableRecord):
        data[0]


def test_the_loader_counts_and_replaces_unreadable_records(tmp_path, capsys):
    for k in range(4):
        captioned(tmp_path, f"{k}.png")
    (tmp_path / "2.png").write_bytes(b"broken")

    def collate(records, ids, dropped):
        return SimpleNamespace(files=[r.meta["file"] for r in records])

    loader = Loader(Folder(str(tmp_path)), cast(Any, collate), batch_size=4, seed=0)
    files = cast(Any, loader(0)).files
    assert loader.unreadable == {2}
    assert len(files) == 4 and set(files) == {"0.png", "1.png", "3.png"}
    assert "2.png" in capsys.readouterr().err


# -- metadata.jsonl ------------------------------------------------------------------------------


def test_jsonl_reads_prompts_meta_and_images(tmp_path):
    paint(tmp_path / "img/a.png", (64, 64), GREEN)
    lines(
        tmp_path / "metadata.jsonl",
        {"file_name": "img/a.png", "text": "a green field"},
        "",
        {"image": "./img/../img/a.png", "prompt": 'says "HI"', "text": "HI", "id": 7, "meta":
            {"text_box": [0, 0.5, 1, 1], "artist": "me"}},
        {"image": "img/a.png", "prompt": "line\u2028separator", "text": ["A", "B"], "id": "7"},
    )  # fmt: skip
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        data = Jsonl(str(path), sizes=[[32, 32]])
        assert len(data) == 3
        assert data[0].prompt == "a green field" and data[0].meta == {}
        assert data[1].prompt == 'says "HI"'
        want = {"text": ("HI",), "text_box": (0, 0.5, 1, 1), "artist": "me", "id": 7}
        assert data[1].meta == want
        assert data[2].prompt == "line\u2028separator" and data[2].meta["text"] == ("A", "B")
        assert (cast(np.ndarray, data[0].target) == np.array(GREEN)).all()


def test_an_edit_has_references_and_a_mask_that_lie_on_its_target(tmp_path):
    """The mask's white square and the reference's blue one are cut and shrunk alike."""
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[32:96, 96:160] = BLUE
    Image.fromarray(pixels).save(tmp_path / "ref.png")
    Image.fromarray(pixels[..., 2]).save(tmp_path / "mask.png")
    paint(tmp_path / "target.png", (128, 128))
    paint(tmp_path / "other.png", (32, 32), GREEN)
    lines(tmp_path / "metadata.jsonl", {
        "image": "target.png", "prompt": "make it red",
        "references": ["other.png", "ref.png"], "mask": "mask.png",
    })  # fmt: skip
    data = Jsonl(str(tmp_path), sizes=[[64, 64], [32, 64]])
    record = data[0]
    assert data.bucket_of(0) == record.bucket == (64, 64, 2)
    assert record.mask is not None and record.mask.dtype == bool
    assert all(r.shape == (64, 64, 3) for r in record.references)
    want = np.zeros((64, 64), bool)
    want[16:48, 16:48] = True
    np.testing.assert_array_equal(record.mask, want)
    np.testing.assert_array_equal(record.references[1][..., 2] > 127, want)
    assert (record.references[0] == GREEN).all()


def test_a_mask_of_another_size_than_its_reference_is_unreadable(tmp_path):
    for name, size in {"t.png": (64, 64), "r.png": (64, 64), "m.png": (32, 64)}.items():
        paint(tmp_path / name, size)
    lines(tmp_path / "metadata.jsonl",
          {"image": "t.png", "prompt": "p", "references": ["r.png"], "mask": "m.png"})  # fmt: skip
    with pytest.raises(UnreadableRecord, match=r"m\.png"):
        Jsonl(str(tmp_path))[0]


GOOD = {"image": "a.png", "prompt": "p"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "no JSON object"),
        ({"image": "a.png"}, "no prompt"),
        ({"image": "a.png", "prompt": "  "}, "no prompt"),
        ({"image": "a.png", "prompt": 3}, "no prompt"),
        ({"prompt": "p"}, "needs one image"),
        (GOOD | {"file_name": "a.png"}, "needs one image"),
        ({"image": 3, "prompt": "p"}, "3 is no path"),
        ({"image": "../a.png", "prompt": "p"}, "leads out of"),
        ({"image": "x/../../a.png", "prompt": "p"}, "leads out of"),
        ({"image": "/etc/a.png", "prompt": "p"}, "leads out of"),
        ({"image": "a\0.png", "prompt": "p"}, "leads out of"),
        ({"image": "b.png", "prompt": "p"}, "there is no"),
        ({"image": "metadata.jsonl", "prompt": "p"}, "is no image"),
        (GOOD | {"references": "a.png"}, "is no list"),
        (GOOD | {"references": ["../b.png"]}, "leads out of"),
        (GOOD | {"mask": "a.png"}, "mask but no references"),
        (GOOD | {"references": ["a.png"], "mask": "../m.png"}, "leads out of"),
        (GOOD | {"meta": 3}, '"meta" is no object'),
        (GOOD | {"meta": {"text": "A"}, "text": "B"}, '"text" both in meta and beside'),
        (GOOD | {"text": 3}, '"text" of an image'),
        (GOOD | {"text": ["A", 3]}, '"text" of an image'),
        (GOOD | {"text_box": [0, 0, 1]}, '"text_box" is'),
        (GOOD | {"text_box": [0, 0, 1, 64]}, '"text_box" is'),
        (GOOD | {"id": 1}, "the id of line 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    paint(tmp_path / "data/a.png", (16, 16))
    paint(tmp_path / "a.png", (16, 16))
    file = lines(tmp_path / "data/metadata.jsonl", GOOD | {"id": 1}, "", line)
    refused(rf"metadata\.jsonl, line 3.*{message}", Jsonl, str(file))


def test_jsonl_refuses_a_missing_or_empty_file(tmp_path):
    refused(r"cannot read .*metadata\.jsonl", Jsonl, str(tmp_path))
    refused(r"cannot read .*none\.jsonl", Jsonl, str(tmp_path / "none.jsonl"))
    lines(tmp_path / "metadata.jsonl", " ")
    refused("has no lines", Jsonl, str(tmp_path))


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_have_blank_targets_of_the_wanted_size(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red sign\r\n\r\nüber “quotes”\n".encode())
    data = Prompts(str(file), height=32, width=48)
    assert [data[i].prompt for i in range(len(data))] == ["a red sign", "über “quotes”"]
    target = data[1].target
    assert target is not None and target.shape == (32, 48, 3) and not target.any()
    assert data.bucket_of(1) == data[1].bucket == (32, 48, 0)


def test_prompts_of_jsonl_carry_meta_and_read_no_image(tmp_path):
    file = lines(tmp_path / "p.jsonl", {"prompt": 'a sign "HI"', "text": "HI", "image": "none.png"})
    data = Prompts(str(file))
    assert data[0].meta == {"text": ("HI",)} and data[0].bucket == (64, 64, 0)


def test_prompts_refuse_what_they_cannot_use(tmp_path):
    refused("cannot read", Prompts, str(tmp_path / "none.txt"))
    refused("neither in .txt", Prompts, str(tmp_path / "none.csv"))
    file = lines(tmp_path / "p.jsonl", {"prompt": "p", "references": ["a.png"]})
    refused("line 1 has references", Prompts, str(file))
    file = lines(tmp_path / "p.txt", "p")
    refused("multiples of 16", Prompts, str(file), height=60)


# -- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "jsonl", "prompts"])
def test_configurations_build_and_have_the_keys_of_the_default(tmp_path, name):
    cfg = OmegaConf.load(CONF / f"{name}.yaml")
    signs = OmegaConf.load(CONF / "signs.yaml")
    assert set(cfg) == set(signs) and set(cfg.collate) == set(signs.collate)
    captioned(tmp_path, "a.png")
    lines(tmp_path / "metadata.jsonl", GOOD)
    cfg.dataset.path = str(tmp_path / "a.txt" if name == "prompts" else tmp_path)
    data = build(cfg.dataset)
    assert len(data) == 1 and data[0].bucket == (64, 64, 0) == data.bucket_of(0)
