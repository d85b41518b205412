"""Which σ a sampler visits. One grid object serves rollout, training, evaluation and export.

A schedule is called with the number of steps and of target tokens and gives a `Grid`. FLUX.2's own
inference schedule is `EmpiricalShift`; all of them start from σ = 1, 1 − 1/N, …, 1/N and append 0.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, overload

import torch
from torch import Tensor

from flux2.errors import InputError


@dataclass(frozen=True)
class Grid:
    """σ from noise to data: steps + 1 numbers in [0, 1], strictly descending, the last exactly 0.

    Raises:
        InputError: the numbers are not such a grid.
    """

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        s = tuple(map(float, self.sigmas))
        object.__setattr__(self, "sigmas", s)
        falls = all(a > b for a, b in pairwise(s))  # False with a NaN, too
        if len(s) < 2 or not falls or s[0] > 1 or s[-1] != 0:
            raise InputError(
                f"sigmas {s} are no grid: give at least two numbers that fall strictly, from at "
                "most 1 to exactly 0"
            )

    @property
    def steps(self) -> int:
        """How many steps a sampler makes."""
        return len(self.sigmas) - 1

    @property
    def hash(self) -> str:
        """12 hex digits, of σ to 7 decimals: machines differ in the last bit of exp."""
        text = " ".join(f"{s:.7f}" for s in self.sigmas)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def tensor(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The sigmas as a tensor of steps + 1 numbers."""
        return torch.tensor(self.sigmas, device=device, dtype=dtype)


class Schedule(Protocol):
    """Chooses the grid."""

    def __call__(self, steps: int, tokens: int) -> Grid:
        """steps ≥ 1, tokens ≥ 1 of the target (references do not count)."""
        ...


@overload
def shift_sigma(sigma: float, shift: float) -> float: ...
@overload
def shift_sigma(sigma: Tensor, shift: float) -> Tensor: ...
def shift_sigma(sigma: float | Tensor, shift: float) -> float | Tensor:
    """s·σ/(1 + (s − 1)·σ) for σ in (0, 1]; s > 1 moves σ towards noise (SD3,
    arXiv 2403.03206).

    Written so that σ = 1 stays exactly 1 and rounding never exceeds it.
    """
    return 1 / (1 + (1 / sigma - 1) / shift)


def check_shift(shift: float) -> None:
    """Raises InputError unless 0 < shift < ∞."""
    if not (0 < shift < math.inf):
        raise InputError(f"shift is {shift}: give a positive number, 1 for none")


def empirical_mu(tokens: int, steps: int) -> float:
    """log of FLUX.2's inference shift, fitted by its authors (diffusers' compute_empirical_mu).

    Linear in the number of steps through a line (in tokens) for 10 and one for 200 steps; above
    4300 tokens the 200-step line alone, so that the shift drops there.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


def flux1_mu(tokens: int) -> float:
    """log of FLUX.1's shift, reported for FLUX.2's training: 0.5 at 256 tokens, 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def _shifted(steps: int, shift: float) -> Grid:
    ramp = ((steps - i) / steps for i in range(steps))
    return Grid((*(shift_sigma(s, shift) for s in ramp), 0.0))


def _check_counts(steps: int, tokens: int) -> None:
    for name, value in {"steps": steps, "tokens": tokens}.items():
        if value < 1:
            raise InputError(f"a sigma grid of {value} {name}: give at least 1")


@dataclass(frozen=True)
class EmpiricalShift:
    """FLUX.2's inference grid: shift e^μ with μ of `empirical_mu`, as its pipelines make it."""

    def __call__(self, steps: int, tokens: int) -> Grid:
        """Raises InputError for steps or tokens < 1."""
        _check_counts(steps, tokens)
        return _shifted(steps, math.exp(empirical_mu(tokens, steps)))


@dataclass(frozen=True)
class StaticShift:
    """One shift for every size and step count; a scheduler's config can express it, too."""

    shift: float

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def __call__(self, steps: int, tokens: int) -> Grid:
        """Raises InputError for steps or tokens < 1."""
        _check_counts(steps, tokens)
        return _shifted(steps, self.shift)


@dataclass(frozen=True)
class Linear:
    """σ = 1, 1 − 1/N, …, 0."""

    def __call__(self, steps: int, tokens: int) -> Grid:
        """Raises InputError for steps or tokens < 1."""
        _check_counts(steps, tokens)
        return _shifted(steps, 1.0)
