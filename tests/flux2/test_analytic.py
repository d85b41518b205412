"""The oracle itself, against Monte Carlo-free independent derivations: autograd and quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from flux2 import flow
from flux2.analytic import (
    AffinePolicy,
    ConditionalGaussian,
    Gaussian,
    GaussianPolicy,
    Mixture,
    MixturePolicy,
    toy_condition,
)
from flux2.schedule import Linear
from flux2.types import Condition

EXACT = {"atol": 1e-10, "rtol": 0}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


T = torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
X = 2 * draw(5, 2, 3, seed=1)
GAUSSIAN = Gaussian(draw(2, 3, seed=2), 0.7)
MIXTURE = Mixture(3 * draw(4, 6, seed=3), torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), 0.4)


def density(mixture: Mixture, t: float) -> MixtureSameFamily:
    """p_t by torch.distributions, from the law of (1 − t)x0 + tε."""
    k, d = mixture.means.shape
    cov = ((1 - t) ** 2 * mixture.std**2 + t**2) * torch.eye(d).double().expand(k, d, d)
    parts = MultivariateNormal((1 - t) * mixture.means, cov)
    return MixtureSameFamily(Categorical(mixture.weights), parts)


@pytest.mark.parametrize("model", [GAUSSIAN, MIXTURE])
def test_velocity_and_score_agree(model):
    score = flow.score_from_velocity(X, model(X, T), T)
    torch.testing.assert_close(score, model.score(X, T), **EXACT)


def test_gaussian_score_is_the_densitys_gradient():
    for i, t in enumerate(T.tolist()):
        x = X[i].clone().requires_grad_()
        law = torch.distributions.Normal(
            (1 - t) * GAUSSIAN.mean, math.sqrt((1 - t) ** 2 * 0.7**2 + t**2)
        )
        (want,) = torch.autograd.grad(law.log_prob(x).sum(), x)
        torch.testing.assert_close(GAUSSIAN.score(X, T)[i], want, **EXACT)


def test_gaussian_x0_is_the_conditional_expectation():
    """By regression of x0 on x_t: m + Cov(x0, x_t)/Var(x_t)·(x − E x_t); and by the velocity."""
    t = T[:, None, None]
    cov, var = (1 - t) * 0.7**2, (1 - t) ** 2 * 0.7**2 + t**2
    want = GAUSSIAN.mean + cov / var * (X - (1 - t) * GAUSSIAN.mean)
    torch.testing.assert_close(GAUSSIAN.x0(X, T), want, **EXACT)
    torch.testing.assert_close(flow.x0_from_velocity(X, GAUSSIAN(X, T), T), want, **EXACT)


def test_gaussian_flow_map():
    """Ends, group law, dX/dr = v, and the marginal's push-forward."""
    r, u = T.flip(0), torch.full_like(T, 0.42)
    torch.testing.assert_close(GAUSSIAN.flow(X, T, T), X, **EXACT)
    through = GAUSSIAN.flow(GAUSSIAN.flow(X, T, u), u, r)
    torch.testing.assert_close(through, GAUSSIAN.flow(X, T, r), **EXACT)
    r = r.clone().requires_grad_()
    y = GAUSSIAN.flow(X, T, r)
    slope = torch.stack([torch.autograd.grad(v.sum(), r, retain_graph=True)[0] for v in y])
    v = GAUSSIAN(y, r).sum((1, 2))
    torch.testing.assert_close(slope.diagonal(), v.detach(), **EXACT)
    mean, var = GAUSSIAN.marginal(T)
    out = GAUSSIAN.flow(mean + var.sqrt() * X, T, u)
    mean, var = GAUSSIAN.marginal(u)
    torch.testing.assert_close(out, mean + var.sqrt() * X, **EXACT)


def test_gaussian_samples_have_its_moments():
    data = GAUSSIAN.sample(draw(40_000, 2, 3, seed=5))
    torch.testing.assert_close(data.mean(0), GAUSSIAN.mean, atol=5 * 0.7 / 200, rtol=0)
    assert data.std(0).sub(0.7).abs().max() < 5 * 0.7 / math.sqrt(8e4)


def test_mixture_density_and_score():
    for i, t in enumerate(T.tolist()):
        law, x = density(MIXTURE, t), X[i].flatten().requires_grad_()
        log_p = law.log_prob(x)
        torch.testing.assert_close(MIXTURE.log_density(X, T)[i], log_p.detach(), **EXACT)
        (want,) = torch.autograd.grad(log_p, x)
        torch.testing.assert_close(MIXTURE.score(X, T)[i].flatten(), want, **EXACT)


def test_mixture_posterior_is_bayes():
    for i, t in enumerate(T.tolist()):
        law = density(MIXTURE, t)
        joint = (
            law.mixture_distribution.probs
            * law.component_distribution.log_prob(X[i].flatten()).exp()
        )
        got = MIXTURE.posterior(X, T)[i]
        torch.testing.assert_close(got, joint / joint.sum(), atol=1e-8, rtol=0)


def test_mixture_velocity_by_quadrature():
    """E[ε − x0 | x] in one dimension, integrated numerically over x0."""
    one = Mixture(
        torch.tensor([[-2.0], [1.0]]).double(), torch.tensor([0.3, 0.7], dtype=torch.float64), 0.5
    )
    x0 = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    prior = sum(w * torch.exp(-0.5 * ((x0 - m) / 0.5) ** 2) for m, w in ((-2, 0.3), (1, 0.7)))
    for t, x in ((0.3, 0.4), (0.6, -1.0), (0.95, 0.1)):
        eps = (x - (1 - t) * x0) / t
        weight = prior * torch.exp(-0.5 * eps**2)
        want = ((eps - x0) * weight).sum() / weight.sum()
        got = one(draw(1, 1, 1) * 0 + x, torch.tensor([t], dtype=torch.float64))
        assert got.item() == pytest.approx(want.item(), abs=1e-9)


def test_mixture_of_one_is_the_gaussian():
    one = Mixture(GAUSSIAN.mean.flatten()[None], torch.ones(1).double(), 0.7)
    torch.testing.assert_close(one(X, T), GAUSSIAN(X, T), **EXACT)


def test_mixture_samples_have_its_weights_and_spread():
    g = torch.Generator().manual_seed(7)
    noise, u = draw(40_000, 2, 3, seed=8), torch.rand(40_000, generator=g)
    data = MIXTURE.sample(u, noise)
    centred = data - MIXTURE.std * noise
    nearest = torch.cdist(centred.flatten(1), MIXTURE.means).argmin(1)
    torch.testing.assert_close(centred.flatten(1), MIXTURE.means[nearest], **EXACT)
    share = nearest.bincount(minlength=4) / 40_000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.0125, rtol=0)
    # The inverse distribution function takes [0, ½) to the first and [½, 1) to the second.
    pair = Mixture(torch.tensor([[-1.0], [1.0]]), torch.ones(2), 0.1)
    u = torch.tensor([0.0, 0.5 - 2.0**-24, 0.5, 1 - 2.0**-24])
    assert pair.sample(u, torch.zeros(4, 1, 1)).flatten().tolist() == [-1, -1, 1, 1]


def test_velocity_is_finite_at_both_ends():
    for model in (GAUSSIAN, MIXTURE):
        for end in (0.0, 1.0):
            assert model(X, torch.full_like(T, end)).isfinite().all()


def test_conditional_gaussian_reads_the_text():
    model = ConditionalGaussian(draw(2, 3, seed=9), draw(2, 3, seed=10), 0.5)
    cond = toy_condition(5, 2)
    assert cond.null is not None
    prompted, unprompted = Gaussian(model.prompted, 0.5), Gaussian(model.unprompted, 0.5)
    torch.testing.assert_close(model(X, T, cond), prompted(X, T), **EXACT)
    torch.testing.assert_close(model(X, T, cond.null), unprompted(X, T), **EXACT)
    text = torch.tensor([1.0, -1, 2, 0, 1])[:, None, None]
    mixed = model(X, T, Condition(text, cond.text_ids, cond.ids))
    for i, law in enumerate((prompted, unprompted, prompted, unprompted, prompted)):
        torch.testing.assert_close(mixed[i], law(X, T)[i], **EXACT)


def test_guided_gaussian_is_a_gaussian():
    model = ConditionalGaussian(draw(2, 3, seed=9), draw(2, 3, seed=10), 0.5)
    cond = toy_condition(5, 2)
    assert cond.null is not None
    v_c, v_u = model(X, T, cond), model(X, T, cond.null)
    for scale in (0.0, 1.0, 4.0):
        torch.testing.assert_close(model.guided(scale)(X, T), v_u + scale * (v_c - v_u), **EXACT)


def test_policy_is_a_trainable_gaussian():
    """Flow matching on N(m, s²) has its optimum at (m, s), found by gradient descent."""
    data = Gaussian(torch.tensor([[1.0, -2.0]]).double(), 0.5)
    policy = GaussianPolicy(torch.zeros(1, 2).double(), std=1.0, train_std=True)
    cond = toy_condition(256, 1)
    opt = torch.optim.Adam(policy.parameters(), lr=0.05)
    t = (torch.arange(256).double() + 0.5) / 256
    for step in range(300):
        x0, eps = data.sample(draw(256, 1, 2, seed=step)), draw(256, 1, 2, seed=10_000 + step)
        v = policy(flow.interpolate(x0, eps, t), t, cond)
        loss = ((v - flow.target_velocity(x0, eps)) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    torch.testing.assert_close(policy.mean.detach(), data.mean, atol=0.1, rtol=0)
    assert policy.log_std.exp().item() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(policy(X[:, :1, :2], T), policy.law(X[:, :1, :2], T), **EXACT)
    frozen = GaussianPolicy(torch.zeros(1, 2))
    assert [n for n, p in frozen.named_parameters() if p.requires_grad] == ["mean"]


def test_tilted_laws_are_the_law_times_an_exponential():
    """log p(x) − log p_ref(x) − (slope·x − curvature/2·‖x‖²) is one number, whatever x."""
    slope, flat = draw(2, 3, seed=11), torch.zeros(5, dtype=torch.float64)
    want = (slope * X).sum((1, 2))
    laws = (GAUSSIAN.tilted(slope, 0.8), GAUSSIAN)
    parts = [torch.distributions.Normal(g.mean, float(g.std)).log_prob(X).sum((1, 2)) for g in laws]
    rest = parts[0] - parts[1] - want + 0.4 * X.square().sum((1, 2))
    torch.testing.assert_close(rest, rest[:1].expand(5), **EXACT)
    tilted = MIXTURE.tilted(slope.flatten())
    rest = tilted.log_density(X, flat) - MIXTURE.log_density(X, flat) - want
    torch.testing.assert_close(rest, rest[:1].expand(5), **EXACT)


def test_a_mixture_policy_starts_as_its_law_and_learns_all_of_it():
    policy = MixturePolicy(MIXTURE)
    v = policy(X, T)
    torch.testing.assert_close(v, MIXTURE(X, T), **EXACT)
    v.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_an_affine_policy_starts_as_a_gaussian_on_its_grid():
    grid = Linear()(4, 1)
    policy = AffinePolicy(GAUSSIAN.mean, 0.7, grid)
    times = torch.tensor([0.5, 1.0, 0.25, 0.75, 0.5], dtype=torch.float64)
    torch.testing.assert_close(policy(X, times), GAUSSIAN(X, times), **EXACT)
    policy(X, times).sum().backward()
    assert policy.slope.grad is not None and policy.slope.grad.shape == (4, 1, 1)
    assert policy.offset.grad is not None and policy.offset.grad.shape == (4, 2, 3)
