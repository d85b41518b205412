"""Memory of a distillation's three networks as roles of one backbone, beside three copies of it.

    python benchmarks/roles.py                     # 300M, LoRA, on the GPU if there is one
    python benchmarks/roles.py --model klein-4b    # needs a GPU

The peak of one step of DMD2 with student, fake score and teacher (both turns; LoRA; 256²),
against one update of supervised finetuning with the same LoRA, micro-batch and size; in one process
after another, with random weights. What is measured is said in benchmarks/memory.py.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import instantiate
from memory import MIB, SHAPES, batch_of, configuration, cpu_peak, cuda_peak, stored
from omegaconf import DictConfig
from torch import Tensor

from distill.dmd import DMD
from flux2.engine import Engine, share
from flux2.model import AUTOCAST, load_model
from flux2.optim import LearningRate
from flux2.rng import Rng
from flux2.roles import Roles
from flux2.types import Batch, Method, RoleSpec


def engine_of(cfg: DictConfig, specs: Mapping[str, RoleSpec], device: torch.device) -> Engine:
    """Roles on one backbone with random weights, their adapters, optimizer and states."""
    model, lora = load_model(cfg.model, device), instantiate(cfg.adapter, _convert_="all")
    autocast = AUTOCAST[cfg.engine.autocast]
    roles = Roles(specs, model, lora, autocast, bool(cfg.engine.checkpointing))
    named = {role: roles.parameters(role) for role in roles.trainable}
    # A copy that is only asked has nothing to optimise.
    optimizer = instantiate(cfg.optim.optimizer, _convert_="all", roles=named) if named else None
    return Engine(roles, optimizer, LearningRate(), 1.0)  # pyright: ignore[reportArgumentType]


def step(method: Method, engines: Mapping[str, Engine], batch: Batch) -> None:
    """One step, as flux2/loop.py makes it; a role's engine is the one that it lies in."""
    roles = {name: engine.roles[name] for name, engine in engines.items()}
    rng = Rng(0, 0)
    for update in map(share, method.collect(roles, batch, rng)):
        for turn in method.turns:
            engine = engines[turn.role]
            with engine.turn(turn.role):
                for k, micro in enumerate(update, 1):
                    loss, _ = turn.loss(roles, micro, rng)
                    engine.backward(loss, last=k == len(update))
                    del loss


def held(engines: Mapping[str, Engine]) -> int:
    """Bytes of weights and optimizer states."""
    found: list[Tensor] = []
    for engine in {id(e): e for e in engines.values()}.values():
        backbones, roles = engine.roles.backbones, engine.roles
        found += [*backbones.parameters(), *backbones.buffers()]
        for name in roles.trainable:
            for p in roles.parameters(name).values():
                found += engine.optimizer.state_of(p).values()
    return stored(found)


def measure(method: Method, engines: Mapping[str, Engine], batch: Batch, device: str) -> int:
    """Bytes at the peak of a step that is not the first."""
    step(method, engines, batch)
    gc.collect()
    peak: Callable[..., int] = cuda_peak if device == "cuda" else cpu_peak
    return held(engines) + peak(lambda: step(method, engines, batch))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints three lines: bytes, and the ratio to the first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="300m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--checkpointing", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.model == "klein-4b" and asked.device != "cuda":
        parser.error("klein-4b needs a GPU")
    device = torch.device(asked.device)
    cfg = configuration(
        asked.model, f"engine.device={device}", "adapter=lora", "engine.autocast=bf16",
        f"engine.checkpointing={str(asked.checkpointing).lower()}",
    )  # fmt: skip
    sft: Method = instantiate(cfg.method, _convert_="all")
    dmd = DMD(guidance=4.0, every=1, micro=2)

    def plain() -> tuple[Method, dict[str, Engine]]:
        engine = engine_of(cfg, sft.roles, device)
        return sft, dict.fromkeys(sft.roles, engine)

    def shared() -> tuple[Method, dict[str, Engine]]:
        engine = engine_of(cfg, dmd.roles, device)
        return dmd, dict.fromkeys(dmd.roles, engine)

    def copies() -> tuple[Method, dict[str, Engine]]:
        return dmd, {k: engine_of(cfg, {k: s}, device) for k, s in dmd.roles.items()}

    cases: dict[str, Callable[[], Any]] = {
        "SFT, one role": plain, "DMD2, three roles on one backbone": shared,
        "DMD2, three copies": copies,
    }  # fmt: skip
    first = 0
    for name, make in cases.items():
        method, engines = make()
        batch = _batch(cfg, next(iter(engines.values())), asked.size)
        peak = measure(method, engines, batch, device.type)
        first = first or peak
        print(f"{name:36}{peak / MIB:9.0f} MiB{peak / first:7.2f} ×", flush=True)
        del method, engines, batch
        gc.collect()


def _batch(cfg: DictConfig, engine: Engine, size: int) -> Batch:
    class Model:  # what batch_of asks of a model
        transformer = engine.roles.backbones["base"]
        device = next(transformer.parameters()).device

    batch = batch_of(cfg, Model, size)  # pyright: ignore[reportArgumentType]
    assert batch.cond is not None
    return replace(batch, cond=replace(batch.cond, null=batch.cond))


if __name__ == "__main__":
    main()
