"""What an export writes: safetensors, one tensor at a time, and the parts of a folder in diffusers'
layout."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flux2 import policy
from flux2.errors import InputError
from flux2.files import write_json
from flux2.formats import Part
from flux2.model import Flux2
from flux2.policy import Head
from flux2.schedule import EmpiricalShift, Linear, Schedule, StaticShift

MAX_SHARD = "5GB"
EMBEDDED = {
    "_class_name": "Flux2EmbeddedPipeline",
    "transformer": ["diffusers", "Flux2EmbeddedTransformer2DModel"],
}
"""In the index of a model whose second number no pipeline of diffusers gives: klein's passes none,
dev's only a strength. They would open the folder and draw other images, without a word; classes
that there are not make every one of them refuse it by name. Its parts open one by one."""
POLICY = {
    "_class_name": "Flux2PolicyPipeline",
    "transformer": ["diffusers", "Flux2PolicyTransformer2DModel"],
}
"""The same of a policy student, whose transformer alone is no sampler of few steps."""


class replacing:
    """A folder that appears whole, or not at all, in place of an older one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._temporary = folder, folder.with_name(f".{folder.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self._temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._temporary.rename(self._folder)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)


_CODES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
}  # fmt: skip


def write(path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str]) -> str:
    """Writes a safetensors file, one tensor at a time; returns its SHA-256.

    The same tensors give the same bytes. safetensors' own writer holds all tensors at once and
    orders several entries of metadata by chance.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in sorted(parts):
        part = parts[name]
        size = part.dtype.itemsize
        for length in part.shape:
            size *= length
        header[name] = {
            "dtype": _CODES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            file.write(block)
        for name in sorted(parts):
            part = parts[name]
            tensor = part.make().detach().to("cpu", part.dtype).contiguous()
            if tuple(tensor.shape) != part.shape:
                raise ValueError(f"{name} was announced as {part.shape}, not {tensor.shape}")
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


@contextmanager
def openable(folder: Path) -> Iterator[Path]:
    """The folder as a pipeline opens it: itself, or for as long as its parts are compared a view of
    it whose index names the classes that its transformer and text encoder are of."""
    index = json.loads((folder / "model_index.json").read_text())
    if index["_class_name"] not in (EMBEDDED["_class_name"], POLICY["_class_name"]):
        yield folder
        return
    klein = index["text_encoder"][1].startswith("Qwen3")
    index["_class_name"] = "Flux2KleinPipeline" if klein else "Flux2Pipeline"
    index["transformer"] = ["diffusers", "Flux2Transformer2DModel"]
    index.pop("embedded_guidance", None)
    with tempfile.TemporaryDirectory() as view:
        for part in folder.iterdir():
            if part.is_dir():
                (Path(view) / part.name).symlink_to(part.resolve())
        (Path(view) / "model_index.json").write_text(json.dumps(index))
        yield Path(view)


def write_config(module: Any, folder: Path) -> None:
    """config.json of the shape alone: not where it was loaded from, nor how it was quantised."""
    own = {"_name_or_path", "quantization_config", "_pre_quantization_dtype"}
    with torch.device("meta"):
        plain = type(module).from_config({k: v for k, v in module.config.items() if k not in own})
    plain.save_config(folder)


def write_shards(folder: Path, parts: Mapping[str, Part]) -> dict[str, str]:
    """diffusers' weight files of at most MAX_SHARD, with their index where there are several."""
    from huggingface_hub import split_torch_state_dict_into_shards

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        k: torch.empty(parts[k].shape, dtype=parts[k].dtype, device="meta") for k in sorted(parts)
    }
    split = split_torch_state_dict_into_shards(
        sizes,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=MAX_SHARD,
    )
    hashes: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        mine = {k: parts[k] for k in names}
        hashes[f"{folder.name}/{file}"] = write(folder / file, mine, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes


def write_head(head: Head, folder: Path, **facts: Any) -> dict[str, str]:
    """A policy student's head, in fp32, and what is to be known of it. facts: for the JSON."""
    parts = {k: Part.of(v, torch.float32) for k, v in head.state_dict().items()}
    write_json(folder / policy.FILE, policy.describe(head.shape, **facts))
    return {policy.WEIGHTS: write(folder / policy.WEIGHTS, parts, {"format": "pt"})}


def write_vae(vae: torch.nn.Module, folder: Path, dtype: torch.dtype) -> dict[str, str]:
    parts = {
        k: Part.of(v, torch.float32 if k.startswith("bn.") else dtype)
        for k, v in vae.state_dict().items()
    }
    hashes = write_shards(folder, parts)
    write_config(vae, folder)
    return hashes


def write_text(model: Flux2, folder: Path) -> dict[str, Any]:
    """text_encoder/ and tokenizer/, and their lines of the index. The files that the model was read
    from are copied, since what is in memory may be cut short; random ones are saved as they are.

    Raises:
        InputError: a random encoder that was freed.
    """
    text, parts = model.text, ("text_encoder", "tokenizer")
    if text.source is not None:
        for part in parts:
            shutil.copytree(text.source / part, folder / part)
        index = json.loads((text.source / "model_index.json").read_text())
        return {part: index[part] for part in parts}
    if text.encoder is None:
        raise InputError("the text encoder was freed and lies in no folder: keep it for the export")
    text.encoder.save_pretrained(folder / "text_encoder")
    text.tokenizer.save_pretrained(folder / "tokenizer")
    objects = (text.encoder, text.tokenizer)
    return {k: ["transformers", type(x).__name__] for k, x in zip(parts, objects, strict=True)}


def scheduler_config(schedule: Schedule, renoise: bool = False) -> dict[str, Any]:
    """FlowMatchEulerDiscreteScheduler's settings that give our grid inside the pipelines, which
    always pass it a linear ramp and FLUX.2's own μ.

    renoise: each step's x̂0 is noised anew (flux2.samplers.sample_renoise). The pipelines draw that
    noise from torch's global generator, whatever generator they are given.

    Raises:
        InputError: a schedule that such a configuration cannot hold.
    """
    if isinstance(schedule, EmpiricalShift):
        dynamic = {"use_dynamic_shifting": True, "time_shift_type": "exponential", "shift": 3.0}
        return {**dynamic, "stochastic_sampling": renoise}
    if isinstance(schedule, StaticShift | Linear):
        shift = schedule.shift if isinstance(schedule, StaticShift) else 1.0
        static = {"use_dynamic_shifting": False, "shift": float(shift)}
        return {**static, "stochastic_sampling": renoise}
    raise InputError(
        f"a scheduler's configuration cannot hold {type(schedule).__name__}: export with "
        "EmpiricalShift, StaticShift or Linear"
    )
