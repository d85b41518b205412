"""Load and describe a FLUX.2: transformer, autoencoder, text encoder, and what it is.

A model comes from a folder in diffusers' layout, or, for models that are yet to be trained, from an
architecture with random weights. diffusers' and transformers' own classes are inside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2.errors import InputError
from flux2.latents import LatentCodec
from flux2.text import TextEncoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
"""Names of the precision of matrix products; None leaves the weights' own."""
ROLES = ("base", "distilled", "guidance-distilled")


@dataclass(frozen=True)
class ModelInfo:
    """What a run must know of its model.

    Attributes:
        name: the name in conf/model.
        role: base, distilled, or guidance-distilled: they look alike and must not be mistaken.
        guidance_embeds: whether the transformer takes an embedded guidance strength.
        parameters: of the transformer.
        source: the folder it was read from; "" for random weights.
        hash: of the transformer's weight files; "" for random weights.
    """

    name: str
    role: str
    guidance_embeds: bool
    parameters: int
    source: str
    hash: str


@dataclass
class Flux2:
    """A loaded model; its parts are frozen until a role makes them trainable."""

    transformer: nn.Module
    vae: nn.Module
    codec: LatentCodec
    text: TextEncoder
    info: ModelInfo
    device: torch.device


def check_model(cfg: Any) -> None:
    """Everything about `cfg` (conf/model) that can be refused before a weight is read."""
    if cfg.role not in ROLES:
        raise InputError(f"model.role is {cfg.role!r}: choose from {', '.join(ROLES)}")
    if cfg.dtype not in DTYPES:
        raise InputError(f"model.dtype is {cfg.dtype!r}: choose from {', '.join(DTYPES)}")
    if cfg.vae_autocast not in AUTOCAST:
        raise InputError(f"model.vae_autocast is {cfg.vae_autocast!r}: choose fp32 or bf16")
    if cfg.path is None and cfg.architecture is None:
        raise InputError("model.path names no folder: give one in diffusers' layout")
    for key in ("path", "vae"):
        value = cfg[key]
        if value is not None and not Path(value).is_dir():
            raise InputError(f"model.{key}: no folder {value}: give a folder in diffusers' layout")
    if cfg.path is not None:
        _read_index(Path(cfg.path), cfg.role)


def _read_index(folder: Path, role: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(f"{folder} has no model_index.json: give a folder in diffusers' layout")
    try:
        content = json.loads(index.read_text())
    except ValueError:
        raise InputError(f"{index} is not JSON: restore the folder") from None
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder} has no {part} folder: restore it")
    distilled = bool(content.get("is_distilled", False))
    if distilled != (role == "distilled"):
        found = "distilled" if distilled else "not distilled"
        raise InputError(f"{folder} is {found}, but model.role is {role}: set model.role to match")


def _pretrained(cls: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """cls.from_pretrained on local files, with one line instead of a traceback on broken ones."""
    from safetensors import SafetensorError

    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if dtype is not None and cls.__module__.startswith("diffusers"):
        kwargs = {"dtype": dtype, "low_cpu_mem_usage": True}
    try:
        return cls.from_pretrained(folder, local_files_only=True, **kwargs)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"cannot load {folder}: {first}: restore the folder's files") from error


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _random(cls: Any, config: Mapping[str, Any], seed: int, what: str) -> nn.Module:
    torch.manual_seed(seed)
    try:
        return cls(**config)
    except TypeError as error:
        raise InputError(f"model.architecture.{what}: {error}") from None


def quiet() -> None:
    """Stops the libraries' own progress bars and their notes on dtypes: the run has its own log."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def load_model(cfg: Any, device: torch.device, seed: int = 0) -> Flux2:
    """The model that conf/model describes, frozen, in eval mode.

    Raises:
        InputError: a missing or broken folder, or one that is not what cfg says it is.
    """
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from flux2 import attention

    check_model(cfg)
    quiet()
    dtype = DTYPES[cfg.dtype]
    transformer: Any
    encoder: Any
    if cfg.path is not None:
        folder = Path(cfg.path)
        transformer = _pretrained(Flux2Transformer2DModel, folder / "transformer", dtype)
        vae = _pretrained(AutoencoderKLFlux2, folder / "vae", torch.float32)
        encoder = _pretrained(Qwen3ForCausalLM, folder / "text_encoder", dtype)
        tokenizer = _pretrained(AutoTokenizer, folder / "tokenizer")
        weights_hash = _fingerprint(folder / "transformer")
    else:
        from flux2.nano import build_text_encoder, build_tokenizer

        shape: Any = OmegaConf.to_container(cfg.architecture, resolve=True)
        tokenizer = build_tokenizer(cfg.max_sequence_length)
        encoder = build_text_encoder(shape["text_encoder"], len(tokenizer), seed)
        joint = len(cfg.text_layers) * encoder.config.hidden_size
        transformer = _random(
            Flux2Transformer2DModel,
            {**shape["transformer"], "joint_attention_dim": joint},
            seed,
            "transformer",
        )
        vae = _random(AutoencoderKLFlux2, shape["vae"], seed, "vae")
        weights_hash = ""
    if cfg.vae is not None:
        vae = _pretrained(AutoencoderKLFlux2, Path(cfg.vae), torch.float32)
    attention.install(transformer, cfg.attention)
    for part in (transformer, vae, encoder):
        part.to(device).eval().requires_grad_(False)
    text = TextEncoder(encoder, tokenizer, cfg.max_sequence_length, tuple(cfg.text_layers))
    if text.dim != transformer.config.joint_attention_dim:
        raise InputError(
            f"the text encoder gives {text.dim} features a token and the transformer takes "
            f"{transformer.config.joint_attention_dim}: set model.text_layers to match"
        )
    info = ModelInfo(
        name=cfg.name,
        role=cfg.role,
        guidance_embeds=bool(transformer.config.guidance_embeds),
        parameters=sum(p.numel() for p in transformer.parameters()),
        source="" if cfg.path is None else str(cfg.path),
        hash=weights_hash,
    )
    codec = LatentCodec(vae, AUTOCAST[cfg.vae_autocast])
    return Flux2(transformer, vae, codec, text, info, device)


def load_initial(cfg: Any, device: torch.device) -> Flux2:
    """The model that a run starts from: conf/model, or the result of `init_from=<run>`.

    A run's result becomes the new backbone, adapters merged, so that the reference of what follows
    is the previous stage's weights and not the base.

    Raises:
        InputError: the run's result does not fit conf/model.
    """
    from omegaconf import OmegaConf

    from flux2.checkpoint import load_checkpoint, resolve_init

    if cfg.init_from is None:
        return load_model(cfg.model, device, cfg.seed)
    init = resolve_init(cfg.init_from)
    trained, role = init.manifest.get("trained"), init.manifest.get("model_role")
    if not trained or trained == ["autoencoder"]:
        raise InputError(
            f"init_from={init.run} trained no transformer (stage {init.manifest.get('stage')}): "
            "name a run that did, or give an autoencoder as model.vae"
        )
    if role != cfg.model.role:
        raise InputError(
            f"init_from={init.run} is a {role} model and model.role is {cfg.model.role}: "
            "set model.role to match"
        )
    if init.is_export:
        chosen = cfg.model.copy()
        chosen.path, chosen.architecture, chosen.vae = str(init.weights), None, None
        return load_model(chosen, device, cfg.seed)
    before = OmegaConf.load(init.run / "config.yaml")
    for key in ("dtype", "vae_autocast", "attention", "max_sequence_length", "text_layers"):
        before.model[key] = cfg.model[key]
    # Without an init_from of its own this is load_model; with one, its weights lie on that run's.
    model = load_initial(before, device)
    weights = load_checkpoint(init.weights, verify=False).weights
    _apply(model, weights, trained[0], before.adapter)
    return model


def _apply(model: Flux2, weights: Mapping[str, Tensor], role: str, adapter: Any) -> None:
    """Puts a role's trained weights, or its adapter, into the model's transformer."""
    from flux2 import adapters, attention

    mine = {k.removeprefix(f"{role}/"): v for k, v in weights.items() if k.startswith(f"{role}/")}
    if adapter is None:
        model.transformer.load_state_dict(mine)
        return
    body = model.transformer
    adapters.add(body, adapters.LoRA(adapter.rank, adapter.alpha, adapter.targets), role)
    for name, parameter in adapters.parameters(body, role).items():
        parameter.data.copy_(mine[name])
    plain = type(body).from_config(body.config)  # pyright: ignore
    plain.load_state_dict(adapters.merged(body, role))
    processor = body.transformer_blocks[0].attn.processor  # pyright: ignore
    attention.install(plain, processor._attention_backend)
    model.transformer = plain.to(model.device, body.dtype).eval().requires_grad_(False)
