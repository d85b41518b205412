"""Models in closed form, with the same call as a role: the oracle of every loss and sampler.

Data N(m, s²·I) at time t is N((1 − t)·m, C_t·I) with C_t = (1 − t)²·s² + t². All else follows by
conditioning; a mixture weighs its components by their posterior. A condition is ignored unless
stated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn

from flux2.flow import exact, expand
from flux2.schedule import Grid
from flux2.types import Condition


def _velocity(x: Tensor, t: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """E[ε − x0 | x_t = x] for one Gaussian; t: b 1 1, mean broadcasts to x."""
    var = (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / var * (x - (1 - t) * mean) - mean


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Data N(mean, std²·I).

    Attributes:
        mean: broadcasts to b n c.
        std: above 0; a float, or a tensor of no dimension.
    """

    mean: Tensor
    std: float | Tensor

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """v = E[ε − x0 | x]; x: b n c, t: b → b n c."""
        x, t, mean = exact(x, t, self.mean)
        return _velocity(x, expand(t, x), mean, self.std)

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (broadcasts to b n c) and variance (b 1 1) of x_t; t: b."""
        t, mean = exact(t, self.mean)
        t = rearrange(t, "b -> b 1 1")
        return (1 - t) * mean, (1 - t) ** 2 * self.std**2 + t**2

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x): b n c."""
        mean, var = self.marginal(t)
        return (mean - x) / var

    def x0(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t = x]: b n c."""
        centre, var = self.marginal(t)
        return self.mean + (1 - expand(t, x)) * self.std**2 / var * (x - centre)

    def flow(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The ODE's flow map from time t to time r: b n c."""
        (mean_t, var_t), (mean_r, var_r) = self.marginal(t), self.marginal(r)
        return mean_r + (var_r / var_t).sqrt() * (x - mean_t)

    def sample(self, noise: Tensor) -> Tensor:
        """noise: b n c, standard normal → data: b n c."""
        return self.mean + self.std * noise

    def tilted(self, slope: Tensor | float, curvature: float = 0.0) -> Gaussian:
        """The law ∝ N(mean, std²·I)·exp(slope·x − curvature/2·‖x‖²): what maximises E[R] − β·KL to
        this one where R/β is that exponent.

        slope broadcasts to n c; 1/std² + curvature must be above 0.
        """
        var = 1 / (1 / self.std**2 + curvature)
        return Gaussian(var * (self.mean / self.std**2 + slope), var**0.5)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data Σ_k weights_k · N(means_k, std²·I), over all D = n·c numbers of a sample.

    Attributes:
        means: k D.
        weights: k, positive; only their proportions count.
        std: of every component, above 0; a float, or a tensor of no dimension.
    """

    means: Tensor
    weights: Tensor
    std: float | Tensor

    def _var(self, t: Tensor) -> Tensor:
        return (1 - t) ** 2 * self.std**2 + t**2

    def _joint(self, x: Tensor, t: Tensor) -> Tensor:
        """log of weight × density of each component at x_t: b k."""
        x, t, means, weights = exact(x, t, self.means, self.weights)
        flat = rearrange(x, "b n c -> b 1 (n c)")
        var = self._var(rearrange(t, "b -> b 1"))
        squared = ((flat - rearrange(1 - t, "b -> b 1 1") * means) ** 2).sum(-1)
        constant = 0.5 * means.shape[1] * torch.log(2 * math.pi * var)
        return torch.log(weights / weights.sum()) - squared / (2 * var) - constant

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x), summed over the D dimensions: b."""
        return self._joint(x, t).logsumexp(1)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """P(component | x_t = x): b k."""
        return self._joint(x, t).softmax(1)

    def _posterior_mean(self, x: Tensor, t: Tensor) -> Tensor:
        mean = self.posterior(x, t) @ exact(x, t, self.means)[2]
        return rearrange(mean, "b (n c) -> b n c", n=x.shape[1])

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """v = E[ε − x0 | x]; x: b n c, t: b → b n c.

        With equal variances the velocity is linear in the component's mean, so the posterior mean
        of the means takes its place.
        """
        mean = self._posterior_mean(x, t)
        x, t = exact(x, t)
        return _velocity(x, expand(t, x), mean, self.std)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x): b n c."""
        mean, t = self._posterior_mean(x, t), expand(t, x)
        return ((1 - t) * mean - x) / self._var(t)

    def sample(self, u: Tensor, noise: Tensor) -> Tensor:
        """u: b uniform on [0, 1) chooses the component, noise: b n c → data: b n c."""
        edges = (self.weights / self.weights.sum()).cumsum(0)[:-1]
        mean = self.means[torch.searchsorted(edges, u.to(edges.dtype), right=True)]
        return rearrange(mean, "b (n c) -> b n c", n=noise.shape[1]) + self.std * noise

    def tilted(self, slope: Tensor) -> Mixture:
        """The law ∝ p(x)·exp(slope·x), slope: D. Each mean moves by std²·slope, and each weight
        grows by exp(slope·mean): what maximises E[R] − β·KL to this one where R/β = slope·x."""
        gain = self.means @ slope
        weights = self.weights * (gain - gain.max()).exp()
        return Mixture(self.means + self.std**2 * slope, weights, self.std)


@dataclass(frozen=True, eq=False)
class ConditionalGaussian:
    """Data N(prompted, std²·I) where cond.text[:, 0, 0] > 0, else N(unprompted, std²·I).

    Both means broadcast to n c.
    """

    prompted: Tensor
    unprompted: Tensor
    std: float

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v = E[ε − x0 | x, cond]; x: b n c, t: b → b n c."""
        chosen = rearrange(cond.text[:, 0, 0] > 0, "b -> b 1 1")
        return Gaussian(torch.where(chosen, self.prompted, self.unprompted), self.std)(x, t)

    def guided(self, scale: float) -> Gaussian:
        """What classifier-free guidance samples, exactly: N(m_u + scale·(m_c − m_u), std²·I)."""
        return Gaussian(self.unprompted + scale * (self.prompted - self.unprompted), self.std)


class GaussianPolicy(nn.Module):
    """A trainable velocity: that of N(mean, e^{2·log_std}·I). What a loss makes of it is known.

    Args:
        mean: n c, where it starts.
        std: where it starts.
        train_std: whether log_std learns too.
    """

    def __init__(self, mean: Tensor, std: float = 1.0, train_std: bool = False) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.log_std = nn.Parameter(mean.new_tensor(math.log(std)), requires_grad=train_std)

    @property
    def law(self) -> Gaussian:
        """The Gaussian that it stands for now; gradients reach the parameters."""
        return Gaussian(self.mean, self.log_std.exp())

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """v = E[ε − x0 | x]; x: b n c, t: b → b n c."""
        return self.law(x, t)


class MixturePolicy(nn.Module):
    """A trainable velocity: that of Σ_k softmax(logits)_k · N(means_k, e^{2·log_std}·I).

    Args:
        law: where it starts.
    """

    def __init__(self, law: Mixture) -> None:
        super().__init__()
        std = torch.as_tensor(law.std, dtype=law.means.dtype)
        self.means = nn.Parameter(law.means.clone())
        self.logits = nn.Parameter((law.weights / law.weights.sum()).log())
        self.log_std = nn.Parameter(std.log())

    @property
    def law(self) -> Mixture:
        """The mixture that it stands for now; gradients reach the parameters."""
        return Mixture(self.means, self.logits.softmax(0), self.log_std.exp())

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """v = E[ε − x0 | x]; x: b n c, t: b → b n c."""
        return self.law(x, t)


class AffinePolicy(nn.Module):
    """A trainable velocity slope_i·x + offset_i at each σ_i of a grid: any linear-Gaussian sampler
    is one of these, whatever its law. It starts as the velocity of N(mean, std²·I).

    Args:
        mean: n c.
        grid: the only times that it knows.
    """

    def __init__(self, mean: Tensor, std: float, grid: Grid) -> None:
        super().__init__()
        sigmas = grid.tensor(mean.device, mean.dtype)[:-1]
        zero = mean.expand(len(sigmas), *mean.shape) * 0
        at_0, at_1 = (Gaussian(mean, std)(x, sigmas) for x in (zero, zero + 1))
        self.slope = nn.Parameter((at_1 - at_0)[:, :1, :1].clone())
        self.offset = nn.Parameter(at_0.clone())
        self.register_buffer("sigmas", sigmas)

    def forward(self, x: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """x: b n c, t: b, each a σ of the grid → b n c."""
        i = (t[:, None] - self.get_buffer("sigmas")).abs().argmin(1)
        return self.slope[i] * x + self.offset[i]


def toy_condition(batch: int, tokens: int, device: torch.device | str | None = None) -> Condition:
    """A condition for the models above: one text token, 1 with the prompt and −1 in its `null`."""
    row, ids = torch.zeros(batch, 1, 4, device=device), torch.zeros(batch, tokens, 4, device=device)
    cond = Condition(text=torch.ones(batch, 1, 1, device=device), text_ids=row, ids=ids)
    return replace(cond, null=replace(cond, text=-cond.text))
