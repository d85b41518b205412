"""Readers on images drawn here, and the reward on readers whose answers are known."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import rewards.ocr as ocr
from flux2.errors import InputError
from flux2.types import Batch
from rewards.ocr import Box, OCRReward, RapidReader, Reading, TesseractReader, crop, reading_order
from rewards.text_match import TextMatch

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono-Bold.ttf"
# Without O and Q, which the readers take for 0 and O: that is their ceiling, not their wiring.
LETTERS = tuple("ABCDEFGHIJKLMNPRSTUVWXYZ")
NAN = math.nan


def sign(
    word: str, ink: str, ground: str, cell: tuple[int, int] = (0, 1)
) -> tuple[np.ndarray, Box]:
    """A 64x64 sign with letters in 16-pixel cells from (column, row) on, and the word's box."""
    column, row = cell
    image = Image.new("RGB", (64, 64), ground)
    draw = ImageDraw.Draw(image)
    font = ImageFont.truetype(str(FONT), 20)
    for k, letter in enumerate(word):
        at = (16 * (column + k) + 8, 16 * row + 8)
        draw.text(at, letter, ink, font, anchor="mm")
    box = (column / 4, row / 4, (column + len(word)) / 4, (row + 1) / 4)
    return np.array(image), box


def signs(count: int) -> list[tuple[str, np.ndarray, Box]]:
    rng = np.random.default_rng(3)
    grounds = ("#FFFFFF", "#FFCC00", "#1F77B4", "#000000", "#990033")
    inks = ("#000000", "#330066", "#FFFFFF", "#00FF99", "#FFFFCC")
    out = []
    for i in range(count):
        word = "".join(rng.choice(LETTERS, rng.integers(3, 5)))
        cell = (int(rng.integers(0, 5 - len(word))), int(rng.integers(0, 4)))
        out.append((word, *sign(word, inks[i % 5], grounds[i % 5], cell)))
    return out


def make_batch(prompts: Sequence[str], metas: Sequence[Mapping[str, Any]] | None = None) -> Batch:
    n = len(prompts)
    ids = torch.arange(n)
    return Batch(ids, tuple(prompts), None, ids, tuple(metas or [{}] * n), (4, 4))


def stack(images: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def blank(count: int) -> Tensor:
    return torch.zeros(count, 3, 8, 8, dtype=torch.uint8)


class Told:
    """A reader that reads what it was told for an image of that brightness."""

    def __init__(self, answers: Sequence[Sequence[str] | None]) -> None:
        self.answers = answers
        self.boxes: list[Box | None] = []

    def read(self, image: np.ndarray, box: Box | None) -> Reading:
        self.boxes.append(box)
        answer = self.answers[int(image[0, 0, 0])]
        if answer is None:
            raise RuntimeError("cannot be read")
        return Reading(tuple(answer), 1.0)


def numbered(count: int) -> Tensor:
    return blank(count) + torch.arange(count, dtype=torch.uint8)[:, None, None, None]


@pytest.fixture(scope="module")
def region() -> RapidReader:
    return RapidReader(region=True)


@pytest.fixture(scope="module")
def whole() -> RapidReader:
    return RapidReader(region=False)


# ---------------------------------------------------------------- geometry


def test_crop() -> None:
    image = np.arange(64 * 64 * 3).reshape(64, 64, 3)
    box = (0.25, 0.5, 0.75, 0.75)
    np.testing.assert_array_equal(crop(image, box, 0.0), image[32:48, 16:48])
    np.testing.assert_array_equal(crop(image, box, 0.25), image[28:52, 12:52])
    np.testing.assert_array_equal(crop(image, (0.0, 0.0, 1.0, 1.0), 0.5), image)
    wide = np.zeros((10, 40, 3))
    assert crop(wide, (0.0, 0.0, 0.5, 0.5), 0.0).shape == (5, 20, 3)
    for bad in ((0.5, 0.5, 0.5, 0.7), (0.5, 0.7, 0.6, 0.5), (NAN, 0.0, 1.0, 1.0), (2.0, 0, 3, 1)):
        with pytest.raises(ValueError, match="text box"):
            crop(image, bad, 0.0)


def test_reading_order_is_by_rows_and_then_by_x() -> None:
    rows = [
        [(40, 0, 60, 10), (62, 2, 90, 11)],
        [(0, 14, 20, 30), (25, 17, 40, 27), (50, 12, 70, 28)],
        [(10, 40, 90, 44)],
    ]
    wanted = np.array([box for row in rows for box in row], float)
    shuffle = np.random.default_rng(0).permutation(len(wanted))
    shuffled = wanted[shuffle]
    np.testing.assert_array_equal(shuffled[reading_order(shuffled)], wanted)
    assert reading_order(np.zeros((0, 4))) == []


# ---------------------------------------------------------------- engines


def test_rapid_reads_known_regions(region: RapidReader) -> None:
    match, drawn = TextMatch(), signs(40)
    reads = [region.read(image, box) for _, image, box in drawn]
    exact = [
        match.join(r.text) == match.join([w]) for r, (w, _, _) in zip(reads, drawn, strict=True)
    ]
    assert np.mean(exact) >= 0.95
    assert all(0 < r.confidence <= 1 for r in reads)


def test_rapid_reads_whole_images(whole: RapidReader) -> None:
    match, drawn = TextMatch(), signs(20)
    reads = [match.join(whole.read(image, None).text) for _, image, _ in drawn]
    exact = [r == match.join([w]) for r, (w, _, _) in zip(reads, drawn, strict=True)]
    assert np.mean(exact) >= 0.85


def test_rapid_region_reads_the_region_only(region: RapidReader) -> None:
    upper, upper_box = sign("TAXI", "#FFFFFF", "#1F77B4", (0, 0))
    lower, lower_box = sign("BUS", "#FFFFFF", "#1F77B4", (1, 3))
    both = np.maximum(upper, lower)
    assert region.read(both, upper_box).text == ("TAXI",)
    assert region.read(both, lower_box).text == ("BUS",)


def test_rapid_finds_lines_in_reading_order(whole: RapidReader) -> None:
    image = Image.new("RGB", (256, 256), "#FFFFFF")
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(str(FONT), 36)
    # The right word stands 14 px higher: rapidocr's own order, by tops, would put it first.
    for at, word in (((140, 14), "RIGHT"), ((10, 28), "LEFT"), ((60, 180), "BELOW")):
        draw.text(at, word, "#000000", font)
    assert whole.read(np.array(image), None).text == ("LEFT", "RIGHT", "BELOW")


def test_rapid_takes_channels_as_rgb(region: RapidReader) -> None:
    seen = []
    engine, region._engine = region._engine, lambda image: seen.append(image) or engine(image)
    try:
        region.read(np.full((8, 8, 3), (255, 128, 0), np.uint8), (0.0, 0.0, 1.0, 1.0))
    finally:
        region._engine = engine
    assert seen[0][0, 0].tolist() == [0, 128, 255]  # rapidocr wants BGR, as cv2 does


def test_rapid_reads_nothing_where_there_is_nothing(
    region: RapidReader, whole: RapidReader
) -> None:
    rng = np.random.default_rng(0)
    plain = np.full((64, 64, 3), 120, np.uint8)
    noise = rng.integers(100, 140, (64, 64, 3)).astype(np.uint8)
    assert whole.read(plain, None) == whole.read(noise, None) == Reading((), 0.0)
    assert region.read(plain, (0.0, 0.25, 1.0, 0.5)) == Reading((), 0.0)


def test_rapid_without_its_region_cannot_read(region: RapidReader) -> None:
    with pytest.raises(ValueError, match="region of the text is not known"):
        region.read(np.zeros((64, 64, 3), np.uint8), None)


def test_rapid_refuses_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ocr.MODELS, "PP-OCRv6_rec_small.onnx", "0" * 64)
    with pytest.raises(InputError, match=r"rec_small\.onnx is missing or not the pinned"):
        RapidReader()


def test_rapid_refuses_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr.importlib.metadata, "version", lambda name: "3.11.0")
    with pytest.raises(InputError, match=r"rapidocr 3\.11\.0 is not 3\.10"):
        RapidReader()
    with pytest.raises(InputError, match="limit_type"):
        RapidReader(limit_type="mean")


def test_reader_processes_need_no_torch_and_stay_quiet() -> None:
    code = (
        "import sys, numpy as np; from rewards.ocr import RapidReader\n"
        "RapidReader(region=False).read(np.zeros((64, 64, 3), np.uint8), None)\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(ocr.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


needs_tesseract = pytest.mark.skipif(
    not TesseractReader.available(), reason="the tesseract program is not installed"
)


@needs_tesseract
def test_tesseract_reads_known_regions() -> None:
    reader, match, drawn = TesseractReader(), TextMatch(), signs(20)
    reads = [reader.read(image, box) for _, image, box in drawn]
    exact = [
        match.join(r.text) == match.join([w]) for r, (w, _, _) in zip(reads, drawn, strict=True)
    ]
    assert np.mean(exact) >= 0.7
    assert all(0 <= r.confidence <= 1 for r in reads)


@needs_tesseract
def test_tesseract_whole_image_lines() -> None:
    image = Image.new("RGB", (200, 120), "#FFFFFF")
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(str(FONT), 24)
    draw.text((20, 10), "GREEN TEA", "#000000", font)
    draw.text((20, 70), "PLEASE", "#000000", font)
    assert TesseractReader(region=False).read(np.array(image), None).text == ("GREEN TEA", "PLEASE")


@needs_tesseract
def test_tesseract_refusals() -> None:
    with pytest.raises(InputError, match="no data for language 'xyz'"):
        TesseractReader(language="xyz")
    with pytest.raises(ValueError, match="region of the text is not known"):
        TesseractReader().read(np.zeros((64, 64, 3), np.uint8), None)


def test_tesseract_that_is_missing_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert not TesseractReader.available()
    with pytest.raises(InputError, match="tesseract is not installed: install it"):
        TesseractReader()
    with (
        OCRReward(TesseractReader, workers=1) as reward,
        pytest.raises(InputError, match="tesseract is not installed"),
    ):
        reward.ready()


def test_tesseracts_table() -> None:
    head = ["header"] * 12
    rows = [
        [4, 1, 1, 1, 1, 0, 0, 0, 9, 9, -1, ""],
        [5, 1, 1, 1, 1, 1, 0, 0, 9, 9, 90, "NO"],
        [5, 1, 1, 1, 1, 2, 0, 0, 9, 9, 70, "ENTRY"],
        [5, 1, 2, 1, 1, 1, 0, 0, 9, 9, 95, " "],
        [5, 1, 3, 1, 1, 1, 0, 0, 9, 9, 50, '"'],
    ]
    tsv = "\n".join("\t".join(map(str, r)) for r in [head, *rows])
    lines = ocr._tsv_lines(tsv)
    assert [text for text, _ in lines] == ["NO ENTRY", '"']
    assert [c for _, c in lines] == pytest.approx([0.8, 0.5])


# ---------------------------------------------------------------- the reward


def test_scores_by_hand() -> None:
    told = Told([["TAXI"], ["TAXI", "CAB"], [], ["taxl"], ["XXXXXXXX"]])
    with OCRReward(lambda: told, workers=0, graded=0.25, exact=0.75) as reward:
        scores = reward(numbered(5), make_batch(['a sign "TAXI"'] * 5))
    wanted = {
        "reward": [1.0, 0.25 * 4 / 7, 0.0, 0.25 * 3 / 4, 0.25 * 1 / 8],
        "ocr_exact": [1.0, 0.0, 0.0, 0.0, 0.0],
        "ocr_ned": [1.0, 4 / 7, 0.0, 3 / 4, 1 / 8],
        "ocr_cer": [0.0, 3 / 4, 1.0, 1 / 4, 7 / 4],
    }
    assert set(scores) == set(wanted)
    for name, values in wanted.items():
        torch.testing.assert_close(scores[name], torch.tensor(values))
    assert not reward.failures


def test_what_could_not_be_scored_is_nan_and_counted_and_never_zero() -> None:
    told = Told([["A"], None, ["A"], ["A"], ["A"]])
    prompts = ['"A"', '"A"', "a sign without quotes", "no quotes", '"B"']
    metas = [{}, {}, {}, {"text": ("A",)}, {"text": ()}]
    with OCRReward(lambda: told, workers=0) as reward:
        scores = reward(numbered(5), make_batch(prompts, metas))
        for values in scores.values():
            assert values.isnan().tolist() == [False, True, True, False, True]
        assert scores["ocr_exact"][[0, 3]].tolist() == [1, 1]
        assert reward.failures == {"no target": 2, "RuntimeError": 1}


def test_targets_and_boxes_come_from_meta_first() -> None:
    told = Told([["ONE", "TWO"], ["JSON"], ["SPAN"]])
    box = [0.0, 0.25, 1.0, 0.5]
    metas = [{"text": ("ONE", "TWO"), "text_box": box}, {}, {"text_box": None, "text": "SPAN"}]
    prompts = ['"OTHER"', '{"text": "JSON", "ink": "red"}', ""]
    with OCRReward(lambda: told, workers=0) as reward:
        assert reward(numbered(3), make_batch(prompts, metas))["ocr_exact"].tolist() == [1, 1, 1]
    assert told.boxes == [(0.0, 0.25, 1.0, 0.5), None, None]


def test_match_options_reach_the_reward() -> None:
    told = Told([["★", "TAXI"], ["taxi"]])
    for match, wanted in (
        (TextMatch(ignore_symbols=True), [1, 1]),
        (TextMatch(ignore_case=False), [0, 0]),
    ):
        with OCRReward(lambda: told, workers=0, match=match) as reward:
            scores = reward(numbered(2), make_batch(['"TAXI"'] * 2))
        assert scores["ocr_exact"].tolist() == wanted


def test_score_strings_gives_the_ceiling_of_perfect_text() -> None:
    with OCRReward(lambda: Told([]), workers=0) as reward:
        scores = reward.score_strings(
            [["TAXI"], ["NO", "ENTRY"], None], [["taxi"], ["NO ENTRY"], ["A"]]
        )
        none = reward(blank(0), make_batch([]))
    assert scores["reward"][:2].tolist() == [1, 1] and scores["reward"][2].isnan()
    assert all(v.shape == (0,) and v.dtype == torch.float32 for v in none.values())


@pytest.mark.parametrize("processes", [0, 2])
def test_reward_on_signs(processes: int) -> None:
    drawn = signs(12)
    metas = [{"text": (word,), "text_box": box} for word, _, box in drawn]
    metas[3]["text"] = ("WRONG",)
    del metas[4]["text_box"]
    images = stack([image for _, image, _ in drawn])
    with OCRReward(workers=processes) as reward:
        reward.ready()
        start = time.monotonic()
        pending = reward.submit(images, make_batch(["a sign"] * 12, metas))
        if processes:
            assert time.monotonic() - start < 0.1
        scores = reward.result(pending)
        assert reward.failures == {"ValueError": 1}
    exact = scores["ocr_exact"]
    assert exact[4].isnan() and exact[3] == 0 and exact.nansum() >= 9
    assert 0 <= scores["reward"][3] < 0.5
    assert all(v.dtype == torch.float32 and v.shape == (12,) for v in scores.values())


def test_bad_arguments() -> None:
    for graded, exact in ((-1.0, 0.5), (0.0, 0.0)):
        with pytest.raises(InputError, match="weights"):
            OCRReward(workers=0, graded=graded, exact=exact)
    with OCRReward(lambda: Told([["A"]]), workers=0) as reward:
        for images in (blank(1).float(), blank(1)[0], blank(1)[:, :1]):
            with pytest.raises(InputError, match="images b 3 h w uint8"):
                reward(images, make_batch(['"A"']))
        with pytest.raises(InputError, match="2 images for a batch of 1"):
            reward(blank(2), make_batch(['"A"']))


def test_readers_are_configured_by_a_partial_that_travels() -> None:
    word, image, _ = signs(1)[0]
    batch = make_batch([f'the word "{word}"'])
    with OCRReward(partial(RapidReader, region=False), workers=1) as reward:
        assert reward(stack([image]), batch)["ocr_exact"].item() == 1
