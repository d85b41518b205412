"""A rehearsed step makes the calls that a real step on a real model makes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from flux2.passes import Call
from flux2.rehearsal import rehearse
from flux2.rng import Rng
from posttrain.autoencoder import AutoencoderTraining
from posttrain.axes import Anchor
from posttrain.direct import Direct, DirectAlign, LastSteps
from posttrain.grpo import GRPO
from posttrain.nft import NFT
from posttrain.sft import FlowMatching

WANT = {"scored": False, "latents": True, "images": False, "unconditional": False,
        "guidance": False, "references": False}  # fmt: skip
RL = {**WANT, "scored": True, "latents": False, "unconditional": True}


def test_sft_is_one_graded_forward_of_a_micro_batch() -> None:
    found = rehearse(lambda **_: FlowMatching(micro=3, ema=0.9), 8, **WANT)
    assert found.turns == {"model": (Call(3, True, "trained"),)}
    assert found.micros == {"model": 3} and not found.collected and not found.decoded


def test_nft_samples_with_the_follower_and_compares_with_it_and_the_reference() -> None:
    def make(score: Any) -> NFT:
        anchor = Anchor(0.1, "velocity")
        return NFT(score, group=4, chunk=6, times=2, guidance=3.0, anchor=anchor, steps=4)

    found = rehearse(make, 3, **RL)
    # Guidance doubles the rows of sampling, not of the loss.
    assert found.collected == (Call(12, False, "follower"),)
    assert found.turns["policy"] == (
        Call(6, True, "trained"), Call(6, False, "follower"), Call(6, False, "frozen"),
    )  # fmt: skip
    # Rewards see whole groups of 4: the second chunk completes two.
    assert found.decoded == 8 and found.micros == {"policy": 4}


def test_grpo_trains_through_guidance_and_measures_its_floor_with_gradients() -> None:
    def make(score: Any) -> GRPO:
        return GRPO(score, group=4, chunk=4, guidance=2.0, steps=6)

    found = rehearse(make, 2, **RL)
    assert found.turns["policy"] == (Call(8, True, "trained"),)
    assert Call(8, True, "trained") in found.collected
    assert found.micros["policy"] == 2 * 3  # chunks × steps of the window
    plain = rehearse(lambda score: GRPO(score, group=4, chunk=4, steps=6), 2, **RL)
    assert plain.turns["policy"] == (Call(4, True, "trained"),)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_direct_samples_once_without_gradients_then_with_and_decodes(guidance: float) -> None:
    rows = 4 if guidance == 1 else 8

    def make(score: Any) -> Direct:
        anchor = Anchor(0.1, "velocity")
        return Direct(score, chunk=4, steps=9, guidance=guidance, through=LastSteps(2),
                      anchor=anchor)  # fmt: skip

    found = rehearse(make, 8, **RL)
    assert found.turns["policy"] == (
        Call(rows, False, "trained"), Call(rows, True, "trained"), Call(rows, True, "trained"),
        Call(4, True, "decoder"), Call(4, True, "trained"), Call(4, False, "frozen"),
    )  # fmt: skip
    assert found.micros == {"policy": 2} and not found.collected and not found.decoded
    aligned = rehearse(lambda score: Direct(score, chunk=4, through=DirectAlign()), 8, **RL)
    assert aligned.turns["policy"] == (
        Call(4, False, "trained"), Call(4, True, "trained"), Call(4, True, "decoder"),
    )  # fmt: skip


def test_an_autoencoder_is_told_apart() -> None:
    found = rehearse(
        lambda **_: AutoencoderTraining(kl=0.1, micro=5), 8,
        **{**WANT, "latents": False, "images": True},
    )  # fmt: skip
    assert found.autoencoder == {"autoencoder": 5} and not found.turns


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_calls_are_those_of_a_real_step(guidance: float, tiny, make_batch) -> None:
    """NFT on real roles, forwards counted by (rows, gradients)."""
    from flux2.roles import Roles

    calls: Counter[tuple[int, bool]] = Counter()

    def make(score: Any) -> NFT:
        return NFT(score, group=2, chunk=4, steps=3, guidance=guidance)

    def score(x: Any, batch: Any) -> Any:
        return lambda: {"reward": (batch.ids % 7).float()}

    method = make(score)
    roles = Roles(method.roles, tiny, None, None)
    for name in roles:
        role = roles[name]

        def counted(call: Any, role: Any = role) -> Any:
            out = call()
            trained = any(p.requires_grad for p in role.backbone.parameters())
            calls[len(out), torch.is_grad_enabled() and trained] += 1
            return out

        role.root = counted
    rng = Rng(0, 0)
    update = next(iter(method.collect(roles, make_batch(4), rng)))
    sampled = set(calls)
    calls.clear()
    method.loss(roles, max(update, key=len), rng)
    found = rehearse(make, 4, **RL)
    assert {(c.rows, c.graded) for c in found.collected} == sampled
    assert Counter((c.rows, c.graded) for c in found.turns["policy"]) == calls
