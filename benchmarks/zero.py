"""Memory per rank of one training step, by engine: what ZeRO's stages save.

    python benchmarks/zero.py [--ranks 2] [--engines ddp,zero1,zero2,zero3] [--width 512]

A random-weight FLUX.2 of the real classes, all weights trained with AdamW in fp32, one sample of 32
tokens a rank, so that weights, gradients and states are nearly all there is. On the CPU the peak
is what tensors hold before the third step and the largest total that torch's allocator adds to it
(torch.profiler), on CUDA torch.cuda.max_memory_allocated: not the process's size, in which imported
libraries weigh most.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
FEW = {
    "stage3_max_live_parameters": 2_000_000,
    "stage3_max_reuse_distance": 2_000_000,
    "sub_group_size": 2_000_000,
}
"""Stage 3 keeps a billion parameters gathered, and updates many at a time: all of this model."""
sys.path.insert(0, str(ROOT))


def rank_main(kind: str, width: int) -> None:
    """Three steps on this rank; rank 0 prints each rank's peak."""
    from omegaconf import OmegaConf

    from flux2 import distributed
    from flux2.distributed import pick_device
    from flux2.engine import Engine
    from flux2.latents import grid_ids
    from flux2.model import load_model
    from flux2.optim import LearningRate, TurnAdamW
    from flux2.rng import Rng
    from flux2.roles import Roles
    from flux2.text import text_ids
    from flux2.types import Condition, RoleSpec
    from flux2.zero import Sharded, Zero

    torch.set_num_threads(1)
    device = pick_device("auto")
    distributed.start(device)
    cfg = OmegaConf.load(ROOT / "conf" / "model" / "nano-scratch.yaml")
    cfg.architecture.transformer.num_attention_heads = width // 32
    model = load_model(cfg, device)
    roles = Roles({"model": RoleSpec(trainable=True)}, model, None, None)
    optimizer = TurnAdamW({"model": roles.parameters("model")}, 1e-4)
    engine: Any = (
        Engine(roles, optimizer, LearningRate(), 1.0)
        if kind == "ddp"
        else Sharded(roles, optimizer, LearningRate(), 1.0,
                     Zero(int(kind[-1]), "fp32", bucket=2_000_000, extra=FEW), device)
    )  # fmt: skip
    features = int(model.transformer.config.joint_attention_dim)  # pyright: ignore

    def step(k: int) -> None:
        ids = torch.tensor([distributed.rank()])
        rng = Rng(0, k)
        cond = Condition(
            text=rng("text", ids, (16, features)).to(device),
            text_ids=text_ids(1, 16, device),
            ids=grid_ids((4, 4), device=device)[None],
        )
        x = rng("x", ids, (16, 128)).to(device)
        with engine.turn("model"):
            v = roles["model"](x, torch.full((1,), 0.5, device=device), cond)
            engine.backward(v.square().mean() / distributed.size(), last=True)

    step(0)
    step(1)
    peak = _peak(lambda: step(2), device)
    count = roles.count("model")
    peaks = distributed.gather_objects(peak)
    if distributed.is_main():
        print("RESULT " + json.dumps({"parameters": count, "peaks": peaks}), flush=True)
    distributed.stop()


def _peak(run: Any, device: torch.device) -> int:
    """Bytes of torch's allocator at its fullest while `run` runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and t.device.type == "cpu"
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as prof:
        run()
    largest, nodes = 0, list(prof.profiler.kineto_results.experimental_event_tree())  # type: ignore
    while nodes:
        node = nodes.pop()
        if node.tag.name == "Allocation":
            fields: Any = node.extra_fields
            largest = max(largest, fields.total_allocated)
        nodes.extend(node.children)
    return sum(held.values()) + largest


def main() -> None:
    """Runs each engine under torchrun and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engines", default="ddp,zero1,zero2,zero3")
    parser.add_argument("--width", type=int, default=512, help="multiple of 32")
    options = parser.parse_args()
    print(f"{'engine':8}  {'parameters':>12}  {'peak a rank':>12}  {'B/parameter':>11}  of ddp")
    first = None
    for kind in options.engines.split(","):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(options.ranks), __file__, "--rank", kind, str(options.width)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        if done.returncode or not lines:
            sys.exit(done.stdout + done.stderr)
        result = json.loads(lines[0].removeprefix("RESULT "))
        peak, count = max(result["peaks"]), result["parameters"]
        first = first or peak
        sizes = f"{peak / 2**20:8.0f} MiB  {peak / count:11.1f}  {peak / first:.2f}"
        print(f"{kind:8}  {count:12,}  {sizes}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2], int(sys.argv[3]))
    else:
        main()
