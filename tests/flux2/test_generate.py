"""The sampler as configuration describes it. Whole images against diffusers: test_export."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from flux2.analytic import Gaussian
from flux2.errors import InputError
from flux2.generate import Sampler, blank_image, buckets
from flux2.rng import Rng
from flux2.samplers import sample_heun
from flux2.types import Batch, Condition


def batch(b: int) -> Batch:
    cond = Condition(torch.zeros(b, 1, 1), torch.zeros(b, 1, 4), torch.zeros(b, 6, 4))
    ids = torch.arange(b) + 40
    return Batch(ids, ("",) * b, cond, ids, ({},) * b, (2, 3), channels=4)


def test_samples_do_not_depend_on_the_chunk_or_their_company():
    model = Gaussian(torch.zeros(6, 4), 0.5)
    one = Sampler(steps=4, guidance=1.0, chunk=5)(model, batch(5), seed=3)
    for chunk in (1, 2):
        again = Sampler(steps=4, guidance=1.0, chunk=chunk)(model, batch(5), seed=3)
        torch.testing.assert_close(again, one, atol=1e-6, rtol=0)
    part = Sampler(steps=4, guidance=1.0)(model, batch(5).select(torch.tensor([3])), seed=3)
    torch.testing.assert_close(part[0], one[3], atol=1e-6, rtol=0)
    other = Sampler(steps=4, guidance=1.0)(model, batch(5), seed=4)
    assert (other - one).abs().min() > 0 and (one[0] - one[1]).abs().max() > 0.1


def test_the_solver_is_the_one_that_is_named():
    model, b = Gaussian(torch.zeros(6, 4), 0.5), batch(2)
    sampler = Sampler(steps=4, guidance=1.0, solver="heun")
    noise = Rng(7, 0)("sample", b.ids, (6, 4))
    want = sample_heun(model, noise, b.cond, sampler.grid(6))
    assert torch.equal(sampler(model, b, seed=7), want)
    assert not torch.equal(Sampler(steps=4, guidance=1.0)(model, b, seed=7), want)


def test_progress_counts_samples():
    done: list[int] = []
    model = Gaussian(torch.zeros(6, 4), 1.0)
    Sampler(steps=2, guidance=1.0, chunk=2)(model, batch(5), 0, done.append)
    assert done == [2, 2, 1]


@pytest.mark.parametrize(("steps", "tokens"), [(4, 16), (50, 1024), (10, 4301)])
def test_the_grid_is_the_pipelines(steps, tokens):
    import math

    mu = compute_empirical_mu(tokens, steps)
    sigma = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    want = math.exp(mu) / (math.exp(mu) + 1 / sigma - 1)
    got = torch.tensor(Sampler(steps=steps).grid(tokens).sigmas, dtype=torch.float64)
    torch.testing.assert_close(got[:-1], want, atol=1e-9, rtol=0)
    assert got[-1] == 0


@pytest.mark.parametrize(
    "wrong", [{"solver": "rk4"}, {"chunk": 0}, {"guidance": -1.0}, {"steps": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError):
        Sampler(**wrong)


def test_buckets_keep_the_order_and_lose_nothing():
    from flux2.data.signs import SignWorld

    world = SignWorld(length=30, tasks={"t2i": 1.0, "move": 1.0, "compose": 1.0})
    records = [world[i] for i in range(30)]
    groups = list(buckets(records))
    assert [len({r.bucket for r in g}) for g in groups] == [1] * 3
    assert groups[0][0].id == 0 and sorted(r.id for g in groups for r in g) == list(range(30))
    assert all([r.id for r in g] == sorted(r.id for r in g) for g in groups)


def test_blank_images_are_multiples_of_16():
    assert blank_image(32, 48).shape == (32, 48, 3)
    for wrong in ((30, 32), (32, 8), (0, 16)):
        with pytest.raises(InputError, match="16"):
            blank_image(*wrong)
