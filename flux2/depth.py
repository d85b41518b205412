"""Transformers with fewer blocks: the kept ones' weights in a model of the same class.

FLUX.2 has double-stream blocks, then single-stream ones, and everything else (embedders,
modulation, output) is shared by all of them, so that any block may be left out. Blocks of a kind
are numbered from 0.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from flux2.errors import InputError

Blocks = tuple[tuple[int, ...], tuple[int, ...]]
"""Numbers of double-stream and of single-stream blocks."""
KINDS = ("double", "single")
_LISTS = ("transformer_blocks", "single_transformer_blocks")
KEYS = ("num_layers", "num_single_layers")
"""Of a transformer's config."""


def depth_of(transformer: Any) -> tuple[int, int]:
    """Double-stream and single-stream blocks that a transformer has."""
    double, single = (len(getattr(transformer, name)) for name in _LISTS)
    return double, single


def depth_in(names: Iterable[str]) -> tuple[int, int]:
    """The same of a transformer whose weights have these names."""
    seen: dict[str, set[str]] = {name: set() for name in _LISTS}
    for name in names:
        found = re.match(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.", name)
        if found is not None:
            seen[found[1]].add(found[2])
    double, single = (len(seen[name]) for name in _LISTS)
    return double, single


def all_blocks(depth: Sequence[int]) -> Blocks:
    """Every block of a transformer of this depth."""
    return tuple(range(depth[0])), tuple(range(depth[1]))


def checked(blocks: Any, depth: Sequence[int]) -> Blocks:
    """Blocks to keep, as configuration gives them, of a transformer of this depth.

    Raises:
        InputError: not two lists of ascending numbers of blocks that there are; or none of a kind
            is left, which other programs do not take for a FLUX.2.
    """
    if not isinstance(blocks, Sequence) or isinstance(blocks, str) or len(blocks) != 2:
        raise InputError(f"blocks is {blocks!r}: give two lists, as [[0],[0,2]]")
    for kind, mine, there in zip(KINDS, blocks, depth, strict=True):
        if isinstance(mine, str) or not isinstance(mine, Sequence):
            raise InputError(f"blocks is {blocks!r}: give two lists, as [[0],[0,2]]")
        if any(type(i) is not int for i in mine) or list(mine) != sorted(set(mine)):
            raise InputError(f"blocks: {list(mine)} of the {kind} ones must be ascending numbers")
        if not mine:
            raise InputError(f"blocks keeps no {kind} block: keep at least one of {there}")
        if mine[0] < 0 or mine[-1] >= there:
            odd = mine[0] if mine[0] < 0 else mine[-1]
            raise InputError(
                f"blocks names {kind} block {odd}, and there are 0 to {there - 1}: correct it"
            )
    return tuple(blocks[0]), tuple(blocks[1])


def counts(keep: Any, depth: Sequence[int]) -> tuple[int, int]:
    """How many blocks of each kind are kept.

    Args:
        keep: a share of both kinds, as 0.5; or {double: …, single: …}, each a share or a number. A
            share is rounded half up, and leaves one block at least.
        depth: of the whole transformer.

    Raises:
        InputError: neither; or all blocks of both kinds, or none of one, would be kept.
    """
    asked = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(KINDS, keep)
    if set(asked) != set(KINDS):
        raise InputError(f"keep names {', '.join(map(str, asked))}: give double and single")
    double, single = (_count(k, asked[k], n) for k, n in zip(KINDS, depth, strict=True))
    if (double, single) == tuple(depth):
        raise InputError(f"keep={keep} keeps all of {depth[0]} + {depth[1]} blocks: keep fewer")
    return double, single


def _count(kind: str, asked: Any, there: int) -> int:
    if type(asked) is int and 1 <= asked <= there:
        return asked
    if type(asked) is float and 0 < asked <= 1:
        return max(1, math.floor(asked * there + 0.5))
    raise InputError(
        f"keep asks for {asked!r} {kind} blocks of {there}: give a share above 0, as 0.5, or a "
        f"number from 1 to {there}"
    )


def shortened(transformer: Any, blocks: Blocks) -> Any:
    """A copy with these blocks alone, and a config that says so.

    Raises:
        InputError: see `checked`.
    """
    kept = checked(blocks, depth_of(transformer))
    gone: dict[int, Any] = {}
    for name, mine in zip(_LISTS, kept, strict=True):
        for i, block in enumerate(getattr(transformer, name)):
            if i not in mine:
                gone[id(block)] = nn.Identity()  # stands for its copy, which is not made
    out = copy.deepcopy(transformer, gone)
    for name, mine in zip(_LISTS, kept, strict=True):
        setattr(out, name, _picked(out, name, mine))
    out.register_to_config(**dict(zip(KEYS, map(len, kept), strict=True)))
    return out


@contextmanager
def only(transformer: Any, blocks: Blocks) -> Iterator[None]:
    """Inside, the transformer goes through these blocks alone. Nothing is copied; its config goes
    on telling its own depth."""
    whole = {name: getattr(transformer, name) for name in _LISTS}
    for name, mine in zip(_LISTS, blocks, strict=True):
        setattr(transformer, name, _picked(transformer, name, mine))
    try:
        yield
    finally:
        for name, blocks_of in whole.items():
            setattr(transformer, name, blocks_of)


def _picked(transformer: Any, name: str, numbers: Sequence[int]) -> nn.ModuleList:
    there = getattr(transformer, name)
    return nn.ModuleList(there[i] for i in numbers)
