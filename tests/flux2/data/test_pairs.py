"""Pairs of images on files written here: our own layout, the published ones, and their batches."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from flux2.data.cache import RowCache
from flux2.data.loader import Collator, Loader, stack_images
from flux2.data.pairs import Pairs
from flux2.data.record import UnreadableRecord
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.train import build

CONF = Path(__file__).parents[3] / "conf/data"
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def paint(path: Path, colour: Any = RED, size: tuple[int, int] = (64, 64)) -> str:
    """A flat image of (width, height); returns its name in the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path.name


def lines(path: Path, *objects: Any) -> Path:
    path.write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
    return path


def refused(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(InputError, match=match) as caught:
        Pairs(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.png red, b.png green, c.png blue and wide."""
    for name, colour, size in (("a", RED, (64, 64)), ("b", GREEN, (64, 64)), ("c", BLUE, (96, 64))):
        paint(tmp_path / f"{name}.png", colour, size)
    return tmp_path


# -- our own layout ------------------------------------------------------------------------------


def test_a_line_is_a_pair(images: Path):
    lines(
        images / "pairs.jsonl",
        {"prompt": "p", "winner": "a.png", "loser": "b.png", "margin": 0.5,
         "meta": {"text": "HI"}, "rater": 3},
        {"prompt": "q", "winner": "b.png", "loser": "a.png", "references": ["c.png"]},
    )  # fmt: skip
    data = Pairs(str(images))
    first, second = data[0], data[1]
    assert len(data) == 2 and (first.id, first.prompt, first.meta["text"]) == (0, "p", ("HI",))
    assert first.meta["rater"] == 3 and first.preference is not None
    winner, loser, margin = first.preference
    assert (winner == RED).all() and (loser == GREEN).all() and margin == 0.5
    assert first.target is winner and first.bucket == data.bucket_of(0) == (64, 64, 0)
    assert second.preference is not None and second.preference[2] == 1.0
    assert data.bucket_of(1) == second.bucket == (64, 64, 1)
    assert second.references[0].shape == (64, 64, 3) and (second.references[0] == BLUE).all()
    assert len(Pairs(str(images / "pairs.jsonl"))) == 2 and data.rewards == ()
    with pytest.raises(IndexError):
        data[2]


def test_both_images_take_the_bucket_of_the_winner(images: Path):
    lines(images / "pairs.jsonl", {"prompt": "p", "winner": "c.png", "loser": "a.png"},
          {"prompt": "p", "winner": "a.png", "loser": "c.png"})  # fmt: skip
    data = Pairs(str(images), [[32, 48], [32, 32]])
    for index, bucket in enumerate([(32, 48, 0), (32, 32, 0)]):
        record = data[index]
        assert data.bucket_of(index) == record.bucket == bucket and record.preference is not None
        assert record.preference[0].shape == record.preference[1].shape == (*bucket[:2], 3)


def test_what_judged_is_told_where_it_is_known(images: Path):
    lines(images / "pairs.jsonl", {"prompt": "p", "winner": "a.png", "loser": "b.png"})
    (images / "facts.json").write_text(json.dumps({"rewards": ["ocr(x=1)"], "seed": 3}))
    assert Pairs(str(images)).rewards == ("ocr(x=1)",)


def test_the_stamp_changes_with_what_it_stands_for(images: Path):
    def stamp(**change: Any) -> str:
        line = {"prompt": "p", "winner": "a.png", "loser": "b.png", "margin": 0.5, **change}
        lines(images / "pairs.jsonl", line)
        return Pairs(str(images)).stamp

    same = stamp()
    assert same == stamp()
    stamps = {same, stamp(prompt="q"), stamp(margin=0.4), stamp(winner="b.png", loser="a.png"),
              stamp(rater=1)}  # fmt: skip
    os.utime(images / "b.png", (1, 1))
    assert len(stamps | {stamp()}) == 6


def test_a_damaged_image_makes_its_pair_unreadable_and_no_other(images: Path):
    (images / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    lines(images / "pairs.jsonl", {"prompt": "p", "winner": "a.png", "loser": "bad.png"},
          {"prompt": "p", "winner": "bad.png", "loser": "a.png"},
          {"prompt": "p", "winner": "a.png", "loser": "b.png"})  # fmt: skip
    data = Pairs(str(images), [[64, 64], [32, 64]])
    for index in (0, 1):
        with pytest.raises(UnreadableRecord, match="bad"):
            data[index]
    assert data.bucket_of(1) == (64, 64, 0) and data[2].prompt == "p"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": " "}, "line 1 has no prompt"),
        ({"winner": None}, "None is no path"),
        ({"loser": "a.png"}, "needs two images"),
        ({"loser": "../b.png"}, "leads out"),
        ({"loser": "z.png"}, "there is no"),
        ({"margin": -1}, "margin"),
        ({"margin": True}, "margin"),
        ({"margin": "large"}, "margin"),
        ({"references": "c.png"}, "references"),
        ({"meta": 3}, "meta"),
    ],
)
def test_a_wrong_line_is_refused(images: Path, change: dict[str, Any], says: str):
    lines(images / "pairs.jsonl", {"prompt": "p", "winner": "a.png", "loser": "b.png", **change})
    refused(says, str(images))


def test_what_is_no_data_is_refused(images: Path):
    refused("path is not set", None)
    refused("layout", str(images), layout="laion")
    refused("cannot read", str(images))
    lines(images / "pairs.jsonl", {"prompt": "p", "winner": "a.png", "loser": "b.png"})
    refused("no image size", str(images), [[60, 60]])


# -- published layouts ---------------------------------------------------------------------------


def test_hpdv3(images: Path):
    """path1 was preferred."""
    rows = [
        {"prompt": "p", "choice_dist": [12, 7], "confidence": 0.99, "path1": "a.png",
         "path2": "b.png", "model1": "flux", "model2": "kolors"},
        {"prompt": "q", "choice_dist": [3, 1], "confidence": None, "path1": "b.png",
         "path2": "c.png", "model1": "sd", "model2": "flux"},
    ]  # fmt: skip
    (images / "train.json").write_text(json.dumps(rows, indent=1))
    data = Pairs(str(images / "train.json"), layout="hpdv3")
    assert [data[k].preference[2] for k in (0, 1)] == [0.99, 1.0]
    assert (data[0].preference[0] == RED).all() and (data[0].preference[1] == GREEN).all()
    assert data[1].meta == {"model1": "sd", "model2": "flux"}
    lines(images / "train.jsonl", *rows)
    assert len(Pairs(str(images / "train.jsonl"), layout="hpdv3")) == 2
    rows[1]["path2"] = "z.png"
    (images / "train.json").write_text(json.dumps(rows))
    refused("row 2: there is no", str(images / "train.json"), layout="hpdv3")
    (images / "train.json").write_text("[{")
    refused("is not JSON", str(images / "train.json"), layout="hpdv3")
    refused("is a folder", str(images), layout="hpdv3")


def test_imagereward(images: Path):
    """Rank 1 is best; every two of different rank are a pair, and ties are left out."""
    row = {"id": "0-1", "prompt": "p", "generations": ["a.png", "b.png", "c.png"],
           "ranking": [3, 1, 3]}  # fmt: skip
    file = images / "test.json"
    file.write_text(json.dumps([row]))
    data = Pairs(str(file), layout="imagereward")
    assert len(data) == 2 and data.left_out == {"tie": 1}
    for k, loser in enumerate((RED, BLUE)):
        preference = data[k].preference
        assert (preference[0] == GREEN).all() and (preference[1] == loser).all()
        assert preference[2] == 2.0 and data[k].meta["id"] == "0-1"
    file.write_text(json.dumps([{**row, "ranking": [1, 1, 1]}]))
    refused("no pair .tie × 3", str(file), layout="imagereward")
    for wrong in ([1, 2], [1, 2, "3"], None):
        file.write_text(json.dumps([{**row, "ranking": wrong}]))
        refused("row 1.*ranking", str(file), layout="imagereward")


def jpeg(colour: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (96, 64), colour).save(out, "JPEG", quality=95)
    return out.getvalue()


def shard(path: Path, labels: list[tuple[Any, Any, Any]], **columns: Any) -> None:
    """A file of Pick-a-Pic: image 0 red, image 1 green; row groups of two rows."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    n = len(labels)
    table = {
        "caption": [f"{path.stem} {k}" for k in range(n)], "has_label": [x[2] for x in labels],
        "jpg_0": [jpeg(RED)] * n, "jpg_1": [jpeg(GREEN)] * n,
        "label_0": [x[0] for x in labels], "label_1": [x[1] for x in labels], **columns,
    }  # fmt: skip
    table = {k: v for k, v in table.items() if v is not None}
    parquet.write_table(pyarrow.table(table), path, row_group_size=2)


def close(image: np.ndarray, colour: Any) -> bool:
    return bool((np.abs(image.astype(int) - colour).max()) < 6)  # JPEG


def test_pickapic(tmp_path: Path):
    """Ties (½, ½) and rows without a label or caption are left out; rows of any row group and file
    find their images."""
    shard(tmp_path / "a.parquet", [(1.0, 0.0, True), (0.5, 0.5, True), (0.0, 1.0, True)])
    shard(tmp_path / "b.parquet", [(None, None, False), (0.0, 1.0, False), (0.0, 1.0, True)])
    data = Pairs(str(tmp_path), [[64, 64], [64, 96]], layout="pickapic")
    assert data.left_out == {"tie": 1, "no label": 2} and len(data) == 3
    for index, (caption, first) in enumerate([("a 0", True), ("a 2", False), ("b 2", False)]):
        record = data[index]
        assert record.preference is not None
        winner, loser, margin = record.preference
        assert record.prompt == caption and margin == 1.0
        assert data.bucket_of(index) == (64, 96, 0) and loser.shape == (64, 96, 3)
        assert close(winner, RED if first else GREEN) and close(loser, GREEN if first else RED)
    assert len(Pairs(str(tmp_path / "a.parquet"), layout="pickapic")) == 2
    assert Pairs(str(tmp_path), layout="pickapic").stamp == data.stamp


def test_pickapics_damaged_rows_and_files(tmp_path: Path):
    both = [(1.0, 0.0, True)] * 2
    shard(tmp_path / "a.parquet", both, jpg_1=[b"no image", jpeg(GREEN)], caption=["p", " "],
          has_label=None)  # fmt: skip
    data = Pairs(str(tmp_path), layout="pickapic")
    assert len(data) == 1 and data.left_out == {"no caption": 1}
    with pytest.raises(UnreadableRecord, match=r"a\.parquet, row group 0, row 0, jpg_1"):
        data[0]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    refused("b.parquet is no parquet file", str(tmp_path), layout="pickapic")
    shard(tmp_path / "b.parquet", both, label_1=None)
    refused("no column label_1", str(tmp_path), layout="pickapic")
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "b.parquet").unlink()
    refused("no pair", str(tmp_path), layout="pickapic")


def test_pickapic_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused("pip install pyarrow", str(tmp_path), layout="pickapic")


# -- batches -------------------------------------------------------------------------------------


def test_a_batch_of_pairs_holds_winners_losers_and_margins(tiny, images: Path):
    lines(
        images / "pairs.jsonl",
        {"prompt": "p", "winner": "a.png", "loser": "b.png", "margin": 0.5},
        {"prompt": "q", "winner": "b.png", "loser": "c.png", "margin": 2},
    )
    data = Pairs(str(images))
    records = [data[0], data[1]]
    batch = Collator(tiny, images=True)(records, torch.arange(2))
    winners, losers = (stack_images([r.preference[k] for r in records]) for k in (0, 1))
    torch.testing.assert_close(batch.x0, tiny.codec.encode(winners))
    torch.testing.assert_close(batch.extra["loser"], tiny.codec.encode(losers))
    assert batch.extra["margin"].tolist() == [0.5, 2.0] and "label" not in batch.extra
    assert torch.equal(batch.images, winners)
    assert torch.equal(batch.select(torch.tensor([1])).extra["loser"], batch.extra["loser"][1:])
    bare = Collator(tiny, latents=False)(records, torch.arange(2))
    assert bare.x0 is None and set(bare.extra) == {"margin"}
    # The pair is what counts, also where the target is another image.
    other = [replace(r, target=np.zeros_like(r.target)) for r in records]
    assert torch.equal(Collator(tiny)(other, torch.arange(2)).x0, batch.x0)
    with pytest.raises(InputError, match="one kind"):
        Collator(tiny)([records[0], replace(records[1], preference=None)], torch.arange(2))


def test_labels_reach_the_batch_where_all_records_have_one(tiny):
    record = SignWorld("train", length=1)[0]

    def extra(*labels: Any) -> dict[str, Any]:
        records = [replace(record, meta={} if x is None else {"label": x}) for x in labels]
        return dict(Collator(tiny, latents=False)(records, torch.arange(len(labels))).extra)

    assert extra(1, -1)["label"].tolist() == [1.0, -1.0]
    for labels in ((1, None), (1, 0), (1, "cat"), (None, None)):
        assert extra(*labels) == {}


def test_pairs_come_from_the_cache_as_they_were_encoded(tiny, images: Path, tmp_path: Path):
    lines(images / "pairs.jsonl", {"prompt": "p", "winner": "a.png", "loser": "b.png"},
          {"prompt": "q", "winner": "b.png", "loser": "a.png"})  # fmt: skip
    data = Pairs(str(images))
    plain = Loader(data, Collator(tiny), 2, seed=0)(0)

    def cached() -> Loader:
        cache = RowCache(tmp_path / "cache", "key", len(data))
        return Loader(data, Collator(tiny, cache=cache), 2, seed=0)

    cached().fill()
    for file in images.glob("*.png"):  # what is cached is not encoded again
        paint(file, BLUE)
    again = cached()(0)
    torch.testing.assert_close(again.extra["loser"], plain.extra["loser"], atol=2e-2, rtol=2e-3)
    torch.testing.assert_close(again.x0, plain.x0, atol=2e-2, rtol=2e-3)
    assert not torch.allclose(again.x0, again.extra["loser"], atol=0.05)


def test_its_configuration_builds_it(images: Path):
    lines(images / "pairs.jsonl", {"prompt": "p", "winner": "a.png", "loser": "b.png"})
    cfg = OmegaConf.load(CONF / "pairs.yaml")
    with pytest.raises(InputError, match="path is not set"):
        build(cfg.dataset)
    cfg.dataset.path = str(images)
    assert len(build(cfg.dataset)) == 1


def test_imagerewarddbs_own_folders(images: Path):
    """As the hub has it: a row an image, which lies beside its json."""
    rows = [
        {"image_path": f"images/train/train_1/{name}", "prompt_id": key, "prompt": f"p {key}",
         "classification": "People", "image_amount_in_total": 2, "rank": rank, "overall_rating": 4}
        for name, key, rank in (("a.png", "x", 3), ("b.png", "y", 1), ("c.png", "x", 1),
                                ("a.png", "y", 1))
    ]  # fmt: skip
    (images / "train_1.json").write_text(json.dumps(rows))
    data = Pairs(str(images), layout="imagereward")
    assert len(data) == 1 and data.left_out == {"tie": 1}
    assert (data[0].preference[0] == BLUE).all() and (data[0].preference[1] == RED).all()
    assert data[0].preference[2] == 2.0 and data[0].meta == {"id": "x"} and data[0].prompt == "p x"
    rows[0]["rank"] = None
    (images / "train_1.json").write_text(json.dumps(rows))
    refused("row 1.*ranking", str(images), layout="imagereward")


def test_pickapics_splits_are_not_mixed(tmp_path: Path):
    """The hub's folder holds train, validation and test beside each other."""
    both = [(1.0, 0.0, True)] * 2
    for name in ("train-00000-of-00002-ab12", "train-00001-of-00002-cd34",
                 "validation_unique-00000-of-00001-ef"):  # fmt: skip
        shard(tmp_path / f"{name}.parquet", both)
    refused("holds the splits train, validation_unique", str(tmp_path), layout="pickapic")
    assert len(Pairs(str(tmp_path / "train-*"), layout="pickapic")) == 4
    assert len(Pairs(str(tmp_path / "validation_unique-*"), layout="pickapic")) == 2
    refused("no pair", str(tmp_path / "test-*"), layout="pickapic")
