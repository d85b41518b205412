"""Predicted memory against what the allocator gave, for a FLUX.2 with random weights.

    python benchmarks/memory.py                          # 300M, on the GPU if there is one
    python benchmarks/memory.py --model klein-4b         # needs a GPU
    python benchmarks/memory.py --sizes 512 1024 --only lora
    torchrun --nproc-per-node 2 benchmarks/memory.py --zero    # DeepSpeed on the CPU, ZeRO 1 to 3

One optimizer update of supervised finetuning, with AdamW's states in place. On CUDA the measure is
torch.cuda.max_memory_allocated; on the CPU every allocation and release that torch's allocator
reports to its profiler is summed. Neither is the process's size, where libraries dominate.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from flux2 import distributed
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
HEAD = f"{'':42}{'predicted':>10}{'measured':>10}{'error':>8}{'passing':>10}{'error':>8}"


@dataclass(frozen=True)
class Row:
    """A case: bytes predicted and measured, whole and of what passes alone."""

    name: str
    predicted: int
    measured: int
    passing: int
    passing_measured: int

    def __str__(self) -> str:
        return (
            f"{self.name:42}{self.predicted / MIB:10.1f}{self.measured / MIB:10.1f}"
            f"{self.error:8.1%}{self.passing_measured / MIB:10.1f}{self.passing_error:8.1%}"
        )

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


def build(cfg: DictConfig, device: torch.device, masters: bool) -> tuple[Flux2, Roles, Any]:
    """The model, its roles, and an optimizer over them."""
    model = load_model(cfg.model, device)
    method: Method = instantiate(cfg.method, _convert_="all")
    lora = None if cfg.adapter is None else instantiate(cfg.adapter, _convert_="all")
    matmul, checkpointing = AUTOCAST[cfg.engine.autocast], cfg.engine.checkpointing
    roles = Roles(method.roles, model, lora, matmul, checkpointing, 0, masters=masters)
    named = {role: roles.parameters(role) for role in roles.trainable}
    return model, roles, instantiate(cfg.optim.optimizer, _convert_="all", roles=named)


def own_passes(passing: Mapping[str, int]) -> int:
    """What an update needs, without the encoder's and the autoencoder's passes before it."""
    return max(v for k, v in passing.items() if k == "update" or k.startswith("pass"))


def case(name: str, cfg: DictConfig, size: int, device: torch.device) -> Row:
    """Predicts and measures one configuration."""
    predicted = Footprint(cfg, device.type == "cuda", (size, size, 0)).predict(
        engine_of(cfg.engine), 1, cfg.engine.checkpointing
    )
    model, roles, optimizer = build(cfg, device, True)
    parameters = [p for role in roles.trainable for p in roles.parameters(role).values()]
    for p in parameters:  # states as after a first update, without its pass
        p.grad = torch.zeros_like(p)
    optimizer.active = roles.trainable[0]
    optimizer.step()
    for p in parameters:
        p.grad = None
    states = [t for p in parameters for t in optimizer.state_of(p).values()]
    stays = stored([*roles.backbones.parameters(), *roles.backbones.buffers(), *states])
    engine, batch = Engine(roles, optimizer, LearningRate(), 1.0), batch_of(cfg, model, size)
    method: Method = instantiate(cfg.method, _convert_="all")
    gc.collect()
    peak = (cuda_peak if device.type == "cuda" else cpu_peak)(
        lambda: update(engine, method, batch)
    )
    kept = ("frozen base", "trained weights", "averages", "optimizer states")
    mine, passing = sum(predicted.stays[k] for k in kept), own_passes(predicted.passing)
    return Row(name, mine + passing, stays + peak, passing, peak)


def zero_case(name: str, cfg: DictConfig, size: int) -> Row:
    """The same under DeepSpeed, on each rank of the CPU."""
    from flux2.checks import sharding
    from flux2.zero import Sharded

    predicted = Footprint(cfg, False, (size, size, 0)).predict(
        engine_of(cfg.engine), distributed.size(), cfg.engine.checkpointing
    )
    before = everything()
    model, roles, optimizer = build(cfg, torch.device("cpu"), False)
    zero = sharding(cfg.engine)
    engine = Sharded(roles, optimizer, LearningRate(), 1.0, zero, torch.device("cpu"))
    cfg.data.batch_size //= distributed.size()
    method, batch = instantiate(cfg.method, _convert_="all"), batch_of(cfg, model, size)
    update(engine, method, batch)
    stays = everything() - before
    peak, passing = cpu_peak(lambda: update(engine, method, batch)), own_passes(predicted.passing)
    engine._engine.destroy()
    return Row(name, sum(predicted.stays.values()) + passing, stays + peak, passing, peak)


def everything() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    with warnings.catch_warnings():  # of libraries' deprecated objects, which are merely looked at
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    return stored(t for t in tensors if t.device.type == "cpu")


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


def zeros(model: str, sizes: Sequence[int]) -> None:
    """Prints rank 0's table for ZeRO 1, 2 and 3."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    distributed.start(torch.device("cpu"))
    if distributed.is_main():
        print(f"{model}, {distributed.size()} ranks; MiB a rank\n{HEAD}", flush=True)
    for size, adapter, stage in itertools.product(sizes, ("full", "lora"), (1, 2, 3)):
        overrides = ["engine.device=cpu", f"engine=zero{stage}", "engine.bucket=2000000"]
        overrides += ["adapter=lora"] if adapter == "lora" else []
        row = zero_case(f"{size}² {adapter}, zero{stage}", configuration(model, *overrides), size)
        if distributed.is_main():
            print(row, flush=True)
    distributed.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SHAPES, default="300m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--zero", action="store_true", help="ZeRO 1 to 3, under torchrun")
    asked = parser.parse_args(arguments)
    if asked.zero:
        zeros("18m" if asked.model == "klein-4b" else asked.model, asked.sizes or [128])
        return
    device = torch.device(asked.device)
    if asked.model == "klein-4b" and device.type != "cuda":
        parser.error("klein-4b needs a GPU")
    sizes = asked.sizes or ([512, 1024] if device.type == "cuda" else [128, 256])
    parts = meta_parts(configuration(asked.model).model)
    count = sum(p.numel() for p in parts["transformer"].parameters()) / 1e6
    print(f"{count:.1f}M parameters, {device.type}; MiB\n{HEAD}", flush=True)
    for size, (name, overrides) in itertools.product(sizes, CASES.items()):
        if not name.startswith(asked.only):
            continue
        cfg = configuration(asked.model, f"engine.device={device}", *overrides)
        print(case(f"{size}² {name}", cfg, size, device), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
