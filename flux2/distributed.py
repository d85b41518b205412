"""What the ranks of a run say to each other. With one process every function is the identity.

torch is imported inside the functions: run.py and the checkpoints, which stand above this module,
answer wrong input before the seconds that this takes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from flux2.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
_apart = False
TIMEOUT = timedelta(minutes=60)
"""How long a rank waits for another: rewards and checkpoints of big models take minutes."""


def launched() -> bool:
    """Whether the environment names a place among several ranks (torchrun's variables)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def pick_device(name: str) -> torch.device:
    """This rank's device; "auto" takes CUDA where there is one. Raises InputError for a device that
    is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise InputError(f"engine.device is {name}, and torch sees no CUDA device: use auto or cpu")
    if ":" in name or not launched():
        return torch.device(name)
    count, mine = torch.cuda.device_count(), local_rank()
    if mine >= count:
        raise InputError(
            f"this machine has {count} GPUs and rank {mine} of it needs one: "
            f"set launch.processes={count}"
        )
    return torch.device("cuda", mine)


def connected() -> bool:
    """Whether this process has joined a group."""
    import sys

    if _apart:
        return False
    # Without torch.distributed imported there is no group, and no need of seconds to ask.
    module = sys.modules.get("torch.distributed")
    return module is not None and module.is_available() and module.is_initialized()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, this rank speaks to no other, and every function is the identity: for what one rank
    computes alone, with code that would gather."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def start(device: torch.device) -> None:
    """Joins the group that the environment names; nothing where there is one process alone, or
    where the group is there already."""
    import torch

    if not launched() or connected():
        return
    torch.distributed.init_process_group(_backend(device), timeout=TIMEOUT)


def alone(device: torch.device) -> None:
    """A group of this process only, for an engine that will not do without one; nothing where there
    is a group."""
    import torch

    if not connected():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(_backend(device), store=store, rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return "gloo"
    torch.cuda.set_device(device)
    return "cpu:gloo,cuda:nccl"


def stop() -> None:
    """Leaves the group."""
    import torch

    if connected():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """This process's place, from 0. Before `start` it is the environment's."""
    if connected():
        import torch

        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's place on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def size() -> int:
    """The number of ranks. Before `start` it is the environment's."""
    if connected():
        import torch

        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    gather_objects(None)


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank (pickled)."""
    if not connected():
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank (pickled)."""
    if not connected():
        return [value]
    import torch

    out: list[Any] = [None] * size()
    torch.distributed.all_gather_object(out, value)
    return out


def gather(tensor: Tensor) -> Tensor:
    """Every rank's rows joined in rank order, on every rank; ranks may have unequal numbers of
    rows. On the tensor's device."""
    if not connected():
        return tensor
    import torch

    parts = gather_objects(tensor.detach().cpu())
    return torch.cat(parts).to(tensor.device)


def largest(value: int) -> int:
    """The largest of the ranks' values: a choice that all must make alike."""
    return max(gather_objects(value))


def sum_gradients(parameters: list[Any]) -> None:
    """Replaces every gradient by its sum over the ranks, in buckets of 64 Mi elements at most.

    A parameter without a gradient counts as zero, and gets one where another rank has one.
    """
    if not connected():
        return
    import torch

    have = torch.tensor([float(p.grad is not None) for p in parameters])
    torch.distributed.all_reduce(have)
    mine = [p for p, h in zip(parameters, have.tolist(), strict=True) if h]
    for p in mine:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket: list[Tensor] = []
    for i, p in enumerate(mine):
        bucket.append(p.grad)
        following = mine[i + 1].grad if i + 1 < len(mine) else None
        full = sum(g.numel() for g in bucket) >= 1 << 26
        if full or following is None or following.dtype != p.grad.dtype:
            flat = torch.cat([g.flatten() for g in bucket])
            torch.distributed.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []
