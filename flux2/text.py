"""Prompts → conditioning, exactly as FLUX.2's pipelines make it.

klein: Qwen3, hidden states (9, 18, 27) concatenated, right-padded, the user's turn in the chat
template with generation prompt and without thinking. Padding takes part in the joint attention, as
it does in the reference pipelines; `mask_padding` is the option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from flux2.errors import InputError


def text_ids(batch: int, length: int, device: torch.device | None = None) -> Tensor:
    """Positions (0, 0, 0, l) of text tokens: b s 4 int64."""
    ids = torch.zeros(batch, length, 4, dtype=torch.int64, device=device)
    ids[..., 3] = torch.arange(length, device=device)
    return ids


class TextEncoder:
    """A frozen language model and its tokenizer; remembers the prompts it has encoded.

    Args:
        encoder: Qwen3ForCausalLM (klein). Layers above the last one used are never run: the last
            one used must lie below the top, whose output is normalised and would be another
            feature.
        tokenizer: with a chat template.
        max_length: tokens a prompt is padded and cut to.
        layers: hidden states that are concatenated.
        remember: bytes of features kept in memory.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokenizer: Any,
        max_length: int,
        layers: Sequence[int] = (9, 18, 27),
        remember: int = 1 << 30,
    ) -> None:
        depth = int(encoder.config.num_hidden_layers)  # pyright: ignore
        if max(layers) >= depth:
            raise InputError(
                f"text layer {max(layers)} is the encoder's last of {depth} (its output is "
                "normalised): choose lower model.text_layers"
            )
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.layers = tuple(layers)
        self._remember = remember
        self._seen: dict[str, Tensor] = {}

    @property
    def dim(self) -> int:
        """Features of a token: layers × hidden size."""
        return len(self.layers) * int(self.encoder.config.hidden_size)  # pyright: ignore

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask, each b s."""
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": p}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for p in prompts
        ]
        return self.tokenizer(
            texts,
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
        )

    def __call__(self, prompts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """b prompts → b s d, fp32."""
        missing = list(dict.fromkeys(p for p in prompts if p not in self._seen))
        size = 4 * self.dim * self.max_length
        if (len(self._seen) + len(missing)) * size > self._remember:
            self._seen.clear()
            missing = list(dict.fromkeys(prompts))
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            self._seen.update(zip(part, self._encode(part).unbind(0), strict=True))
        out = torch.stack([self._seen[p] for p in prompts])
        return out if device is None else out.to(device)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokens(prompts)
        where = next(self.encoder.parameters()).device
        body: Any = self.encoder.model
        output = body(
            input_ids=tokens["input_ids"].to(where),
            attention_mask=tokens["attention_mask"].to(where),
            output_hidden_states=True,
            use_cache=False,
        )
        states = torch.stack([output.hidden_states[k] for k in self.layers], 1)  # b k s d
        return rearrange(states, "b k s d -> b s (k d)").float().cpu()
