"""Resampling by difficulty: what is learned from comes more often, and nothing is forgotten."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from flux2 import distributed
from flux2.data.difficulty import Resampled
from flux2.data.mixture import Mixture
from flux2.data.order import adaptive_part, identity, report
from flux2.data.sampler import IndexSampler
from flux2.errors import InputError
from tests.flux2.data.toys import drawn, numbered

ROOT = Path(__file__).resolve().parents[3]
NAN = float("nan")


def tell(data: Resampled, **scores: list[float]) -> dict[str, float]:
    """scores: p<id> → its group's."""
    ids = [int(name[1:]) for name, group in scores.items() for _ in group]
    values = [s for group in scores.values() for s in group]
    return dict(data.observe(torch.tensor(ids), torch.tensor(values)))


def shares(data: Resampled, step: int = 0) -> np.ndarray:
    return data.law(step).shares(len(data))


def test_until_anything_is_known_all_are_alike():
    assert shares(Resampled(numbered(5))) == pytest.approx([0.2] * 5)


def test_probabilities_are_the_formula():
    data = Resampled(numbered(4), floor=0.2)
    tell(data, p0=[0, 0, 0, 0], p1=[1, 0, 1, 0], p2=[1, 1, 1, 0])
    d = np.array([0, 0.25, 0.1875, 0])
    d[3] = d[:3].mean()  # not seen
    want = 0.25 * (0.2 + 0.8 * d / (0.25 * d).sum())
    assert shares(data) == pytest.approx(want)
    assert shares(data).sum() == pytest.approx(1)
    assert shares(data)[0] == pytest.approx(0.2 / 4)  # hopeless, and not forgotten


def test_spread_is_the_deviation_in_the_group():
    data = Resampled(numbered(3), signal="spread", floor=0.5)
    tell(data, p0=[3.0, 5.0], p1=[2.0, 2.0, 2.0], p2=[9.0])
    assert data._value.tolist() == [1.0, 0.0, 0.0]
    assert data._seen.tolist() == [1, 1, 0]  # one sample has no spread
    assert shares(data)[0] > shares(data)[2] > shares(data)[1]


def test_rewards_are_scaled_to_failure_and_success_and_failures_to_score_left_out():
    data = Resampled(numbered(2), low=-1.0, high=3.0)
    tell(data, p0=[-5.0, 9.0, NAN], p1=[NAN, NAN])
    assert data._value[0] == 0.25 and data._seen.tolist() == [1, 0]


def test_what_was_known_decays():
    data = Resampled(numbered(1), decay=0.75)
    tell(data, p0=[0, 1])
    tell(data, p0=[1, 1])
    assert data._value[0] == pytest.approx(0.75 * 0.25)
    assert data._mean[0] == pytest.approx(0.75 * 0.5 + 0.25)


def test_where_nobody_learns_anything_all_are_alike_again():
    data = Resampled(numbered(3))
    told = tell(data, p0=[0, 0], p1=[1, 1])
    assert shares(data) == pytest.approx([1 / 3] * 3)
    assert told == {"prompts_seen": pytest.approx(2 / 3), "prompts_settled": 1.0,
                    "prompts_success": 0.5}  # fmt: skip


def test_the_state_does_not_depend_on_ranks_or_order(monkeypatch):
    g = np.random.default_rng(0)
    ids = torch.from_numpy(g.integers(0, 6, 64))
    scores = torch.from_numpy(g.random(64)).float()
    whole = Resampled(numbered(6), signal="spread")
    whole.observe(ids, scores)
    # Two ranks: each holds half, and gathering joins the halves; here in the other order too.
    for order in (torch.arange(64), torch.randperm(64), torch.arange(63, -1, -1)):
        rank = Resampled(numbered(6), signal="spread")
        parts = {ids[:32].dtype: ids[order], torch.float64: scores[order].double()}
        monkeypatch.setattr(distributed, "gather", lambda x, parts=parts: parts[x.dtype])
        rank.observe(ids[:32], scores[:32])
        monkeypatch.undo()
        for name, value in whole.state_dict().items():
            other = rank.state_dict()[name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


JOB = """
import sys, torch
from flux2 import distributed as d
from flux2.data.difficulty import Resampled
from tests.flux2.data.toys import numbered

d.start(torch.device("cpu"))
data = Resampled(numbered(6))
g = torch.Generator().manual_seed(0)
ids, scores = torch.randint(6, (48,), generator=g), torch.rand(48, generator=g)
half = slice(24 * d.rank(), 24 * (d.rank() + 1))
data.observe(ids[half], scores[half])
torch.save(data.state_dict(), sys.argv[1] + f"/{d.rank()}.pt")
d.stop()
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_know_what_one_process_knows(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}  # fmt: skip
    places = [{"WORLD_SIZE": "2", "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    ranks = [subprocess.Popen([sys.executable, "-c", JOB, str(tmp_path)], env={**common, **place})
             for place in places]  # fmt: skip
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    whole, g = Resampled(numbered(6)), torch.Generator().manual_seed(0)
    whole.observe(torch.randint(6, (48,), generator=g), torch.rand(48, generator=g))
    want = whole.state_dict()
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(state[k], want[k]) for k in ("ids", "value", "mean", "seen"))


def success(index: int) -> float:
    """Of 60 prompts, 20 always fail, 20 always succeed, 20 do as they like."""
    return (0.0, 1.0, 0.5)[index % 3]


def run(data: Resampled, sampler: IndexSampler, steps: range, law=success) -> list[list[int]]:
    """Batches of 6 prompts in groups of 8; what they score is a function of step and prompt."""
    batches = []
    for step in steps:
        batch = sampler(step)
        rows = [(i, float(np.random.default_rng((step, i, k)).random() < law(i)))
                for i in dict.fromkeys(batch) for k in range(8)]  # fmt: skip
        data.observe(torch.tensor([i for i, _ in rows]), torch.tensor([r for _, r in rows]))
        batches.append(batch)
    return batches


def test_what_can_be_learned_from_comes_most_and_all_keep_coming():
    data = Resampled(numbered(60), floor=0.2)
    batches = run(data, IndexSampler(data, 6, seed=0), range(300))
    late = Counter(i % 3 for batch in batches[100:] for i in batch)
    assert late[2] / late.total() > 0.75  # 0.2/3 + 0.8 once all are seen; evenly a third
    seen = Counter(i for batch in batches for i in batch)
    assert set(seen) == set(range(60))


def test_a_prompt_that_becomes_solvable_is_found_again():
    data = Resampled(numbered(60), floor=0.3)
    sampler = IndexSampler(data, 6, seed=0)
    run(data, sampler, range(100))
    before = shares(data)[0]
    run(data, sampler, range(100, 260), lambda i: 0.5 if i == 0 else success(i))
    assert shares(data)[0] > 2.5 * before


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws():
    def parts() -> tuple[Resampled, IndexSampler]:
        data = Resampled(numbered(60, (16, 32)))
        return data, IndexSampler(data, 6, seed=1)

    data, sampler = parts()
    whole = run(data, sampler, range(40))
    data, sampler = parts()
    first = run(data, sampler, range(25))
    state = data.state_dict()
    data, sampler = parts()
    data.load_state_dict(state)
    assert first + run(data, sampler, range(25, 40)) == whole


def test_draws_have_the_probabilities_they_should():
    data = Resampled(numbered(12), floor=0.3)
    tell(data, p0=[0, 0], p1=[1, 0], p2=[1, 1, 1, 0], p3=[0, 1])
    seen = drawn(data, 4, 1000)
    assert [seen[i] / 4000 for i in range(12)] == pytest.approx(shares(data), abs=0.01)


def test_within_the_shares_that_the_data_have():
    parts = {"a": {"dataset": numbered(2), "weight": 3}, "b": {"dataset": numbered(2), "weight": 1}}
    data = Resampled(Mixture(parts), floor=1.0)
    tell(data, p0=[0, 1], p2=[1, 1])
    assert shares(data) == pytest.approx([3 / 8, 3 / 8, 1 / 8, 1 / 8])
    assert IndexSampler(data, 4, 0)(0)


def test_it_must_be_the_outermost():
    data = Resampled(numbered(4))
    assert adaptive_part(data) is data and adaptive_part(numbered(4)) is None
    assert identity(data) == identity(numbered(4))
    inside = Mixture({"a": {"dataset": data, "weight": 1}})
    with pytest.raises(InputError, match="outermost"):
        IndexSampler(inside, 2, seed=0)
    assert "4 prompts by success" in report(data)[0]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"signal": "luck"}, "success, spread"),
        ({"low": 1.0}, "low must be below"),
        ({"decay": 1.0}, "decay"),
        ({"floor": 0.0}, "forgotten"),
        ({"floor": 1.1}, "floor"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(InputError, match=why):
        Resampled(numbered(3), **settings)


def test_wrong_states_and_ids_are_refused():
    data = Resampled(numbered(9))
    tell(data, p8=[0, 1])
    with pytest.raises(InputError, match="signal"):
        Resampled(numbered(9), signal="spread").load_state_dict(data.state_dict())
    with pytest.raises(InputError, match="data it had"):
        Resampled(numbered(3)).load_state_dict(data.state_dict())
    with pytest.raises(InputError, match="not in data"):
        tell(data, p9=[0, 1])
