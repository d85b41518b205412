"""What the losses of all methods share: draws of a noise level, and weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flux2.flow import TimeDensity, interpolate, target_velocity
from flux2.rng import Rng
from flux2.types import Batch, Metrics


@dataclass(frozen=True, eq=False)
class Noised:
    """Images on their way to noise, x_t = (1 − t)·x0 + t·ε. x0, eps: b n c; t: b."""

    x0: Tensor
    eps: Tensor
    t: Tensor

    @classmethod
    def draw(cls, batch: Batch, density: TimeDensity, rng: Rng, counter: int = 0) -> Noised:
        """One t ~ p(t) and one ε a sample; the same for the same counter."""
        assert batch.x0 is not None
        t = density(rng.uniform("time", batch.ids, counter=counter))
        eps = rng("noise", batch.ids, batch.shape, counter=counter)
        return cls(batch.x0, eps.to(batch.x0.device), t.to(batch.x0.device))

    @property
    def x(self) -> Tensor:
        """x_t: b n c."""
        return interpolate(self.x0, self.eps, self.t)

    def matching(self, v: Tensor) -> Tensor:
        """ℓ = ‖v − (ε − x0)‖², averaged over dimensions; v: b n c → b."""
        return (v - target_velocity(self.x0, self.eps)).square().mean((1, 2))


def weighted(batch: Batch, term: Tensor, metrics: Metrics) -> tuple[Tensor, Metrics]:
    """A micro-batch's loss, the weighted sum of its samples' terms (b); and, before the metrics,
    their weighted mean."""
    assert batch.weight is not None
    weight = batch.weight.to(term.device)
    loss = (weight * term).sum()
    return loss, {"loss": loss.detach() / weight.sum(), **metrics}
