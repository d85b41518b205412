"""stage=enhance: prompts rewritten by a language model, with their ground truth kept.

    python run.py stage=enhance data=prompts data.dataset.path=prompts.jsonl writer.model=<name>

`rewrites` rewrites of each of `count` prompts; of edits the writer sees the images. What a rewrite
must keep is in eval/rewriting.py; one that does not is drawn again, `attempts` times in all, and
then the original stands in its place and is counted. The run holds

    enhance/prompts.jsonl   a line a record, for data=prompts and data=derived (docs/prompts.md)
    enhance/chunks/         what each chunk gave, whole or absent: a resumed run goes on behind them

The ranks share the chunks, which are the same for any number of them. What failed for the writer's
own reasons (no connection …) is asked for again by `resume=<run>`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from eval.groups import check_counts, chunk_file, claim, plain_meta, read_chunks, readable
from eval.rewriting import Style, accept, seed_of
from flux2 import distributed
from flux2.data.derived import FILE
from flux2.data.record import Dataset, Record
from flux2.errors import InputError
from flux2.files import read_json, write_json, write_text
from flux2.log import progress
from flux2.runs import Interrupt, Run
from rewards.vlm.model import Writer

AGAIN: Final = ("too long", "no words")
"""A writer's failures that another draw may mend; the others are not the text's fault."""

Key = tuple[int, int]
"""(record, number of the rewrite)"""


@dataclass(frozen=True)
class Rewrite:
    """A rewrite, or what stands in its place.

    Attributes:
        text: None where the original is kept, or nothing was answered.
        attempts: draws made.
        kept: why the last draw was rejected.
        failed: why the writer gave no answer.
    """

    text: str | None
    attempts: int
    kept: str | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Enhancer:
    """Rewrites records' prompts.

    Attributes:
        style: how. rewrites: of each prompt. attempts: draws for a rewrite, at most.
        seed: of the draws. folder: enhance/ of the run.
    """

    dataset: Dataset
    writer: Writer
    style: Style
    rewrites: int
    attempts: int
    seed: int
    folder: Path

    def rewrite(
        self, records: Sequence[Record], known: Mapping[Key, Rewrite]
    ) -> dict[Key, Rewrite]:
        """All rewrites of these records; `known` ones are not asked for."""
        by = {r.id: r for r in records}
        keys = [(r.id, k) for r in records for k in range(self.rewrites)]
        found = {key: known[key] for key in keys if key in known}
        todo = {key: "" for key in keys if key not in found}  # → why the last draw was rejected
        for attempt in range(self.attempts):
            asked = list(todo)
            requests = [
                self.style.request(
                    by[i].prompt, by[i].references, seed_of(self.seed, i, k, attempt), todo[i, k]
                )
                for i, k in asked
            ]
            answers = self.writer.written(self.writer.write(requests)) if asked else []
            for key, answer in zip(asked, answers, strict=True):
                if answer.failure is not None and answer.failure not in AGAIN:
                    found[key] = Rewrite(None, attempt, failed=answer.failure)
                    del todo[key]
                    continue
                text, why = accept(by[key[0]].prompt, answer.text)
                todo[key] = "was " + answer.failure if answer.failure == AGAIN[0] else why
                if not todo[key]:
                    found[key] = Rewrite(text, attempt + 1)
                    del todo[key]
        kept = {key: Rewrite(None, self.attempts, kept=why) for key, why in todo.items()}
        return {key: {**found, **kept}[key] for key in keys}

    def known(self, number: int) -> dict[Key, Rewrite] | None:
        """A chunk's rewrites that need not be asked for again; None where it is whole."""
        file = chunk_file(self.folder, number)
        if not file.is_file():
            return {}
        found = {
            (row["record"], k): Rewrite(**rewrite)
            for row in read_json(file)["rows"]
            for k, rewrite in enumerate(row["rewrites"])
        }
        good = {key: rewrite for key, rewrite in found.items() if rewrite.failed is None}
        return None if len(good) == len(found) else good

    def keep(self, number: int, indices: Sequence[int], known: Mapping[Key, Rewrite]) -> None:
        """Makes a chunk, and writes it whole or not at all."""
        records = readable(self.dataset, indices)
        found = self.rewrite(records, known)
        rows = [
            {
                "record": record.id,
                "prompt": record.prompt,
                "rewrites": [asdict(found[record.id, k]) for k in range(self.rewrites)],
                "meta": plain_meta(record),
            }
            for record in records
        ]
        unreadable = len(indices) - len(records)
        write_json(chunk_file(self.folder, number), {"rows": rows, "unreadable": unreadable})

    def run(self, chunks: Sequence[Sequence[int]]) -> None:
        """This rank's chunks that are not whole yet."""
        mine = range(distributed.rank(), len(chunks), distributed.size())
        todo = [(n, known) for n in mine if (known := self.known(n)) is not None]
        total = sum(len(chunks[n]) for n, _ in todo)
        with Interrupt() as stop:
            for number, known in progress(todo, "prompts", total, lambda it: len(chunks[it[0]])):
                self.keep(number, chunks[number], known)
                if stop.signum:
                    stop.abort()


def count_of(rewrites: Any) -> Counter[str]:
    """rewritten, kept and failed."""
    return Counter(
        "rewritten" if r.text is not None else "kept" if r.kept is not None else "failed"
        for r in rewrites
    )


def make(cfg: Any) -> dict[str, Any]:
    """stage=enhance, on every rank; returns its summary (on rank 0)."""
    from flux2.train import build

    _check(cfg)
    style = Style(cfg.system, cfg.system_edit, cfg.words, cfg.tokens, cfg.temperature)
    dataset = build(cfg.data.dataset)
    stop = len(dataset) if cfg.count is None else min(cfg.start + cfg.count, len(dataset))
    indices = range(cfg.start, stop)
    if not indices:
        raise InputError(f"start={cfg.start}, and the dataset has {len(dataset)} records")
    writer: Writer = build(cfg.writer)
    if not writer.sees and any(dataset.bucket_of(i)[2] for i in indices):
        raise InputError(
            "the data have edits, and the writer sees no images: choose a vision-language model, "
            "or data without references"
        )
    chunks = [indices[k : k + cfg.chunk] for k in range(0, len(indices), cfg.chunk)]
    run = Run(Path(cfg.run.dir))
    folder = run.path / "enhance"
    try:
        writer.ready()
        facts = {"writer": writer.engine, "dataset": repr(dataset), "seed": cfg.seed,
                 "style": asdict(style), "told": [style.told(False), style.told(True)],
                 "rewrites": cfg.rewrites, "attempts": cfg.attempts, "start": cfg.start,
                 "count": len(indices), "chunk": cfg.chunk}  # fmt: skip
        if distributed.is_main():
            print(f"writer: {writer.engine}; licence: {writer.licence}", flush=True)
            claim(folder, facts, "shown")
        distributed.barrier()
        Enhancer(dataset, writer, style, cfg.rewrites, cfg.attempts, cfg.seed, folder).run(chunks)
    finally:
        writer.close()
    distributed.barrier()
    return finish(folder, len(chunks), cfg.shown) if distributed.is_main() else {}


def _check(cfg: Any) -> None:
    check_counts(cfg, start=0, rewrites=1, attempts=1, chunk=1, shown=0)
    if cfg.count is not None and cfg.count < 1:
        raise InputError(f"count is {cfg.count}: it must be at least 1, or null for all records")
    if "model" in cfg.writer and cfg.writer.model is None:
        raise InputError(
            "writer.model names no model: write writer.model=<the server's name for it>, or "
            "writer=local writer.path=<folder>"
        )


# ---------------------------------------------------------------- what comes out


def finish(folder: Path, chunks: int, shown: int) -> dict[str, Any]:
    """Joins the chunks into prompts.jsonl; prints and returns the summary.

    Raises:
        InputError: not one prompt was rewritten.
    """
    found = read_chunks(folder, chunks)
    rows = [row for chunk in found for row in chunk["rows"]]
    rewrites = [Rewrite(**r) for row in rows for r in row["rewrites"]]
    counts = count_of(rewrites)
    reasons = {
        "kept": Counter(_kind(r.kept) for r in rewrites if r.kept is not None),
        "failed": Counter(r.failed for r in rewrites if r.failed is not None),
    }
    told = ", ".join(f"{n} × {why}" for part in reasons.values() for why, n in part.most_common())
    if not counts["rewritten"]:
        raise InputError(
            f"none of {len(rows)} prompts was rewritten ({told or 'none could be read'}): correct "
            "the writer, and go on with resume=<run>, or raise attempts or tokens in another run"
        )
    lines = [json.dumps(line_of(row), ensure_ascii=False) for row in rows]
    write_text(folder / FILE, "\n".join(lines) + "\n")
    again = "; resume this run to ask again for what failed" if counts["failed"] else ""
    print(f"{counts['rewritten']} rewrites of {len(rows)} prompts, {counts['kept']} times the "
          f"original kept, {counts['failed']} failed{f' ({told})' if told else ''}{again}: "
          f"{folder / FILE}")  # fmt: skip
    for row in [r for r in rows if r["rewrites"][0]["text"]][:shown]:
        print(f"  {row['prompt']}\n  → {row['rewrites'][0]['text']}")
    return {
        "stage": "enhance",
        "prompts": len(rows),
        "rewritten": counts["rewritten"],
        "kept": counts["kept"],
        "failed": counts["failed"],
        "unreadable": sum(c["unreadable"] for c in found),
        "attempts": sum(r.attempts for r in rewrites) / max(1, len(rewrites)),
        "reasons": {name: dict(part) for name, part in reasons.items()},
        "file": str(folder / FILE),
    }


def _kind(why: str | None) -> str:
    """A rejection without what it names: "lost", "added", or as it is."""
    first = (why or "").split(" ")[0]
    return first if first in ("lost", "added") else why or ""


def line_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record's line: `prompt` is its first rewrite, or the original where that was kept;
    `original_prompt` is what rewards go by, also of a prompt that was rewritten before; `captions`
    has both by kind: raw, enhanced, enhanced2 …"""
    prompt, meta = row["prompt"], row["meta"]
    texts = [rewrite["text"] for rewrite in row["rewrites"]]
    kinds = {
        f"enhanced{k if k > 1 else ''}": text for k, text in enumerate(texts, 1) if text is not None
    }
    return {
        "id": row["record"],
        **meta,
        "prompt": texts[0] or prompt,
        "original_prompt": meta.get("original_prompt", prompt),
        "captions": {**(meta.get("captions") or {}), "raw": prompt, **kinds},
        "record": row["record"],
        "attempts": [rewrite["attempts"] for rewrite in row["rewrites"]],
    }
