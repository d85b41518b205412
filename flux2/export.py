"""Exports that the ecosystem opens, each opened again and compared before it counts as done.

    diffusers        a folder for Flux2KleinPipeline or Flux2Pipeline
    single           the transformer in one file of the original layout
    lora-diffusers   an adapter, for load_lora_weights
    lora-original    the same under the original layout's names, for ComfyUI

Functions take plain tensors by name, not live modules, so that what is written does not depend on
how a run was sharded; the same tensors give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flux2 import adapters, folders, formats, quantise, verify
from flux2.architecture import DTYPES
from flux2.checkpoint import on_main
from flux2.distributed import is_main
from flux2.errors import InputError
from flux2.files import write_json
from flux2.formats import Adapter, Part
from flux2.latents import to_float
from flux2.lineage import export_manifest, inserted, schedule_hash
from flux2.model import STRENGTH, Flux2, with_transformer
from flux2.policy import Head, PolicyRole, parted
from flux2.roles import Local, Roles, Storage, VelocityRole
from flux2.schedule import EmpiricalShift, Schedule

WHOLE, LORA = ("diffusers", "single"), ("lora-diffusers", "lora-original")
FORMATS = (*WHOLE, *LORA)


# ---------------------------------------------------------------- the autoencoder


@torch.no_grad()
def measure_statistics(vae: torch.nn.Module, images: Iterable[Tensor]) -> None:
    """Sets `vae.bn`'s running mean and variance to those of the images' latents, exactly.

    images: batches b 3 h w uint8.
    """
    count, total, square = 0, 0.0, 0.0
    weight = next(vae.parameters())
    for batch in images:
        z = vae.encode(to_float(batch).to(weight)).latent_dist.mode()  # pyright: ignore
        tokens = rearrange(z.double(), "b c (h p) (w q) -> (b h w) (c p q)", p=2, q=2)
        count += len(tokens)
        total = total + tokens.sum(0)
        square = square + tokens.square().sum(0)
    mean = total / count
    bn = vae.bn
    bn.running_mean.copy_(mean)  # pyright: ignore
    bn.running_var.copy_((square / count - mean**2) * count / (count - 1))  # pyright: ignore


def export_autoencoder(model: Flux2, images: Iterable[Tensor], folder: Path) -> Path:
    """Writes folder/vae with its latent statistics measured on `images`: by all ranks, so that all
    have them; rank 0 writes."""
    measure_statistics(model.vae.eval(), images)

    def write() -> None:
        with folders.replacing(folder) as temporary:
            folders.write_vae(model.vae, temporary / "vae", torch.float32)

    on_main(write)
    return folder


# ---------------------------------------------------------------- what is exported, and how


@dataclass(frozen=True)
class Target:
    """How an export is to be.

    Attributes:
        format: one of FORMATS.
        dtype: of the weights in the file.
        merge: fold the adapter into a whole model; False writes the base that the adapter is for.
        role: base, distilled or guidance-distilled.
        schedule: what the scheduler's configuration is to reproduce.
        source: the manifest of the run that it comes from, or {}.
        parent: where its weights lie there, as in a manifest's `parents`.
        head: of a policy student, whose transformer the weights are.
        renoise: it is sampled by flux2.samplers.sample_renoise.
    """

    format: str
    dtype: torch.dtype
    merge: bool = True
    role: str = "base"
    schedule: Schedule = field(default_factory=EmpiricalShift)
    source: Mapping[str, Any] = field(default_factory=dict)
    parent: Mapping[str, str] | None = None
    head: Head | None = None
    renoise: bool = False


@dataclass(frozen=True)
class Report:
    """What was written, and how far it is from what was meant (see flux2.verify)."""

    path: Path
    format: str
    differences: Mapping[str, float]
    tolerance: Mapping[str, float]

    @property
    def failed(self) -> list[str]:
        """Names of the differences that are too large."""
        return [k for k, v in self.differences.items() if not v <= self.tolerance[k]]

    def line(self) -> str:
        """For a person."""
        found = ", ".join(
            f"{k} {v:.1e} (allowed {self.tolerance[k]:.0e})" for k, v in self.differences.items()
        )
        return f"{self.format} → {self.path}: opened again by diffusers, off by {found}"


def expected(
    model: Flux2,
    backbone: torch.nn.Module,
    adapter: str | None,
    root: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The probe's velocity with an adapter or without, computed in the weights' own dtype.

    root: a sharded engine's, see flux2.roles.VelocityRole; all ranks then call this together.
    """
    dtype = next(backbone.parameters()).dtype
    autocast = None if dtype == torch.float32 else dtype
    role = VelocityRole(backbone, adapters.Switch(backbone), adapter, autocast)
    role.root = root or role.root
    with torch.no_grad():
        return role(*verify.probe(model))


def export_weights(
    model: Flux2,
    weights: Mapping[str, Tensor],
    adapter: Adapter | None,
    folder: Path,
    target: Target,
    want: Tensor,
) -> Report:
    """Writes one export, opens it in its own ecosystem, compares, and only then puts it in place.

    Args:
        model: gives the shapes, the autoencoder and the text encoder; its transformer's weights are
            not read.
        weights: the transformer's by diffusers' names; with an adapter, those it was trained on.
        adapter: what was trained on them, if that was LoRA.
        folder: where the export goes; an older one in that place is replaced.
        want: the velocity that it must have on `verify.probe(model)`: with the adapter, unless a
            whole model is written unmerged.

    Raises:
        InputError: a format that this model, adapter or schedule cannot have.
        RuntimeError: what was opened differs by more than the tolerance; nothing is left behind.
    """
    check_target(target, None if adapter is None else adapter.pairs)
    folded = adapter if target.merge else None
    with folders.replacing(folder) as temporary:
        if target.format in LORA:
            assert adapter is not None
            hashes, differences = _lora(model, weights, adapter, temporary, target, want)
        else:
            parts = formats.merged(weights, folded, target.dtype)
            write = _pipeline if target.format == "diffusers" else _single
            hashes, differences = write(model, parts, temporary, target, want)
        limits = verify.tolerance(model, target.dtype)
        report = Report(folder, target.format, differences, {k: limits[k] for k in differences})
        if report.failed:
            raise RuntimeError(f"the export is not what was trained: {report.line()}")
        write_json(temporary / "manifest.json", _manifest(model, target, adapter, hashes, report))
    return report


def export_run(
    model: Flux2,
    roles: Roles,
    name: str,
    folder: Path,
    dtype: torch.dtype,
    *,
    role: str | None = None,
    schedule: Schedule | None = None,
    renoise: bool = False,
    lineage: Mapping[str, Any] | None = None,
    parent: Mapping[str, str] | None = None,
) -> Path:
    """Writes a folder that diffusers' pipeline opens, with role `name` as its transformer. All
    ranks call it together, whatever their engine; rank 0 writes.

    Adapters are merged in fp32 before the weights are rounded to `dtype`. The latent statistics
    stay fp32: bf16 would move every latent.

    Args:
        role: what the result is; None: what the model was.
        schedule: of the run's sampler; None: FLUX.2's own. renoise: whether it noises x̂0 anew.
        lineage, parent: the run's manifest, and its entry among the export's parents.

    Raises:
        RuntimeError: what diffusers opened differs from the role; the old export stays.
    """
    mine = roles[name]
    model = with_transformer(model, mine.backbone)
    want = expected(model, mine.backbone, mine.adapter, mine.root)
    weights, adapter = gathered(roles, name)
    target = Target(
        "diffusers",
        dtype,
        role=role or model.info.role,
        schedule=schedule or EmpiricalShift(),
        source=lineage or {},
        parent=parent,
        head=mine.head if isinstance(mine, PolicyRole) else None,
        renoise=renoise,
    )

    def write() -> None:
        report = export_weights(model, weights, adapter, folder, target, want)
        print(report.line(), flush=True)

    on_main(write)
    return folder


def gathered(roles: Roles, name: str) -> tuple[dict[str, Tensor], Adapter | None]:
    """A role's tensors as `tensors_of` gives them, whole, from wherever an engine has put them: on
    rank 0, and nothing on the others. Trained ones are the fp32 masters. All ranks call it."""
    mine, storage, main = roles[name], roles.storage, is_main()
    own: dict[str, Tensor] = {}
    for key, tensor in roles.tensors():
        if main and key.startswith(f"{name}/"):
            own[key.removeprefix(f"{name}/")] = _kept(tensor, storage)
    own, _ = parted(own)
    if roles.parameters(name) and mine.adapter is None:  # on every rank alike
        return own, None
    if isinstance(storage, Local):
        weights, _ = tensors_of(mine.backbone, None)
    else:
        weights = {}
        for key, parameter in mine.backbone.named_parameters():
            if "lora_" not in key:
                tensor = storage.whole(parameter, storage.part(parameter))
                if main:
                    weights[key.replace(".base_layer", "")] = _kept(tensor, storage)
    if mine.adapter is None or not main:
        return weights, None
    return weights, Adapter.read(own, _scale(mine.backbone, mine.adapter))


def _kept(tensor: Tensor, storage: Storage) -> Tensor:
    """Local tensors are the run's own; gathered ones go to the host, one by one."""
    return tensor if isinstance(storage, Local) else tensor.detach().to("cpu", copy=True)


def _scale(backbone: Any, adapter: str) -> float:
    config = backbone.peft_config[adapter]
    return config.lora_alpha / config.r


def tensors_of(
    backbone: torch.nn.Module, adapter: str | None
) -> tuple[dict[str, Tensor], Adapter | None]:
    """A backbone's own tensors by diffusers' plain names, and an adapter's. Nothing is copied but
    quantised weights, which are what they stand for."""
    state = quantise.state_dict(backbone)
    weights = {k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}
    if adapter is None:
        return weights, None
    tensors = adapters.parameters(backbone, adapter)
    return weights, Adapter.read(tensors, _scale(backbone, adapter))


def formats_of(cfg: Any) -> list[str]:
    """The names in cfg.format, one or a list.

    Raises:
        InputError: none, one twice, or an unknown cfg.dtype. An unknown format is `check_target`'s.
    """
    names = [cfg.format] if isinstance(cfg.format, str) else list(cfg.format)
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"format= names nothing, or one twice: name each of {', '.join(FORMATS)} at most once"
        )
    if cfg.dtype not in DTYPES:
        raise InputError(f"dtype is {cfg.dtype!r}: choose from {', '.join(DTYPES)}")
    if not cfg.get("merge", True) and not set(names) & set(LORA):
        raise InputError(
            "merge=false writes the base without its adapter: add lora-diffusers or lora-original "
            "to format"
        )
    return names


def check_target(target: Target, trained: Iterable[str] | None) -> None:
    """Refuses what cannot be written. trained: the adapter's layers, None without one.

    Raises:
        InputError: why.
    """
    if target.format not in FORMATS:
        raise InputError(f"format is {target.format!r}: choose from {', '.join(FORMATS)}")
    if trained is None and target.format in LORA:
        raise InputError(
            f"format={target.format}: no adapter was trained there: choose "
            f"{' or '.join(WHOLE)}, or a run with adapter=lora"
        )
    if target.format != "diffusers" and (target.head or target.source.get("policy")):
        raise InputError(
            f"format={target.format}: a policy student is its transformer and its head: choose "
            "diffusers"
        )
    if target.format in LORA and inserted(target.source):
        raise InputError(
            f"format={target.format}: the run gave its model a guidance embedder, and its adapter "
            f"has no place on a base that lacks one: choose {' or '.join(WHOLE)}"
        )
    if trained is None and not target.merge:
        raise InputError("merge=false: no adapter was trained there: leave it out")
    if target.format == "lora-original":
        formats.check_lora_original(trained or ())
    if target.format == "diffusers":
        folders.scheduler_config(target.schedule, target.renoise)


# ---------------------------------------------------------------- writing


Written = tuple[dict[str, str], dict[str, float]]
"""(SHA-256 of each file of weights, differences)."""


def _lora(
    model: Flux2, weights: Mapping[str, Tensor], adapter: Adapter, folder: Path, target: Target,
    want: Tensor,
) -> Written:  # fmt: skip
    if target.format == "lora-diffusers":
        tensors, metadata = formats.lora_diffusers(adapter)
        file = folder / "pytorch_lora_weights.safetensors"
    else:
        tensors, metadata = formats.lora_original(adapter), {}
        file = folder / f"{model.info.name}-lora.safetensors"
    parts = {k: Part.of(v, target.dtype) for k, v in tensors.items()}
    digest = folders.write(file, parts, {"format": "pt", **metadata})
    return {file.name: digest}, verify.check_lora(model, file, weights, adapter, want)


def _single(
    model: Flux2, parts: Mapping[str, Part], folder: Path, target: Target, want: Tensor
) -> Written:
    file = folder / f"{model.info.name}.safetensors"
    digest = folders.write(file, formats.original(parts), {"format": "pt"})
    folders.write_config(model.transformer, folder / "transformer")  # for from_single_file
    return {file.name: digest}, verify.check_single(model, file, parts, target.dtype, want)


def _pipeline(
    model: Flux2, parts: Mapping[str, Part], folder: Path, target: Target, want: Tensor
) -> Written:
    from diffusers import FlowMatchEulerDiscreteScheduler

    hashes = folders.write_shards(folder / "transformer", parts)
    folders.write_config(model.transformer, folder / "transformer")
    hashes |= folders.write_vae(model.vae, folder / "vae", target.dtype)
    settings = folders.scheduler_config(target.schedule, target.renoise)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.save_pretrained(folder / "scheduler")
    text = folders.write_text(model, folder)
    embeds, guidance = model.info.guidance_embeds, model.info.guidance
    klein = not embeds or text["text_encoder"][1].startswith("Qwen3")
    index = {
        "_class_name": "Flux2KleinPipeline" if klein else "Flux2Pipeline",
        **({"is_distilled": target.role == "distilled"} if klein else {}),
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **text,
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    if embeds and (klein or guidance is None):
        index |= {**folders.EMBEDDED, STRENGTH: guidance}
    if target.head is not None:
        index |= folders.POLICY
        hashes |= folders.write_head(target.head, folder, schedule=repr(target.schedule))
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    with folders.openable(folder) as view:
        found = verify.check_pipeline(
            model, view, parts, target.dtype, want, target.schedule, target.renoise
        )
    if target.head is not None:
        found["head"] = verify.check_head(folder, target.head)
    return hashes, found


def _manifest(
    model: Flux2, target: Target, adapter: Adapter | None, hashes: Mapping[str, str], report: Report
) -> dict[str, Any]:
    merged = target.merge and target.format in WHOLE
    return export_manifest(
        target.source,
        target.parent,
        model=model.info.name,
        model_role=target.role,
        result_role=target.role,
        base={"source": model.info.source, "hash": model.info.hash},
        format=target.format,
        dtype=str(target.dtype).removeprefix("torch."),
        adapter=None if adapter is None else "merged" if merged else "apart",
        schedule=repr(target.schedule),
        schedule_hash=schedule_hash(target.schedule),
        policy=None if target.head is None else asdict(target.head.shape),
        files=dict(sorted(hashes.items())),
        differences=report.differences,
        tolerance=report.tolerance,
    )
