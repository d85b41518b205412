"""What a model is made of, without a weight: shapes from conf/model or from a folder's config.json.

Modules are built on the meta device, so that parameters are counted exactly, and a file or folder
of another shape is refused, before anything is read. diffusers' and transformers' own classes are
inside.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flux2.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("transformer", "vae", "text_encoder")


def image_class(what: str) -> Any:
    """diffusers' class of the "transformer" or the "vae"."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    return {"transformer": Flux2Transformer2DModel, "vae": AutoencoderKLFlux2}[what]


def build(what: str, config: Mapping[str, Any]) -> nn.Module:
    """The "transformer" or the "vae" of this shape, on the present default device, untrained.

    Raises:
        InputError: the class knows no such key.
    """
    try:
        return image_class(what)(**{k: v for k, v in config.items() if not k.startswith("_")})
    except TypeError as error:
        raise InputError(f"model.architecture.{what}: {error}") from None


def expected(cfg: Any) -> dict[str, dict[str, Any]] | None:
    """conf/model's architecture as plain dictionaries; None where the folder alone decides."""
    from omegaconf import OmegaConf

    if cfg.architecture is None:
        return None
    shape: Any = OmegaConf.to_container(cfg.architecture, resolve=True)
    text = shape["text_encoder"]
    joint = len(cfg.text_layers) * int(text.get("text_config", text)["hidden_size"])
    shape["transformer"].setdefault("joint_attention_dim", joint)
    return shape


def text_config(shape: Mapping[str, Any], vocabulary: int | None = None) -> Any:
    """transformers' configuration of a text encoder: Qwen3Config, or Mistral3Config.

    Args:
        shape: `model_type` (qwen3, or mistral3 with text_config and vision_config) and the keys of
            that configuration.
        vocabulary: tokens, where the shape does not say.

    Raises:
        InputError: an unknown type, or a key that its configuration does not have.
    """
    from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig, Qwen3Config

    what = "model.architecture.text_encoder"
    rest = dict(shape)
    kind = rest.pop("model_type", "qwen3")
    if kind not in ("qwen3", "mistral3"):
        raise InputError(f"{what}.model_type is {kind!r}: choose qwen3 or mistral3")
    more = {} if vocabulary is None else {"vocab_size": vocabulary}
    if kind == "qwen3":
        return _configuration(Qwen3Config, {**more, **rest}, what)
    text = _configuration(
        MistralConfig, {**more, **rest.pop("text_config", {})}, f"{what}.text_config"
    )
    vision = _configuration(
        PixtralVisionConfig, rest.pop("vision_config", {}), f"{what}.vision_config"
    )
    return _configuration(
        Mistral3Config, {**rest, "text_config": text, "vision_config": vision}, what
    )


def _configuration(cls: Any, keys: Mapping[str, Any], where: str) -> Any:
    unknown = set(keys) - {*cls().to_dict(), "rope_theta"}
    if unknown:
        raise InputError(f"{where} has no key {min(unknown)!r}")
    keys = dict(keys)
    if "rope_theta" in keys:
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": keys.pop("rope_theta")}
    return cls(**keys)


def language(config: Any) -> Any:
    """The configuration of the language model inside a text encoder's."""
    return getattr(config, "text_config", config)


def whole_class(config: Any) -> Any:
    """transformers' class of the whole text encoder, as a pipeline's folder holds it."""
    from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

    return {
        "qwen3": Qwen3ForCausalLM,
        "mistral3": Mistral3ForConditionalGeneration,
    }[config.model_type]


def language_class(config: Any) -> Any:
    """transformers' class of the bare language model: Qwen3Model or MistralModel."""
    from transformers import MistralModel, Qwen3Model

    return {"qwen3": Qwen3Model, "mistral": MistralModel}[language(config).model_type]


def truncated(config: Any, layers: Sequence[int]) -> Any:
    """The language model's configuration with only the layers up to the last one used.

    Raises:
        InputError: the last one used is the encoder's top, whose output is normalised and would be
            another feature, or lies above it.
    """
    out = copy.deepcopy(language(config))
    depth = max(layers)
    if depth >= out.num_hidden_layers:
        raise InputError(
            f"text layer {depth} is not below the encoder's last of {out.num_hidden_layers} (its "
            "output is normalised): choose lower model.text_layers"
        )
    out.num_hidden_layers = depth
    if getattr(out, "layer_types", None) is not None:
        out.layer_types = out.layer_types[:depth]
    return out


def without_top(model: Any) -> Any:
    """A truncated language model whose last state is what the next layer would have seen: the final
    normalisation belongs above the whole model's last layer."""
    model.norm = nn.Identity()
    return model


def differences(found: Mapping[str, Sequence[int]], wanted: nn.Module, exact: bool) -> str | None:
    """How names and shapes of weights differ from a module's, in a few words; None: not at all.

    exact: weights that the module does not have are a difference too.
    """
    mine = {k: tuple(v.shape) for k, v in wanted.state_dict().items() if "num_batches" not in k}
    theirs = {k: tuple(v) for k, v in found.items() if "num_batches" not in k}
    missing, extra = mine.keys() - theirs.keys(), theirs.keys() - mine.keys()
    for key in sorted(mine.keys() & theirs.keys()):
        if mine[key] != theirs[key]:
            return f"{key} is {list(theirs[key])} and should be {list(mine[key])}"
    if missing:
        return f"{min(missing)} is missing"
    return f"{min(extra)} is one too many" if exact and extra else None
