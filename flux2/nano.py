"""The parts of the nano FLUX.2 that are built and not trained: its tokenizer and its text encoder.

The text encoder is a real Qwen3 of 28 thin layers (nano-dev: a Mistral3 of 32) with random, frozen
weights: deep random features of the prompt, which keep each token's identity and mix in its left
context. The tokenizer spells capital letters one by one and knows the rest of the sign world's
language by byte-level BPE. A model of any size whose weights are random has this tokenizer too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from flux2 import architecture
from flux2.data.signs import SignWorld
from flux2.text import PADDING

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{% endif %}"
)
# The pipeline of dev gives messages in parts, a system message first.
PARTS_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}"
)
HEX = "0123456789ABCDEF"
# Capital letters alone; hexadecimal colours in pairs of digits; JSON's glue and words by BPE.
PIECES = (
    r"\{\"text\":\"|\",\"(?:ink|ground|shape)\":\"#?|\"\}|,? \""
    r"|#|(?<=#)[0-9A-F]{2}|(?<=#[0-9A-F]{2})[0-9A-F]{2}|(?<=#[0-9A-F]{4})[0-9A-F]{2}"
    r"|[A-Z]| ?[a-z]+| ?[0-9]+|[^A-Za-z0-9# ]+| +"
)


@functools.cache
def _trained() -> str:
    """The vocabulary and its merges, as JSON: a second of training, the same every time."""
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
    return tokenizer.to_str()


def build_tokenizer(max_length: int, kind: str = "qwen3") -> PreTrainedTokenizerFast:
    """A tokenizer trained on the sign world's prompts; the same every time.

    kind: of the text encoder. For mistral3 it pads on the left, and dev's system message is one
        token, so that it costs a short sequence no more.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[AddedToken(START, special=True)],
        padding_side=PADDING[kind],
        model_max_length=max_length,
    )
    fast.chat_template = CHAT_TEMPLATE
    if kind == "mistral3":
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        fast.add_tokens([SYSTEM_MESSAGE])
        fast.chat_template = PARTS_TEMPLATE
    return fast


def build_text_encoder(
    config: Mapping[str, Any], vocabulary: int, seed: int, device: torch.device | None = None
) -> Any:
    """A whole Qwen3 or Mistral3 with random weights, scaled so that features survive the depth.

    Embeddings have unit variance, projections keep it, and what a layer adds to the stream is
    damped, so that layer 27 still tells one token from another.
    """
    device = device or torch.device("cpu")
    made = architecture.text_config(config, vocabulary)
    with device:
        model = architecture.whole_class(made)(made)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            nn.init.ones_(parameter)
            continue
        std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= 0.3
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def vocabulary_size(cfg: Any) -> int:
    """Tokens that a model with random weights knows, where conf/model does not say."""
    kind = cfg.architecture.text_encoder.get("model_type", "qwen3")
    return len(build_tokenizer(cfg.max_sequence_length, kind))


def random_parts(
    cfg: Any, place: torch.device, device: torch.device, seed: int
) -> tuple[nn.Module, nn.Module, nn.Module, Any]:
    """Transformer, autoencoder, text encoder with random weights keyed by the seed, made where they
    will live, and a tokenizer.

    place: the transformer's device; `device` is the others'.
    """
    shape, dtype = architecture.expected(cfg), architecture.DTYPES[cfg.dtype]
    assert shape is not None
    text = shape["text_encoder"]
    tokenizer = build_tokenizer(cfg.max_sequence_length, text.get("model_type", "qwen3"))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        encoder = build_text_encoder(text, len(tokenizer), seed, device)
        torch.manual_seed(seed)
        with place:
            transformer = architecture.build("transformer", shape["transformer"])
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(seed)
    with device:
        vae = architecture.build("vae", shape["vae"])
    return transformer, vae, encoder, tokenizer
