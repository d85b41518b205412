"""Which forwards a method makes, found by letting it take one step on stand-ins.

A method speaks to roles, a batch and a score, and nothing else. Here the roles are functions that
note that they were called, the samples have four tokens, and the rewards are numbers: the step
takes milliseconds, and no method needs to be described a second time.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flux2.errors import InputError
from flux2.passes import Call
from flux2.rng import Rng
from flux2.types import Batch, Condition, Method, RoleSpec, Scores

_GRID, _CHANNELS, _TEXT = (2, 2), 8, 3


@dataclass(frozen=True)
class Rehearsal:
    """What one step asks for.

    Attributes:
        collected: forwards of `collect`, the distinct ones.
        decoded: samples that are decoded and scored at once; 0 where nothing is.
        turns: role → the forwards of one micro-batch's loss (its largest), in order; of those
            without gradients that follow each other and are alike, one. A reward whose gradient is
            followed is a call of the decoder, which has to be run for it.
        micros: role → micro-batches of an update.
        autoencoder: role → images of a micro-batch, for roles that are autoencoders.
    """

    collected: tuple[Call, ...]
    decoded: int
    turns: Mapping[str, tuple[Call, ...]]
    micros: Mapping[str, int]
    autoencoder: Mapping[str, int]


@dataclass(frozen=True)
class _Law:
    """A policy's answers; they ask nobody."""

    v: Tensor

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """x: b n c → b n c."""
        return self.v

    def detach(self) -> _Law:
        """Without gradients."""
        return _Law(self.v.detach())

    def without(self, dropped: Tensor) -> _Law:
        """The same."""
        return self


class _Role:
    """A velocity, or an autoencoder, that notes its calls."""

    def __init__(self, spec: RoleSpec, note: Callable[..., None], depth: tuple[int, int]) -> None:
        self.scale = torch.ones((), requires_grad=spec.trainable)
        self.depth = depth
        if spec.blocks is not None:
            self.depth = (len(spec.blocks[0]), len(spec.blocks[1]))
        self._note = note

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """x: b n c → b n c."""
        self._note(len(x), torch.is_grad_enabled() and self.scale.requires_grad)
        return 0.1 * self.scale * x

    def policy(self, x: Tensor, t: Tensor, cond: Condition) -> _Law:
        """x: b n c → one velocity for all that follows."""
        return _Law(self(x, t, cond))

    def features(self, x: Tensor, t: Tensor, cond: Condition, block: int) -> tuple[Tensor, Tensor]:
        """Raises InputError: what networks on hidden states take is not known here."""
        raise InputError(
            "the plan does not know networks that read hidden states: plan without align= and "
            "critic="
        )

    def states(
        self, x: Tensor, t: Tensor, cond: Condition, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """x: b n c → b n c, and as much for each of `blocks`."""
        self._note(len(x), torch.is_grad_enabled() and self.scale.requires_grad, len(blocks))
        v = 0.1 * self.scale * x
        return v, [v for _ in blocks]

    def reconstruct(self, images: Tensor, noise: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """images: b 3 h w → reconstruction, mean, log-variance."""
        self._note(len(images), torch.is_grad_enabled() and self.scale.requires_grad)
        latent = self.scale * torch.zeros(len(images), 4, 2, 2)
        return self.scale * images, latent, latent


def rehearse(
    make: Callable[..., Method],
    rows: int,
    *,
    scored: bool,
    latents: bool,
    images: bool,
    unconditional: bool,
    guidance: bool,
    references: bool,
    depth: tuple[int, int] = (1, 1),
) -> Rehearsal:
    """One step of a method on a batch of `rows`.

    Args:
        make: score=… (where `scored`) → the method.
        latents, images, unconditional: what data.collate makes.
        guidance: the model takes an embedded guidance strength.
        references: the batch has reference images.
        depth: double-stream and single-stream blocks of the model.
    """
    calls: list[Call] = []
    decoded = [0]

    score = _Score(decoded, calls)
    method = make(**({"score": score} if scored else {}))
    score.names += tuple(getattr(getattr(method, "advantage", None), "weights", None) or ())
    specs = method.roles

    def noter(name: str) -> Callable[..., None]:
        owner = _owner(specs[name])
        return lambda count, graded, states=0: calls.append(Call(count, graded, owner, states))

    roles = {name: _Role(spec, noter(name), depth) for name, spec in specs.items()}
    batch = _batch(rows, latents, images, unconditional, guidance, references)
    rng = Rng(0, 0)
    with contextlib.redirect_stdout(io.StringIO()):
        update = next(iter(method.collect(roles, batch, rng)))
        collected = tuple(dict.fromkeys(calls))
        turns: dict[str, tuple[Call, ...]] = {}
        largest = max(update, key=len)
        for turn in method.turns:
            calls.clear()
            for name, role in roles.items():
                role.scale.requires_grad_(name == turn.role)
            turn.loss(roles, largest, rng)
            turns[turn.role] = _distinct(calls)
    kinds = {name for name, spec in specs.items() if spec.kind == "autoencoder"}
    return Rehearsal(
        collected,
        decoded[0],
        {name: c for name, c in turns.items() if name not in kinds},
        {name: len(update) for name in turns},
        {name: max((c.rows for c in turns.get(name, ())), default=0) for name in kinds},
    )


def _distinct(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Without the repetitions of a sampler's steps: a forward without gradients leaves nothing."""
    kept = [c for before, c in pairwise([None, *calls]) if c and (c.graded or c != before)]
    return tuple(kept)


def _owner(spec: RoleSpec) -> str:
    if spec.trainable:
        return "trained"
    return "frozen" if spec.follows is None else "follower"


class _Score:
    """Any reward's face; notes the largest batch that is decoded, and what is decoded with
    gradients."""

    def __init__(self, decoded: list[int], calls: list[Call]) -> None:
        self._decoded, self._calls, self.names = decoded, calls, ("reward",)

    def __call__(self, x: Tensor, batch: Batch) -> Callable[[], Scores]:
        self._decoded[0] = max(self._decoded[0], len(x))
        # Spread within each group: else nothing is trained.
        return lambda: dict.fromkeys(self.names, (batch.ids % 7).float() / 7)

    def check_gradient(self) -> None:
        """It has one."""

    def differentiable(self, x: Tensor, batch: Batch) -> Tensor:
        """b n c → b, with gradients."""
        self._calls.append(Call(len(x), True, "decoder"))
        return x.mean((1, 2))


def _batch(
    rows: int, latents: bool, images: bool, unconditional: bool, guidance: bool, references: bool
) -> Batch:
    n, g = _GRID[0] * _GRID[1], torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.zeros(rows, length, 4, dtype=torch.int64)

    cond = Condition(
        text=torch.zeros(rows, _TEXT, 4),
        text_ids=ids(_TEXT),
        ids=ids(n),
        ref=torch.zeros(rows, n, _CHANNELS) if references else None,
        ref_ids=ids(n) if references else None,
        guidance=torch.ones(rows) if guidance else None,
    )
    if unconditional:
        cond = Condition(**{**vars(cond), "null": cond})
    pixels = torch.zeros(rows, 3, 32, 32, dtype=torch.uint8)
    pair = {"loser": torch.randn(rows, n, _CHANNELS, generator=g), "margin": torch.ones(rows)}
    return Batch(
        ids=torch.arange(rows),
        prompts=("",) * rows,
        cond=cond,
        groups=torch.arange(rows),
        meta=({},) * rows,
        grid=_GRID,
        channels=_CHANNELS,
        x0=torch.randn(rows, n, _CHANNELS, generator=g) if latents else None,
        images=pixels if images else None,
        weight=torch.full((rows,), 1 / rows),
        extra=pair if latents else {},
    )
