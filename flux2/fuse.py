"""stage=fuse: one model of a base and a LoRA on it, for what starts from whole weights.

    python run.py stage=fuse model=klein-4b-base lora=style.safetensors scale=0.8
    python run.py stage=fuse lora=outputs/sft

W + scale·B A is summed in fp32 and rounded once. A file may be in any layout that diffusers reads,
and is read without pickle; a run brings what its LoRA lies on. The result is export/diffusers/,
compared as every export, which init_from= takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2 import distributed, sources
from flux2.checkpoint import is_checkpoint, on_main
from flux2.distributed import pick_device
from flux2.errors import InputError
from flux2.export import Target, check_target, expected, export_weights, tensors_of
from flux2.files import sha256
from flux2.formats import PREFIXES, Adapter, check_lora_original
from flux2.lineage import (
    MANIFEST,
    ROLES,
    Init,
    check_lineage,
    init_of,
    resolve_init,
    result_role,
    schedule_hash,
    trained_rewards,
)
from flux2.model import DTYPES, check_model, load_initial
from flux2.results import check_not_policy
from flux2.runs import Run
from flux2.schedule import Schedule
from flux2.train import build

TRAINED = ("fused",)
"""`trained` in the manifest: what has a name there can be started from."""
OTHERS = ("dora_scale", "lokr_", "lora_te", "text_encoder", "hada_")
"""In the keys of what is no LoRA of the transformer alone."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, before a weight is read.

    Attributes:
        file: the LoRA; None where a run is named. init: that run, or what the LoRA lies on.
    """

    file: Path | None
    init: Init | None
    schedule: Schedule


def planned(cfg: Any) -> Plan:
    """Refuses what cannot be fused. Raises InputError."""
    if cfg.lora is None:
        raise InputError("lora= names nothing: give a LoRA's .safetensors file, or a run")
    if cfg.dtype not in DTYPES:
        raise InputError(f"dtype is {cfg.dtype!r}: choose from {', '.join(DTYPES)}")
    if cfg.model.get("quantise") is not None:
        raise InputError("stage=fuse writes whole weights: set model.quantise=null")
    path = Path(cfg.lora)
    check_model(cfg.model, own_role=cfg.init_from is None and not is_run(path))
    schedule: Schedule = build(cfg.sampler.schedule)
    check_target(Target("diffusers", DTYPES[cfg.dtype], schedule=schedule), None)
    if is_run(path):
        if cfg.init_from is not None:
            raise InputError(
                f"lora={path} is a run and brings what it lies on: leave out init_from"
            )
        if cfg.scale != 1:
            raise InputError(
                f"scale={cfg.scale} is for files: of a run, stage=merge runs=[{path}] tasks=true "
                f"weights=[{cfg.scale}]"
            )
        init, file = resolve_init(path), None
    else:
        init, file = init_of(cfg), file_of(path)
        sources.header(file)
    check_not_policy(cfg, init)
    check_lineage(cfg, init, ROLES, schedule_hash(schedule))
    return Plan(file, init, schedule)


def is_run(path: Path) -> bool:
    """Whether lora= names a run, one of its checkpoints, or an export in diffusers' layout."""
    if is_checkpoint(path) or (path.name == "best" and path.parent.name == "checkpoints"):
        return True
    return any((home / MANIFEST).is_file() for home in (path, path.parent, path.parent.parent)
               if path.is_dir()) and not any(path.glob("*.safetensors"))  # fmt: skip


def file_of(path: Path) -> Path:
    """The file that lora= names: itself, or the one in that folder.

    Raises:
        InputError: there is none, or several.
    """
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise InputError(f"lora={path} holds {len(found)} .safetensors files: name one")
        return found[0]
    if not path.is_file() or path.suffix != ".safetensors":
        raise InputError(f"lora={path} is no .safetensors file and no run: name one of the two")
    return path


def read(file: Path) -> Adapter:
    """A LoRA file, in diffusers' layout, the original one, or kohya's; its alphas folded in.

    Raises:
        InputError: it is another kind of adapter, or for other parts than the transformer.
    """
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata() or {}
    odd = next((k for k in tensors if any(part in k for part in OTHERS)), None)
    if odd is not None:
        raise InputError(f"lora={file} is no LoRA of a transformer: it has {odd}")
    foreign = not all(k.startswith(PREFIXES["diffusers"]) for k in tensors)
    try:
        found: Any = Flux2LoraLoaderMixin.lora_state_dict(dict(tensors))
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        first = str(error).split("\n")[0][:200]
        raise InputError(
            f"lora={file} is no LoRA of FLUX.2 that diffusers reads: {first}"
        ) from None
    prefix = PREFIXES["diffusers"]
    plain = Adapter.read({k.removeprefix(prefix): v for k, v in found.items()}, 1.0)
    if foreign:
        check_lora_original(plain.pairs)
        return plain
    return _scaled(plain, json.loads(metadata.get("lora_adapter_metadata", "{}")))


def _scaled(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The scales that diffusers' metadata has, layer by layer, folded into B."""
    said = {k.removeprefix(PREFIXES["diffusers"]): v for k, v in config.items()}
    alphas, alpha = said.get("alpha_pattern") or {}, said.get("lora_alpha")
    pairs = {}
    for path, (a, b) in adapter.pairs.items():
        rank = a.shape[0]
        scale = 1.0 if alpha is None else alphas.get(path, alpha) / rank
        if said.get("use_rslora"):
            scale *= rank**0.5
        pairs[path] = (a, b.float() * scale)
    return Adapter(pairs, 1.0)


@torch.no_grad()
def add(network: nn.Module, adapter: Adapter, scale: float) -> None:
    """W ← W + scale·ΔW, in place, summed in fp32.

    Raises:
        InputError: the adapter is for another model.
    """
    weights: dict[str, Tensor] = dict(network.named_parameters())
    for path, (a, b) in adapter.pairs.items():
        weight = weights.get(f"{path}.weight")
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise InputError(f"the LoRA is for another model: {path} does not fit; choose model=")
        weight.copy_(weight.float() + scale * adapter.delta(path).to(weight.device))


def parents_of(plan: Plan) -> list[dict[str, Any]]:
    """`parents` of the manifest. A run that lora= names has a weight, as a merger's has: the stage
    did not begin there by init_from, and is resumed without it."""
    if plan.init is None:
        return []
    return [plan.init.parent() | ({"weight": 1.0} if plan.file is None else {})]


def fuse(cfg: Any) -> dict[str, Any]:
    """Runs the stage on every rank; returns its summary (on rank 0)."""
    plan, run = planned(cfg), Run(Path(cfg.run.dir))
    chosen = cfg.copy()
    if cfg.dtype == "fp32":
        chosen.model.dtype = "fp32"  # else the export would be of rounded weights
    if plan.file is None and plan.init is not None:
        chosen.init_from = str(plan.init.weights)
    adapter = None if plan.file is None else read(plan.file)
    model = load_initial(chosen, pick_device(cfg.engine.device))
    if adapter is not None:
        add(model.transformer, adapter, float(cfg.scale))
    role = (plan.init and result_role(plan.init.manifest)) or cfg.model.role
    facts: dict[str, Any] = {"lora": str(plan.file or cfg.lora), "scale": float(cfg.scale)}
    if plan.file is not None:
        facts["sha256"] = sha256(plan.file)
    run.update(
        parents=parents_of(plan),
        base=asdict(model.info),
        trained=list(TRAINED),
        result_role=role,
        schedule_hash=schedule_hash(plan.schedule),
        fused=facts,
    )
    run.update(rewards=distributed.broadcast(trained_rewards(cfg, run.path, ())))
    want = expected(model, model.transformer, None)
    whole, _ = tensors_of(model.transformer, None)
    folder = run.path / "export" / "diffusers"

    def write() -> dict[str, Any]:
        target = Target("diffusers", DTYPES[cfg.dtype], role=role, schedule=plan.schedule,
                        source=run.manifest)  # fmt: skip
        report = export_weights(model, whole, None, folder, target, want)
        print(report.line(), flush=True)
        return dict(report.differences)

    return {"stage": "fuse", **facts, "export": str(folder), "differences": on_main(write)}
