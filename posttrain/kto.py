"""Diffusion-KTO (Li et al., arXiv 2404.04465): alignment from single images that were liked or not.

    t ~ p(t),  ε ~ N(0, I)
    ℓ(x0) = ‖v(x_t, t, c) − (ε − x0)‖² / dim
    r = −β/2 · (ℓ_θ − ℓ_ref)                      the implicit reward
    Q = max(0, mean r over the batch)             the reference point; stop-gradient
    L = λ·(1 − U),   U = σ(w·(r − Q)),   w = 1 where it was liked, −1 where not

ℓ is averaged over dimensions, and β is Flow-DPO's: the published code writes β for our β/2. The
utility is the sigmoid, which the paper found best: sensitive near Q, indifferent far from it.
Q is taken over the step's whole batch on all ranks, at the weights before the update, so that it
does not depend on how the batch is cut; that costs a forward of the policy without gradients.

Pairs become two samples of their own noise: the winner liked, the loser not. Single images bring
their label (1 or −1) in extra["label"], from `label` in a record's meta.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flux2.distributed import gather
from flux2.errors import BatchError, check_positive
from flux2.flow import LogitNormal, TimeDensity
from flux2.losses import Noised, weighted
from flux2.rng import Rng
from flux2.types import Batch, Memoryless, Metrics, RoleSpec, Turn, Velocity


@dataclass
class KTO(Memoryless):
    """Method of stage=kto.

    Attributes:
        density: p(t).
        beta: how dear it is to leave the reference: the larger, the sooner a sample is settled.
        desirable, undesirable: λ of liked samples and of the others; against unequal numbers of
            them.
        micro: samples a micro-batch; a pair is two.
    """

    density: TimeDensity = field(default_factory=LogitNormal)
    beta: float = 2000.0
    desirable: float = 1.0
    undesirable: float = 1.0
    micro: int = 32
    accepts: ClassVar[tuple[str, ...]] = ("base",)
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_positive({"beta": self.beta, "desirable": self.desirable,
                        "undesirable": self.undesirable, "micro": self.micro})  # fmt: skip
        self._metrics: dict[str, float | Tensor] = {}

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """The policy, and what it started from."""
        return {"policy": RoleSpec(trainable=True), "reference": RoleSpec()}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("policy", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the samples, with the reference's ℓ and Q in extra."""
        micro = labelled(batch).split(self.micro)
        with torch.no_grad():
            held = [self._matching(roles["reference"], m, rng) for m in micro]
            now = [self._matching(roles["policy"], m, rng) for m in micro]
        rewards = torch.cat([self._reward(a, b) for a, b in zip(now, held, strict=True)])
        label = gather(torch.cat([m.extra["label"] for m in micro]).to(rewards))
        rewards = gather(rewards)
        q = rewards.mean().clamp(min=0)
        self._metrics = {
            "q": q,
            "utility": (label * (rewards - q)).sigmoid().mean(),
            "accuracy": (label * (rewards - q) > 0).float().mean(),
            "liked": rewards[label > 0].mean(),
            "disliked": rewards[label < 0].mean(),
        }
        yield [
            replace(m, extra={**m.extra, "reference": h, "q": q.expand(len(m))})
            for m, h in zip(micro, held, strict=True)
        ]

    def _matching(self, role: Velocity, batch: Batch, rng: Rng) -> Tensor:
        """ℓ: b."""
        at = Noised.draw(batch, self.density, rng)
        assert batch.cond is not None
        return at.matching(role(at.x, at.t, batch.cond))

    def _reward(self, policy: Tensor, reference: Tensor) -> Tensor:
        """r: b."""
        return -self.beta / 2 * (policy - reference)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch."""
        matching = self._matching(roles["policy"], batch, rng)
        reward = self._reward(matching, batch.extra["reference"])
        label = batch.extra["label"].to(reward)
        utility = (label * (reward - batch.extra["q"])).sigmoid()
        scale = torch.where(label > 0, self.desirable, self.undesirable)
        term = scale * (1 - utility)
        return weighted(batch, term, {})

    def metrics(self) -> Metrics:
        """Of the step's batch, before its update; liked and disliked are the mean implicit rewards
        of those samples."""
        return self._metrics


def labelled(batch: Batch) -> Batch:
    """The batch with a label (1 or −1) for each sample in extra; a pair becomes two samples in
    succession, with ids of their own. Raises InputError where nothing was judged."""
    if batch.x0 is not None and "loser" in batch.extra:
        both = replace(batch, extra={}).repeat(2)
        x0 = torch.stack([batch.x0, batch.extra["loser"].to(batch.x0)], 1).flatten(0, 1)
        label = x0.new_tensor([1.0, -1.0]).repeat(len(batch))
        return replace(both, x0=x0, extra={"label": label})
    label = batch.extra.get("label")
    if batch.x0 is None or label is None or not bool((label.abs() == 1).all()):
        raise BatchError(
            "stage=kto learns from pairs (data=pairs) or from images whose lines say "
            '"label": 1 or -1 (data=jsonl)'
        )
    return batch
