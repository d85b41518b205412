"""Where weights come from: a folder in diffusers' layout, a model on the hub (the local cache
first), or single files in the original layout. Each is compared with the shape that it must have,
by names and headers, before a weight is read, and then read straight onto its device.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2 import architecture, latents
from flux2.depth import KEYS
from flux2.errors import InputError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FOLDERS = ("transformer", "vae", "text_encoder", "tokenizer")
STEM = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
        "text_encoder": "model"}  # fmt: skip
PREFIX = "model.diffusion_model."
"""Of a transformer inside a checkpoint that holds more."""
ORIGINAL = {"transformer": "img_in.", "vae": "encoder.down."}
"""Names that only the original layout has."""
TEXT_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
              "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip
LANGUAGE = r"^(?:language_model\.model|model\.language_model|model)\.(?!vision|multi)"
"""Before the names of the language model in a text encoder's file; Mistral3's changed in time."""
READABLE = ("F32", "BF16", "F16")


def locate(path: str, download: bool = False, leave_out: str | None = None) -> Path | None:
    """The folder that `model.path` names; None if it is a hub id that is not in the local cache.

    Args:
        path: a folder, or a hub id such as black-forest-labs/FLUX.2-klein-base-4B.
        download: fetch what the local cache lacks.
        leave_out: a part that is not needed.

    Raises:
        InputError: neither a folder nor a hub id; or the hub cannot be reached or does not have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(path) or Path(folder.parts[0]).is_dir():
        raise InputError(
            f"model.path: no folder {path}: give a folder in diffusers' layout, or a hub id"
        )
    parts = [p for p in FOLDERS if p != leave_out]
    try:
        found = Path(snapshot_download(path, local_files_only=True))
        if all(_whole(found / p, p) for p in parts) and (found / "model_index.json").is_file():
            return found
    except LocalEntryNotFoundError:
        pass
    if not download:
        return None
    wanted = ["model_index.json", "scheduler/*", *(f"{p}/*" for p in parts)]
    return Path(_ask(path, lambda: snapshot_download(path, allow_patterns=wanted)))


def reachable(path: str) -> None:
    """Raises InputError, with how to get it, unless the hub has this model and lets us have it."""
    from huggingface_hub import HfApi

    _ask(path, lambda: HfApi().model_info(path, timeout=20))


def _ask(path: str, request: Any) -> Any:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,  # of its network library, which one release called httpx and the next httpx2
        RepositoryNotFoundError,
    )

    get = f"hf download {path}"
    if constants.is_offline_mode():
        raise InputError(
            f"model.path: {path} is not in the local cache and HF_HUB_OFFLINE is set: run `{get}` "
            "where there is a network, or give a folder"
        )
    try:
        return request()
    except GatedRepoError:
        raise InputError(
            f"model.path: {path} is gated: accept its licence at https://huggingface.co/{path}, "
            "then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"model.path: no folder {path}, and the hub has no such model: correct the name"
        ) from None
    except (HfHubHTTPError, HTTPError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(
            f"model.path: {path} is not in the local cache and the hub cannot be reached "
            f"({first}): run `{get}` where there is a network, or give a folder"
        ) from None


def _whole(folder: Path, part: str) -> bool:
    try:
        return folder.is_dir() if part == "tokenizer" else bool(files(folder, part))
    except InputError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder; raises InputError."""
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise InputError(f"{path.parent} has no {path.name}: restore the folder") from None
    except ValueError:
        raise InputError(f"{path} is not JSON: restore the folder") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: restore the folder")
    return content


def files(folder: Path, part: str) -> list[Path]:
    """The weight files of a part, one or many shards; raises InputError where one is missing."""
    single, index = (folder / f"{STEM[part]}.safetensors{end}" for end in ("", ".index.json"))
    found = [single]
    if index.is_file():
        shards = read_json(index).get("weight_map", {})
        found = [folder / name for name in sorted(set(shards.values()))]
    for path in found:
        if not path.is_file():
            raise InputError(f"{folder} has no {path.name}: restore the folder")
    return found


def header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names → (shape, dtype) of a safetensors file, without its weights.

    Raises:
        InputError: not a safetensors file, or a torn one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118
            return {k: (tuple(s.get_shape()), s.get_dtype()) for k, s in slices.items()}
    except (SafetensorError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"cannot read {path}: {first}: restore the file") from None


def _headers(paths: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    out = {k: v for path in paths for k, v in header(path).items()}
    for name, (_, dtype) in out.items():
        if dtype not in READABLE and "num_batches" not in name:
            raise InputError(
                f"{paths[0].parent}: {name} is stored as {dtype}: give the weights in bf16 or fp32 "
                "(model.quantise makes them smaller)"
            )
    return out


def check_folder(folder: Path, part: str, module: nn.Module) -> None:
    """Refuses a part whose names and shapes are not the module's. Headers are read, weights not."""
    found = {k: shape for k, (shape, _) in _headers(files(folder, part)).items()}
    if part == "text_encoder":
        found = {re.sub(LANGUAGE, "", k): v for k, v in found.items()}
    _compare(folder, part, found, module, exact=part != "text_encoder")


def _compare(
    path: Path, part: str, found: Mapping[str, tuple[int, ...]], module: nn.Module, exact: bool
) -> None:
    wrong = architecture.differences(found, module, exact)
    if wrong is not None:
        raise InputError(
            f"{path} is not the {part} it should be: {wrong}: choose its own conf/model"
        )


def left_out(cfg: Any) -> str | None:
    """The part of `model.path` that a single file replaces, and that is not asked for."""
    return None if cfg.get("transformer") is None else "transformer"


def check_role(role: str, transformer: Mapping[str, Any], where: object) -> None:
    """Refuses a role that the guidance embedder contradicts: a base has none."""
    if bool(transformer.get("guidance_embeds", True)):
        if role == "base":
            raise InputError(
                f"{where} has a guidance embedder, which a base lacks: set model.role to "
                "guidance-distilled"
            )
    elif role == "guidance-distilled":
        raise InputError(
            f"{where} has no guidance embedder, so it is not guidance-distilled: set model.role to "
            "base or distilled"
        )


def check_index(folder: Path, cfg: Any, own_role: bool = True) -> None:
    """Refuses a folder that lacks a part, or whose model_index.json tells of another role where
    model.role is its own."""
    content = read_json(folder / "model_index.json")
    for part in FOLDERS:
        if part != left_out(cfg) and not (folder / part).is_dir():
            raise InputError(f"{folder} has no {part} folder: restore it")
    distilled = bool(content.get("is_distilled", False))
    if own_role and left_out(cfg) is None and distilled != (cfg.role == "distilled"):
        found = "distilled" if distilled else "not distilled"
        raise InputError(
            f"{folder} is {found}, but model.role is {cfg.role}: set model.role to match"
        )


def check_config(folder: Path, part: str, shape: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config.json of a part's folder.

    Raises:
        InputError: it is of another class, or not what conf/model says.
    """
    content = read_json(folder / "config.json")
    wanted, found = dict(shape or {}), content
    if part == "text_encoder":
        wanted, found = (x.get("text_config", x) for x in (wanted, content))
        wanted = {k: v for k, v in wanted.items() if k in TEXT_SHAPE}
    else:
        wanted["_class_name"] = architecture.image_class(part).__name__
        wanted.pop("sample_size", None)  # a hint for pipelines, not a shape
        if found.get("guidance_embeds"):  # a run may have given it the embedder: see check_role
            wanted.pop("guidance_embeds", None)
    if part == "transformer" and (folder.parent / "manifest.json").is_file():
        for key in KEYS:  # a run may have made it shorter, and its export says how deep it is
            if key in wanted and 0 < found.get(key, 0) < wanted[key]:
                del wanted[key]
    for key, want in wanted.items():
        have = found.get(key, want)
        if have != want:
            raise InputError(
                f"{folder} has {key.strip('_')} {have} and the model should have {want}: "
                "choose its own conf/model, or another folder"
            )
    return content


def check_file(path: Path, part: str, module: nn.Module) -> None:
    """Refuses a single file that is not, by its header, the module's."""
    found = _headers([path])
    empty = {k: torch.empty(shape, device="meta") for k, (shape, _) in found.items()}
    try:
        converted = original(empty, part, module)
    except (KeyError, IndexError, ValueError, RuntimeError):
        raise InputError(f"{path} is no {part} of FLUX.2: give its original layout") from None
    shapes = {k: tuple(v.shape) for k, v in converted.items()}
    _compare(path, part, shapes, module, exact=True)


def original(state: dict[str, Tensor], part: str, module: nn.Module) -> dict[str, Tensor]:
    """A single file's tensors under diffusers' names. Views, mostly: nothing is copied."""
    from diffusers.loaders import single_file_utils as convert

    inside = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    state = dict(inside or state)
    if not any(k.startswith(ORIGINAL[part]) for k in state):
        return state  # a single file in diffusers' own layout
    if part == "transformer":
        return convert.convert_flux2_transformer_checkpoint_to_diffusers(state)
    for name in ("quant_conv", "post_quant_conv"):  # inside the coders, unlike older autoencoders'
        for end in ("weight", "bias"):
            coder = "encoder" if name == "quant_conv" else "decoder"
            state[f"{name}.{end}"] = state.pop(f"{coder}.{name}.{end}")
    statistics = {k: v for k, v in state.items() if k.startswith("bn.")}
    return convert.convert_ldm_vae_checkpoint(state, module.config) | statistics  # pyright: ignore


def load_file(
    path: Path, part: str, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A transformer or an autoencoder from a single file. `config` is its shape, never guessed:
    diffusers takes every FLUX.2 file for dev."""
    from safetensors.torch import load_file as tensors

    cls = architecture.image_class(part)
    state = tensors(path)  # mapped, not read: each tensor is read when it is placed
    with torch.device("meta"):
        empty = architecture.build(part, config)
    state = original(state, part, empty)
    if part == "vae":
        state.setdefault("bn.num_batches_tracked", torch.tensor(0))  # not every file has it
        empty.load_state_dict(state, strict=False, assign=True)
        return latents.cast(empty.to(device), dtype)
    with tempfile.TemporaryDirectory() as folder:
        empty.save_config(folder)  # pyright: ignore
        return cls.from_single_file(
            state, config=folder, local_files_only=True, device=str(device), dtype=dtype
        )


def pretrained(cls: Any, folder: Path, **kwargs: Any) -> Any:
    """cls.from_pretrained on local files, with one line instead of a traceback on broken ones."""
    from safetensors import SafetensorError

    try:
        return cls.from_pretrained(folder, local_files_only=True, **kwargs)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"cannot load {folder}: {first}: restore the folder's files") from error


def load_folder(
    folder: Path, part: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """A folder's transformer or autoencoder, read straight onto the device."""
    cls = architecture.image_class(part)
    place = {} if device.type == "cpu" else {"device_map": {"": device}}
    if part == "vae":  # its latent statistics keep the precision of the file
        vae = pretrained(cls, folder, dtype=torch.float32, low_cpu_mem_usage=True, **place)
        return latents.cast(vae, dtype)
    return pretrained(cls, folder, dtype=dtype, low_cpu_mem_usage=True, **place)


def load_text_encoder(
    folder: Path, config: Any, layers: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The language model of a folder's text encoder, up to the last layer used. What lies above,
    the head and an eye are not read."""
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    if hasattr(config, "text_config"):
        place["key_mapping"] = {LANGUAGE: ""}
    cut = architecture.truncated(config, layers)
    cls = architecture.language_class(config)
    model = pretrained(cls, folder, config=cut, dtype=dtype, **place)
    return architecture.without_top(model)


def fingerprint(paths: list[Path]) -> str:
    """Hash of the weight files. In the hub's cache a file's name is its hash already."""
    digest = hashlib.sha256()
    for path in paths:
        name = path.resolve().name
        if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", name):
            digest.update(bytes.fromhex(name))
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
