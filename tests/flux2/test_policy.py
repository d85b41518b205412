"""The policy of a Gaussian mixture: its closed form, its integration, its head."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from flux2.analytic import Gaussian, Mixture
from flux2.errors import InputError
from flux2.policy import FILE, WEIGHTS, Head, TokenMixture, describe, parted, read
from flux2.samplers import sample_euler, sample_policy, substates
from flux2.schedule import Grid, StaticShift
from flux2.types import Law, Policy, PolicyShape

G = torch.Generator().manual_seed(0)
DOUBLE = torch.float64


def some(b: int = 2, n: int = 3, k: int = 3, c: int = 2, sigma: float = 0.8) -> TokenMixture:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=G, dtype=DOUBLE)

    s = torch.full((b,), sigma, dtype=DOUBLE)
    return TokenMixture(
        draw(b, n, c), s, draw(b, n, k), draw(b, n, k, c), 0.3 * draw(b, n, 1) - 0.5
    )


@pytest.mark.parametrize("t", [0.79, 0.5, 0.1])
def test_the_posterior_is_the_integral_of_the_ratio(t):
    """q(x0 | x_s)·p(x_t | x0)/p(x_s | x0), integrated on a grid of two dimensions."""
    law, s = some(b=1, n=1), 0.8
    x = law.x + 0.2
    line = torch.linspace(-7, 7, 901, dtype=DOUBLE)
    x0 = torch.cartesian_prod(line, line)  # g 2
    away = (x0[:, None] - law.means[0, 0]).square().sum(-1)  # g k
    q = (law.logits[0, 0].softmax(0) * (-away / (2 * (2 * law.log_std[0, 0]).exp())).exp()).sum(1)
    gain = -(x[0, 0] - (1 - t) * x0).square().sum(-1) / (2 * t**2)
    gain = gain + (law.x[0, 0] - (1 - s) * x0).square().sum(-1) / (2 * s**2)
    weight = q * (gain - gain.max()).exp()
    mean = (weight[:, None] * x0).sum(0) / weight.sum()
    got = law.x0(x, torch.tensor([t], dtype=DOUBLE))[0, 0]
    torch.testing.assert_close(got, mean, atol=1e-8, rtol=0)


def test_where_it_was_told_it_is_what_was_told():
    law = some()
    logits, means, var = law.posterior(law.x, law.s)
    torch.testing.assert_close(logits, law.logits)
    torch.testing.assert_close(means, law.means)
    torch.testing.assert_close(var, (2 * law.log_std).exp())


class Exact:
    """The very policy of a mixture of Gaussians in D = c dimensions of one token: what the teacher
    knows of x0 at x_s. k: components kept; fewer are merged into one of the same mean."""

    def __init__(self, law: Mixture, merge: bool = False, substeps: int = 400) -> None:
        self.law, self.merge, self.asked = law, merge, 0
        self.shape = PolicyShape(len(law.weights), 1, substeps)

    def policy(self, x: Tensor, t: Tensor, cond: object) -> Law:
        self.asked += 1
        law, wide = self.law, t[:, None, None]
        var = (1 - wide) ** 2 * law.std**2 + wide**2
        pull = (1 - wide) * law.std**2 / var  # b 1 1
        means = law.means + pull * (x - (1 - wide) * law.means)  # b k c, as n is 1
        log_std = 0.5 * (law.std**2 * wide**2 / var).log()
        logits = law.posterior(x, t).log()
        if self.merge:
            p = logits.exp()[..., None]
            mean = (p * means).sum(1, keepdim=True)
            spread = (p * (means - mean).square()).sum((1, 2))[:, None, None] / x.shape[-1]
            log_std = 0.5 * ((2 * log_std).exp() + spread).log()
            return TokenMixture(x, t, logits[:, None, :1] * 0, mean[:, None], log_std)
        return TokenMixture(x, t, logits[:, None], means[:, None], log_std)


EIGHT = Mixture(
    3.0 * torch.stack([torch.tensor([math.cos(a), math.sin(a)], dtype=DOUBLE)
                       for a in torch.arange(8) * math.pi / 4]),
    torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 2], dtype=DOUBLE), 0.3,
)  # fmt: skip


@pytest.mark.parametrize("sigma", [1.0, 0.7])
def test_the_exact_policy_has_the_flows_velocity_anywhere(sigma):
    x = torch.randn(5, 1, 2, generator=G, dtype=DOUBLE) * 2
    law = Exact(EIGHT).policy(x, x.new_full((5,), sigma), None)
    for t in (sigma, 0.6, 0.2, 0.02):
        y, at = torch.randn(5, 1, 2, generator=G, dtype=DOUBLE), x.new_full((5,), t)
        torch.testing.assert_close(law.velocity(y, at), EIGHT(y, at), atol=1e-9, rtol=1e-9)


def test_a_gaussian_needs_one_component():
    teacher = Gaussian(torch.randn(4, 3, generator=G, dtype=DOUBLE), 0.6)
    x, s = torch.randn(2, 4, 3, generator=G, dtype=DOUBLE), torch.tensor([0.9, 0.9], dtype=DOUBLE)
    _, var = teacher.marginal(s)
    log_std = (0.6 * s[:, None, None] / var.sqrt()).log().expand(2, 4, 1)
    mean = teacher.x0(x, s)
    law = TokenMixture(x, s, torch.zeros(2, 4, 1, dtype=DOUBLE), mean[:, :, None], log_std)
    y, t = torch.randn(2, 4, 3, generator=G, dtype=DOUBLE), torch.tensor([0.4, 0.1], dtype=DOUBLE)
    torch.testing.assert_close(law.velocity(y, t), teacher(y, t), atol=1e-10, rtol=1e-10)


def energy(a: Tensor, b: Tensor) -> float:
    """Energy distance of two samples, n d each: 2·E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖."""
    n = len(a)
    within = [torch.cdist(v, v).sum() / (n * (n - 1)) for v in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - sum(within))


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_eight_modes_in_few_forwards_and_not_with_one_component(segments):
    noise = torch.randn(1500, 1, 2, generator=G, dtype=DOUBLE)
    u = torch.rand(1500, generator=G, dtype=DOUBLE)
    data = EIGHT.sample(u, torch.randn(1500, 1, 2, generator=G, dtype=DOUBLE))[:, 0]
    grid, cond = StaticShift(3.0)(segments, 1), None
    exact, one = Exact(EIGHT, substeps=100), Exact(EIGHT, merge=True, substeps=100)
    good = sample_policy(exact, noise, cond, grid, 100)[:, 0]
    bad = sample_policy(one, noise, cond, grid, 100)[:, 0]
    plain = sample_euler(EIGHT, noise, cond, grid)[:, 0]
    assert exact.asked == segments
    assert energy(good, data) < 0.02
    assert energy(plain, data) > 0.05 and (segments > 2 or energy(bad, data) > 0.05)


def test_one_segment_arrives_where_the_teachers_many_steps_do():
    noise = torch.randn(64, 1, 2, generator=G, dtype=DOUBLE)
    fine = Grid(tuple(1 - i / 200 for i in range(201)))
    got = sample_policy(Exact(EIGHT), noise, None, Grid((1.0, 0.0)), 200)
    torch.testing.assert_close(got, sample_euler(EIGHT, noise, None, fine), atol=1e-8, rtol=0)


def test_substates_tell_both_ends_of_a_segment():
    law = some()
    path = list(substates(law, law.x, 0.8, 0.3, 7))
    assert [t for t, _ in path][::7] == [0.8, 0.3] and len(path) == 8
    assert torch.equal(path[0][1], law.x)
    assert path[3][0] == pytest.approx(0.8 - 0.5 * 3 / 7)
    step = path[0][1] + (path[1][0] - 0.8) * law.velocity(law.x, law.s)
    torch.testing.assert_close(path[1][1], step)


def test_left_out_components_have_no_say():
    law = some(b=3, k=3)
    dropped = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    got, t = law.without(dropped), torch.full((3,), 0.4, dtype=DOUBLE)
    two = TokenMixture(law.x, law.s, law.logits[..., 1:], law.means[..., 1:, :], law.log_std)
    whole = law.x0(law.x, t)
    torch.testing.assert_close(got.x0(law.x, t)[0], two.x0(law.x, t)[0])
    torch.testing.assert_close(got.x0(law.x, t)[1:], whole[1:])  # none left: all of them


# ---------------------------------------------------------------- the head


def test_a_fresh_heads_mean_is_the_velocity():
    head = Head(5, 4, PolicyShape(3, 4, 8), seed=1)
    h, v, x = torch.randn(2, 6, 5), torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    s = torch.tensor([1.0, 0.7])
    law = head(h, v, x, s)
    torch.testing.assert_close(law.velocity(x, s), v, atol=1e-6, rtol=1e-6)
    assert law.logits.shape == (2, 6, 3) and law.means.shape == (2, 6, 3, 4)
    torch.testing.assert_close(law.log_std.exp(), s[:, None, None].expand(2, 6, 1))
    # Its components differ, else they would stay alike for ever.
    assert float((law.means[:, :, 0] - law.means[:, :, 1]).detach().abs().min()) > 0
    law.velocity(x, torch.tensor([0.5, 0.3])).square().sum().backward()
    k, c = 3, 4
    for rows in (slice(0, k), slice(k, k + k * c), slice(k + k * c, None)):
        assert float(head.weight.grad[rows].abs().min()) > 0


def test_the_head_is_drawn_from_the_seed():
    a, b, c = (Head(5, 4, PolicyShape(), seed) for seed in (0, 0, 1))
    assert torch.equal(a.bias, b.bias) and not torch.equal(a.bias, c.bias)


def test_a_head_is_read_back(tmp_path):
    from safetensors.torch import save_file

    shape = PolicyShape(3, 4, 8)
    head = Head(5, 4, shape)
    nn.init.normal_(head.weight)
    save_file(dict(head.state_dict()), tmp_path / WEIGHTS)
    (tmp_path / FILE).write_text(json.dumps(describe(shape)))
    again = read(tmp_path, torch.device("cpu"))
    assert again is not None and again.shape == shape and again.channels == 4
    assert torch.equal(again.weight, head.weight) and not again.weight.requires_grad
    assert read(tmp_path / "elsewhere", torch.device("cpu")) is None
    (tmp_path / FILE).write_text(json.dumps(describe(PolicyShape(4, 4, 8))))
    with pytest.raises(InputError, match="none of 4 components"):
        read(tmp_path, torch.device("cpu"))
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(InputError, match="export it again"):
        read(tmp_path, torch.device("cpu"))


def test_weights_are_parted():
    body, head = parted({"proj_out.weight": torch.ones(1), "head.bias": torch.zeros(1)})
    assert list(body) == ["proj_out.weight"] and list(head) == ["bias"]


def test_only_a_policy_is_one():
    assert isinstance(Exact(EIGHT), Policy) and not isinstance(EIGHT, Policy)
