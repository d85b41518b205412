"""The latent autoencoder.

    z = μ(x) + σ(x)·ε,   loss = |x̂ − x| + (x̂ − x)² + β·KL(N(μ, σ²) ‖ N(0, 1)) / dim z

(Kingma and Welling, arXiv 1312.6114, with a pixel loss.) A small β keeps latents near the unit
Gaussian without blurring letters; noise on z makes the decoder forgiving to a generator's errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flux2.errors import InputError
from flux2.rng import Rng
from flux2.types import Batch, Memoryless, Metrics, RoleSpec, Turn


@dataclass(frozen=True)
class AutoencoderTraining(Memoryless):
    """Method of stage=autoencoder.

    Attributes:
        kl: β above.
        micro: images a micro-batch.
    """

    kl: float = 1e-4
    micro: int = 64
    accepts: ClassVar[tuple[str, ...]] = ("base", "distilled", "guidance-distilled")
    result: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        for name, value, least in (("kl", self.kl, 0), ("micro", self.micro, 1)):
            if value < least:
                raise InputError(f"method.{name} is {value}: it must be at least {least}")

    @property
    def roles(self) -> Mapping[str, RoleSpec]:
        """One: the autoencoder."""
        return {"autoencoder": RoleSpec(trainable=True, kind="autoencoder")}

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One."""
        return (Turn("autoencoder", self.loss),)

    def collect(
        self, roles: Mapping[str, Any], batch: Batch, rng: Rng
    ) -> Iterable[Sequence[Batch]]:
        """One update on the batch."""
        yield batch.split(self.micro)

    def loss(self, roles: Mapping[str, Any], batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Weighted sum over the micro-batch."""
        assert batch.images is not None and batch.weight is not None
        x = batch.images.float() / 127.5 - 1
        y, mean, logvar = roles["autoencoder"].reconstruct(x, lambda s: rng("latent", batch.ids, s))
        error = (y - x).abs().mean((1, 2, 3))  # b
        square = (y - x).square().mean((1, 2, 3))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3))
        loss = (batch.weight * (error + square + self.kl * kl)).sum()
        return loss, {
            "loss": loss,
            "l1": error.mean(),
            "psnr": 10 * (4 / square).log10().mean(),
            "kl": kl.mean(),
        }
