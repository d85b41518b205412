"""The nano model's tokenizer and text encoder keep what the sign world says."""

from __future__ import annotations

import pytest
import torch

from flux2.data.signs import ALPHABET, CUBE, SignWorld
from flux2.errors import InputError
from flux2.nano import _trained, build_text_encoder, build_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 28,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(24)


def test_capital_letters_are_tokens_of_their_own(tokenizer):
    """What is learned is spelling: a word is its letters."""
    letters = {tokenizer.tokenize(a)[0] for a in ALPHABET}
    assert len(letters) == 26
    for word in ("TAXI", "QZXJ", "BUS"):
        assert tokenizer.tokenize(word) == list(word)


def test_hexadecimal_colours_are_three_pairs(tokenizer):
    for colour in (*CUBE[::17], "#1F77B4"):
        tokens = tokenizer.tokenize(f'"ink":"{colour}"')
        digits = colour[1:]
        assert [t for t in tokens if t in {digits[k : k + 2] for k in (0, 2, 4)}] == [
            digits[k : k + 2] for k in (0, 2, 4)
        ]


def test_every_prompt_of_the_world_survives_the_round_trip_and_fits(tokenizer):
    """24 tokens hold each prompt and the template: a cut one would ask for less than is scored."""
    tasks = dict.fromkeys(("t2i", "recolour", "move", "replace", "compose"), 1.0)
    kinds = {"full": 1.0, "short": 1.0, "json": 1.0}
    for split in ("train", "heldout", "combinations"):
        world = SignWorld(split, length=700, seed=9, tasks=tasks, granularity=kinds)
        for i in range(700):
            prompt = world[i].prompt
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text)["input_ids"]
            assert len(ids) <= 24, prompt
            assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


def test_the_template_marks_begin_and_end(tokenizer):
    def tokens(**kwargs):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a sign"}], tokenize=False, **kwargs
        )
        return tokenizer.tokenize(text)

    full = tokens(add_generation_prompt=True, enable_thinking=False)
    assert full[0] == "<|im_start|>" and full[-1] == "<|im_end|>"
    assert tokens(add_generation_prompt=False) == full[:-1]


def test_building_twice_gives_the_same(tokenizer):
    _trained.cache_clear()  # trained again, not remembered
    other = build_tokenizer(24)
    assert other._tokenizer.to_str() == tokenizer._tokenizer.to_str()
    assert other.get_vocab() == tokenizer.get_vocab()
    one, two = (build_text_encoder(SHAPE, 50, seed=3) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    third = build_text_encoder(SHAPE, 50, seed=4)
    assert not torch.equal(third.get_input_embeddings().weight, one.get_input_embeddings().weight)


@torch.no_grad()
def test_deep_layers_still_tell_tokens_apart():
    """Another token changes its own features at layer 27 most, later ones less, earlier not."""
    model = build_text_encoder(SHAPE, 50, seed=0)
    ids = torch.tensor([[7, 8, 9, 10], [7, 8, 11, 10]])
    states = model.model(input_ids=ids, output_hidden_states=True).hidden_states[27]
    assert states.isfinite().all() and 0.3 < states.std() < 30
    changed = (states[0] - states[1]).norm(dim=-1)
    assert changed[:2].max() < 1e-4  # what is to the left cannot see it
    assert changed[2] > changed[3] > 1e-3  # the token itself changes most; the next one hears of it


def test_devs_system_message_is_one_token_and_no_prompt_is_cut():
    """conf/model/nano-dev's 28 tokens hold every prompt, the message and the template."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    dev = build_tokenizer(28, "mistral3")
    assert dev.padding_side == "left" and len(dev.tokenize(SYSTEM_MESSAGE)) == 1
    tasks = dict.fromkeys(("t2i", "recolour", "move", "replace", "compose"), 1.0)
    kinds = {"full": 1.0, "short": 1.0, "json": 1.0}
    world = SignWorld("train", length=300, seed=9, tasks=tasks, granularity=kinds)
    prompts = [world[i].prompt for i in range(300)]
    texts = dev.apply_chat_template(format_input(prompts), tokenize=False)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = dev(text)["input_ids"]
        assert len(ids) <= 28, prompt
        assert dev.decode(ids, skip_special_tokens=True) == SYSTEM_MESSAGE + prompt


@torch.no_grad()
def test_a_deep_mistral_still_tells_tokens_apart():
    """As the Qwen above, at dev's layer 30; and it is keyed by its seed."""
    eye = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
           "num_attention_heads": 1, "head_dim": 16, "patch_size": 14}  # fmt: skip
    shape = {"model_type": "mistral3", "vision_config": eye,
             "text_config": {**SHAPE, "num_hidden_layers": 32, "sliding_window": None}}  # fmt: skip
    model, again = (build_text_encoder(shape, 50, seed=0) for _ in range(2))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    ids = torch.tensor([[7, 8, 9, 10], [7, 8, 11, 10]])
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[30]
    assert states.isfinite().all() and 0.3 < states.std() < 30
    changed = (states[0] - states[1]).norm(dim=-1)
    assert changed[:2].max() < 1e-4 and changed[2] > changed[3] > 1e-3


def test_an_unknown_key_is_refused():
    with pytest.raises(InputError, match="hidden_sise"):
        build_text_encoder({**SHAPE, "hidden_sise": 3}, 50, seed=0)
