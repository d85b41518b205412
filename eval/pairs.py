"""stage=pairs: preference pairs from a model, judged by a reward.

    python run.py stage=pairs run.dir=outputs/pairs
    python run.py stage=pairs init_from=outputs/dpo start=512 seed=1      the next round's

`group` samples of each of `count` prompts, by the sampler and with the sample ids of evaluation; of
each group the best against the worst, where they differ by `margin` at least. The run holds

    pairs/pairs.jsonl     {"prompt", "winner", "loser", "margin", "references", "meta"} a line
    pairs/images/         the images, PNG
    pairs/chunks/         what each chunk gave, whole or absent: a resumed run goes on behind them
    samples/pairs.png     some pairs, the winner to the left

The ranks share the chunks, which are the same for any number of them. `margin` is applied at the
end, so that `resume=<run> margin=…` filters anew without sampling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.groups import Drawn, check_counts, judge, plain_meta, read_chunks
from eval.images import read_image
from flux2 import distributed
from flux2.data.pairs import FILE
from flux2.data.record import Record
from flux2.errors import InputError
from flux2.files import write_text
from flux2.log import grid


def found_in(folder: Path, drawn: Drawn | None, rewards: Tensor) -> dict[str, Any]:
    """The pairs of a chunk (`eval.groups.Gave`); their images are written first."""
    out: dict[str, Any] = {"prompts": len(rewards), "unscored": 0, "flat": 0}
    out |= {"rewards": rewards.flatten().tolist(), "rows": []}
    if drawn is None:
        return out
    (folder / "images").mkdir(exist_ok=True)
    best, worst, reason = best_and_worst(rewards)
    for k, record in enumerate(drawn.records):
        if reason[k]:
            out[reason[k]] += 1
            continue
        i, j = int(best[k]), int(worst[k])
        group = drawn.images.unflatten(0, rewards.shape)[k]
        out["rows"].append(_row(folder, record, group, rewards[k], i, j))
    return out


def _row(
    folder: Path, record: Record, images: Tensor, rewards: Tensor, i: int, j: int
) -> dict[str, Any]:
    """A pair's line; its images are written. images, rewards: of the group, g."""
    names = [f"images/{record.id:06d}-{m}.png" for m in (i, j)]
    for name, m in zip(names, (i, j), strict=True):
        _save(folder / name, images[m].permute(1, 2, 0).cpu().numpy())
    given = []
    for n, reference in enumerate(record.references):
        given.append(f"images/{record.id:06d}-reference{n}.png")
        _save(folder / given[-1], reference)
    best, worst = float(rewards[i]), float(rewards[j])
    row = {"prompt": record.prompt, "winner": names[0], "loser": names[1]}
    row |= {"margin": best - worst} | ({"references": given} if given else {})
    meta = {**plain_meta(record), "rewards": [best, worst], "record": record.id}
    return row | {"meta": meta}


def best_and_worst(rewards: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """rewards: p g, NaN where unscored → the best and the worst member of each group (of equals the
    first): p each; and why a group gives no pair: "unscored" (fewer than two have a score), "flat"
    (no spread), or ""."""
    nan = rewards.isnan()
    best = rewards.masked_fill(nan, -math.inf).argmax(1)
    worst = rewards.masked_fill(nan, math.inf).argmin(1)
    rows = torch.arange(len(rewards))
    spread = rewards[rows, best] - rewards[rows, worst]
    few = (~nan).sum(1) < 2
    reasons = [
        "unscored" if f else "" if s > 0 else "flat"
        for f, s in zip(few.tolist(), spread.tolist(), strict=True)
    ]
    return best, worst, reasons


def make(cfg: Any) -> dict[str, Any]:
    """stage=pairs, on every rank; returns its summary (on rank 0)."""
    _check(cfg)
    folder, chunks = judge(cfg, found_in, "margin and shown")
    return finish(folder, chunks, cfg.margin, cfg.shown) if distributed.is_main() else {}


def _check(cfg: Any) -> None:
    check_counts(cfg, count=1, start=0, group=2, chunk=1, shown=0)
    if not 0 <= cfg.margin < math.inf:
        raise InputError(f"margin is {cfg.margin}: it must be at least 0")
    if cfg.reward is None:
        raise InputError("stage=pairs needs a judge: choose a reward, as reward=ocr")


# ---------------------------------------------------------------- what comes out


def finish(folder: Path, chunks: int, margin: float, shown: int) -> dict[str, Any]:
    """Joins the chunks into pairs.jsonl, draws the picture, prints and returns the summary.

    Raises:
        InputError: no pair has the margin.
    """
    found = read_chunks(folder, chunks)
    rows = [row for chunk in found for row in chunk["rows"]]
    kept = [row for row in rows if row["margin"] >= margin]
    prompts = sum(c["prompts"] for c in found)
    counts = {name: sum(c[name] for c in found) for name in ("unscored", "flat")}
    counts["below_margin"] = len(rows) - len(kept)
    counts["samples_unscored"] = sum(r is None for c in found for r in c["rewards"])
    if not kept:
        raise InputError(
            f"none of {prompts} prompts gave a pair with margin={margin} ({_told(counts)}): lower "
            "margin, raise group, or take a reward that tells the samples apart"
        )
    write_text(folder / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    margins = np.array([row["margin"] for row in kept])
    judged = np.array([row["meta"]["rewards"] for row in kept])
    every = np.array([r for c in found for r in c["rewards"]], float)  # None becomes NaN
    print(f"{len(kept)} pairs of {prompts} prompts ({_told(counts)}) in {folder}")
    summary = {
        "stage": "pairs",
        "prompts": prompts,
        "kept": len(kept),
        **counts,
        "margin": {"asked": margin, **_spread(margins)},
        "reward": {
            "all": float(np.nanmean(every)),
            "winners": float(judged[:, 0].mean()),
            "losers": float(judged[:, 1].mean()),
        },
        "pairs": str(folder),
    }
    if shown:
        summary["picture"] = str(_picture(folder, kept[:shown]))
        print(f"pairs: {summary['picture']}")
    return summary


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in counts.items())


def _spread(x: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(x, [0, 0.5, 1]).tolist()
    return {"least": low, "median": middle, "mean": float(x.mean()), "most": high}


def _picture(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Winners and losers side by side, of those that have the first one's size."""
    images, captions = [], []
    for row in rows:
        shots = [read_image(folder / row[k]) for k in ("winner", "loser")]
        if not images or shots[0].shape == images[0].shape:
            images += shots
            best, worst = row["meta"]["rewards"]
            captions += [f"{best:.3g}: {row['prompt']}", f"{worst:.3g}"]
    path = folder.parent / "samples" / "pairs.png"
    path.parent.mkdir(exist_ok=True)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    grid(batch, captions, 8).save(path)
    return path


def _save(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image).save(path, "PNG")
