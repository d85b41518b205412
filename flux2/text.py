"""Prompts → conditioning, exactly as FLUX.2's pipelines make it.

klein: Qwen3, hidden states (9, 18, 27) concatenated, right-padded, the user's turn in the chat
template with generation prompt and without thinking. dev: Mistral3, hidden states (10, 20, 30),
left-padded, a system message before the user's turn, no generation prompt. Padding takes part in
the joint attention, as it does in the reference pipelines; `mask_padding` is the option.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flux2.errors import InputError

PADDING = {"qwen3": "right", "mistral3": "left"}
"""The side on which each family's prompts are padded."""
AT_ONCE = 4096
"""Tokens that are encoded together: all layers' states of them are alive at once."""


def text_ids(batch: int, length: int, device: torch.device | None = None) -> Tensor:
    """Positions (0, 0, 0, l) of text tokens: b s 4 int64."""
    ids = torch.zeros(batch, length, 4, dtype=torch.int64, device=device)
    ids[..., 3] = torch.arange(length, device=device)
    return ids


def attention_mask(text: Tensor, image_tokens: int) -> Tensor:
    """Condition.mask for texts of unequal lengths: b s bool → b (s + n) bool.

    image_tokens: of the target and its references together; all take part.
    """
    return torch.cat([text.bool(), text.new_ones(len(text), image_tokens, dtype=torch.bool)], 1)


def family(encoder: nn.Module) -> str:
    """qwen3 (klein) or mistral3 (dev), of a whole text encoder or of its language model alone."""
    kind = str(encoder.config.model_type)  # pyright: ignore
    return {"mistral": "mistral3"}.get(kind, kind)


def language_model(encoder: nn.Module) -> Any:
    """The stack of layers inside a text encoder: the part that is run."""
    inner: Any = encoder.base_model  # itself, if there is no head around it
    return inner.language_model if encoder.config.model_type == "mistral3" else inner  # pyright: ignore


class TextEncoder:
    """A frozen language model and its tokenizer; remembers the prompts it has encoded.

    Args:
        encoder: Qwen3 (klein) or Mistral3 (dev), whole; or only its language model, cut off after
            the last layer used and without the final normalisation. Of a whole one the last layer
            used must lie below the top, whose output is normalised and would be another feature.
        tokenizer: with a chat template.
        max_length: tokens a prompt is padded and cut to.
        layers: hidden states that are concatenated.
        remember: bytes of features kept in memory.
        source: the folder in diffusers' layout that holds the whole encoder, where `encoder` is
            cut off; an export copies text_encoder/ and tokenizer/ from there. None: it is whole.
        mask_padding: whether the loader is to hide padding from the transformer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        max_length: int,
        layers: Sequence[int] = (9, 18, 27),
        remember: int = 1 << 30,
        source: Path | None = None,
        mask_padding: bool = False,
    ) -> None:
        config: Any = language_model(encoder).config
        if source is None and max(layers) >= config.num_hidden_layers:
            raise InputError(
                f"text layer {max(layers)} is the encoder's last of {config.num_hidden_layers} "
                "(its output is normalised): choose lower model.text_layers"
            )
        self.family = family(encoder)
        # A fact of the model: not all versions of transformers keep it in a tokenizer's files.
        tokenizer.padding_side = PADDING[self.family]
        self.encoder: Any = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.layers = tuple(layers)
        self.source = source
        self.mask_padding = mask_padding
        self.dim = len(self.layers) * int(config.hidden_size)
        """Features of a token: layers × hidden size."""
        self._remember = remember
        self._seen: dict[str, Tensor] = {}

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask, each b s."""
        sized: dict[str, Any] = {
            "return_tensors": "pt",
            "padding": "max_length",
            "truncation": True,
            "max_length": self.max_length,
        }
        if self.family == "mistral3":
            # The pipeline's own: its system message, and what it removes from prompts.
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            return self.tokenizer.apply_chat_template(
                format_input(list(prompts)),
                add_generation_prompt=False,
                tokenize=True,
                return_dict=True,
                **sized,
            )
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": p}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for p in prompts
        ]
        return self.tokenizer(texts, **sized)

    def mask(self, prompts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Which tokens are not padding: b s bool. For `attention_mask`."""
        return self.tokens(prompts)["attention_mask"].bool().to(device or "cpu")

    def __call__(self, prompts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """b prompts → b s d, fp32.

        Raises:
            InputError: the encoder was released and a prompt is new to it.
        """
        missing = list(dict.fromkeys(p for p in prompts if p not in self._seen))
        if missing and self.encoder is None:
            raise InputError(
                f"the text encoder was freed and has not seen the prompt {missing[0]!r}: encode "
                "every prompt before, or keep the encoder"
            )
        if missing and (len(self._seen) + len(missing)) * self._bytes > self._remember:
            self._seen.clear()
            missing = list(dict.fromkeys(prompts))
        count = max(1, min(64, AT_ONCE // self.max_length))
        for start in range(0, len(missing), count):
            part = missing[start : start + count]
            self._seen.update(zip(part, self._encode(part).unbind(0), strict=True))
        out = torch.stack([self._seen[p] for p in prompts])
        return (out if device is None else out.to(device)).float()

    def keep(self, prompts: Sequence[str]) -> None:
        """Encodes these prompts and keeps them, whatever `remember` allows: before `release`."""
        distinct = dict.fromkeys([*self._seen, *prompts])
        self._remember = max(self._remember, (len(distinct) + 1) * self._bytes)
        for prompt in distinct:
            self([prompt])

    @property
    def _bytes(self) -> int:
        """Of one prompt's features."""
        return self.encoder.dtype.itemsize * self.dim * self.max_length

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokens(prompts)
        where = next(self.encoder.parameters()).device
        output = language_model(self.encoder)(
            input_ids=tokens["input_ids"].to(where),
            attention_mask=tokens["attention_mask"].to(where),
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.stack([output.hidden_states[k] for k in self.layers], 1)  # b k s d
        return rearrange(states, "b k s d -> b s (k d)").cpu()

    def release(self) -> None:
        """Frees the encoder's weights. Prompts that were encoded stay known; a new one is an error,
        and so is an export, unless `source` holds the whole encoder."""
        self.encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
