"""stage=export: from a run, or a model as it is, to the files of flux2.export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from flux2 import adapters, embedder
from flux2.adapters import LoRA
from flux2.checkpoint import load_checkpoint
from flux2.distributed import pick_device
from flux2.errors import InputError
from flux2.export import (
    LORA,
    Target,
    check_target,
    expected,
    export_weights,
    formats_of,
    tensors_of,
)  # fmt: skip
from flux2.formats import Adapter
from flux2.lineage import resolve_init, result_role
from flux2.model import DTYPES, Flux2, check_model, cut, embed_as, load_initial
from flux2.policy import Head, parted
from flux2.runs import Run
from flux2.schedule import EmpiricalShift, Schedule
from flux2.train import build
from flux2.types import PolicyShape


@dataclass(frozen=True)
class Origin:
    """Where an export's weights come from, known before a weight is read.

    Attributes:
        cfg: what flux2.model.load_initial takes: the base of an adapter, else the model.
        model_role: of the result.
        name: the checkpoint's role; "" for a model as it is.
        weights: of that role, by path in the transformer.
        lora: the adapter's shape, if it is one.
        schedule: of the sampler that the run was evaluated with.
        source, parent: for the manifest, see flux2.lineage.export_manifest.
        head: of a policy student's run. renoise: whether the run's sampler noises x̂0 anew.
    """

    cfg: Any
    model_role: str
    name: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    lora: LoRA | None = None
    schedule: Schedule = field(default_factory=EmpiricalShift)
    source: Mapping[str, Any] = field(default_factory=dict)
    parent: Mapping[str, str] | None = None
    head: Head | None = None
    renoise: bool = False


def origin_of(cfg: Any) -> Origin:
    """What stage=export is asked to export: `init_from=<run>`, or `model=<name>` as it is.

    Raises:
        InputError: neither or both, or a run without such weights.
    """
    chosen = OmegaConf.select(cfg, "model")
    if cfg.init_from is None:
        if chosen is None:
            raise InputError("nothing to export: give init_from=<run>, or model=<name>")
        check_model(chosen)
        return Origin(cfg, chosen.role)
    if chosen is not None:
        raise InputError(f"init_from={cfg.init_from} brings its own model: leave out model=")
    init = resolve_init(cfg.init_from)
    trained, made = init.manifest.get("trained"), result_role(init.manifest)
    if not trained or trained == ["autoencoder"]:
        raise InputError(
            f"init_from={init.run} trained no transformer (stage {init.manifest.get('stage')}): "
            "name a run that did"
        )
    before: Any = OmegaConf.load(init.run / "config.yaml")
    if "quantise" in before.model:
        before.model.quantise = None  # an adapter is the same without; the base is written whole
    sampler = OmegaConf.select(before, "sampler.schedule")
    schedule = EmpiricalShift() if sampler is None else build(sampler)
    role = made or before.model.role
    renoise = OmegaConf.select(before, "sampler.solver") == "renoise"
    come = {"schedule": schedule, "source": init.manifest, "parent": init.parent(),
            "renoise": renoise}  # fmt: skip
    if init.is_export:
        before.init_from, before.model.role = cfg.init_from, role
        return Origin(before, role, **come)
    stored = load_checkpoint(init.weights, verify=False).weights
    name = trained[0] if cfg.role is None else cfg.role
    mine = {k.removeprefix(f"{name}/"): stored[k] for k in stored if k.startswith(f"{name}/")}
    if not mine:
        others = ", ".join(sorted({k.split("/")[0] for k in stored}))
        raise InputError(f"role={name}: {init.weights} has {others}: choose one")
    mine, head = parted(mine)
    if head:
        come["head"] = Head.of(head, PolicyShape(**init.manifest["policy"]))
    lora = None if before.adapter is None else build(before.adapter)
    if lora is not None and embedder.trained(mine):
        lora = replace(lora, targets=embedder.targets(lora.targets))
    return Origin(before, role, name, mine, lora, **come)


def targets_of(cfg: Any, origin: Origin) -> list[Target]:
    """One for each of cfg.format.

    Raises:
        InputError: a format that cannot be had from this origin.
    """
    names = formats_of(cfg)
    schedule = origin.schedule if cfg.schedule is None else build(cfg.schedule)
    adapter = None if origin.lora is None else Adapter.read(origin.weights, 1.0)
    targets = []
    for name in names:
        target = Target(
            name,
            DTYPES[cfg.dtype],
            cfg.merge,
            origin.model_role,
            schedule,
            origin.source,
            origin.parent,
            origin.head,
            origin.renoise,
        )
        check_target(target, None if adapter is None else adapter.pairs)
        targets.append(target)
    return targets


def load_origin(origin: Origin, device: torch.device) -> tuple[Flux2, dict[str, Tensor]]:
    """(the model with the trained role in its transformer, the weights that an adapter lies on, or
    the result's own in fp32)."""
    model = load_initial(origin.cfg, device)
    if origin.name and origin.lora is None:
        cut(model, origin.weights)
    embed_as(model, origin.weights, origin.cfg.seed, origin.source)
    body = model.transformer
    weights, _ = tensors_of(body, None)
    if not origin.name:
        return model, weights
    if origin.lora is None:
        own, weights = dict(body.named_parameters()), dict(origin.weights)
    else:
        adapters.add(body, origin.lora, origin.name)
        own = adapters.parameters(body, origin.name)
    odd = set(own) ^ set(origin.weights)
    if odd or any(own[k].shape != origin.weights[k].shape for k in own):
        raise InputError("the checkpoint's weights do not fit its model: it has been changed since")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(origin.weights[key])
    return model, weights


def export(cfg: Any) -> dict[str, Any]:
    """stage=export: each format in a folder of its own under run.dir/export."""
    run, device = Run(Path(cfg.run.dir)), pick_device(cfg.engine.device)
    origin = origin_of(cfg)
    targets = targets_of(cfg, origin)
    model, weights = load_origin(origin, device)
    adapter, name = None, None
    if origin.lora is not None:
        adapter = Adapter.read(origin.weights, origin.lora.alpha / origin.lora.rank)
        name = origin.name
    run.update(model_role=origin.model_role)
    exports: dict[str, Any] = {}
    for target in targets:
        target = replace(target, head=target.head or model.head)
        used = name if target.merge or target.format in LORA else None
        want = expected(model, model.transformer, used)
        folder = run.path / "export" / target.format
        report = export_weights(model, weights, adapter, folder, target, want)
        print(report.line(), flush=True)
        exports[target.format] = {"folder": str(folder), "differences": report.differences}
    return {"stage": "export", "model_role": origin.model_role, "exports": exports}
