"""stage=vae: what a model's autoencoder loses, before any transformer has drawn a thing.

    python run.py stage=vae                                   the nano model, on held-out signs
    python run.py stage=vae model=klein-4b data=folder data.dataset.path=<images> report.canvas=256
    python run.py stage=vae report.lpips.path=<alexnet.pth>   with LPIPS

No generator on it can be expected to do better. Beside each reading stands the same reader's result
on the images as they were: what is missing there the autoencoder did not lose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from eval.patterns import KINDS, batch_of, contrast_kept, patterns, sharpness_kept, words
from eval.records import Aggregate, Fingerprint, Results, Score, summarise
from eval.sets.frechet import frechet_distance
from eval.sets.population import around, one_thread, without_each
from eval.stats import blocks_of
from eval.suite import table
from flux2 import distributed
from flux2.data.loader import stack_images
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.latents import LatentCodec
from flux2.log import grid, progress
from rewards.base import settings
from rewards.nets.features import Extractor
from rewards.nets.perceptual import Lpips, psnr, ssim
from rewards.nets.weights import digest
from rewards.ocr import OCRReward

Reconstruct = Callable[[Tensor], Tensor]
"""images b 3 h w uint8 → the same after the round trip."""
TOGETHER: Final = 32
READ: Final = ("ocr_exact", "ocr_ned")


@dataclass(frozen=True)
class VaeReport:
    """What is measured.

    Attributes:
        dataset: whose targets are reconstructed; the first `count` of them.
        ocr: reads the data's words and the drawn ones; None leaves reading out.
        extractor: of the features for `rfd`, the Fréchet distance between the originals' features
            and the reconstructions' (rFID where it is Inception); None leaves it out.
        lpips: None leaves it out.
        sizes: of drawn words, in pixels. words: how many of each.
        patterns: how many images of each kind of lines, checks and edges.
        canvas: side in pixels of drawn images.
        shown: originals in the picture. seed: of what is drawn.
    """

    dataset: Dataset
    count: int = 200
    ocr: OCRReward | None = None
    extractor: Extractor | None = None
    lpips: Lpips | None = None
    sizes: Sequence[int] = (6, 8, 10, 12, 16, 20, 24)
    words: int = 24
    patterns: int = 16
    canvas: int = 64
    shown: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "words", "patterns", "shown"):
            if getattr(self, name) < 1:
                raise InputError(f"report.{name} is {getattr(self, name)}: it must be at least 1")
        for size in self.sizes:
            words(size, self.words, self.canvas, self.seed)  # refuses what does not fit

    def records(self) -> Iterator[Record]:
        """The first `count` records; each must have a target. Raises InputError."""
        for i in range(min(self.count, len(self.dataset))):
            record = self.dataset[i]
            if record.target is None:
                raise InputError(f"record {i} has no target image: choose data with images")
            yield record


def lpips_at(path: str | None, net: str = "alex", device: str = "auto") -> Lpips | None:
    """LPIPS with the weights in `path`; None where none are named."""
    return None if path is None else Lpips(path, net, device)


@dataclass
class Measured:
    """What was found, while it is being found.

    Attributes:
        scores: one of each image and value.
        ceilings: value → its mean on the originals.
        engines: value → what scored.
        pictures: name → rows of (original, reconstruction, difference), each 3 h w uint8, and their
            captions.
        skipped: what is missing → why.
    """

    scores: list[Score] = field(default_factory=list)
    aggregates: list[Aggregate] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    engines: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, list[tuple[Tensor, str]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    reference: Any = field(default_factory=hashlib.sha256)

    def add(self, name: str, ids: Sequence[int], values: Tensor, engine: str) -> None:
        """One value of each image."""
        self.engines[name] = engine
        pairs = zip(ids, values.tolist(), strict=True)
        self.scores += [Score(int(i), 0, name, v) for i, v in pairs]

    def show(self, picture: str, before: Tensor, after: Tensor, captions: Sequence[str]) -> None:
        """Adds rows to a picture."""
        difference = (4 * (after.int() - before.int()).abs()).clamp(0, 255).byte()
        rows = self.pictures.setdefault(picture, [])
        for a, b, d, caption in zip(before, after, difference, captions, strict=True):
            rows += [(a, caption), (b, "reconstruction"), (d, "difference ×4")]

    def results(self) -> Results:
        """The records, with their fingerprints."""
        counts: dict[str, int] = {}
        for s in self.scores:
            counts[s.metric] = counts.get(s.metric, 0) + 1
        counts |= {a.metric: a.n for a in self.aggregates}
        reference = self.reference.hexdigest()[:12]
        prints = {
            name: Fingerprint(name, engine, counts[name], reference, "autoencoder", 1.0)
            for name, engine in self.engines.items()
        }
        return Results(tuple(self.scores), prints, tuple(self.aggregates))


# ---------------------------------------------------------------- measuring


def measure(plan: VaeReport, reconstruct: Reconstruct, patch: int) -> Measured:
    """All that `plan` asks for. patch: the multiple that an image's sides must be; larger ones are
    cut in the middle."""
    if plan.canvas % patch:
        raise InputError(f"report.canvas is {plan.canvas}: make it a multiple of {patch}")
    found = Measured()
    _data(plan, reconstruct, patch, found)
    if plan.ocr is None:
        found.skipped["ocr, small text"] = "no reader was given (report.ocr)"
    else:
        _text(plan, plan.ocr, reconstruct, found)
    _lines(plan, reconstruct, found)
    return found


def cut(image: Tensor, patch: int) -> Tensor:
    """image: 3 h w → the middle of it whose sides are multiples of patch. Raises InputError."""
    h, w = image.shape[-2:]
    height, width = h // patch * patch, w // patch * patch
    if not height or not width:
        raise InputError(f"an image of {h}×{w} is smaller than a token of {patch} pixels")
    top, left = (h - height) // 2, (w - width) // 2
    return image[:, top : top + height, left : left + width]


def _chunks(plan: VaeReport, patch: int) -> Iterator[tuple[list[Record], Tensor]]:
    """Records whose images, b 3 h w, are of one size."""
    rows: list[Record] = []
    images: list[Tensor] = []
    for record in plan.records():
        assert record.target is not None
        image = cut(stack_images([record.target])[0], patch)
        if rows and (len(rows) == TOGETHER or image.shape != images[0].shape):
            yield rows, torch.stack(images)
            rows, images = [], []
        rows.append(record)
        images.append(image)
    if rows:
        yield rows, torch.stack(images)


def _data(plan: VaeReport, reconstruct: Reconstruct, patch: int, found: Measured) -> None:
    features: list[tuple[Tensor, Tensor]] = []
    originals: dict[str, list[Tensor]] = {name: [] for name in READ}
    total = min(plan.count, len(plan.dataset))
    chunks = progress(_chunks(plan, patch), "reconstructing", total, lambda chunk: len(chunk[0]))
    for rows, images in chunks:
        found.reference.update(images.numpy().tobytes())
        again, ids = reconstruct(images), [r.id for r in rows]
        found.add("psnr", ids, psnr(images, again), "psnr(range=255)")
        found.add("ssim", ids, ssim(images, again), "ssim(window=11)")
        if plan.lpips is not None:
            found.add("lpips", ids, plan.lpips(images, again), plan.lpips.engine)
        if plan.extractor is not None:
            features.append((plan.extractor(images), plan.extractor(again)))
        if plan.ocr is not None:
            batch = batch_of(ids, [dict(r.meta) for r in rows], _size(images))
            before, after = (plan.ocr(x, batch) for x in (images, again))
            for name in READ:
                found.add(name, ids, after[name], plan.ocr.engine)
                originals[name].append(before[name])
        room = plan.shown - len(found.pictures.get("images", ())) // 3
        shown = slice(0, max(0, min(room, len(rows))))
        if not found.pictures or _size(images) == tuple(found.pictures["images"][0][0].shape[1:]):
            captions = [r.prompt or "original" for r in rows[shown]]
            found.show("images", images[shown], again[shown], captions)
    _finish_data(plan, found, features, originals)


def _finish_data(
    plan: VaeReport,
    found: Measured,
    features: list[tuple[Tensor, Tensor]],
    originals: Mapping[str, list[Tensor]],
) -> None:
    if plan.lpips is None:
        found.skipped["lpips"] = "no weights were named (report.lpips.path)"
    if plan.extractor is None:
        found.skipped["rfd"] = "no extractor was given (report.extractor)"
    else:
        before, after = (torch.cat(x) for x in zip(*features, strict=True))
        found.aggregates.append(rfd(before, after))
        found.engines["rfd"] = plan.extractor.engine
    for name, parts in originals.items():
        values = torch.cat(parts) if parts else torch.empty(0)
        found.ceilings[name] = float(values.nanmean())
    if plan.ocr is not None and not any(s.metric in READ and s.value == s.value
                                        for s in found.scores):  # fmt: skip
        found.skipped["ocr"] = "no text is known in these images, or none could be read"


def rfd(before: Tensor, after: Tensor) -> Aggregate:
    """Fréchet distance between features of originals and of their reconstructions, n d each.

    Both sets are the same images, so that a perfect round trip has 0 at any n, and no correction
    for n is due. The interval leaves out blocks of images, on both sides (jackknife).
    """
    a, b = before.double(), after.double()
    n, d = a.shape
    if n < 2:
        raise InputError("rfd needs two images at least: raise report.count")
    blocks = torch.from_numpy(blocks_of(range(n)))

    def number(keep: Tensor) -> list[float]:
        x, y = a[keep], b[keep]
        return [frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())]

    with one_thread():
        value = number(blocks >= 0)[0]
        left = without_each(blocks, number) if n > 3 else torch.empty(0, 1).numpy()
    note = "" if n > d else f"n = {n} images, no more than d = {d}"
    return around("rfd", value, left[:, 0], n, note, within=(0.0, float("inf")))


def _size(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


def _drawn(plan: VaeReport) -> str:
    return settings("drawn", canvas=plan.canvas, seed=plan.seed)


def _text(plan: VaeReport, ocr: OCRReward, reconstruct: Reconstruct, found: Measured) -> None:
    for size in progress(plan.sizes, "small text", len(plan.sizes)):
        drawn = words(size, plan.words, plan.canvas, plan.seed)
        again = reconstruct(drawn.images)
        before, after = (ocr(x, drawn.batch) for x in (drawn.images, again))
        for name in READ:
            key = f"text_{size:02d}px_{name.removeprefix('ocr_')}"
            found.add(key, range(len(again)), after[name], f"{ocr.engine} + {_drawn(plan)}")
            found.ceilings[key] = float(before[name].nanmean())
        few = slice(0, 3)
        found.show("text", drawn.images[few], again[few], [f"{size} pixels"] * len(again[few]))


def _lines(plan: VaeReport, reconstruct: Reconstruct, found: Measured) -> None:
    for kind in KINDS:
        images = patterns(kind, plan.patterns, plan.canvas, plan.seed)
        again, ids = reconstruct(images), range(len(images))
        for name, score in (
            ("psnr", psnr), ("contrast", contrast_kept), ("sharpness", sharpness_kept)
        ):  # fmt: skip
            found.add(f"{kind}_{name}", ids, score(images, again), f"{name} + {_drawn(plan)}")
        few = slice(0, 3)
        found.show("lines", images[few], again[few], [kind.replace("_", " ")] * len(images[few]))


# ---------------------------------------------------------------- the stage


def codec_of(cfg: Any, device: torch.device) -> tuple[LatentCodec, str]:
    """The autoencoder of conf/model alone, and 12 hex digits of its weights' sha256.

    Raises:
        InputError: the model has no weights of its own.
    """
    from flux2 import architecture, sources
    from flux2.model import AUTOCAST, DTYPES

    if cfg.vae is None and cfg.path is None:
        raise InputError(f"model {cfg.name} has random weights: choose another, or give model.vae")
    path = None if cfg.vae is None else Path(cfg.vae)
    if path is None:
        folder = sources.locate(cfg.path, download=True)
        assert folder is not None
        path = folder / "vae"
    dtype = DTYPES[cfg.get("vae_dtype", "fp32")]
    if path.is_file():
        shape = architecture.expected(cfg)
        assert shape is not None
        vae, files = sources.load_file(path, "vae", shape["vae"], device, dtype), [path]
    else:
        files = sources.files(path, "vae")
        vae = sources.load_folder(path, "vae", device, dtype)
    return LatentCodec(vae.eval().requires_grad_(False), AUTOCAST[cfg.vae_autocast]), digest(files)


def report(cfg: Any) -> dict[str, Any]:
    """Runs the stage on rank 0: a table, records.jsonl, and pictures of what was lost."""
    from flux2.distributed import pick_device
    from flux2.model import check_model, quiet
    from flux2.train import build

    if cfg.init_from is not None:
        raise InputError(
            "stage=vae looks at model.path's autoencoder, or model.vae's: leave init_from out, and "
            "give a run's own as model.vae=<run>/export/vae"
        )
    check_model(cfg.model)
    if not distributed.is_main():
        return {}
    quiet()
    plan: VaeReport = build(cfg.report)
    try:
        if plan.ocr is not None:
            plan.ocr.ready()
        device = pick_device(cfg.engine.device)
        codec, weights = codec_of(cfg.model, device)

        def reconstruct(images: Tensor) -> Tensor:
            tokens = (images.shape[-2] // codec.patch, images.shape[-1] // codec.patch)
            return codec.decode(codec.encode(images.to(device)), tokens).cpu()

        found = measure(plan, reconstruct, codec.patch)
    finally:
        if plan.ocr is not None:
            plan.ocr.close()
    return _tell(cfg, found, weights)


def _tell(cfg: Any, found: Measured, weights: str) -> dict[str, Any]:
    run, results = Path(cfg.run.dir), found.results()
    results.save(run / "records.jsonl")
    summary = {k: v for k, v in summarise(results).items() if v["n"]}
    ceilings = {k: v for k, v in found.ceilings.items() if k in summary}
    text = table(summary, ceilings)
    (run / "table.txt").write_text(text)
    print(text)
    print("ceiling: the same reader on the images before the autoencoder")
    for what, why in found.skipped.items():
        print(f"without {what}: {why}")
    (run / "samples").mkdir(exist_ok=True)
    pictures = {}
    for name, rows in found.pictures.items():
        path = run / "samples" / f"{name}.png"
        images, captions = zip(*rows, strict=True)
        grid(torch.stack(images), captions, columns=9).save(path)
        pictures[name] = str(path)
        print(f"{name}: {path}")
    return {
        "stage": "vae",
        "autoencoder": {
            "model": cfg.model.name, "sha256": weights, "dtype": cfg.model.get("vae_dtype", "fp32"),
            "autocast": cfg.model.vae_autocast,
        },
        "metrics": summary,
        "ceiling": ceilings,
        "skipped": found.skipped,
        "engines": found.engines,
        "pictures": pictures,
    }  # fmt: skip
