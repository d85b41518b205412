"""Keyed randomness: what changes a draw, what does not, and that draws are what they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flux2.rng import Rng, keyed

IDS = torch.tensor([3, 0, 41, 2**40])


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_same_key_same_numbers():
    for draw in ("__call__", "uniform"):
        a, b = (getattr(Rng(7, 5), draw)("rollout", IDS, (4, 3), counter=2) for _ in range(2))
        assert torch.equal(a, b) and a.shape == (4, 4, 3) and a.dtype == torch.float32
    assert (
        Rng(7, 5).shared("window").random(4).tolist()
        == Rng(7, 5).shared("window").random(4).tolist()
    )


def test_order_of_calls_does_not_matter():
    rng = Rng(1, 2)
    first = rng("a", IDS, (5,))
    rng("b", IDS, (100,))
    rng.uniform("a", IDS)
    assert torch.equal(rng("a", IDS, (5,)), first)


@pytest.mark.parametrize(
    "other",
    [
        lambda: Rng(8, 5)("rollout", IDS, (6,), counter=2),
        lambda: Rng(7, 6)("rollout", IDS, (6,), counter=2),
        lambda: Rng(7, 5)("loss", IDS, (6,), counter=2),
        lambda: Rng(7, 5)("rollout", IDS + 1, (6,), counter=2),
        lambda: Rng(7, 5)("rollout", IDS, (6,), counter=3),
        lambda: Rng(5, 7)("rollout", IDS, (6,), counter=2),
    ],
    ids=["seed", "step", "stream", "sample", "counter", "swapped"],
)
def test_every_part_of_the_key_counts(other):
    assert not torch.isclose(Rng(7, 5)("rollout", IDS, (6,), counter=2), other()).any()


def test_batches_may_be_split_and_ordered_anyhow():
    rng = Rng(0, 9)
    whole = rng("rollout", IDS, (2, 3))
    parts = torch.cat([rng("rollout", IDS[:1], (2, 3)), rng("rollout", IDS[1:], (2, 3))])
    assert torch.equal(whole, parts)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(rng("rollout", IDS[order], (2, 3)), whole[order])
    assert rng("rollout", IDS[:0], (2, 3)).shape == (0, 2, 3)


def test_moments():
    ids = torch.arange(4000)
    z = Rng(0, 0)("moments", ids, (50,)).double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        got = (z**power).mean().item()
        assert got == pytest.approx(moment, abs=5 * math.sqrt(variance / n)), power
    u = Rng(0, 0).uniform("moments", ids, (50,)).double()
    assert u.min() >= 0 and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / n))
    assert u.var().item() == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / n))


def test_samples_steps_streams_and_counters_are_uncorrelated():
    ids, bound = torch.arange(5000), 5 / math.sqrt(5000)
    z = Rng(0, 0)("a", ids)
    for other in (
        Rng(0, 0)("a", ids + 1),
        Rng(0, 1)("a", ids),
        Rng(1, 0)("a", ids),
        Rng(0, 0)("b", ids),
        Rng(0, 0)("a", ids, counter=1),
    ):
        assert abs(correlation(z, other)) < bound


def test_uniform_and_normal_of_one_stream_are_independent():
    """A loss that draws t and ε under one name must not tie them: neither values nor magnitudes."""
    ids, bound = torch.arange(5000), 5 / math.sqrt(5000)
    u, z = Rng(0, 0).uniform("loss", ids), Rng(0, 0)("loss", ids)
    assert abs(correlation(u, z)) < bound
    assert abs(correlation(u, z.abs())) < bound


def test_shared_draws_are_keyed():
    draws = [
        Rng(0, 0).shared("window"), Rng(0, 1).shared("window"), Rng(1, 0).shared("window"),
        Rng(0, 0).shared("turn"), Rng(0, 0).shared("window", counter=1),
    ]  # fmt: skip
    assert len({d.random() for d in draws}) == 5


def test_keys_are_not_concatenations():
    """("ab", 1) and ("a", "b1"), 1 and "1": different keys."""
    keys = [("ab", 1), ("a", "b1"), ("ab1",), ("ab", "1"), (1, "ab")]
    assert len({keyed(*k).random() for k in keys}) == len(keys)


def test_generator_is_philox_and_so_portable():
    assert isinstance(keyed(0).bit_generator, np.random.Philox)
