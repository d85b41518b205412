"""What a training stage's configuration may not ask for: refused before anything heavy."""

from __future__ import annotations

import contextlib
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flux2 import quantise
from flux2.data.captions import captions_of, check_weights
from flux2.data.loader import check_group_lengths
from flux2.data.order import adaptive_part, describe
from flux2.data.record import UnreadableRecord
from flux2.distributed import pick_device
from flux2.errors import InputError
from flux2.model import AUTOCAST
from flux2.types import RoleSpec
from flux2.zero import Zero, check_zero

AXES = (
    "window", "kernel", "surrogate", "anchor", "advantage", "through", "filter", "density",
    "weighting", "target", "align",
)  # fmt: skip
"""Groups of conf/ whose choice becomes a part of the method."""


def check(cfg: DictConfig) -> None:
    """Refuses what a training stage cannot run, before anything heavy."""
    for key in ("train.steps", "train.save_every", "train.keep", "data.batch_size", "seed"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{key} is {value!r}: give a whole number")
    if cfg.train.steps < 1:
        raise InputError(f"train.steps is {cfg.train.steps}: it must be at least 1")
    if cfg.train.save_every < 0 or cfg.train.keep < 1:
        raise InputError("train.save_every must be at least 0 and train.keep at least 1")
    for axis, chosen in (cfg.method or {}).items():
        if isinstance(chosen, str) and axis in AXES:
            raise InputError(f"method.{axis}={chosen} names a file: write {axis}={chosen}")
    check_engine(cfg)
    _check_best(cfg)
    if cfg.optim.clip < 0:
        raise InputError(f"optim.clip is {cfg.optim.clip}: it must be at least 0 (0: no clipping)")
    if not 0 <= cfg.data.caption_dropout <= 1:
        raise InputError(f"data.caption_dropout is {cfg.data.caption_dropout}: give 0 to 1")
    if cfg.data.get("captions") is not None:
        check_weights(cfg.data.captions)
    if cfg.data.get("group_lengths"):
        check_group_lengths(bool(cfg.model.get("mask_padding", False)))
    if cfg.data.release_encoder and cfg.data.cache is None:
        raise InputError("data.release_encoder needs data.cache: give a folder to encode into")
    if cfg.data.release_encoder and cfg.model.path is None and cfg.train.export:
        raise InputError(
            "data.release_encoder frees an encoder that the export needs and no folder holds: set "
            "train.export=false, or give a model.path"
        )
    OmegaConf.to_container(cfg, throw_on_missing=True, resolve=True)


def _check_best(cfg: DictConfig) -> None:
    """train.best needs a value at every checkpoint. Raises InputError where it would have none."""
    if cfg.train.best is None:
        return
    every = OmegaConf.select(cfg, "evaluation.every") or 0
    if not every:
        raise InputError(
            "train.best keeps the best checkpoint by evaluation, and evaluation.every=0 measures "
            "none: set it to train.save_every"
        )
    if cfg.train.save_every % every or cfg.train.steps % every:
        raise InputError(
            f"train.best keeps the best checkpoint by evaluation, and evaluation.every={every} "
            f"measures not all of them: make train.save_every={cfg.train.save_every} and "
            f"train.steps={cfg.train.steps} multiples of it"
        )


def check_engine(cfg: Any) -> None:
    """Refuses an engine that cannot train this model. Raises InputError."""
    engine, dtype = cfg.engine, cfg.model.dtype
    if engine.kind not in ("none", "ddp", "deepspeed"):
        raise InputError(f"engine.kind is {engine.kind!r}: choose none, ddp or deepspeed")
    if engine.autocast not in AUTOCAST:
        raise InputError(f"engine.autocast is {engine.autocast!r}: choose fp32 or bf16")
    half = dtype != "fp32" or (engine.kind == "deepspeed" and engine.precision == "bf16")
    if half and engine.autocast == "fp32":
        raise InputError(
            "engine.autocast=fp32 and weights in bf16: set engine.autocast=bf16, or both "
            "model.dtype and engine.precision to fp32"
        )
    quantise.check_use(cfg.model.get("quantise"), engine.kind, cfg.get("adapter") is not None)
    if engine.kind == "deepspeed":
        sharding(engine)
        if engine.precision == "fp32" and dtype != "fp32":
            raise InputError(f"engine.precision=fp32 and model.dtype={dtype}: set both alike")
        check_zero(pick_device(engine.device).type)


def sharding(engine: Any) -> Zero:
    """conf/engine's ZeRO settings. Raises InputError."""
    extra: Any = OmegaConf.to_container(engine.extra, resolve=True)
    return Zero(engine.stage, engine.precision, engine.offload, engine.offload_weights,
                engine.bucket, extra)  # fmt: skip


def check_data(cfg: DictConfig, dataset: Any) -> None:
    """Refuses data that cannot be drawn as asked for: difficulty without a reward, captions of
    kinds that no record has. Raises InputError."""
    if adaptive_part(dataset) is not None and cfg.reward is None:
        raise InputError(
            f"data={type(dataset).__name__} draws by what a reward scores, and stage="
            f"{cfg.stage.name} has none: choose other data"
        )
    weights = cfg.data.get("captions")
    if weights is None:
        return
    found: set[str] = set()
    for index in range(0, len(dataset), max(1, len(dataset) // 64)):
        with contextlib.suppress(UnreadableRecord):  # told when it is read
            found |= set(captions_of(describe(dataset, index)))
    if not found & set(weights):
        raise InputError(
            f"data.captions asks for {', '.join(weights)}, and the records' captions are "
            f"{', '.join(sorted(found))}: change data.captions, or leave it out"
        )


def check_role(cfg: DictConfig, name: str, spec: RoleSpec) -> None:
    """Refuses a role that the engine cannot train. Raises InputError."""
    if spec.tangents:
        _check_tangents(cfg)
    if cfg.engine.kind != "deepspeed":
        return
    if spec.kind != "velocity":
        raise InputError(
            f"stage={cfg.stage.name} trains a small network ({name}): choose engine=none or ddp"
        )
    if spec.follows is not None and "zero_quantized_nontrainable_weights" in cfg.engine.extra:
        raise InputError(
            f"engine={cfg.engine.name} keeps what is not trained in int8, and {name} is an average "
            "that must not be rounded: choose engine=zero3"
        )


def _check_tangents(cfg: DictConfig) -> None:
    """Refuses what has no forward-mode derivative. Raises InputError."""
    quantised = cfg.model.get("quantise")
    attention = cfg.model.get("attention")
    why = None
    if cfg.engine.kind == "deepspeed" and cfg.engine.stage == 3:
        why = f"engine={cfg.engine.name}"
    elif quantised not in (None, "nf4"):
        why = f"model.quantise={quantised}"
    elif attention not in (None, "native", "_native_math"):
        why = f"model.attention={attention}"
    if why is not None:
        raise InputError(
            f"method.derivative=jvp has no derivative through {why}: choose "
            "method.derivative=differences"
        )
