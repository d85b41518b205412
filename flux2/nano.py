"""The parts of the nano FLUX.2 that are built and not trained: its tokenizer and its text encoder.

The text encoder is a real Qwen3 of 28 thin layers with random, frozen weights: deep random features
of the prompt, which keep each token's identity and mix in its left context. The tokenizer spells
capital letters one by one and knows the rest of the sign world's language by byte-level BPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from flux2.data.signs import SignWorld
from flux2.errors import InputError

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
HEX = "0123456789ABCDEF"
# Capital letters alone; hexadecimal colours in pairs of digits; JSON's glue and words by BPE.
PIECES = (
    r"\{\"text\":\"|\",\"(?:ink|ground|shape)\":\"#?|\"\}|,? \""
    r"|#|(?<=#)[0-9A-F]{2}|(?<=#[0-9A-F]{2})[0-9A-F]{2}|(?<=#[0-9A-F]{4})[0-9A-F]{2}"
    r"|[A-Z]| ?[a-z]+| ?[0-9]+|[^A-Za-z0-9# ]+| +"
)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the sign world's prompts; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    world = SignWorld(
        "train",
        length=4000,
        tasks={"t2i": 0.6, "recolour": 0.1, "move": 0.1, "replace": 0.1, "compose": 0.1},
        granularity={"full": 0.4, "short": 0.2, "json": 0.4},
    )
    corpus = [world[i].prompt for i in range(len(world))] 
    corpus += [f"#{a}{b}{a}{b}{a}{b}" for a in HEX for b in HEX]  # every pair of digits is a token
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[AddedToken(START, special=True)],
        padding_side="right",
        model_max_length=max_length,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_text_encoder(config: Mapping[str, Any], vocabulary: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights, scaled so that features survive 28 layers.

    Embeddings have unit variance, projections keep it, and what a layer adds to the stream is
    damped, so that layer 27 still tells one token from another.
    """
    known = set(Qwen3Config().to_dict())
    unknown = set(config) - known
    if unknown:
        raise InputError(f"model.architecture.text_encoder has no key {min(unknown)!r}")
    model = Qwen3ForCausalLM(
        Qwen3Config(**dict(config), vocab_size=vocabulary, tie_word_embeddings=True)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.ones_(parameter)
            continue
        std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= 0.3
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()
