"""What a pass through a network allocates, found by running it without data.

The real modules run on fake tensors (shapes, dtypes and strides alone), and every storage that an
operation makes is followed from its birth to its death. FLUX.2's blocks are alike, so that three of
each kind are run, and the middle one's storages are repeated for the blocks left out: the result is
that of the whole depth, and does not depend on it in time.

On a GPU, autocast also lifts norms to fp32, which a CPU's does not; `cuda=True` does so too. What a
kernel uses inside itself is not seen, save for flash attention's fp32 sum of dq.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FEW = 3
"""Blocks of a kind that are really run: a first, a middle and a last one."""
Segment = tuple[str, str, int]
"""(forward or backward, kind of block, its number)."""


@dataclass
class Life:
    """A storage: bytes, when it was made and freed (segment's position in the run, place in it)."""

    size: int
    born: tuple[int, int]
    died: tuple[int, int] | None = None
    gradient: bool = False


@dataclass(frozen=True)
class Curve:
    """Bytes over a pass: what is live besides weights.

    Attributes:
        other: activations and temporaries, at each moment.
        gradients: parameters' gradients, at the same moments.
    """

    other: tuple[int, ...] = (0,)
    gradients: tuple[int, ...] = (0,)

    def peak(self, share: float = 1.0, held: int = 0) -> int:
        """The largest sum. share: bytes that are kept of a byte of gradients; held: gradients that
        earlier micro-batches have left, which this one's are added to."""
        moments = zip(self.other, self.gradients, strict=True)
        if held:
            return max(self.other) + held
        return max(int(o + share * g) for o, g in moments)


class Tracker(TorchDispatchMode):
    """Follows storages. Those that exist before it begins are not counted."""

    def __init__(self, cuda: bool = False) -> None:
        super().__init__()
        self.lives: list[Life] = []
        self.segments: list[Segment] = [("forward", "", 0)]
        self.spikes: list[tuple[tuple[int, int], int]] = []
        self._cuda, self._tick = cuda, 0
        self._next: Segment | None = None
        self._known: dict[int, Any] = {}
        self._alive: dict[int, tuple[Life, Any]] = {}

    def know(self, tensors: Sequence[Tensor]) -> None:
        """Weights and inputs: not to be counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage

    def mark(self, segment: Segment) -> None:
        """From now on, this segment."""
        self._next = None
        self.segments.append(segment)
        self._tick = 0

    def mark_next(self, segment: Segment) -> None:
        """From the next operation on, this segment: what a caller lets go of first is not its."""
        self._next = segment

    def gradient(self, tensor: Tensor) -> None:
        """What holds this tensor is a parameter's gradient."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        if found is not None:
            found[0].gradient = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE:  # asked for more often than all else together
            return args[0].fake_device
        if self._next is not None:
            self.mark(self._next)
        self._tick += 1
        out = func(*args, **(kwargs or {}))
        if self._cuda and func is _FLASH_BACKWARD:
            query: Tensor = args[1]
            self.spikes.append((self._now(), 4 * query.numel()))
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor):
                self._see(leaf)
            elif isinstance(leaf, tuple | list):
                for inner in tree_leaves(leaf):
                    if isinstance(inner, Tensor):
                        self._see(inner)
        return out

    def _now(self) -> tuple[int, int]:
        return len(self.segments) - 1, self._tick

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._known:
            return
        life = Life(storage.nbytes(), self._now())
        self.lives.append(life)

        def gone(_: Any) -> None:
            life.died = self._now()
            self._alive.pop(key, None)

        self._alive[key] = (life, weakref.ref(storage, gone))

    def peak(self) -> int:
        """Largest sum of live bytes, as run."""
        return self.curve({}).peak()

    def curve(self, depth: dict[str, int]) -> Curve:
        """Bytes over the run, with `depth` blocks of each kind in place of those that were run."""
        events: list[tuple[tuple[int, int, int], int, int]] = []
        for life in self.lives:
            a, g = (0, life.size) if life.gradient else (life.size, 0)
            for born, died in self._copies(life, depth):
                events.append((born, a, g))
                if died is not None:
                    events.append((died, -a, -g))
        for moment, size in self.spikes:
            for born, _ in self._copies(Life(size, moment, moment), depth):
                segment, copy, tick = born
                events += [(born, size, 0), ((segment, copy, tick + 1), -size, 0)]
        # At one moment births come first: an operation's result is made before its inputs go.
        events.sort(key=lambda e: (e[0], -(e[1] + e[2])))
        other, gradients, points = 0, 0, ([0], [0])
        for _, a, g in events:
            other, gradients = other + a, gradients + g
            points[0].append(other)
            points[1].append(gradients)
        return Curve(tuple(points[0]), tuple(points[1]))

    def _copies(
        self, life: Life, depth: dict[str, int]
    ) -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int] | None]]:
        """(born, died) of a storage in each block that it stands for. Moments are (segment, copy of
        the segment, place in it)."""
        _, kind, number = self.segments[life.born[0]]
        deep = depth.get(kind, 0)
        for j in range(deep - FEW + 1 if number == 1 and deep > FEW else 1):
            mine = 1 + j if number == 1 else _last(number, deep)
            born = self._moment(life.born, mine, deep)
            if life.died is None:
                yield born, None
                continue
            _, other, end = self.segments[life.died[0]]
            theirs = _last(end, depth.get(other, 0))
            if other == kind and 1 in (number, end):
                theirs = mine + end - number
            yield born, self._moment(life.died, theirs, depth.get(other, 0))

    def _moment(self, place: tuple[int, int], number: int, deep: int) -> tuple[int, int, int]:
        """`place` in block `number`, whose segment was that of a like block when it was run."""
        position, tick = place
        phase, kind, was = self.segments[position]
        forward = phase == "forward"
        if deep > FEW:
            like = 0 if number == 0 else FEW - 1 if number == deep - 1 else 1
            position += like - was if forward else was - like
            assert self.segments[position] == (phase, kind, like), "blocks ran out of order"
        return position, number if forward else -number, tick


_DEVICE = torch.ops.prim.device.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _last(number: int, deep: int) -> int:
    """A block's number at full depth."""
    return deep - 1 if number == FEW - 1 and deep > FEW else number


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@contextmanager
def fake(cuda: bool = False) -> Iterator[Tracker]:
    """Inside, tensors have no data. What is made counts in the Tracker once that is entered."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield Tracker(cuda)


def emptied(module: nn.Module, cuda: bool = False) -> nn.Module:
    """A module on the meta device as one of fake tensors, in place. Within `fake`.

    cuda: its norms are lifted as autocast lifts them there (ATen/autocast_mode.h, AT_FORALL_FP32).
    """
    for part in module.modules():
        lifted = cuda and isinstance(part, _NORMS)
        for name, p in part._parameters.items():
            if p is not None:
                data = torch.empty(p.shape, dtype=torch.float32 if lifted else p.dtype)
                part._parameters[name] = nn.Parameter(data, requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
        if lifted:
            part.register_forward_pre_hook(_lift)
    return module


def _lift(_: nn.Module, inputs: Any) -> Any:
    return (inputs[0].float(),) if torch.is_autocast_enabled("cpu") else None


@dataclass(frozen=True)
class Pass:
    """Forwards that are made one after the other, and the backward pass through those with
    gradients.

    Attributes:
        blocks: the network's repeated blocks by kind, in order.
        run: forwards → the tensors that a loss is made of.
        inputs: what exists before.
    """

    networks: Sequence[nn.Module]
    run: Callable[[], Sequence[Tensor]]
    inputs: Sequence[Tensor]
    blocks: dict[str, list[Sequence[nn.Module]]] = field(default_factory=dict)


def follow(one: Pass, tracker: Tracker, depth: dict[str, int]) -> Curve:
    """The pass's curve. Within `fake`."""
    backward = False

    def begins(tensors: Any, segment: Segment) -> None:
        """Marks the backward pass's arrival at these tensors."""
        begun: list[bool] = []

        def arrived(_: Tensor) -> None:
            if not begun:
                tracker.mark(segment)
            begun.append(True)

        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(arrived)

    def entered(kind: str, number: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            if backward:  # recomputation is part of the backward pass
                return
            if number == 0:
                begins((args, kwargs), ("backward", "", 0))
            tracker.mark(("forward", kind, number))

        return hook

    def left(kind: str, number: int, last: bool) -> Callable[..., None]:
        def hook(_m: Any, _i: Any, out: Any) -> None:
            if backward:
                return
            begins(out, ("backward", kind, number))
            if last:
                tracker.mark_next(("forward", "", 0))

        return hook

    for network in one.networks:
        tracker.know([*network.parameters(), *network.buffers()])
        for p in network.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(
                    lambda p: tracker.gradient(p.grad) if p.grad is not None else None
                )
    for kind, stacks in one.blocks.items():
        for stack in stacks:
            for number, block in enumerate(stack):
                block.register_forward_pre_hook(entered(kind, number), with_kwargs=True)
                block.register_forward_hook(left(kind, number, number == len(stack) - 1))
    tracker.know(one.inputs)
    with tracker:
        outs = one.run()
        losses = [o.square().mean() for o in outs if o.requires_grad]
        del outs
        if losses:
            loss = torch.stack(losses).sum()
            del losses
            backward = True
            tracker.mark(("backward", "", 0))
            loss.backward()
            del loss
    return tracker.curve(depth)
