"""How far a policy has moved from the model that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from flux2.errors import InputError
from flux2.flow import FlowSDE, Kernel
from flux2.generate import Sampler
from flux2.model import Flux2, load_model
from flux2.rng import Rng
from flux2.roles import velocity_of
from flux2.samplers import guided, replay, sample_sde
from flux2.types import Batch, Velocity


@dataclass
class PathKL:
    """The metric `kl_path`: KL of the policy's noisy sampling path to the reference's.

        KL = E over paths of π of Σ_i ‖μ_π(x_i) − μ_ref(x_i)‖² / (2·std_i²·D),   nats a dimension

    Both laws start from the same noise and have the same std, so the KL of the whole path is the
    sum over its steps (chain rule). Sampled with evaluation's steps and guidance for both; the last
    step is noiseless and does not count. It bounds the KL of the images from above.

    Attributes:
        model: conf/model of the reference; null: the model that the run is a tuned form of.
        kernel: of the steps.
        autocast: of both networks.
        samples: measured, the first ones; the others have no value.
    """

    model: Mapping[str, Any]
    kernel: Kernel = field(default_factory=FlowSDE)
    autocast: str = "fp32"
    samples: int = 64
    _reference: Velocity | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"the KL's samples are {self.samples}: give at least 1")

    @property
    def engine(self) -> str:
        """The reference and the kernel."""
        return f"path KL to {self.model['name']} ({self.kernel})"

    @torch.no_grad()
    def along(
        self, velocity: Velocity, model: Flux2, batch: Batch, sampler: Sampler, seed: int
    ) -> Mapping[str, Tensor]:
        """Values of the batch's samples, `kl_path`: b. All ranks together."""
        if self._reference is None:
            reference = load_model(OmegaConf.create(dict(self.model)), model.device)
            self._reference = velocity_of(reference, self.autocast)
        rng, grid, found = Rng(seed, 0), sampler.grid(batch.shape[0]), []
        policy = guided(velocity, sampler.guidance)
        reference = guided(self._reference, sampler.guidance)
        for part in batch.split(sampler.chunk):
            assert part.cond is not None
            device, ids, cond = part.cond.text.device, part.ids, part.cond

            def noise(i: int, part: Batch = part, device: torch.device = device) -> Tensor:
                return rng("kl", part.ids, part.shape, counter=i).to(device)

            start = rng("sample", ids, part.shape).to(device)
            _, steps = sample_sde(
                policy, start, cond, grid, self.kernel, range(grid.steps - 1), noise
            )
            total = torch.zeros(len(ids), device=device)
            for step in steps:
                held = replay(reference, step.x, cond, grid, self.kernel, step.i)
                total += (step.mean - held.mean).square().mean((1, 2)) / (2 * held.std**2)
            found.append(total)
        return {"kl_path": torch.cat(found).float().cpu()}
