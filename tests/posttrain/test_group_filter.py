"""Which groups online methods train on, and what a rollout costs: forwards, encodings, waiting."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2 import distributed
from flux2.analytic import GaussianPolicy, toy_condition
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.engine import share
from flux2.errors import InputError
from flux2.rng import Rng
from flux2.schedule import Linear
from flux2.scorer import Scorer
from flux2.types import Batch, Condition
from posttrain._common import GroupFilter
from posttrain.awm import AWM
from posttrain.grpo import GRPO
from posttrain.nft import NFT

N, C, G = 4, 3, 4
NAN = math.nan
RNG = Rng(5, 0)
METHODS = (NFT, AWM, GRPO)
LOOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-4}
Reward = Callable[[Tensor, Batch], Tensor]


def prompts(count: int, first: int = 0) -> Batch:
    """Prompts whose groups' ids are 100 and up, rows `first` and up of the global batch."""
    ids = torch.arange(first, first + count)
    return Batch(
        ids, ("p",) * count, toy_condition(count, N), ids + 100, ({},) * count, (2, 2), C
    )  # fmt: skip


def make(kind: Any, reward: Reward, chosen: GroupFilter, **more: Any) -> Any:
    def score(x: Tensor, batch: Batch) -> Any:
        scores = {"reward": reward(x, batch)}
        return lambda: scores

    settings = {"group": G, "steps": 5, "chunk": 8, "schedule": Linear()}
    return kind(score, filter=chosen, **{**settings, **more})


def roles() -> dict[str, Any]:
    start = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) + 0.5
    policy = GaussianPolicy(start, 0.8)
    return {"policy": policy, "old": copy.deepcopy(policy)}


def linear(x: Tensor, batch: Batch) -> Tensor:
    return x.mean((1, 2))


def only(good: Sequence[int], flat: float = 0.0) -> Reward:
    """Rewards that differ in these prompts' groups, by more than 1, and elsewhere by `flat`."""

    def reward(x: Tensor, batch: Batch) -> Tensor:
        prompt, member = batch.groups - 100, batch.ids % G
        wide = torch.isin(prompt, torch.tensor(good)).float()
        return (member.float() + linear(x, batch).tanh() / 10) * wide + flat * member * (1 - wide)

    return reward


def trained(update: Sequence[Batch]) -> list[int]:
    """The prompts of the samples that count, each once for its group, in order."""
    found = [m.groups[m.weight > 0] - 100 for m in update if m.weight is not None]
    return sorted(set(torch.cat(found).tolist())) if found else []


def gradient(method: Any, parts: Mapping[str, Any], update: Sequence[Batch]) -> Tensor:
    for micro in update:
        method.loss(parts, micro, RNG)[0].backward()
    return parts["policy"].mean.grad


# ---------------------------------------------------------------- which groups


def test_what_is_informative_by_hand():
    rewards = torch.tensor([
        [0.1, 0.3, 0.2], [0.1, 0.11, 0.1], [0.5, 0.5, 0.5], [NAN, 0.1, 0.4], [NAN, NAN, 0.9],
        [NAN] * 3, [-2.0, -1.9, -1.8], [0.5, 0.50005, 0.5],
    ])  # fmt: skip
    found = GroupFilter(0.15).informative(rewards)
    assert found.tolist() == [True, False, False, True, False, False, True, False]
    found = GroupFilter(0.0, oversample=2).informative(rewards)  # what advantages call flat is flat
    assert found.tolist() == [True, True, False, True, False, False, True, False]


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("chunk", [5, 8, 32])
def test_left_out_groups_are_as_if_never_scored(kind: Any, chunk: int):
    """The gradient is that of a run whose reward is NaN where the filter leaves a group out."""
    good = only([0, 3], flat=0.05)

    def masked(x: Tensor, batch: Batch) -> Tensor:
        keep = torch.isin(batch.groups - 100, torch.tensor([0, 3]))
        return torch.where(keep, good(x, batch), NAN)

    found = []
    for reward, chosen in ((good, GroupFilter(0.5)), (masked, GroupFilter())):
        method, parts = make(kind, reward, chosen, chunk=chunk), roles()
        (update,) = map(share, method.collect(parts, prompts(5), RNG))
        assert trained(update) == [0, 3]
        if chosen.on:
            # Trained as drawn: a smaller batch may round otherwise, and the first ratio not be 1.
            assert all(len(m) == min(chunk, 5 * G - int(m.ids[0])) for m in update)
            assert method.metrics()["groups_informative"] == 2 / 5
            assert method.metrics()["rewards_missing"] == 0
        found.append(gradient(method, parts, update))
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[0], found[1], **LOOSE)


@pytest.mark.parametrize("kind", METHODS)
def test_without_a_filter_nothing_is_left_out_or_told(kind: Any):
    method, parts = make(kind, only([0, 1, 2], 0.05), GroupFilter()), roles()
    (update,) = map(share, method.collect(parts, prompts(5), RNG))
    assert trained(update) == [0, 1, 2, 3, 4]
    assert not any(name.startswith("groups_i") for name in method.metrics())


@pytest.mark.parametrize("kind", METHODS)
def test_nothing_informative_updates_nothing(kind: Any):
    method, parts = make(kind, only([], 0.05), GroupFilter(0.5)), roles()
    assert list(map(share, method.collect(parts, prompts(4), RNG))) == [[]]
    assert method.metrics()["groups_trained"] == 0


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize(
    ("good", "want", "waves"),
    [
        # Of 12 prompts an update has 4; wave w is the prompts w, w + 3, w + 6, w + 9.
        (range(12), [0, 3, 6, 9], 1),
        ([0, 3, 9, 1, 2, 10], [0, 1, 3, 9], 2),  # 10 comes after 1 in its wave and finds no place
        ([3, 2, 5, 8], [2, 3, 5, 8], 3),
        ([3, 7], [3, 7], 3),  # not full: there are no more prompts
    ],
)
def test_dynamic_sampling_draws_until_an_update_is_full(
    kind: Any, good: Sequence[int], want: list[int], waves: int
):
    scored: list[int] = []
    inner = only(list(good), 0.05)

    def reward(x: Tensor, batch: Batch) -> Tensor:
        scored.extend(batch.groups.tolist())
        return inner(x, batch)

    method, parts = make(kind, reward, GroupFilter(0.5, 3, 12)), roles()
    (update,) = map(share, method.collect(parts, prompts(12), RNG))
    assert trained(update) == want
    assert len(scored) == waves * 4 * G
    metrics = method.metrics()
    drawn = [p for p in range(12) if p % 3 < waves]
    assert metrics["groups_informative"] == sum(p in good for p in drawn) / len(drawn)
    assert metrics["groups_trained"] == len(want) / 4


def test_prompts_that_are_left_out_do_not_change_what_others_draw():
    """The samples of a prompt are those of an unfiltered rollout: noise is keyed by its row."""
    found = []
    for chosen in (GroupFilter(), GroupFilter(0.0, 3, 12)):
        method, parts = make(NFT, linear, chosen), roles()
        (update,) = map(share, method.collect(parts, prompts(12), RNG))
        rows = {int(i): x for m in update for i, x in zip(m.ids, m.x0, strict=True)}
        found.append(rows)
    assert len(found[0]) == 48 and len(found[1]) == 16
    for i, x in found[1].items():
        assert torch.equal(x, found[0][i])


@contextmanager
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], Any]], list]]:
    """Runs a function on two ranks, threads that speak through `gather_objects`."""
    here, barrier, box = threading.local(), threading.Barrier(2, timeout=60), [None, None]

    def gather_objects(value: Any) -> list[Any]:
        box[here.rank] = value
        barrier.wait()
        out = list(box)
        barrier.wait()
        return out

    def run(work: Callable[[int], Any]) -> list[Any]:
        out: list[Any] = [None, None]

        def one(rank: int) -> None:
            here.rank = rank
            try:
                out[rank] = work(rank)
            except BaseException as error:
                out[rank] = error
                barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        for result in out:
            if isinstance(result, BaseException):
                raise result
        return out

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "connected", lambda: True)
        patch.setattr(distributed, "size", lambda: 2)
        patch.setattr(distributed, "rank", lambda: here.rank)
        patch.setattr(distributed, "gather_objects", gather_objects)
        yield run


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("updates", [1, 2])
def test_two_ranks_choose_and_learn_what_one_does(
    kind: Any, updates: int, monkeypatch: pytest.MonkeyPatch
):
    """Six prompts a rank, in three waves; the second rank has most of what is informative."""
    if kind is NFT and updates > 1:
        pytest.skip("NFT has one update a rollout")
    good = only([3, 7, 8, 10], 0.05)
    more = {} if kind is NFT else {"updates": updates}

    def work(rank: int, count: int = 6) -> tuple[list[list[int]], Tensor, Any, int]:
        calls = 0
        parts = roles()

        def counted(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            nonlocal calls
            calls += 1
            return parts["policy"](x, t, cond)

        seen = {**parts, "policy": counted, "old": counted}
        method = make(kind, good, GroupFilter(0.5, 3, 12), **more)
        lists = list(map(share, method.collect(seen, prompts(count, 6 * rank), RNG)))
        drawn = calls
        for update in lists:
            gradient(method, {**parts, "old": parts["old"]}, update)
        return [trained(u) for u in lists], parts["policy"].mean.grad, method.metrics(), drawn

    alone = work(0, 12)
    assert sorted(p for u in alone[0] for p in u) == [3, 7, 8, 10]
    with two_ranks(monkeypatch) as run:
        first, second = run(work)
    together = [sorted(a + b) for a, b in zip(first[0], second[0], strict=True)]
    assert sorted(p for u in together for p in u) == [3, 7, 8, 10]
    assert first[3] == second[3]  # forwards, of which a sharded engine wants as many on each rank
    for name in ("groups_informative", "groups_trained"):
        assert first[2][name] == second[2][name] == alone[2][name]
    if updates == 1:
        torch.testing.assert_close(first[1] + second[1], alone[1], **LOOSE)
        assert alone[1].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"min_range": -0.1}, "min_range"), ({"min_range": NAN}, "min_range"),
     ({"oversample": 0}, "oversample"), ({"oversample": 3, "prompts": 8}, "multiple of 3")],
)  # fmt: skip
def test_wrong_filters_are_refused(wrong: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says) as caught:
        GroupFilter(**wrong)
    assert "\n" not in str(caught.value)


def test_waves_want_as_many_prompts_on_every_rank(monkeypatch: pytest.MonkeyPatch):
    GroupFilter(0.1, 2, 6)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(InputError, match="multiple of 4"):
        GroupFilter(0.1, 2, 6)
    GroupFilter(0.1, 1, 6)


# ---------------------------------------------------------------- what a rollout costs


class Slow:
    """A reward that works in processes of its own, as far as anyone can see."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.sent = events, 0

    def ready(self) -> None: ...

    def submit(self, images: Tensor, batch: Batch) -> tuple[int, Tensor]:
        self.events.append(f"submit {self.sent}")
        self.sent += 1
        return self.sent - 1, images.float().mean((1, 2, 3))

    def result(self, pending: tuple[int, Tensor]) -> Mapping[str, Tensor]:
        self.events.append(f"result {pending[0]}")
        return {"reward": pending[1]}

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        return self.result(self.submit(images, batch))


@pytest.mark.parametrize("kind", METHODS)
def test_a_chunk_is_scored_while_the_next_is_drawn(kind: Any):
    """Nobody waits for a score before the last chunk is drawn: 12 samples in chunks of 4."""
    events: list[str] = []

    def decode(x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x.reshape(len(x), 3, 2, 2)

    score: Any = Scorer(Slow(events), SimpleNamespace(codec=SimpleNamespace(decode=decode)))
    parts = roles()

    def watched(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if float(t[0]) == 1.0:
            events.append("draw")
        return parts["policy"](x, t, cond)

    method = kind(score, group=G, steps=5, chunk=4, schedule=Linear())
    updates = list(method.collect({"policy": watched, "old": watched}, prompts(3), RNG))
    drawn = events[: events.index("result 0")]
    assert drawn == ["draw", "submit 0", "draw", "submit 1", "draw", "submit 2"]
    assert events[6:9] == ["result 0", "result 1", "result 2"]
    assert trained(updates[0]) == [0, 1, 2]


class Counted:
    """A velocity that counts its forwards and their samples."""

    def __init__(self) -> None:
        self.inner = roles()["policy"]
        self.calls, self.samples = 0, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        return self.inner(x, t, cond)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_empty_prompt_costs_nothing_where_guidance_is_off(kind: Any, guidance: float):
    """12 samples of 5 steps: as many samples in forwards, and twice that with guidance."""
    policy, batch = Counted(), prompts(3)
    assert batch.cond is not None
    empty = toy_condition(3, N)
    cond = Condition(**{**vars(batch.cond), "null": empty if guidance != 1 else None})
    batch = Batch(**{**vars(batch), "cond": cond})
    method = make(kind, linear, GroupFilter(), guidance=guidance)
    (update,) = method.collect({"policy": policy, "old": policy}, batch, RNG)
    extra = 8 * (guidance != 1) + 8 if kind is GRPO else 0  # its first rollout is replayed once
    assert policy.samples == 12 * 5 * (1 if guidance == 1 else 2) + extra
    before = policy.samples
    micro = update[0]
    method.loss({"policy": policy, "old": policy}, micro, RNG)
    each = {NFT: 2, AWM: 1, GRPO: 1 if guidance == 1 else 2}[kind]  # NFT asks the old policy too
    assert policy.samples - before == len(micro) * each


@pytest.mark.parametrize("unconditional", [False, True])
def test_a_groups_text_is_encoded_once(tiny, monkeypatch, unconditional: bool):
    encoded: list[str] = []
    inner = tiny.text._encode

    def counted(texts: Sequence[str]) -> Tensor:
        encoded.extend(texts)
        return inner(texts)

    monkeypatch.setattr(tiny.text, "_encode", counted)
    monkeypatch.setattr(tiny.text, "_seen", {})
    world = SignWorld("train", length=50)
    records = [world[k] for k in (41, 42, 43)]
    collate = Collator(tiny, latents=False, unconditional=unconditional)
    batch = collate(records, torch.arange(3))
    samples = batch.repeat(G)
    assert sorted(encoded) == sorted([r.prompt for r in records] + [""] * unconditional)
    assert samples.cond is not None and len(samples.cond.text) == 3 * G
    assert (samples.cond.null is not None) == unconditional
    assert torch.equal(samples.cond.text[G], samples.cond.text[2 * G - 1])
    policy, count = Counted(), len(encoded)
    method = make(NFT, linear, GroupFilter(), chunk=4)
    policy.inner = lambda x, t, cond: x * 0.1
    list(method.collect({"policy": policy, "old": policy}, batch, RNG))
    assert policy.samples == 3 * G * 5 and len(encoded) == count
