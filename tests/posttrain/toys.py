"""What the tests of methods share: prompts without text, rewards of latents, the loop in small, and
how far draws are from a law."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import kstest, norm
from torch import Tensor

from flux2.analytic import Gaussian, Mixture, toy_condition
from flux2.engine import share
from flux2.rng import Rng
from flux2.types import Batch
from posttrain.advantages import Advantages

Reward = Callable[[Tensor, Batch], Tensor]


def prompts(count: int, n: int = 4, c: int = 3) -> Batch:
    """`count` prompts of n tokens of c channels, each a group of its own."""
    ids = torch.arange(count)
    return Batch(ids, ("p",) * count, toy_condition(count, n), ids, ({},) * count, (n, 1), c)


def scored(reward: Reward) -> Any:
    """A reward of latents as methods get one (`flux2.types.Score`)."""

    def score(x: Tensor, batch: Batch) -> Any:
        scores = {"reward": reward(x, batch)}
        return lambda: scores

    return score


@dataclass(frozen=True)
class Known:
    """A reward of latents as methods get one that follow its gradient."""

    reward: Callable[[Tensor], Tensor]

    def check_gradient(self) -> None:
        pass

    def differentiable(self, latents: Tensor, batch: Batch) -> Tensor:
        return self.reward(latents)


@dataclass(frozen=True)
class Centred:
    """A = R − mean_group: E[A·f] is (1 − 1/n)·Cov(R, f), without the spread's own fluctuation."""

    bound: float = 1e6

    def __call__(self, scores: Mapping[str, Tensor], groups: Tensor) -> Advantages:
        r, ids = scores["reward"], groups.to(scores["reward"].device)
        same = (ids[:, None] == ids[None, :]).to(r.dtype)
        a = r - same @ r / same.sum(1)
        return Advantages(a, torch.ones_like(r, dtype=torch.bool), 0.0, 0.0)


@dataclass(frozen=True)
class Quick:
    """Draws of `flux2.rng.Rng`'s laws, a whole batch at a time: keyed by the first sample only, so
    it serves where batches are not cut in other ways."""

    seed: int
    step: int

    def _generator(self, stream: str, ids: Tensor, counter: int, kind: str) -> torch.Generator:
        key = (self.seed, self.step, stream, int(ids[0]), len(ids), counter, kind)
        return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))

    def __call__(
        self, stream: str, ids: Tensor, shape: tuple[int, ...] = (), counter: int = 0
    ) -> Tensor:
        g = self._generator(stream, ids, counter, "normal")
        return torch.randn(len(ids), *shape, generator=g)

    def uniform(
        self, stream: str, ids: Tensor, shape: tuple[int, ...] = (), counter: int = 0
    ) -> Tensor:
        g = self._generator(stream, ids, counter, "uniform")
        return torch.rand(len(ids), *shape, generator=g)

    def shared(self, stream: str, counter: int = 0) -> np.random.Generator:
        return Rng(self.seed, self.step).shared(stream, counter)


def backward(method: Any, roles: Mapping[str, Any], update: Sequence[Batch], rng: Any) -> float:
    """The update's loss; its gradients are left on the parameters."""
    total = 0.0
    for micro in update:
        loss, _ = method.loss(roles, micro, rng)
        loss.backward()
        total += float(loss.detach())
    return total


def train(
    method: Any,
    roles: dict[str, Any],
    data: Batch | Callable[[int], Batch],
    steps: int,
    lr: float,
    rng: Callable[[int, int], Any] = Quick,
    seed: int = 0,
) -> None:
    """`flux2.loop.fit` in small, on the roles that the method names; then the trained role gets its
    average over the last half (Polyak and Juditsky, 1992), which takes the steps' noise out."""
    (turn,) = method.turns
    policy = roles[turn.role]
    live = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(live, lr)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    followers = {n: s.decay for n, s in method.roles.items() if s.follows == turn.role}
    averages, count = [torch.zeros_like(p) for p in live], 0
    for step in range(steps):
        draws = rng(seed, step)
        batch = data(step) if callable(data) else data
        for update in map(share, method.collect(roles, batch, draws)):
            if not update:
                continue
            optimizer.zero_grad()
            backward(method, roles, update, draws)
            optimizer.step()
            follow(roles, followers, policy)
        rates.step()
        if step >= steps // 2:
            count += 1
            for mean, p in zip(averages, live, strict=True):
                mean += (p.detach() - mean) / count
    with torch.no_grad():
        for mean, p in zip(averages, live, strict=True):
            p.copy_(mean)


def follow(roles: Mapping[str, Any], followers: Mapping[str, float], policy: Any) -> None:
    """Each follower ← decay·follower + (1 − decay)·policy, as an engine does it."""
    with torch.no_grad():
        for name, decay in followers.items():
            for old, new in zip(roles[name].parameters(), policy.parameters(), strict=True):
                old.lerp_(new, 1 - decay)


NEAR = 0.025
"""Kolmogorov's distance of a law that is reached: 20,000 draws have 0.01 of their own."""


def distance(x: Tensor, law: Gaussian | Mixture) -> float:
    """Kolmogorov's, of draws of one number to its law."""
    if isinstance(law, Gaussian):
        means, weights = torch.as_tensor([float(law.mean)]), torch.ones(1)
    else:
        means, weights = law.means[:, 0], law.weights / law.weights.sum()

    def cdf(v: np.ndarray) -> np.ndarray:
        parts = zip(weights.tolist(), means.tolist(), strict=True)
        return sum((w * norm.cdf(v, m, float(law.std)) for w, m in parts), np.zeros_like(v))

    return float(kstest(x.flatten().double().numpy(), cdf).statistic)


def moments(x: Tensor) -> list[float]:
    """Mean, standard deviation, skewness and excess kurtosis."""
    x = x.double()
    z = (x - x.mean()) / x.std()
    return [float(x.mean()), float(x.std()), float((z**3).mean()), float((z**4).mean() - 3)]


def shrunk(n: int) -> float:
    """E[std of n normal draws, with n below]/σ: what a group's own spread takes off A."""
    return math.sqrt(2 / n) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))
