"""Reading text in images, and the reward and metric made of it.

A reader is anything with `read`; two are here. `OCRReward` runs one in worker processes and
compares what it reads with what the sample asks for. torch is imported where tensors are met, and
not by the worker processes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from einops import rearrange
from PIL import Image

from flux2.errors import InputError
from rewards.text_match import TextMatch, TextScore, quoted
from rewards.workers import Job, Workers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flux2.types import Batch

Box = tuple[float, float, float, float]
"""(x0, y0, x1, y1) relative to the image's size, in [0, 1]."""

RAPIDOCR: Final = "3.10"
MODELS: Final = {
    "PP-OCRv6_det_small.onnx": "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
    "PP-OCRv6_rec_small.onnx": "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
}
"""sha256 of the models in rapidocr's wheel: another release reads differently."""


@dataclass(frozen=True)
class Reading:
    """What was read: lines in reading order, none where there is no text; confidence in [0, 1]."""

    text: tuple[str, ...]
    confidence: float


class Reader(Protocol):
    """Reads one image. An exception means: could not be read."""

    def read(self, image: np.ndarray, box: Box | None) -> Reading:
        """image: h w 3 uint8; box: the region of a single line of text, where it is known."""
        ...


def crop(image: np.ndarray, box: Box, margin: float) -> np.ndarray:
    """The region of an image (h w 3), grown by `margin` × its height on all sides and clipped.

    Raises ValueError for a box without area inside the image.
    """
    h, w = image.shape[:2]
    x0, y0, x1, y1 = np.asarray(box, float) * (w, h, w, h)
    grow = margin * (y1 - y0)
    edges = np.round((x0 - grow, y0 - grow, x1 + grow, y1 + grow))
    if not (x1 > x0 and y1 > y0 and np.isfinite(edges).all()):
        raise ValueError(f"text box {box} has no area")
    left, top, right, bottom = np.clip(edges, 0, (w, h, w, h)).astype(int)
    if right <= left or bottom <= top:
        raise ValueError(f"text box {box} lies outside the image")
    return image[top:bottom, left:right]


def reading_order(boxes: np.ndarray) -> list[int]:
    """Indices of boxes (n 4 as x0 y0 x1 y1) by rows from the top, then from left to right.

    A box joins a row when its middle is nearer to that of the row's first box than half the height
    of the smaller of the two.
    """
    middles, heights = boxes[:, [1, 3]].mean(1), boxes[:, 3] - boxes[:, 1]
    rows: list[list[int]] = []
    for i in np.argsort(middles, kind="stable").tolist():
        first = rows[-1][0] if rows else i
        reach = 0.5 * min(heights[first], heights[i])
        if rows and middles[i] - middles[first] < reach:
            rows[-1].append(i)
        else:
            rows.append([i])
    return [i for row in rows for i in sorted(row, key=lambda j: boxes[j, 0])]


class RapidReader:
    """rapidocr 3.10's PP-OCRv6 small, on one thread and without any download.

    Args:
        region: recognise the known region only, as one line (14 ms on a core at 64 px); else find
            the text in the whole image (3 to 5 times as long); the box is then not used.
        margin: by which a region grows, in heights. Small, or what stands above or below letters is
            read as accents.
        limit_side: the shortest side, in pixels, at which text is looked for; smaller images are
            enlarged first. For images of 1024 px use limit_type="max" and 640.
        limit_type: "min" as above; "max" shrinks longer sides to `limit_side` for the search.
        threads: of the inference engine.

    Raises:
        InputError: rapidocr or its models are not the ones whose accuracy is known.
    """

    def __init__(
        self,
        region: bool = True,
        margin: float = 0.0625,
        limit_side: int = 224,
        limit_type: str = "min",
        threads: int = 1,
    ) -> None:
        if limit_type not in ("min", "max"):
            raise InputError(f'limit_type={limit_type!r}: choose "min" or "max"')
        self.region, self.margin = region, margin
        self._enlarge_to = limit_side if limit_type == "min" else 0
        det, rec = _model_files()

        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(threads)
        self._cv2 = cv2
        self._engine: Callable[..., Any] = RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.use_det": not region,
                "Global.use_cls": False,
                # Its resizing rounds sides to multiples of 32, which distorts narrow crops.
                "Global.use_preprocess_img": False,
                "Det.model_path": str(det),
                "Det.limit_side_len": limit_side,
                "Det.limit_type": limit_type,
                "Rec.model_path": str(rec),
                # The recogniser pads to this width (320 costs twice 160); longer lines get theirs.
                "Rec.rec_img_shape": [3, 48, 160 if region else 320],
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )
        # Models load at the first use: let what is broken show itself now.
        self.read(np.zeros((64, 64, 3), np.uint8), (0.0, 0.0, 1.0, 1.0))

    def read(self, image: np.ndarray, box: Box | None) -> Reading:
        """See `Reader`. Raises ValueError where the region is needed and not known."""
        if self.region:
            if box is None:
                raise ValueError("the region of the text is not known: use region=False")
            out = self._engine(_bgr(crop(image, box, self.margin)))
            lines = [(t, s) for t, s in zip(out.txts, out.scores, strict=True) if t.strip()]
        else:
            out = self._engine(_bgr(self._enlarged(image)))
            if out.txts is None:
                return Reading((), 0.0)
            corners = np.asarray(out.boxes, float)  # n 4 2
            order = reading_order(np.concatenate([corners.min(1), corners.max(1)], 1))
            lines = [(out.txts[i], out.scores[i]) for i in order]
        return _reading(lines)

    def _enlarged(self, image: np.ndarray) -> np.ndarray:
        # Lines are cut out at whole pixels: of a small image, that would cost parts of letters.
        scale = self._enlarge_to / min(image.shape[:2])
        if scale <= 1:
            return image
        return self._cv2.resize(
            image, None, fx=scale, fy=scale, interpolation=self._cv2.INTER_CUBIC
        )


def _reading(lines: Sequence[tuple[str, float]]) -> Reading:
    confidence = float(np.mean([s for _, s in lines])) if lines else 0.0
    return Reading(tuple(t for t, _ in lines), confidence)


def _bgr(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, :, ::-1])


def _model_files() -> tuple[Path, ...]:
    """The detector's and the recogniser's files, after their sums were compared."""
    mend = f'install "rapidocr>={RAPIDOCR},<3.11" again'
    try:
        version = importlib.metadata.version("rapidocr")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"rapidocr is not installed: {mend}") from None
    if version.split(".")[:2] != RAPIDOCR.split("."):
        raise InputError(f"rapidocr {version} is not {RAPIDOCR}: {mend}")
    import rapidocr

    folder = Path(str(rapidocr.__file__)).parent / "models"
    for name, wanted in MODELS.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            raise InputError(f"rapidocr's {name} is missing or not the pinned one: {mend}")
    return tuple(folder / name for name in MODELS)


class TesseractReader:
    """The tesseract program: a second engine, beside the one that may have been optimised for.

    Args:
        region: read the known region as one line (psm 7); else the whole image (psm 11).
        scale: enlargement before reading.
        margin: by which a region grows, in heights. Without any, letters that touch the crop's edge
            are misread (half as many words exact); with more, what stands above or below is read.
        language: of tesseract's data.
        timeout: seconds for one image.

    Raises:
        InputError: tesseract or the language's data are not installed.
    """

    def __init__(
        self,
        region: bool = True,
        scale: int = 4,
        margin: float = 0.0625,
        language: str = "eng",
        timeout: float = 20.0,
    ) -> None:
        program = shutil.which("tesseract")
        if program is None:
            raise InputError("tesseract is not installed: install it (Debian: tesseract-ocr)")
        self.region, self.scale, self.margin, self.timeout = region, scale, margin, timeout
        psm = "7" if region else "11"
        self._command = [program, "stdin", "stdout", "-l", language, "--psm", psm, "tsv"]
        self._environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
        listed = subprocess.run(
            [program, "--list-langs"], capture_output=True, text=True, timeout=timeout
        )
        if language not in listed.stdout.split():
            raise InputError(
                f"tesseract has no data for language {language!r}: install them "
                f"(Debian: tesseract-ocr-{language})"
            )

    @classmethod
    def available(cls) -> bool:
        """Whether the program is installed."""
        return shutil.which("tesseract") is not None

    def read(self, image: np.ndarray, box: Box | None) -> Reading:
        """See `Reader`. Raises ValueError for a missing region, RuntimeError if tesseract fails."""
        if self.region:
            if box is None:
                raise ValueError("the region of the text is not known: use region=False")
            image = crop(image, box, self.margin)
        picture = Image.fromarray(image)
        size = (picture.width * self.scale, picture.height * self.scale)
        data = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(data, "PNG")
        done = subprocess.run(
            self._command,
            input=data.getvalue(),
            capture_output=True,
            timeout=self.timeout,
            env=self._environment,
        )
        if done.returncode:
            raise RuntimeError(f"tesseract failed: {done.stderr.decode(errors='replace').strip()}")
        return _reading(_tsv_lines(done.stdout.decode()))


def _tsv_lines(tsv: str) -> list[tuple[str, float]]:
    """tesseract's table → (line, mean confidence of its words in [0, 1]), in its order.

    Columns: level page block paragraph line word left top width height confidence text.
    """
    lines: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    for row in tsv.splitlines()[1:]:
        cells = row.split("\t")
        if len(cells) == 12 and cells[0] == "5" and cells[11].strip():
            lines.setdefault(tuple(cells[1:5]), []).append((cells[11], float(cells[10]) / 100))
    return [(" ".join(w for w, _ in x), sum(c for _, c in x) / len(x)) for x in lines.values()]


@dataclass(frozen=True)
class _ReadItem:
    """What a worker does, once built: (image, box) → Reading."""

    reader: Reader

    def __call__(self, item: tuple[np.ndarray, Box | None]) -> Reading:
        return self.reader.read(*item)


@dataclass(frozen=True)
class _Build:
    """A factory for `Workers` that can be pickled."""

    reader: Callable[[], Reader]

    def __call__(self) -> _ReadItem:
        return _ReadItem(self.reader())


@dataclass(frozen=True)
class Pending:
    """Images being read; hand it to `OCRReward.result`."""

    job: Job[Reading]
    targets: tuple[tuple[str, ...], ...]
    rows: tuple[int, ...]
    device: torch.device


class OCRReward:
    """Whether images show the text asked for: a Reward, and a Metric.

    The target is `meta["text"]` (a tuple of strings, in reading order), or, where the sample has
    none, what its prompt quotes (`text_match.quoted`); the region is `meta["text_box"]`. Scores:

        reward     graded · ned + exact · ocr_exact
        ocr_exact  1 where the text is exactly the target, else 0
        ocr_ned    1 − ED / max length, in [0, 1]
        ocr_cer    ED / target's length, may exceed 1

    A sample without a target, or that the reader failed on, is NaN in all of them and counted in
    `failures`; an image in which the reader finds no text is a score of 0, not a failure.

    Args:
        reader: builds the reader in each worker; picklable, as partial(RapidReader, region=True).
        workers: processes; 0 reads in this one.
        graded: weight of ned in the reward.
        exact: weight of the exact match in the reward.
        match: how texts are normalised before they are compared.
        timeout: seconds for one image.

    Raises:
        InputError: for bad arguments, and from `ready`, `result` or a call, where the reader's
            program or models are not installed.
    """

    def __init__(
        self,
        reader: Callable[[], Reader] = RapidReader,
        workers: int = 2,
        graded: float = 0.5,
        exact: float = 0.5,
        match: TextMatch | None = None,
        timeout: float = 30.0,
    ) -> None:
        if graded < 0 or exact < 0 or graded + exact <= 0:
            raise InputError(
                f"OCR reward weights graded={graded}, exact={exact}: use two numbers ≥ 0, one > 0"
            )
        # While cv2 is being imported its own folder, with a typing.py, leads sys.path; a worker
        # that is spawned in that moment inherits it and dies. So the import comes before workers.
        import cv2  # noqa: F401

        self.graded, self.exact, self.match = graded, exact, match or TextMatch()
        self._no_target = 0
        self._reader = reader
        self._workers: Workers[tuple[np.ndarray, Box | None], Reading] = Workers(
            _Build(reader), workers, timeout
        )

    @property
    def failures(self) -> Counter[str]:
        """Reason → samples that got NaN, since the start."""
        counts = Counter(self._workers.failures)
        if self._no_target:
            counts["no target"] = self._no_target
        return counts

    @property
    def engine(self) -> str:
        """The reader and its settings, as a comparison must know them."""
        if isinstance(self._reader, partial):
            settings = ", ".join(f"{k}={v}" for k, v in sorted(self._reader.keywords.items()))
            return f"{self._reader.func.__name__}({settings})"
        return getattr(self._reader, "__name__", type(self._reader).__name__)

    def ready(self) -> None:
        """Waits until the readers are built; raises InputError where they cannot be."""
        self._workers.ready()

    def submit(self, images: Tensor, batch: Batch) -> Pending:
        """Starts reading (images: b 3 h w uint8) and returns at once, so that sampling goes on."""
        import torch

        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"OCR wants images b 3 h w uint8, not {tuple(images.shape)} {images.dtype}: decode "
                "them and round to 0…255"
            )
        if len(images) != len(batch):
            raise InputError(f"{len(images)} images for a batch of {len(batch)}: give one for each")
        pixels = rearrange(images.detach().cpu().numpy(), "b c h w -> b h w c")
        targets = tuple(map(target_of, batch.prompts, batch.meta))
        rows = tuple(i for i, target in enumerate(targets) if self.match.join(target))
        items = [(np.ascontiguousarray(pixels[i]), _box_of(batch.meta[i])) for i in rows]
        return Pending(self._workers.submit(items), targets, rows, images.device)

    def result(self, pending: Pending) -> Mapping[str, Tensor]:
        """Waits for the scores, each b fp32."""
        scores = self.score_strings(self._lines(pending), pending.targets)
        return {name: values.to(pending.device) for name, values in scores.items()}

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """images: b 3 h w uint8 → scores, each b fp32, NaN where there is none."""
        return self.result(self.submit(images, batch))

    def score_strings(
        self, reads: Sequence[Sequence[str] | None], targets: Sequence[Sequence[str]]
    ) -> Mapping[str, Tensor]:
        """Scores, each b fp32, of lines already read (None: not read) against target spans.

        For other engines' readings, and for what is written perfectly: the ceiling.
        """
        import torch

        rows = [self._row(r, t) for r, t in zip(reads, targets, strict=True)]
        columns = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4).unbind(1)
        return dict(zip(("reward", "ocr_exact", "ocr_ned", "ocr_cer"), columns, strict=True))

    def _lines(self, pending: Pending) -> list[tuple[str, ...] | None]:
        lines: list[tuple[str, ...] | None] = [None] * len(pending.targets)
        self._no_target += len(pending.targets) - len(pending.rows)
        for i, reading in zip(pending.rows, self._workers.result(pending.job), strict=True):
            lines[i] = None if reading is None else reading.text
        return lines

    def _row(self, read: Sequence[str] | None, target: Sequence[str]) -> tuple[float, ...]:
        score: TextScore | None = None if read is None else self.match(read, target)
        if score is None:
            return (float("nan"),) * 4
        reward = self.graded * score.ned + self.exact * score.exact
        return reward, score.exact, score.ned, score.cer

    def close(self) -> None:
        """Ends the worker processes."""
        self._workers.close()

    def __enter__(self) -> OCRReward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def target_of(prompt: str, meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The spans that an image should show: `meta["text"]`, else the prompt's quoted spans."""
    if "text" not in meta:
        return quoted(prompt)
    text = meta["text"]
    return (text,) if isinstance(text, str) else tuple(text)


def _box_of(meta: Mapping[str, Any]) -> Box | None:
    box = meta.get("text_box")
    return None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
