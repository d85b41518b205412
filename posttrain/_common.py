"""What the online methods share: groups, advantages, and which steps are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux2.distributed import gather
from flux2.errors import InputError
from flux2.schedule import Grid
from flux2.types import Batch


@dataclass(frozen=True)
class FirstSteps:
    """The noisy, trained steps: `count` of them from step `skip` on.

    Early steps decide content; training them alone costs less, and is the strongest single remedy
    against reward hacking (Flow-GRPO-Fast).
    """

    count: int = 3
    skip: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.skip < 0:
            raise InputError("method.window: count must be at least 1 and skip at least 0")

    def __call__(self, grid: Grid) -> tuple[int, ...]:
        """The step indices. Raises InputError where they reach the grid's last, noiseless step."""
        if self.skip + self.count > grid.steps - 1:
            raise InputError(
                f"method.window takes steps {self.skip} to {self.skip + self.count - 1} of "
                f"{grid.steps}, and the last one stays noiseless: shorten it or add steps"
            )
        return tuple(range(self.skip, self.skip + self.count))


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


def group_advantages(
    rewards: Tensor, groups: Tensor, bound: float = 5.0, eps: float = 1e-4
) -> Advantages:
    """A = (R − mean_group) / (std_group + eps), |A| ≤ bound (GRPO, arXiv 2402.03300; std with n
    below).

    rewards: b, NaN where unscored; groups: b prompt ids. A group whose scores are all alike says
    nothing: it is masked, not divided by eps.
    """
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


def check_group(group: int) -> None:
    """A group of one has no spread. Raises InputError."""
    if group < 2:
        raise InputError(f"method.group is {group}: a group needs at least 2 samples to compare")


def mean_scores(scores: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means over all samples, of all ranks, that have a score; by name."""
    names = scores[0] if scores else {}
    joined = {n: gather(torch.cat([s[n] for s in scores])) for n in names}
    return {n: v.nanmean() for n, v in joined.items()}


def spread(rewards: Tensor) -> Tensor:
    """Standard deviation (with n below) of the rewards that are not NaN; NaN where none is."""
    return (rewards - rewards.nanmean()).square().nanmean().sqrt()


def weigh(batch: Batch, valid: Tensor) -> Tensor:
    """Weights of a micro-batch's samples, b: 1 where valid, else 0; the engine scales an update's
    to sum to 1."""
    return valid.to(batch.ids.device, torch.float32)
