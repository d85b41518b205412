"""The flow: x_t = (1 − t)·x0 + t·ε, v = ε − x0, and what follows from them.

t = σ ∈ [0, 1]; 1 is noise. x, x0, ε, v: b n c; t: b. All of it runs in fp32, or in fp64 where an
input is fp64; bf16 and fp16 are raised to fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from einops import reduce as reduce_axes
from torch import Tensor

from flux2.errors import InputError
from flux2.schedule import Grid, check_shift, shift_sigma


def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the one dtype of the computation: fp64 if any of them has it, else fp32."""
    dtype = reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    return tuple(x.to(dtype) for x in tensors)


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t: b → b 1 … 1, with as many dimensions as `like`."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"t has shape {tuple(t.shape)} beside a batch of {like.shape[0]}")
    return t.reshape(-1, *(1,) * (like.ndim - 1))


def _with_time(a: Tensor, b: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    a, b, t = exact(a, b, t)
    return a, b, expand(t, a)


# -- conversions ---------------------------------------------------------------------------------


def interpolate(x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·x0 + t·ε."""
    x0, eps, t = _with_time(x0, eps, t)
    return (1 - t) * x0 + t * eps


def target_velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """v = ε − x0, what a velocity learns to expect."""
    x0, eps = exact(x0, eps)
    return eps - x0


def x0_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x̂0 = x − t·v."""
    x, v, t = _with_time(x, v, t)
    return x - t * v


def eps_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """ε̂ = x + (1 − t)·v."""
    x, v, t = _with_time(x, v, t)
    return x + (1 - t) * v


def score_from_velocity(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """∇ log p_t(x) = −ε̂/t, for t > 0."""
    x, v, t = _with_time(x, v, t)
    return -(x + (1 - t) * v) / t


def velocity_from_x0(x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x − x̂0)/t, for t > 0."""
    x, x0, t = _with_time(x, x0, t)
    return (x - x0) / t


def velocity_from_eps(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """v = (ε̂ − x)/(1 − t), for t < 1."""
    x, eps, t = _with_time(x, eps, t)
    return (eps - x) / (1 - t)


def velocity_from_score(x: Tensor, score: Tensor, t: Tensor) -> Tensor:
    """v = −(x + t·score)/(1 − t), for t < 1."""
    x, score, t = _with_time(x, score, t)
    return -(x + t * score) / (1 - t)


def guide(v_c: Tensor, v_u: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance of a strength for each sample, v_u + g·(v_c − v_u); scale: b."""
    v_c, v_u, scale = _with_time(v_c, v_u, scale)
    return v_u + scale * (v_c - v_u)


def unguide(v: Tensor, v_u: Tensor, scale: Tensor) -> Tensor:
    """The conditional velocity that a guided one stands for, v_u + (v − v_u)/g; scale: b, not 0."""
    v, v_u, scale = _with_time(v, v_u, scale)
    return v_u + (v - v_u) / scale


# -- densities of t ------------------------------------------------------------------------------


class TimeDensity(Protocol):
    """A law of t, as its inverse distribution function: keyed uniforms in, times out."""

    def __call__(self, u: Tensor) -> Tensor:
        """u: b uniform on [0, 1) → t: b in (0, 1]."""
        ...


def _open(u: Tensor) -> Tensor:
    """u with 0 moved to the middle of its bin of 2⁻²⁴ (fp32 uniforms), so that t stays above 0."""
    return exact(u)[0].clamp(min=2.0**-25)


@dataclass(frozen=True)
class Uniform:
    """t uniform, then shifted: s·t/(1 + (s − 1)·t)."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def __call__(self, u: Tensor) -> Tensor:
        """u: b in [0, 1) → t: b."""
        return shift_sigma(_open(u), self.shift)


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std²), then shifted (SD3, arXiv 2403.03206)."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)
        if not (0 < self.std < math.inf and math.isfinite(self.mean)):
            raise InputError(
                f"logit-normal times of mean {self.mean}, std {self.std}: give numbers, std above 0"
            )

    def __call__(self, u: Tensor) -> Tensor:
        """u: b in [0, 1) → t: b."""
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(_open(u)))
        return shift_sigma(t, self.shift)


@dataclass(frozen=True)
class Mode:
    """SD3's density with heavy ends (arXiv 2403.03206, equation 20), then shifted:
    t = 1 − u − scale·(cos²(π·u/2) − 1 + u).

    scale > 0 prefers the middle, scale < 0 the ends; 0 is uniform.
    """

    scale: float = 1.29
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)
        # Within this range t falls as u rises: the inverse of a distribution function.
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise InputError(f"mode times of scale {self.scale}: give one from -1 to 1.75")

    def __call__(self, u: Tensor) -> Tensor:
        """u: b in [0, 1) → t: b."""
        u = _open(u)  # the paper's 1 − u: there t falls as u rises
        t = u - self.scale * (torch.sin(math.pi / 2 * u) ** 2 - u)
        return shift_sigma(t.clamp(2.0**-25, 1), self.shift)


@dataclass(frozen=True)
class CosMap:
    """SD3's CosMap (arXiv 2403.03206, section 3.1), then shifted: p(t) = 2/(π·(1 − 2t + 2t²)), so
    t = sin(π·u/2)/(sin(π·u/2) + cos(π·u/2)): flat, twice as dense in the middle as at the ends."""

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_shift(self.shift)

    def __call__(self, u: Tensor) -> Tensor:
        """u: b in [0, 1) → t: b."""
        angle = math.pi / 2 * _open(u)
        return shift_sigma(angle.sin() / (angle.sin() + angle.cos()), self.shift)


# -- weightings of t -----------------------------------------------------------------------------


class TimeWeighting(Protocol):
    """What the squared error of v counts at t. With a density p, E_p[w·‖Δv‖²] trains as the density
    p·w does; which of the two is drawn and which is weighed only changes the variance."""

    def __call__(self, t: Tensor) -> Tensor:
        """t: b in (0, 1] → w: b, at least 0."""
        ...


@dataclass(frozen=True)
class Unweighted:
    """w = 1: the flow's own loss, ‖Δv‖²."""

    def __call__(self, t: Tensor) -> Tensor:
        """See `TimeWeighting`."""
        return torch.ones_like(exact(t)[0])


@dataclass(frozen=True)
class InversePower:
    """w = max(t, floor)^−power: the cleaner the sample, the more it counts. power 2 and floor 0.001
    are `sigma_sqrt` of diffusers' SD3 training, which has no smaller t."""

    power: float = 1.0
    floor: float = 0.05

    def __post_init__(self) -> None:
        if not (math.isfinite(self.power) and 0 < self.floor <= 1):
            raise InputError(
                f"inverse weighting of power {self.power}, floor {self.floor}: give a finite power "
                "and a floor above 0, at most 1"
            )

    def __call__(self, t: Tensor) -> Tensor:
        """See `TimeWeighting`."""
        return exact(t)[0].clamp(min=self.floor) ** -self.power


@dataclass(frozen=True)
class CosMapWeighting:
    """w = 2/(π·(1 − 2t + 2t²)): the density CosMap as a weight (`cosmap` of diffusers' SD3
    training)."""

    def __call__(self, t: Tensor) -> Tensor:
        """See `TimeWeighting`."""
        (t,) = exact(t)
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


@dataclass(frozen=True)
class MinSNR:
    """Min-SNR-γ (arXiv 2303.09556), min(SNR, γ)·‖Δx̂0‖², for velocities: Δx̂0 = −t·Δv and
    SNR = ((1 − t)/t)², so w = min((1 − t)², γ·t²). γ = ∞ is the loss of ε, (1 − t)²·‖Δv‖²."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise InputError(f"min-SNR weighting of gamma {self.gamma}: it must be above 0")

    def __call__(self, t: Tensor) -> Tensor:
        """See `TimeWeighting`."""
        (t,) = exact(t)
        return torch.minimum((1 - t) ** 2, self.gamma * t**2)


# -- transition kernels --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Transition:
    """One stochastic step: x_next ~ N(mean, std²·I).

    Attributes:
        mean: b n c, fp32 or fp64; gradients flow through it.
        std: above 0.
    """

    mean: Tensor
    std: float

    def sample(self, noise: Tensor) -> Tensor:
        """noise: b n c, standard normal → x_next: b n c."""
        mean, noise = exact(self.mean, noise)
        return mean + self.std * noise

    def log_prob(self, x_next: Tensor) -> Tensor:
        """log N(x_next; mean, std²) with its constants, AVERAGED over the n·c dimensions → b.

        The average keeps log-ratios comparable between resolutions; the sum is n·c times it.
        """
        mean, x_next = exact(self.mean, x_next)
        squared = reduce_axes(((x_next - mean) / self.std) ** 2, "b ... -> b", "mean")
        return -0.5 * squared - math.log(self.std) - 0.5 * math.log(2 * math.pi)

    def kl(self, other: Transition) -> Tensor:
        """KL(self ‖ other), averaged over the n·c dimensions → b."""
        a, b = exact(self.mean, other.mean)
        squared = reduce_axes((a - b) ** 2, "b ... -> b", "mean")
        ratio = self.std / other.std
        return squared / (2 * other.std**2) + 0.5 * (ratio**2 - 1) - math.log(ratio)


class Kernel(Protocol):
    """How a stochastic sampler moves from sigmas[i] to sigmas[i + 1]."""

    def __call__(self, x: Tensor, v: Tensor, grid: Grid, i: int) -> Transition:
        """x, v: b n c at sigmas[i]. Raises ValueError where `step_sigmas` does."""
        ...


def step_sigmas(grid: Grid, i: int) -> tuple[float, float]:
    """σ and σ' of step i.

    Raises:
        ValueError: no such step, or the last one: its noise would stay in the image.
    """
    if not 0 <= i < grid.steps - 1:
        raise ValueError(
            f"step {i} of {grid.steps} cannot be stochastic: only 0 … {grid.steps - 2} can, as the "
            "last step's noise would stay in the image"
        )
    return grid.sigmas[i], grid.sigmas[i + 1]


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO's SDE step (arXiv 2505.05470): the flow's marginals, plus noise.

        s = η·√(σ/(1 − σ*)),  dt = σ' − σ < 0
        mean = x·(1 + s²/(2σ)·dt) + v·(1 + s²·(1 − σ)/(2σ))·dt,  std = s·√−dt

    σ* is σ, but sigmas[1] at the first step, where 1 − σ would vanish: chosen by index, since a
    first σ that misses 1 by rounding would make std explode.
    """

    eta: float = 0.7

    def __post_init__(self) -> None:
        _check_eta(self.eta, math.inf)

    def __call__(self, x: Tensor, v: Tensor, grid: Grid, i: int) -> Transition:
        """x, v: b n c. Raises ValueError for the last step."""
        sigma, after = step_sigmas(grid, i)
        x, v = exact(x, v)
        dt = after - sigma
        s = self.eta * math.sqrt(sigma / (1 - (grid.sigmas[1] if i == 0 else sigma)))
        pull = s**2 / (2 * sigma)
        mean = x * (1 + pull * dt) + v * (1 + pull * (1 - sigma)) * dt
        return Transition(mean, s * math.sqrt(-dt))


@dataclass(frozen=True)
class DanceSDE:
    """DanceGRPO's SDE step (arXiv 2505.07818): noise of one strength at every step.

        dt = σ' − σ < 0
        mean = x + v·dt + ½η²·(x − (1 − σ)·x̂0)/σ²·dt,  std = η·√−dt
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        _check_eta(self.eta, math.inf)

    def __call__(self, x: Tensor, v: Tensor, grid: Grid, i: int) -> Transition:
        """x, v: b n c. Raises ValueError for the last step."""
        sigma, after = step_sigmas(grid, i)
        x, v = exact(x, v)
        dt = after - sigma
        noise = (x + (1 - sigma) * v) / sigma  # (x − (1 − σ)·x̂0)/σ² = ε̂/σ
        return Transition(x + (v + 0.5 * self.eta**2 * noise) * dt, self.eta * math.sqrt(-dt))


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling (Wang and Yu, arXiv 2509.05952): part of the noise is drawn
    anew, and signal and noise keep the coefficients that the flow gives them.

        s = σ'·sin(η·π/2)
        mean = (1 − σ')·x̂0 + √(σ'² − s²)·ε̂,  std = s

    std has no √−dt, so few steps are as noisy as many; η = 1 forgets the old noise.
    """

    eta: float = 0.7

    def __post_init__(self) -> None:
        _check_eta(self.eta, 1.0)

    def __call__(self, x: Tensor, v: Tensor, grid: Grid, i: int) -> Transition:
        """x, v: b n c. Raises ValueError for the last step."""
        sigma, after = step_sigmas(grid, i)
        x, v = exact(x, v)
        s = after * math.sin(self.eta * math.pi / 2)
        x0, eps = x - sigma * v, x + (1 - sigma) * v
        kept = math.sqrt(max(after**2 - s**2, 0.0))
        return Transition((1 - after) * x0 + kept * eps, s)


def _check_eta(eta: float, most: float) -> None:
    if not (0 < eta <= most and eta < math.inf):
        end = "" if most == math.inf else f" of at most {most:g}"
        raise InputError(f"eta is {eta}: a stochastic step needs a positive number{end}")
