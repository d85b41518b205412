"""What earlier runs made, as frozen networks beside the one that is trained.

A run that trained LoRA on the very weights that this run starts from lends its adapter, on the
shared backbone; any other run has a backbone of its own, its adapter merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from flux2 import sources
from flux2.adapters import LoRA
from flux2.checkpoint import load_checkpoint
from flux2.errors import InputError
from flux2.lineage import Init, allowed, inserted, resolve_init, rewards_of
from flux2.model import Flux2, load_merged, network_of
from flux2.policy import FILE
from flux2.types import RoleSpec


@dataclass(frozen=True, eq=False)
class Lent:
    """An adapter's shape, and its tensors by their paths with `name` in them."""

    lora: LoRA
    name: str
    tensors: Mapping[str, Tensor]


def check_source(source: str, model: str) -> Init:
    """Finds a run whose result a role is to be. Every rank must call.

    model: name in conf/model of the run that asks.

    Raises:
        InputError: there is none, it trained no velocity, or one of another model.
    """
    init = resolve_init(source)
    trained = init.manifest.get("trained")
    if not trained or trained == ["autoencoder"] or init.manifest.get("policy"):
        raise InputError(
            f"{source} trained no velocity (stage {init.manifest.get('stage')}): name another run"
        )
    if inserted(init.manifest):
        raise InputError(
            f"{source} gave its model a guidance embedder, which the others lack: name another run"
        )
    found = init.manifest.get("model")
    if found != model:
        raise InputError(f"{source} is of {found} and the model is {model}: name a run of {model}")
    return init


def open_result(source: str, model: Flux2) -> Lent | nn.Module:
    """A run's result beside `model`: an adapter for its transformer, or a transformer.

    Raises:
        InputError: as check_source does; or a transformer that takes other inputs.
    """
    init = check_source(source, model.info.name)
    dtype = next(model.transformer.parameters()).dtype
    if init.is_export:
        network = sources.load_folder(
            init.weights / "transformer", "transformer", model.device, dtype
        )
        return _fit(source, network_of(model, dict(network.state_dict()), network.config), model)
    before: Any = OmegaConf.load(init.run / "config.yaml")
    name = init.manifest["trained"][0]
    if before.adapter is not None and not _same_start(init, model):
        before.init_from, before.model.quantise = str(init.weights), None
        return _fit(source, load_merged(before, model.device).to(dtype), model)
    stored = load_checkpoint(init.weights, verify=False).tensors
    mine = {k.removeprefix(f"{name}/"): v for k, v in stored.items() if k.startswith(f"{name}/")}
    if before.adapter is None:
        return _fit(source, network_of(model, mine), model)
    shape = before.adapter
    return Lent(LoRA(shape.rank, shape.alpha, list(shape.targets)), name, mine)


def _same_start(init: Init, model: Flux2) -> bool:
    """Whether a run's adapter was trained on the weights that `model` has."""
    base = init.manifest.get("base") or {}
    return bool(model.info.hash) and (base.get("hash"), base.get("start")) == (
        model.info.hash,
        model.info.start,
    )


def _fit(source: str, network: Any, model: Flux2) -> nn.Module:
    body: Any = model.transformer
    for key in ("in_channels", "joint_attention_dim", "guidance_embeds"):
        if network.config[key] != body.config[key]:
            raise InputError(
                f"{source} has {key} {network.config[key]} and {model.info.name} has "
                f"{body.config[key]}: name a run of the same kind"
            )
    with torch.no_grad():
        return network.eval().requires_grad_(False)


# ---------------------------------------------------------------- of a run's roles


def shape_of(specs: Mapping[str, RoleSpec]) -> dict[str, int] | None:
    """The policy that a method trains, for the manifest; None where it trains none."""
    shapes = (s.policy for s in specs.values() if s.trainable and s.kind == "policy")
    return next(map(asdict, shapes), None)


def lent(specs: Mapping[str, RoleSpec], found: Mapping[str, Init]) -> dict[str, Any]:
    """What a manifest says of both, {} where there is neither. found: of `sources_of`."""
    shape, teachers = shape_of(specs), {name: init.parent() for name, init in found.items()}
    return {
        **({} if shape is None else {"policy": shape}),
        **({"teachers": teachers} if teachers else {}),
    }


def policy_of(cfg: Any, init: Init | None) -> Path | None:
    """The policy student that a run starts from; None where it starts from another model."""
    if init is not None:
        return init.run if init.manifest.get("policy") else None
    folder = None if cfg.model.path is None else Path(cfg.model.path)
    return folder if folder is not None and (folder / FILE).is_file() else None


def check_not_policy(cfg: Any, init: Init | None) -> None:
    """Refuses a policy student as the start of a training run: its transformer is no velocity of
    many steps, and no method trains it further. Raises InputError."""
    if (student := policy_of(cfg, init)) is not None:
        raise InputError(
            f"{student} is a policy student, which is sampled and not trained: start from its "
            "teacher, or resume its own run"
        )


def sources_of(specs: Mapping[str, RoleSpec], model: str) -> dict[str, Init]:
    """The runs that a method's roles come from, by role. model: name in conf/model."""
    named = {name: spec.source for name, spec in specs.items()}
    return {name: check_source(source, model) for name, source in named.items() if source}


def check_same_teachers(cfg: Any, manifest: Mapping[str, Any], found: Mapping[str, Init]) -> None:
    """Refuses to resume with teachers that have changed. Raises InputError without allow=[base]."""
    before = manifest.get("teachers") or {}
    for name, init in found.items():
        was = before.get(name, {}).get("hash")
        if was is not None and was != init.parent()["hash"] and "base" not in allowed(cfg):
            raise InputError(
                f"{name} ({init.weights}) has other weights than when the run began: restore them, "
                "or add allow=[base]"
            )


def taught(found: Mapping[str, Init]) -> list[str]:
    """The rewards that teachers were trained on: what learns from them has seen them, too."""
    return [reward for init in found.values() for reward in rewards_of(init.run)]
