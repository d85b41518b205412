"""DPO's and KTO's implicit reward in closed form: what a loss of matching is worth as a likelihood.

The SDE that noises x0 with the flow's marginals has g² = 2t/(1 − t) and the score −(x + (1 −
t)·v)/t. Where v_θ is the exact velocity of p_θ its reverse is that very process, so the evidence
bound is tight for each x0 (Song et al., arXiv 2101.09258, theorem 3):

    log p_θ(x0) − log p_ref(x0) = −∫₀¹ (1 − t)/t · E_ε[‖v_θ − u‖² − ‖v_ref − u‖²] dt,   u = ε − x0
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

from flux2.analytic import Gaussian, Mixture
from flux2.types import Batch
from posttrain.dpo import DPO
from posttrain.kto import KTO
from tests.posttrain.toys import prompts

BETA, COUNT = 30.0, 1000
LEVELS = [((x + 1) / 2, w / 2) for x, w in zip(*np.polynomial.legendre.leggauss(40), strict=True)]
MODES = torch.tensor([[-1.0], [0.8]]).double()
LAWS = {
    "shifted": (Gaussian(torch.tensor([[0.9]]).double(), 0.7),
                Gaussian(torch.tensor([[0.4]]).double(), 0.7)),
    "wider": (Gaussian(torch.tensor([[0.3]]).double(), 1.1),
              Gaussian(torch.tensor([[0.4]]).double(), 0.7)),
    "mixture": (Mixture(MODES, torch.tensor([0.7, 0.3]).double(), 0.5),
                Mixture(MODES + 0.2, torch.tensor([0.4, 0.6]).double(), 0.6)),
}  # fmt: skip
WINNER, LOSER = 1.3, -0.6


class Even:
    """Noise in equal shares of probability, of variance 1: a quadrature with equal weights."""

    def __call__(
        self, stream: str, ids: Tensor, shape: tuple[int, ...] = (), counter: int = 0
    ) -> Tensor:
        x = torch.special.ndtri((torch.arange(COUNT).double() + 0.5) / COUNT)
        return (x / x.std(correction=0))[ids % COUNT].reshape(-1, *shape)

    def uniform(
        self, stream: str, ids: Tensor, shape: tuple[int, ...] = (), counter: int = 0
    ) -> Tensor:
        return torch.zeros(len(ids), dtype=torch.float64)


def at(t: float) -> Any:
    """The density that is all at one time."""
    return lambda u: torch.full_like(u, t)


def constant(x: float, count: int) -> Tensor:
    return torch.full((count, 1, 1), x, dtype=torch.float64)


def log_density(law: Gaussian | Mixture, x: float) -> float:
    if isinstance(law, Gaussian):
        return float(Normal(float(law.mean), law.std).log_prob(torch.tensor(x)))
    spread = torch.full((len(law.weights),), float(law.std)).double()
    density = MixtureSameFamily(Categorical(law.weights), Normal(law.means[:, 0], spread))
    return float(density.log_prob(torch.tensor(x).double()))


def log_ratio(name: str, x: float) -> float:
    policy, reference = LAWS[name]
    return log_density(policy, x) - log_density(reference, x)


@pytest.mark.parametrize("name", LAWS)
def test_dpos_implicit_reward_is_the_log_ratio(name: str):
    """β/2·log p_θ/p_ref of the winner, of the loser, and their difference as the margin: for laws
    that differ by a shift, in their spread, and in their modes."""
    roles = dict(zip(("policy", "reference"), LAWS[name], strict=True))
    batch = replace(
        prompts(COUNT, 1, 1), x0=constant(WINNER, COUNT), weight=torch.full((COUNT,), 1 / COUNT),
        extra={"loser": constant(LOSER, COUNT)},
    )  # fmt: skip
    found = dict.fromkeys(("winner_gap", "loser_gap", "margin"), 0.0)
    for t, w in LEVELS:
        _, metrics = DPO(at(t), BETA, micro=COUNT).loss(roles, batch, Even())
        for key in found:
            found[key] += w * (1 - t) / t * float(metrics[key])
    won, lost = (log_ratio(name, x) for x in (WINNER, LOSER))
    assert abs(won - lost) > 0.2
    assert -found["winner_gap"] == pytest.approx(won, abs=2e-3)
    assert -found["loser_gap"] == pytest.approx(lost, abs=2e-3)
    assert found["margin"] == pytest.approx(BETA / 2 * (won - lost), abs=BETA * 2e-3)


@pytest.mark.parametrize("name", LAWS)
def test_ktos_implicit_reward_is_the_log_ratio(name: str):
    """Of liked and of disliked samples; its reference point Q at one t is their mean above 0."""
    roles = dict(zip(("policy", "reference"), LAWS[name], strict=True))
    x0 = torch.cat([constant(WINNER, COUNT), constant(LOSER, COUNT)])
    label = torch.tensor([1.0, -1.0]).repeat_interleave(COUNT).double()
    batch: Batch = replace(prompts(2 * COUNT, 1, 1), x0=x0, extra={"label": label})
    found = {"liked": 0.0, "disliked": 0.0}
    for t, w in LEVELS:
        method = KTO(at(t), BETA, micro=2 * COUNT)
        next(iter(method.collect(roles, batch, Even())))
        metrics = method.metrics()
        for key in found:
            found[key] += w * (1 - t) / t * float(metrics[key])
        mean = (float(metrics["liked"]) + float(metrics["disliked"])) / 2
        assert float(metrics["q"]) == pytest.approx(max(0.0, mean), abs=1e-9)
    for key, x in (("liked", WINNER), ("disliked", LOSER)):
        want = BETA / 2 * log_ratio(name, x)
        assert math.isfinite(want) and found[key] == pytest.approx(want, abs=BETA * 1e-3)
