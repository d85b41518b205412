"""Predicted memory against what the allocator gave, for a FLUX.2 with random weights.

    python benchmarks/memory.py                          # 300M, on the GPU if there is one
    python benchmarks/memory.py --model klein-4b         # needs a GPU
    python benchmarks/memory.py --sizes 512 1024 --only lora

One optimizer update of supervised finetuning, with AdamW's states in place. On CUDA the measure is
torch.cuda.max_memory_allocated; on the CPU every allocation and release that torch's allocator
reports to its profiler is summed. Neither is the process's size, where libraries dominate.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flux2.engine import Engine
from flux2.footprint import Footprint, engine_of
from flux2.latents import grid_ids
from flux2.model import AUTOCAST, Flux2, load_model, meta_parts
from flux2.optim import LearningRate
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.types import Batch, Condition, Method

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # double blocks, single blocks, heads of 128
    "18m": (2, 4, 3),
    "300m": (3, 10, 9),
    "klein-4b": (5, 20, 24),
}
MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """A case: bytes predicted and measured, whole and of what passes alone."""

    name: str
    predicted: int
    measured: int
    passing: int
    passing_measured: int

    @property
    def error(self) -> float:
        """Of the whole, relative."""
        return self.predicted / self.measured - 1

    @property
    def passing_error(self) -> float:
        """Of what passes, relative."""
        return self.passing / self.passing_measured - 1


def configuration(model: str, *overrides: str) -> DictConfig:
    """stage=sft on a model of this size, random weights, without evaluation."""
    OmegaConf.register_new_resolver("project", lambda path: str(ROOT / path), replace=True)
    double, single, heads = SHAPES[model]
    shape = "model.architecture.transformer"
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [
            "stage=sft", "model=nano-scratch", "model.attention=null", "model.dtype=bf16",
            "model.max_sequence_length=64", "data.batch_size=2", "method.micro=2",
            f"{shape}.num_layers={double}", f"{shape}.num_single_layers={single}",
            f"{shape}.num_attention_heads={heads}", f"{shape}.attention_head_dim=128",
            f"{shape}.axes_dims_rope=[32,32,32,32]", *overrides,
        ])  # fmt: skip
    cfg.evaluation = None
    return cfg


def cpu_peak(run: Callable[[], object]) -> int:
    """Most bytes that run() held at once, beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as seen:
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events: list[tuple[int, int]] = []

    def walk(nodes: Iterable[Any]) -> None:
        for node in nodes:
            if node.tag.name == "Allocation":
                events.append((node.start_time_ns, node.extra_fields.alloc_size))
            walk(node.children)

    walk(seen.profiler.kineto_results.experimental_event_tree())
    return max(itertools.accumulate((size for _, size in sorted(events)), initial=0))


def cuda_peak(run: Callable[[], object]) -> int:
    """The same, on the GPU."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def batch_of(cfg: DictConfig, model: Flux2, size: int) -> Batch:
    """Random latents and text features of the configured number of samples."""
    b, grid, device = cfg.data.batch_size, (size // 16, size // 16), model.device
    s, n = cfg.model.max_sequence_length, grid[0] * grid[1]
    dim = int(model.transformer.config.joint_attention_dim)  # pyright: ignore
    cond = Condition(
        text=torch.randn(b, s, dim, device=device),
        text_ids=torch.zeros(b, s, 4, dtype=torch.int64, device=device),
        ids=grid_ids(grid, device=device).expand(b, -1, -1),
    )
    return Batch(
        ids=torch.arange(b), prompts=("",) * b, cond=cond, groups=torch.arange(b),
        meta=({},) * b, grid=grid, x0=torch.randn(b, n, 128, device=device),
        weight=torch.full((b,), 1 / b),
    )  # fmt: skip


def update(engine: Engine, method: Method, batch: Batch) -> None:
    """One step, as flux2/loop.py makes it."""
    rng = Rng(0, engine.step)
    for micros in method.collect(engine.roles, batch, rng):
        for turn in method.turns:
            with engine.turn(turn.role):
                for micro in micros:
                    loss, _ = turn.loss(engine.roles, micro, rng)
                    engine.backward(loss, last=micro is micros[-1])
                    del loss


def case(name: str, cfg: DictConfig, size: int, device: torch.device) -> Row:
    """Predicts and measures one configuration."""
    predicted = Footprint(cfg, device.type == "cuda", (size, size, 0)).predict(
        engine_of(cfg.engine), 1, cfg.engine.checkpointing
    )
    model = load_model(cfg.model, device)
    method: Method = instantiate(cfg.method, _convert_="all")
    lora = None if cfg.adapter is None else instantiate(cfg.adapter, _convert_="all")
    roles = Roles(
        method.roles, model, lora, AUTOCAST[cfg.engine.autocast], cfg.engine.checkpointing, 0
    )
    named = {role: roles.parameters(role) for role in roles.trainable}
    parameters = [p for group in named.values() for p in group.values()]
    optimizer = instantiate(cfg.optim.optimizer, _convert_="all", roles=named)
    for p in parameters:  # states as after a first update, without its pass
        p.grad = torch.zeros_like(p)
    optimizer.active = next(iter(named))
    optimizer.step()
    for p in parameters:
        p.grad = None
    states = [t for p in parameters for t in optimizer.state_of(p).values()]
    stays = stored([*roles.backbones.parameters(), *roles.backbones.buffers(), *states])
    engine, batch = Engine(roles, optimizer, LearningRate(), 1.0), batch_of(cfg, model, size)
    gc.collect()
    peak = (cuda_peak if device.type == "cuda" else cpu_peak)(
        lambda: update(engine, method, batch)
    )
    # The autoencoder and the encoder stand aside here: their passes are not part of an update.
    kept = ("frozen base", "trained weights", "averages", "optimizer states")
    mine = sum(predicted.stays[k] for k in kept)
    passes = {k: v for k, v in predicted.passing.items() if k == "update" or k.startswith("pass")}
    passing = max(passes.values())
    return Row(name, mine + passing, stays + peak, passing, peak)


CASES: dict[str, tuple[str, ...]] = {
    "lora": ("adapter=lora",),
    "lora, checkpointing": ("adapter=lora", "engine.checkpointing=true"),
    "lora, nf4": ("adapter=lora", "model.quantise=nf4"),
    "lora, fp8, checkpointing": (
        "adapter=lora", "model.quantise=fp8", "engine.checkpointing=true",
    ),
    "lora, two micro-batches": ("adapter=lora", "method.micro=1"),
    "full": (),
    "full, checkpointing": ("engine.checkpointing=true",),
    "full, average": ("method.ema=0.99",),
    "full, 8-bit AdamW": ("optim=adamw8bit",),
    "full, 8-bit AdamW, checkpointing": ("optim=adamw8bit", "engine.checkpointing=true"),
    "full, two micro-batches": ("method.micro=1",),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SHAPES, default="300m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    if asked.model == "klein-4b" and device.type != "cuda":
        parser.error("klein-4b needs a GPU")
    sizes = asked.sizes or ([512, 1024] if device.type == "cuda" else [128, 256])
    parts = meta_parts(configuration(asked.model).model)
    count = sum(p.numel() for p in parts["transformer"].parameters()) / 1e6
    print(f"{count:.1f}M parameters, {device.type}; MiB\n{'':42}{'predicted':>10}{'measured':>10}"
          f"{'error':>8}{'passing':>10}{'error':>8}", flush=True)  # fmt: skip
    for size, (name, overrides) in itertools.product(sizes, CASES.items()):
        if not name.startswith(asked.only):
            continue
        cfg = configuration(asked.model, f"engine.device={device}", *overrides)
        row = case(f"{size}² {name}", cfg, size, device)
        print(
            f"{row.name:42}{row.predicted / MIB:10.1f}{row.measured / MIB:10.1f}{row.error:8.1%}"
            f"{row.passing_measured / MIB:10.1f}{row.passing_error:8.1%}",
            flush=True,
        )
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
