"""What can be refused of a run before its parent exists: a dry run of one link of a pipeline.

All parts are built and compared as a start would do it, and no weight is read. What an earlier link
is yet to make is stood in for: its weights by what they will be called, its data by `Promised`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from flux2.chain import Facts, naming
from flux2.checks import check
from flux2.errors import InputError
from flux2.export import Target, check_target, formats_of
from flux2.lineage import ROLES, Init, allowed, check_lineage, init_of
from flux2.model import DTYPES, check_model
from flux2.origin import origin_of, targets_of
from flux2.results import check_not_policy, shape_of
from flux2.scorer import Scorer, close
from flux2.train import assemble, build, train
from flux2.types import Method


class Promised:
    """A dataset that an earlier link is yet to make: of some length, and without a record."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> NoReturn:
        raise InputError("the data is yet to be made")

    def bucket_of(self, index: int) -> NoReturn:
        """Unknown."""
        raise InputError("the data is yet to be made")


class AnyScore(Scorer):
    """In the place of a reward that is not built: it has whatever a method asks for."""

    def check_gradient(self) -> None:
        """It has one."""


def examine(
    cfg: DictConfig, parents: Sequence[Facts], promised: Sequence[Path], merges: bool = False
) -> Facts:
    """Refuses what the run `cfg` cannot be; returns what it will have made.

    Args:
        cfg: resolved.
        parents: what it takes weights from: the run of init_from, or those of runs=.
        promised: run directories of links that are yet to be done.
        merges: whether it makes weights without training.

    Raises:
        InputError: as the run itself would.
    """
    plain, missing = cfg.copy(), naming(cfg, promised)
    OmegaConf.set_struct(plain, False)
    parent = parents[0] if parents and not parents[0].ready else None
    if parent is not None and cfg.init_from is not None:
        plain.init_from = None
    if any(key.startswith("data.dataset") for key in missing):
        plain.data.dataset = {"_target_": f"{__name__}.Promised"}
        plain.data.captions = None
        missing = [key for key in missing if not key.startswith("data.dataset")]
    if cfg.get("train") is not None and cfg.get("method") is not None:
        return _training(cfg, plain, parent, parents, missing)
    if cfg.stage.name == "export":
        _check_export(plain, parent)
    else:
        whole = cfg.init_from is None and not parents and "runs" not in cfg
        _check_parts(plain, parent, missing, whole, merges)
    if not merges:
        return Facts(Path(cfg.run.dir), False, False)
    first = parents[0] if parents else None
    role = cfg.model.role if first is None or first.role is None else first.role
    schedule = None if first is None else first.schedule
    return Facts(Path(cfg.run.dir), False, True, role, _models(cfg, parents), schedule)


def _models(cfg: DictConfig, parents: Sequence[Facts]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*(m for p in parents for m in p.models), cfg.model.name]))


def _training(
    cfg: DictConfig, plain: DictConfig, parent: Facts | None, parents: Sequence[Facts],
    missing: Sequence[str],
) -> Facts:  # fmt: skip
    """A stage that trains: what flux2.train.assemble refuses, and its lineage."""
    models = _models(cfg, parents)
    # A model or an autoencoder that is yet to be made; or a stage that completes its own method.
    if missing or cfg.stage.run != f"{train.__module__}.{train.__name__}":
        check(plain)
        method = method_of(cfg)
        if parent is not None:
            _follow(cfg, parent, method.accepts, trains=True)
        return _made(cfg, method, models, None)
    if parent is not None:
        _stand_in_role(plain)
    parts = assemble(plain)
    try:
        if parent is not None:
            _follow(cfg, parent, parts.method.accepts, parts.schedule_hash, trains=True)
        return _made(cfg, parts.method, models, parts.schedule_hash)
    finally:
        parts.close()


def method_of(cfg: DictConfig) -> Method:
    """The method alone, without its reward. Blocks that its stage chooses are stood in for."""
    plain = cfg.copy()
    OmegaConf.set_struct(plain, False)
    if "blocks" in plain.method and plain.method.blocks is None:
        plain.method.blocks = [[0], [0]]
    return build(plain.method, **({} if plain.get("reward") is None else {"score": AnyScore(None)}))


def makes_weights(method: Method) -> bool:
    """Whether what a method trains is a transformer to start from."""
    return any(s.trainable and s.kind in ("velocity", "policy") for s in method.roles.values())


def _made(cfg: DictConfig, method: Method, models: tuple[str, ...], schedule: str | None) -> Facts:
    role, adapter = method.result or cfg.model.role, cfg.get("adapter") is not None
    policy = shape_of(method.roles) is not None
    weights = makes_weights(method)
    return Facts(Path(cfg.run.dir), False, weights, role, models, schedule, adapter, policy)


def _stand_in_role(plain: DictConfig) -> None:
    """model.role is of the parent's result, which `_follow` compares; what is assembled in its
    place is conf/model's own model, of whichever role that has."""
    given = plain.model.role
    for role in (given, *ROLES):
        plain.model.role = role
        try:
            check_model(plain.model)
        except InputError:
            continue
        if role != given:
            plain.allow = [*allowed(plain), "role"]
        return
    plain.model.role = given  # another fault, which is told when all is assembled


def _follow(
    cfg: DictConfig, parent: Facts, accepts: Sequence[str], schedule: str | None = None,
    trains: bool = False,
) -> None:  # fmt: skip
    """check_lineage against weights that are yet to be made. trains: or changes them otherwise."""
    told = {
        "result_role": parent.role, "schedule_hash": parent.schedule, "policy": parent.policy
    }  # fmt: skip
    # No run lies there, so that what an earlier attempt left at its place does not count.
    init = Init(parent.path / "unmade", told, parent.path, False)
    if trains:
        check_not_policy(cfg, replace(init, run=parent.path))
    check_lineage(cfg, init, accepts, schedule)
    if parent.models and cfg.model.name not in parent.models and "base" not in allowed(cfg):
        raise InputError(
            f"{parent.path.name} is trained on {' and '.join(parent.models)} and the model is "
            f"{cfg.model.name}: add model={parent.models[-1]}, or allow=[base]"
        )


def _check_parts(
    plain: DictConfig, parent: Facts | None, missing: Sequence[str], own_role: bool, merges: bool
) -> None:
    """Any other stage: its model, its lineage, and the parts that its configuration names."""
    groups = {key.partition(".")[0] for key in missing}
    if plain.get("model") is not None and "model" not in groups:
        check_model(plain.model, own_role)
        if parent is not None:
            _follow(plain, parent, ROLES, trains=merges)
        elif "runs" not in plain:
            check_lineage(plain, init_of(plain), ROLES)
    made: list[Any] = []
    try:
        for key in ("sampler", "data.dataset", "reward", "evaluation", "writer"):
            target = OmegaConf.select(plain, f"{key}._target_")
            if target is not None and key.partition(".")[0] not in groups:
                made.append(build(OmegaConf.select(plain, key)))
    finally:
        close(*made)


def _check_export(cfg: DictConfig, parent: Facts | None) -> None:
    """stage=export: of weights that are there, all; of others, whether the formats can be had."""
    if parent is None:
        targets_of(cfg, origin_of(cfg))
        return
    if OmegaConf.select(cfg, "model") is not None:
        raise InputError("the export's parent brings its own model: leave out model=")
    names = formats_of(cfg)
    given = {} if cfg.schedule is None else {"schedule": build(cfg.schedule)}
    for name in names:
        trained = ("adapter",) if parent.adapter else None
        check_target(Target(name, DTYPES[cfg.dtype], cfg.merge, **given), trained)
