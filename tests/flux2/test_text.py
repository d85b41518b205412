"""Prompt features against diffusers' own pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline

from flux2.errors import InputError
from flux2.text import TextEncoder, text_ids

PROMPTS = ['a red circle at the top, "TAXI" in white on black', "", "make the word cyan"]


def test_features_equal_the_pipelines(tiny):
    for length in (24, 40, 9):  # 9 truncates
        mine = TextEncoder(tiny.text.encoder, tiny.text.tokenizer, length)
        with torch.no_grad():
            want = Flux2KleinPipeline._get_qwen3_prompt_embeds(
                tiny.text.encoder, tiny.text.tokenizer, PROMPTS, max_sequence_length=length
            )
        got = mine(PROMPTS)
        assert got.shape == (3, length, mine.dim) and want.std() > 0.1
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_prompts_differ_in_their_features(tiny):
    a, b = tiny.text(['"TAXI"', '"TAXX"'])
    assert (a - b).abs().max() > 0.1


def test_padding_is_on_the_right(tiny):
    mask = tiny.text.tokens(PROMPTS)["attention_mask"]
    assert (mask.diff(dim=1) <= 0).all() and mask[:, 0].all() and not mask.all()


def test_ids_equal_the_pipelines():
    want = Flux2KleinPipeline._prepare_text_ids(torch.zeros(2, 5, 3))
    assert torch.equal(text_ids(2, 5), want)


def test_the_last_layer_is_refused(tiny):
    """Its output is normalised: another feature than the pipeline's users know."""
    with pytest.raises(InputError, match="text_layers"):
        TextEncoder(tiny.text.encoder, tiny.text.tokenizer, 24, (9, 18, 28))


def test_memory_returns_the_same_and_does_not_run_twice(tiny, monkeypatch):
    mine = TextEncoder(tiny.text.encoder, tiny.text.tokenizer, 24)
    first = mine(PROMPTS)
    runs = []
    encode = mine._encode
    monkeypatch.setattr(mine, "_encode", lambda p: runs.append(list(p)) or encode(p))
    assert torch.equal(mine(PROMPTS[::-1]), first.flip(0)) and not runs
    new = mine([PROMPTS[0], "new", "new"])
    assert runs == [["new"]] and torch.equal(new[0], first[0]) and torch.equal(new[1], new[2])


def test_memory_is_bounded(tiny):
    size = 4 * tiny.text.dim * 24
    mine = TextEncoder(tiny.text.encoder, tiny.text.tokenizer, 24, remember=2 * size)
    first = mine(["one"])
    mine(["two"])
    mine(["three"])
    assert len(mine._seen) <= 2
    torch.testing.assert_close(mine(["one"]), first)


def test_the_encoder_is_frozen(tiny):
    assert not tiny.text.encoder.training
    assert not any(p.requires_grad for p in tiny.text.encoder.parameters())
