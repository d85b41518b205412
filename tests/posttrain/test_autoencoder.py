"""The autoencoder's loss on a linear one, against torch.distributions and a hand-made sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from flux2.errors import InputError
from flux2.rng import Rng
from flux2.types import Batch, RoleSpec
from posttrain.autoencoder import AutoencoderTraining

RNG = Rng(2, 3)


class Linear(nn.Module):
    """A latent pixel for each 2×2 pixels, two channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 4, 2, 2)
        self.decoder = nn.ConvTranspose2d(2, 3, 2, 2)

    def reconstruct(
        self, images: Tensor, noise: Callable[[tuple[int, ...]], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encoder(images).chunk(2, 1)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise(tuple(mean.shape[1:]))
        return self.decoder(z), mean, logvar


def pictures(count: int) -> Batch:
    g, ids = torch.Generator().manual_seed(0), torch.arange(count)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=g, dtype=torch.uint8)
    return Batch(
        ids, ("",) * count, None, ids, ({},) * count, (4, 4),
        images=images, weight=torch.full((count,), 1 / count),
    )  # fmt: skip


@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_loss_is_l1_l2_and_the_divergence(kl):
    role, batch = Linear(), pictures(5)
    weight = torch.tensor([0.5, 0.5, 0, 0, 0])
    loss, metrics = AutoencoderTraining(kl).loss(
        {"autoencoder": role}, replace(batch, weight=weight), RNG
    )
    assert batch.images is not None
    x = batch.images / 255 * 2 - 1
    eps = RNG("latent", batch.ids, (2, 4, 4))
    y, mean, logvar = role.reconstruct(x, lambda shape: eps)
    law = Normal(mean, (0.5 * logvar).exp())
    divergence = kl_divergence(law, Normal(0.0, 1.0)).mean((1, 2, 3))
    square = (x - y).pow(2).mean((1, 2, 3))
    each = (x - y).abs().mean((1, 2, 3)) + square + kl * divergence
    torch.testing.assert_close(loss, each[:2].mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(metrics["kl"], divergence.mean(), atol=1e-6, rtol=1e-5)
    psnr = [10 * math.log10(2**2 / s) for s in square.tolist()]  # the range −1 … 1 is 2 wide
    want = torch.tensor(sum(psnr) / 5)
    torch.testing.assert_close(metrics["psnr"], want, atol=1e-5, rtol=1e-5)


def test_loss_and_gradient_do_not_depend_on_the_micro_batches():
    found = []
    for micro in (3, 8):
        method, role = AutoencoderTraining(0.1, micro), Linear()
        roles = {"autoencoder": role}
        (update,) = method.collect(roles, pictures(8), RNG)
        losses = [method.loss(roles, m, RNG)[0] for m in update]
        total = torch.stack(losses).sum()
        total.backward()
        found.append([total.detach(), *(p.grad for p in role.parameters())])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-4)


def test_training_lowers_the_loss():
    """On flat pictures, which two latent channels nearly hold."""
    method, roles, values = AutoencoderTraining(), {"autoencoder": Linear()}, []
    batch = pictures(16)
    assert batch.images is not None
    flat = replace(batch, images=batch.images[:, :, :1, :1].expand(-1, -1, 8, 8).contiguous())
    optimizer = torch.optim.Adam(roles["autoencoder"].parameters(), 0.02)
    for step in range(40):
        for update in method.collect(roles, flat, Rng(0, step)):
            optimizer.zero_grad()
            for micro in update:
                loss, _ = method.loss(roles, micro, Rng(0, step))
                loss.backward()
                values.append(float(loss.detach()))
            optimizer.step()
    assert values[-1] < 0.5 * values[0]


def test_roles_and_wrong_settings():
    assert AutoencoderTraining().roles == {
        "autoencoder": RoleSpec(trainable=True, kind="autoencoder")
    }
    wrong: list[dict[str, Any]] = [{"kl": -1.0}, {"micro": 0}]
    for settings in wrong:
        with pytest.raises(InputError, match=r"method\."):
            AutoencoderTraining(**settings)
