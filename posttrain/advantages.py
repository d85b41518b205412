"""What a sample of a prompt's group gains on the others: an axis of the online methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from flux2.distributed import gather
from flux2.errors import InputError
from flux2.types import Metrics

FLAT: Final = 1e-4
"""A smaller range of rewards within a group is none."""


@dataclass(frozen=True)
class Advantages:
    """Group-relative advantages.

    Attributes:
        value: b, 0 where masked.
        valid: b bool; False for unscored samples and for groups without spread.
        flat: share of groups without spread. missing: share of samples without a score.
    """

    value: Tensor
    valid: Tensor
    flat: float
    missing: float

    @property
    def metrics(self) -> Metrics:
        """For the log."""
        return {"groups_flat": self.flat, "rewards_missing": self.missing}


def group_advantages(
    rewards: Tensor, groups: Tensor, bound: float = 5.0, eps: float = FLAT
) -> Advantages:
    """A = (R − mean_group) / (std_group + eps), |A| ≤ bound (GRPO, arXiv 2402.03300; std with n
    below).

    rewards: b, NaN where unscored; groups: b prompt ids. A group whose scores are all alike says
    nothing: it is masked, not divided by eps.
    """
    groups = groups.to(rewards.device)
    value, valid = torch.zeros_like(rewards), torch.zeros_like(rewards, dtype=torch.bool)
    ids, flat = groups.unique(), 0
    for g in ids.tolist():
        rows = ((groups == g) & ~rewards.isnan()).nonzero()[:, 0]
        r = rewards[rows]
        if len(r) < 2 or float(r.max() - r.min()) < eps:
            flat += 1
            continue
        value[rows] = ((r - r.mean()) / (r.std(correction=0) + eps)).clamp(-bound, bound)
        valid[rows] = True
    missing = float(rewards.isnan().float().mean())
    return Advantages(value, valid, flat / max(1, len(ids)), missing)


class Advantage(Protocol):
    """What samples of one prompt gain on each other."""

    @property
    def bound(self) -> float:
        """Of |A|."""
        ...

    def __call__(self, scores: Mapping[str, Tensor], groups: Tensor) -> Advantages:
        """scores: name → b, "reward" among them, NaN where unscored; groups: b prompt ids, each
        whole."""
        ...


@dataclass(frozen=True)
class GroupRelative:
    """Of "reward": with several rewards, their weighted sum."""

    bound: float = 5.0

    def __call__(self, scores: Mapping[str, Tensor], groups: Tensor) -> Advantages:
        """See `Advantage`."""
        return group_advantages(scores["reward"], groups, self.bound)


@dataclass(frozen=True)
class PerReward:
    """Σ_k w_k·A_k, each reward normalised in the group by itself, then the sum over the batch
    (GDPO, arXiv 2601.05242): rewards of small spread count as much as those of large.

    Attributes:
        weights: name of a score → weight, e.g. {ocr/reward: 1, signs/reward: 0.5}; None: every
            part "<key>/reward" of a composed reward, each with weight 1.
        bound: of |A|.
    """

    weights: Mapping[str, float] | None = None
    bound: float = 5.0

    def __post_init__(self) -> None:
        if self.weights is not None and not any(self.weights.values()):
            raise InputError("method.advantage.weights: give a name and a weight that is not 0")

    def __call__(self, scores: Mapping[str, Tensor], groups: Tensor) -> Advantages:
        """See `Advantage`. A sample that one of the rewards failed on is masked; a reward that
        scores nobody in a group takes no part in it. Raises InputError for an unknown name."""
        groups = groups.to(scores["reward"].device)
        total = torch.zeros_like(scores["reward"])
        valid = torch.zeros_like(total, dtype=torch.bool)
        failed = valid.clone()
        parts = {n: 1.0 for n in scores if n.endswith("/reward")}
        for name, weight in (self.weights or parts or {"reward": 1.0}).items():
            if name not in scores:
                known = ", ".join(parts or ["reward"])
                raise InputError(f"method.advantage.weights has {name!r}: choose from {known}")
            r = scores[name]
            part = group_advantages(r, groups, float("inf"))
            total = total + weight * part.value
            valid |= part.valid
            scored = ((groups[:, None] == groups[None, :]) & ~r.isnan()[None, :]).any(1)
            failed |= r.isnan() & scored
        valid &= ~failed
        everyone = gather(total[valid])
        if len(everyone):
            total = total / (everyone.std(correction=0) + 1e-4)
        value = torch.where(valid, total.clamp(-self.bound, self.bound), 0.0)
        ids = groups.unique().tolist()
        flat = sum(not bool(valid[groups == g].any()) for g in ids) / max(1, len(ids))
        return Advantages(value, valid, flat, float(failed.float().mean()))


@dataclass(frozen=True)
class WinRate:
    """A of the share of the group that a sample beats, ties counting half (Pref-GRPO, 2508.20751):
    the reward's scale no longer matters, so a tiny gap is not blown up to a large advantage by
    being the group's only one.

    Attributes:
        margin: scores nearer than this tie.
        bound: of |A|.
    """

    margin: float = 0.0
    bound: float = 5.0

    def __call__(self, scores: Mapping[str, Tensor], groups: Tensor) -> Advantages:
        """See `Advantage`."""
        r = scores["reward"]
        groups = groups.to(r.device)
        gap = r[:, None] - r[None, :]
        wins = (gap > self.margin).float() + 0.5 * (gap.abs() <= self.margin).float()
        others = (groups[:, None] == groups[None, :]) & ~gap.isnan()
        others.fill_diagonal_(False)
        count = others.sum(1)
        rate = torch.where(others, wins, 0.0).sum(1) / count
        rate = torch.where((count > 0) & ~r.isnan(), rate, torch.nan)
        found = group_advantages(rate, groups, self.bound)
        return Advantages(found.value, found.valid, found.flat, float(r.isnan().float().mean()))
