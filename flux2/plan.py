"""stage=plan: which engine fits which GPUs, predicted without weights; and a line at each start.

    python run.py stage=plan plan=grpo model=klein-4b-base adapter=lora plan.gpus=8
    python run.py stage=plan experiment=klein/grpo-lora

`plan=` takes any stage that trains, and every key of that stage may be set; a recipe brings its
own. Nothing is measured, and nothing is read but configuration: see flux2.footprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from flux2 import distributed
from flux2.errors import BatchError, InputError
from flux2.files import write_json
from flux2.footprint import Engine, Footprint, Prediction, engine_of

GIB = 1 << 30
OUTSIDE = 1.0
"""GiB of a GPU that torch's allocator does not get: CUDA's context, kernels, NCCL."""
FRAGMENTS = 0.04
"""Share of the rest that stays unusable between blocks."""
PLAIN = (Engine("none"), Engine("ddp"))
ZERO = tuple(
    Engine("deepspeed", stage, True, offload, offload and stage == 3)
    for stage, offload in ((1, False), (2, False), (3, False), (2, True), (3, True))
)


@dataclass(frozen=True)
class Choice:
    """A way to run, and what it takes."""

    engine: Engine
    ranks: int
    checkpointing: bool
    found: Prediction

    @property
    def command(self) -> str:
        """As on the command line."""
        parts = [f"engine={self.engine.name}"]
        if self.ranks > 1:
            parts.append(f"launch.processes={self.ranks}")
        if self.checkpointing:
            parts.append("engine.checkpointing=true")
        return " ".join(parts)


def line(cfg: Any) -> str:
    """What a training run that is about to start will take, in one line; no weight is read. A run
    does not end because its forecast fails: the line then says why.

    Raises:
        BatchError: of the method, which is rehearsed.
    """
    cuda = torch.cuda.is_available() and not str(cfg.engine.device).startswith("cpu")
    try:
        found = Footprint(cfg, cuda, brief=True).predict(
            engine_of(cfg.engine), distributed.size(), cfg.engine.checkpointing
        )
    except BatchError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        return f"memory: not predicted ({type(error).__name__}: {why})"
    stays, passes = sum(found.stays.values()) / GIB, found.passing[found.phase] / GIB
    reward = "" if cfg.get("reward") is None else ", the reward's networks aside"
    text = (
        f"memory: {found.peak / GIB:.2f} GiB a rank predicted, {stays:.2f} to stay and "
        f"{passes:.2f} for the {found.phase}{reward}"
    )
    if not cuda:
        return text
    there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
    short = "" if fits(found, there) else ": too little; python run.py stage=plan tells more"
    return f"{text}; the GPU has {there:.1f}{short}"


def fits(found: Prediction, memory: float) -> bool:
    """Whether a GPU of `memory` GiB has room."""
    return found.peak / GIB <= (memory - OUTSIDE) * (1 - FRAGMENTS)


def plan(cfg: Any) -> dict[str, Any]:
    """stage=plan: prints the tables, writes plan.json, returns the summary."""
    asked = cfg.plan
    if asked.gpus < 1 or asked.gpu_memory <= 0:
        raise InputError("plan.gpus must be at least 1 and plan.gpu_memory above 0 GiB")
    if asked.device not in ("cuda", "cpu"):
        raise InputError(f"plan.device is {asked.device!r}: choose cuda or cpu")
    footprint = Footprint(cfg, asked.device == "cuda", _asked_size(asked))
    engine, checkpointing = engine_of(cfg.engine), bool(cfg.engine.checkpointing)
    ranks = max(1, int(cfg.launch.get("processes", 1)) * int(cfg.launch.get("nodes", 1)))
    found = footprint.predict(engine, ranks, checkpointing)
    chosen = Choice(engine, ranks, checkpointing, found)
    choices = list(_choices(footprint, asked.gpus))
    best = recommend(choices, asked.gpus, asked.gpu_memory)
    print("\n".join([
        *_head(cfg, footprint), "", *_dict(chosen), *_aside(footprint), "",
        *_table(choices, asked.gpu_memory), "", advice(cfg, footprint, best, asked),
    ]), flush=True)  # fmt: skip
    out = _summary(cfg, footprint, chosen, choices, best, asked)
    write_json(Path(cfg.run.dir) / "plan.json", out)
    return out


def _asked_size(asked: Any) -> tuple[int, int, int] | None:
    """What plan.height, plan.width and plan.references say; None leaves the size to the data."""
    given = [int(v) for v in (asked.height, asked.width) if v is not None]
    if not given:
        return None
    height, width = given[0], given[-1]
    if height % 16 or width % 16 or min(height, width) < 16:
        raise InputError(f"plan.height={height} plan.width={width}: give multiples of 16")
    return height, width, asked.references


def _choices(footprint: Footprint, gpus: int) -> Iterator[Choice]:
    """Every engine that can train this, on 1, 2, 4, … GPUs, without and with checkpointing."""
    counts = sorted({*(1 << k for k in range(gpus.bit_length())), gpus})
    counts = [n for n in counts if n <= gpus and n <= footprint.cfg.data.batch_size]
    engines = [*PLAIN, *ZERO] if footprint.shardable else PLAIN
    for checkpointing in (False, True) if footprint.velocity else (False,):
        for engine in engines:
            for ranks in counts:
                if (engine.kind == "none") == (ranks == 1) or engine.kind == "deepspeed":
                    found = footprint.predict(engine, ranks, checkpointing)
                    yield Choice(engine, ranks, checkpointing, found)


def recommend(choices: list[Choice], gpus: int, memory: float) -> Choice | None:
    """The quickest way that fits, on as many of the GPUs as the batch can be shared among: copies
    before shards, shards before recomputation (a quarter more work), gathered weights and host
    memory last."""

    def cost(choice: Choice) -> tuple[int, bool, int]:
        engine = choice.engine
        slow = 3 if engine.offload else 2 if engine.stage == 3 else 0
        return slow, choice.checkpointing, engine.stage

    most = max((c.ranks for c in choices), default=0)
    fitting = [c for c in choices if c.ranks == most and fits(c.found, memory)]
    return min(fitting, key=cost, default=None)


def advice(cfg: Any, footprint: Footprint, best: Choice | None, asked: Any) -> str:
    """One line: what to run, or what to change."""
    if best is not None:
        # A recipe that asks for it is planned without it as well.
        off = cfg.engine.get("checkpointing") and not best.checkpointing
        command = best.command + (" engine.checkpointing=false" if off else "")
        return (
            f"Run with {command}: {best.found.peak / GIB:.1f} GiB of {asked.gpu_memory:g} on "
            f"each GPU, {best.found.host_peak / GIB:.0f} GiB of host memory for the first rank."
        )
    key = "method.chunk" if cfg.method.get("chunk") is not None else "method.micro"
    name = key.removeprefix("method.")
    if cfg.method.get(name, 1) > 1:
        smaller = cfg.copy()
        OmegaConf.update(smaller, key, 1)
        again = Footprint(smaller, footprint.cuda, footprint.size)
        found = recommend(list(_choices(again, asked.gpus)), asked.gpus, asked.gpu_memory)
        if found is not None:
            return (
                f"Nothing fits with {key}={cfg.method[name]}. With {key}=1 run {found.command}: "
                f"{found.found.peak / GIB:.1f} GiB of {asked.gpu_memory:g} on each GPU."
            )
    hints = []
    if footprint.lora is None:
        hints.append("adapter=lora")
    elif cfg.model.get("quantise") is None:
        hints.append("model.quantise=nf4")
    if not footprint.released:
        hints.append("data.cache=<folder> data.release_encoder=true")
    return f"Nothing fits: try {', '.join([*hints, 'smaller images'])}, or more GPUs."


# ---------------------------------------------------------------- what is printed


def _head(cfg: Any, footprint: Footprint) -> list[str]:
    shape, count = footprint.shape, footprint.trainable / 1e6
    what = "all weights" if footprint.lora is None else f"LoRA of rank {footprint.lora.rank}"
    roles = f", {footprint.trained} trained" if footprint.trained > 1 else ""
    roles += f", {footprint.followers} averaged" if footprint.followers else ""
    return [
        f"{footprint.method} on {cfg.model.name}: {what}, {count:,.1f}M trained a role{roles}; "
        f"batch {cfg.data.batch_size}, {shape.height}×{shape.width}"
        + (f", {shape.references} references" if shape.references else ""),
    ]


def _dict(chosen: Choice) -> list[str]:
    """The chosen way, part by part."""
    found = chosen.found
    rows = [(k, v) for k, v in found.stays.items() if v]
    rows += [(f"  {k}", v) for k, v in sorted(found.passing.items(), key=lambda x: -x[1])]
    out = [f"{chosen.command}, each rank, GiB"]
    out += [f"  {name:24}{size / GIB:9.2f}" for name, size in rows]
    out.append(f"  {'peak (in ' + found.phase + ')':24}{found.peak / GIB:9.2f}")
    return [*out, f"  {'host, first rank':24}{found.host_peak / GIB:9.2f}"]


def _aside(footprint: Footprint) -> list[str]:
    """What the numbers leave out."""
    what = footprint.uncounted
    return [] if what is None else [f"  not counted: {what}"]


def _table(choices: list[Choice], memory: float) -> list[str]:
    """Engines against numbers of GPUs."""
    counts = sorted({c.ranks for c in choices})
    out = [f"GiB a GPU; * fits {memory:g}", "  " + " " * 28 + "".join(f"{n:>9}" for n in counts)]
    for checkpointing in sorted({c.checkpointing for c in choices}):
        for name in dict.fromkeys(c.engine.name for c in choices):
            cells = {
                c.ranks: f"{c.found.peak / GIB:.1f}{'*' if fits(c.found, memory) else ' '}"
                for c in choices
                if c.engine.name == name and c.checkpointing == checkpointing
            }
            label = f"{name}{' checkpointing' if checkpointing else ''}"
            out.append(f"  {label:28}" + "".join(f"{cells.get(n, '–'):>9}" for n in counts))
    return out


def _summary(
    cfg: Any,
    footprint: Footprint,
    chosen: Choice,
    choices: list[Choice],
    best: Choice | None,
    asked: Any,
) -> dict[str, Any]:
    def entry(choice: Choice) -> dict[str, Any]:
        return {
            "engine": choice.engine.name,
            "ranks": choice.ranks,
            "checkpointing": choice.checkpointing,
            "peak": choice.found.peak,
            "host": choice.found.host_peak,
            "fits": fits(choice.found, asked.gpu_memory),
        }

    return {
        "stage": "plan",
        "method": footprint.method,
        "model": cfg.model.name,
        "size": [footprint.shape.height, footprint.shape.width, footprint.shape.references],
        "trained_parameters": footprint.trainable,
        "not_counted": footprint.uncounted,
        "chosen": {
            **entry(chosen),
            "stays": dict(chosen.found.stays),
            "passing": dict(chosen.found.passing),
            "host_parts": dict(chosen.found.host),
        },
        "choices": [entry(c) for c in choices],
        "recommended": None if best is None else {**entry(best), "command": best.command},
    }
