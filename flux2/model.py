"""Load and describe a FLUX.2: transformer, autoencoder, text encoder, and what it is.

A model comes from a folder in diffusers' layout, from the hub, from single files, or, where it is
yet to be trained, from an architecture with random weights. diffusers' and transformers' own
classes are inside. Where weights are found and how they are read is in flux2.sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2 import architecture, attention, depth, embedder, policy, sources
from flux2.architecture import DTYPES
from flux2.errors import InputError
from flux2.latents import LatentCodec
from flux2.lineage import ROLES
from flux2.text import PADDING, TextEncoder
from flux2.types import PolicyShape

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}
"""Names of the precision of matrix products; None leaves the weights' own."""
KEPT = ("dtype", "vae_dtype", "vae_autocast", "attention", "max_sequence_length", "text_layers",
        "quantise", "mask_padding")  # fmt: skip
"""What a run says of its model itself, and does not take over from the run that it starts from."""
STRENGTH = "embedded_guidance"
"""In the index of a folder whose second number no pipeline would give: what it is where nothing
else is said; null where it is no strength of guidance. Likewise in the manifest of its run."""


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
        guidance: embedded strength that it is given where nothing else is said; None without the
            embedder, or where what it takes is another number.
        start: hash of the run's weights that were put into it; "" for none.
    """

    name: str
    role: str
    guidance_embeds: bool
    parameters: int
    source: str
    hash: str
    guidance: float | None = None
    start: str = ""


@dataclass
class Flux2:
    """A loaded model; its parts are frozen until a role makes them trainable.

    Attributes:
        head: of a policy student (flux2.policy); None: the transformer is a velocity.
    """

    transformer: nn.Module
    vae: nn.Module
    codec: LatentCodec
    text: TextEncoder
    info: ModelInfo
    device: torch.device
    head: policy.Head | None = None


def give_embedder(model: Flux2, seed: int, guidance: float | None) -> None:
    """Gives a model the embedder of a second number (flux2.embedder), and says so.

    guidance: what it is given where nothing else is said; None: that is no strength of guidance.
    """
    embedder.insert(model.transformer, seed)
    model.info = replace(model.info, guidance_embeds=True, guidance=guidance)


def embed_as(model: Flux2, names: Iterable[str], seed: int, manifest: Mapping[str, Any]) -> None:
    """Gives the model the embedder that a run gave it, before that run's weights, which have these
    names, are read into it. manifest, seed: of the run."""
    if not model.info.guidance_embeds and embedder.trained(names):
        give_embedder(model, seed, None)
    if model.info.guidance_embeds and STRENGTH in manifest:
        model.info = replace(model.info, guidance=manifest[STRENGTH])


def check_initial(cfg: Any) -> None:
    """check_model for what a run starts from: with `init_from=<run>`, conf/model is what lies under
    that run's result, and model.role is of the result (`flux2.lineage.check_lineage`)."""
    check_model(cfg.model, own_role=cfg.init_from is None)


def check_model(cfg: Any, own_role: bool = True) -> None:
    """Everything about `cfg` (conf/model) that can be refused before a weight is read.

    own_role: model.role says what the model itself is.

    Raises:
        InputError: settings that are no choice; a folder or file that is missing, torn, or of
            another shape than cfg says; a model that is neither in the local cache nor on the hub.
    """
    if cfg.role not in ROLES:
        raise InputError(f"model.role is {cfg.role!r}: choose from {', '.join(ROLES)}")
    for key in ("dtype", "vae_dtype"):
        if cfg.get(key, "fp32") not in DTYPES:
            raise InputError(f"model.{key} is {cfg[key]!r}: choose from {', '.join(DTYPES)}")
    if cfg.vae_autocast not in AUTOCAST:
        raise InputError(f"model.vae_autocast is {cfg.vae_autocast!r}: choose fp32 or bf16")
    attention.named(cfg.attention)
    if cfg.path is None and cfg.architecture is None:
        raise InputError("model.path names no folder: give one in diffusers' layout, or a hub id")
    if cfg.path is None and cfg.get("transformer") is not None:
        raise InputError("model.transformer needs model.path for the text encoder: name its folder")
    vae = cfg.get("vae")
    if vae is not None and not Path(vae).exists():
        raise InputError(
            f"model.vae: no folder {vae}: give one in diffusers' layout, or an ae.safetensors"
        )
    transformer = cfg.get("transformer")
    if transformer is not None and not Path(transformer).is_file():
        raise InputError(f"model.transformer: no file {transformer}: give a .safetensors file")
    if cfg.path is None:
        shape = architecture.expected(cfg)
        assert shape is not None
        with torch.device("meta"):
            meta = {part: architecture.build(part, shape[part]) for part in ("transformer", "vae")}
        architecture.text_config(shape["text_encoder"])
        if own_role:
            sources.check_role(cfg.role, shape["transformer"], "model.architecture")
        if vae is not None:
            _check_vae(Path(vae), meta)
        return
    folder = sources.locate(cfg.path, leave_out=sources.left_out(cfg))
    if folder is None:
        sources.reachable(cfg.path)
    else:
        _check_weights(cfg, folder, own_role)


def _check_weights(cfg: Any, folder: Path, own_role: bool = True) -> None:
    """The parts' shapes, by their config.json and the headers of their files."""
    sources.check_index(folder, cfg, own_role)
    meta = meta_parts(cfg)
    if sources.left_out(cfg) is None:
        sources.check_folder(folder / "transformer", "transformer", meta["transformer"])
    else:
        sources.check_file(Path(cfg.transformer), "transformer", meta["transformer"])
    _check_vae(Path(cfg.vae or folder / "vae"), meta)
    sources.check_folder(folder / "text_encoder", "text_encoder", meta["text_encoder"])
    config: Any = meta["transformer"].config
    if own_role:
        sources.check_role(cfg.role, config, cfg.get("transformer") or folder / "transformer")
    features = len(cfg.text_layers) * meta["text_encoder"].config.hidden_size  # pyright: ignore
    if features != config.joint_attention_dim:
        raise InputError(
            f"the text encoder gives {features} features a token and the transformer takes "
            f"{config.joint_attention_dim}: set model.text_layers to match"
        )


def _check_vae(vae: Path, meta: Mapping[str, nn.Module]) -> None:
    """A folder brings its own shape; a file must have the model's. Its latents must fit."""
    if vae.is_file():
        return sources.check_file(vae, "vae", meta["vae"])
    with torch.device("meta"):
        own = architecture.build("vae", sources.check_config(vae, "vae", None))
    sources.check_folder(vae, "vae", own)
    gives, takes = 4 * own.config.latent_channels, meta["transformer"].config.in_channels  # pyright: ignore
    if gives != takes:
        raise InputError(
            f"{vae} gives tokens of {gives} channels and the transformer takes {takes}: give "
            "another autoencoder"
        )


def _shapes(cfg: Any) -> tuple[dict[str, Any], Any]:
    """The parts' shapes, and the text encoder's configuration: of conf/model, or of its folder."""
    shape = architecture.expected(cfg)
    folder = None if cfg.path is None else sources.locate(cfg.path, leave_out=sources.left_out(cfg))
    if folder is None:
        if shape is None:
            raise InputError(f"model.path: {cfg.path} is not here: its shapes cannot be known")
        from flux2.nano import vocabulary_size

        text = shape["text_encoder"]
        told = "vocab_size" in text.get("text_config", text)
        return shape, architecture.text_config(text, None if told else vocabulary_size(cfg))
    from transformers import AutoConfig

    found = {
        part: sources.check_config(folder / part, part, None if shape is None else shape[part])
        for part in architecture.PARTS
        if part != sources.left_out(cfg) or shape is None
    }
    config = sources.pretrained(AutoConfig, folder / "text_encoder")
    if config.model_type not in PADDING:
        raise InputError(
            f"{folder}/text_encoder is a {config.model_type}: FLUX.2 has qwen3 (klein) or mistral3 "
            "(dev)"
        )
    return {**(shape or {}), **found}, config


def meta_parts(cfg: Any) -> dict[str, nn.Module]:
    """The parts of conf/model's model as it is loaded, on the meta device: "transformer", "vae" and
    "text_encoder", each in its dtype. No weight is read and no network is asked.

    The text encoder is cut off after the last layer used (see flux2.text), unless the weights are
    random: then it is whole, for there is no folder from which an export could copy it.

    Raises:
        InputError: no architecture and no folder to read one from, or a folder of another one.
    """
    shape, config = _shapes(cfg)
    quiet()
    parts: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for part in ("transformer", "vae"):
            parts[part] = architecture.build(part, shape[part])
        if cfg.path is None:
            parts["text_encoder"] = architecture.whole_class(config)(config)
        else:
            cut = architecture.truncated(config, cfg.text_layers)
            body = architecture.language_class(config)(cut)
            parts["text_encoder"] = architecture.without_top(body)
    parts["transformer"].to(DTYPES[cfg.dtype])
    parts["vae"].to(DTYPES[cfg.get("vae_dtype", "fp32")])
    parts["text_encoder"].to(DTYPES[cfg.dtype])
    return parts


def quiet() -> None:
    """Stops the libraries' own progress bars and their notes on dtypes: the run has its own log."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def load_model(cfg: Any, device: torch.device, seed: int = 0) -> Flux2:
    """The model that conf/model describes, frozen, in eval mode, on the device, quantised if
    `model.quantise` says so.

    Raises:
        InputError: a missing or broken folder, or one that is not what cfg says it is; a
            quantisation that the device cannot do.
    """
    return _quantised(_load(cfg, device, seed), cfg, device)


def _quantised(model: Flux2, cfg: Any, device: torch.device) -> Flux2:
    if cfg.get("quantise") is not None:
        from flux2 import quantise

        quantise.apply(model.transformer, cfg.quantise, device)
        model.transformer.to(device)  # what was not quantised
    return model


def _load(cfg: Any, device: torch.device, seed: int, own_role: bool = True) -> Flux2:
    """load_model without the quantisation; a transformer to be quantised stays on the host.
    own_role: as in check_model."""
    check_model(cfg, own_role)
    quiet()
    place = device
    if cfg.get("quantise") is not None:
        from flux2 import quantise

        quantise.check(cfg.quantise, device)
        place = torch.device("cpu")
    folder, weights_hash = None, ""
    if cfg.path is None:
        from flux2.nano import random_parts

        guidance = _strength(cfg, None)
        transformer, vae, encoder, tokenizer = random_parts(cfg, place, device, seed)
    else:
        folder = sources.locate(cfg.path, leave_out=sources.left_out(cfg))
        if folder is None:
            folder = sources.locate(cfg.path, download=True, leave_out=sources.left_out(cfg))
            assert folder is not None
            _check_weights(cfg, folder, own_role)
        guidance = _strength(cfg, folder)
        tokenizer = _tokenizer(folder)
        transformer, vae, encoder, weights_hash = _stored(cfg, folder, place, device)
    if cfg.path is None and cfg.vae is not None:
        vae = _vae(cfg, Path(cfg.vae), device)
    attention.install(transformer, cfg.attention)
    transformer.to(place)
    for part in (vae, encoder):
        part.to(device)
    for part in (transformer, vae, encoder):
        part.eval().requires_grad_(False)
    text = TextEncoder(
        encoder,
        tokenizer,
        cfg.max_sequence_length,
        tuple(cfg.text_layers),
        source=folder,
        mask_padding=bool(cfg.get("mask_padding", False)),
    )
    config: Any = transformer.config
    if text.dim != config.joint_attention_dim:
        raise InputError(
            f"the text encoder gives {text.dim} features a token and the transformer takes "
            f"{config.joint_attention_dim}: set model.text_layers to match"
        )
    info = ModelInfo(
        name=cfg.name,
        role=cfg.role,
        guidance_embeds=bool(config.guidance_embeds),
        parameters=sum(p.numel() for p in transformer.parameters()),
        source="" if folder is None else str(folder),
        hash=weights_hash,
        guidance=guidance,
    )
    codec = LatentCodec(vae, AUTOCAST[cfg.vae_autocast])
    head = None if folder is None else policy.read(folder, device)
    return Flux2(transformer, vae, codec, text, info, device, head)


def _strength(cfg: Any, folder: Path | None) -> float | None:
    """`ModelInfo.guidance`: conf/model's, else what the folder's index says, which a run wrote.

    Raises:
        InputError: a strength for a model that takes none, or none for one that takes it.
    """
    said = cfg.get("embedded_guidance")
    if not _shapes(cfg)[0]["transformer"].get("guidance_embeds", True):
        return _told(said, False, cfg.name)
    if said is not None:
        return float(said)
    index = {} if folder is None else sources.read_json(folder / "model_index.json")
    if STRENGTH not in index:
        raise InputError(
            f"{cfg.name} takes a strength of guidance: give one as model.embedded_guidance"
        )
    return index[STRENGTH]


def _told(said: float | None, embeds: bool, name: str) -> float | None:
    """model.embedded_guidance, which only a model with the embedder may be given."""
    if said is not None and not embeds:
        raise InputError(
            f"model.embedded_guidance is {said} and {name} has no guidance embedder: leave it out"
        )
    return None if said is None else float(said)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer alone: prompts are text, and a processor's other half reads images."""
    from transformers import AutoTokenizer

    tokenizer = sources.pretrained(AutoTokenizer, folder / "tokenizer")
    if tokenizer.chat_template is None:
        raise InputError(f"{folder}/tokenizer has no chat template: restore chat_template.jinja")
    return tokenizer


def _stored(
    cfg: Any, folder: Path, place: torch.device, device: torch.device
) -> tuple[nn.Module, nn.Module, nn.Module, str]:
    """Transformer, autoencoder, text encoder and the transformer's hash, from files."""
    shape, config = _shapes(cfg)
    dtype = DTYPES[cfg.dtype]
    transformer: Any
    if sources.left_out(cfg) is None:
        paths = sources.files(folder / "transformer", "transformer")
        transformer = sources.load_folder(folder / "transformer", "transformer", place, dtype)
    else:
        paths = [Path(cfg.transformer)]
        transformer = sources.load_file(paths[0], "transformer", shape["transformer"], place, dtype)
    vae = _vae(cfg, Path(cfg.vae or folder / "vae"), device, shape["vae"])
    encoder = sources.load_text_encoder(
        folder / "text_encoder", config, tuple(cfg.text_layers), device, dtype
    )
    return transformer, vae, encoder, sources.fingerprint(paths)


def _vae(
    cfg: Any, path: Path, device: torch.device, shape: Mapping[str, Any] | None = None
) -> nn.Module:
    dtype = DTYPES[cfg.get("vae_dtype", "fp32")]
    if path.is_file():
        shape = shape or architecture.expected(cfg)["vae"]  # pyright: ignore
        return sources.load_file(path, "vae", shape, device, dtype)
    return sources.load_folder(path, "vae", device, dtype)


def load_initial(cfg: Any, device: torch.device) -> Flux2:
    """The model that a run starts from: conf/model, or the result of `init_from=<run>`.

    A run's result becomes the new backbone, adapters merged, so that the reference of what follows
    is the previous stage's weights and not the base.

    Raises:
        InputError: the run's result does not fit conf/model.
    """
    return _quantised(_load_initial(cfg, device), cfg.model, device)


def _load_initial(cfg: Any, device: torch.device) -> Flux2:
    from omegaconf import OmegaConf

    from flux2.checkpoint import load_checkpoint
    from flux2.lineage import resolve_init

    if cfg.init_from is None:
        return _load(cfg.model, device, cfg.seed)
    init = resolve_init(cfg.init_from)
    trained = init.manifest.get("trained")
    if not trained or trained == ["autoencoder"]:
        raise InputError(
            f"init_from={init.run} trained no transformer (stage {init.manifest.get('stage')}): "
            "name a run that did, or give an autoencoder as model.vae"
        )
    if init.is_export:
        chosen = cfg.model.copy()
        chosen.path, chosen.transformer, chosen.vae = str(init.weights), None, None
        return _load(chosen, device, cfg.seed, own_role=False)  # its manifest says its role
    before = OmegaConf.load(init.run / "config.yaml")
    embeds = STRENGTH in init.manifest or before.model.get("embedded_guidance") is not None
    said = _told(cfg.model.get("embedded_guidance"), embeds, init.run.name)
    for key in KEPT:
        before.model[key] = cfg.model.get(key)
    # Without an init_from of its own this is load_model; with one, its weights lie on that run's.
    model = _load_initial(before, device)
    weights = load_checkpoint(init.weights, verify=False).tensors
    mine = [k for k in weights if k.startswith(f"{trained[0]}/")]
    embed_as(model, mine, before.seed, init.manifest)
    if said is not None:
        model.info = replace(model.info, guidance=said)
    _apply(model, weights, trained[0], before.adapter, init.manifest.get("policy"))
    model.info = replace(model.info, start=init.parent()["hash"])
    return model


def load_merged(cfg: Any, device: torch.device) -> nn.Module:
    """The transformer of load_initial alone, never quantised."""
    return _load_initial(cfg, device).transformer


def network_of(model: Flux2, weights: Mapping[str, Tensor], config: Any = None) -> nn.Module:
    """A frozen transformer with these weights, in the dtype and with the attention of the model's
    own, as deep as they are. config: its shape; None: the model's."""
    body: Any = model.transformer
    double, single = depth.depth_in(weights)
    shape = {**(config or body.config), "num_layers": double, "num_single_layers": single}
    with torch.device("meta"):
        plain = type(body).from_config(shape)
    plain.load_state_dict(dict(weights), assign=True)
    attention.install(plain, body.transformer_blocks[0].attn.processor._attention_backend)
    return plain.to(model.device, body.dtype).eval().requires_grad_(False)


def initial_depth(cfg: Any) -> tuple[int, int]:
    """Double-stream and single-stream blocks of what `load_initial` will load: conf/model's, or
    those of the run that init_from names. No weight is read.

    Raises:
        InputError: a run or a folder that is not there.
    """
    from omegaconf import OmegaConf

    from flux2.checkpoint import load_checkpoint
    from flux2.lineage import find_init

    if cfg.get("init_from") is None:
        config = _shapes(cfg.model)[0]["transformer"]
        return tuple(int(config[key]) for key in depth.KEYS)  # pyright: ignore[reportReturnType]
    init = find_init(cfg.init_from)
    if init.is_export:
        config = sources.read_json(init.weights / "transformer" / "config.json")
        return tuple(int(config[key]) for key in depth.KEYS)  # pyright: ignore[reportReturnType]
    before = OmegaConf.load(init.run / "config.yaml")
    role = (init.manifest.get("trained") or [""])[0]
    if before.adapter is not None or role in ("", "autoencoder"):
        return initial_depth(before)
    names = load_checkpoint(init.weights, verify=False).weights
    return depth.depth_in(k.removeprefix(f"{role}/") for k in names if k.startswith(f"{role}/"))


def with_transformer(model: Flux2, transformer: nn.Module) -> Flux2:
    """The model with a network of a role's, which may have fewer blocks, as its transformer."""
    if transformer is model.transformer:
        return model
    count = sum(getattr(p, "ds_numel", p.numel()) for p in transformer.parameters())
    return replace(model, transformer=transformer, info=replace(model.info, parameters=count))


def cut(model: Flux2, names: Iterable[str]) -> None:
    """Leaves the model as many blocks as weights of these names are for, the first ones: what was
    made smaller is about to be read into it."""
    found = depth.depth_in(names)
    if found == depth.depth_of(model.transformer):
        return
    shorter = depth.shortened(model.transformer, depth.all_blocks(found))
    smaller = with_transformer(model, shorter)
    model.transformer, model.info = smaller.transformer, smaller.info


def _apply(
    model: Flux2, weights: Mapping[str, Tensor], role: str, adapter: Any, shape: Any = None
) -> None:
    """Puts a role's trained weights, or its adapter, into the model's transformer. shape: the
    policy's of a run that trained one; its head becomes the model's."""
    from flux2 import adapters

    mine = {k.removeprefix(f"{role}/"): v for k, v in weights.items() if k.startswith(f"{role}/")}
    mine, head = policy.parted(mine)
    model.head = None
    if shape is not None:
        model.head = policy.Head.of(head, PolicyShape(**shape)).to(model.device)
    if adapter is None:
        cut(model, mine)
        model.transformer.load_state_dict(mine)
        return
    body = model.transformer
    targets = embedder.targets(adapter.targets) if embedder.trained(mine) else adapter.targets
    adapters.add(body, adapters.LoRA(adapter.rank, adapter.alpha, targets), role)
    for name, parameter in adapters.parameters(body, role).items():
        parameter.data.copy_(mine[name])
    where = next(body.parameters()).device  # the host, if it is to be quantised
    with torch.device("meta"):
        plain = type(body).from_config(body.config)  # pyright: ignore
    plain.load_state_dict(adapters.merged(body, role), assign=True)
    processor = body.transformer_blocks[0].attn.processor  # pyright: ignore
    attention.install(plain, processor._attention_backend)
    model.transformer = plain.to(where, body.dtype).eval().requires_grad_(False)
