"""stage=merge: one model of several runs' results, at weights that were given or that score best.

    python run.py stage=merge runs=[a,b] weights=[0.7,0.3]
    python run.py stage=merge runs=[a,b] grid=4 evaluation=signs choose=[ocr_exact,max]

Of several points each is evaluated on the same prompts and noises (eval.points compares them), and
the chosen one is exported. flux2.merge has the arithmetic.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from eval.evaluation import FOLDER, Evaluation
from eval.points import compared, label, picture, points_of, told
from eval.records import summarise
from flux2 import distributed
from flux2.errors import InputError
from flux2.files import read_json, write_json
from flux2.runs import MANIFEST, Run

if TYPE_CHECKING:
    from eval.heldout import HeldOut
    from flux2.merge import Parent, Source
    from flux2.model import Flux2

TRAINED = ("merged",)
"""`trained` in the manifest: what has a name there can be started from."""


# ---------------------------------------------------------------- the stage


@dataclass(frozen=True)
class Plan:
    """What is to be done, before a weight is read.

    Attributes:
        choose: (value's name, max or min) of several points; None of one.
        base: of task arithmetic; None where the weights sum to 1.
    """

    parents: Sequence[Parent]
    points: Sequence[tuple[float, ...]]
    formats: Sequence[str]
    choose: tuple[str, str] | None
    base: Source | None


def planned(cfg: Any) -> Plan:
    """Refuses what cannot be merged. Raises InputError."""
    from flux2.export import LORA, Target, check_target, formats_of
    from flux2.lineage import ROLES, allowed, check_lineage, schedule_hash
    from flux2.merge import check_adapters, check_parents, parents_of
    from flux2.model import DTYPES, check_model
    from flux2.train import build

    _check(cfg)
    if OmegaConf.select(cfg, "evaluation.ladder") is not None:
        raise InputError("stage=merge compares models at one sampler: choose evaluation=signs")
    names = [str(r) for r in cfg.runs or ()]
    weights: Any = OmegaConf.to_container(cfg.weights) if cfg.weights is not None else None
    points = points_of(len(names), weights, cfg.grid, cfg.tasks)
    choose = _choice(cfg, len(points))
    check_model(cfg.model, own_role=False)
    formats, schedule = formats_of(cfg), build(cfg.sampler.schedule)
    for name in formats:
        lora = ("adapter",) if name in LORA else None
        check_target(Target(name, DTYPES[cfg.dtype], schedule=schedule), lora)
    parents = parents_of(names, allowed(cfg))
    for parent in parents:
        check_lineage(cfg, parent.init, ROLES, schedule_hash(schedule))
    check_parents(parents, allowed(cfg), cfg.tasks)
    if set(formats) & set(LORA):
        check_adapters(parents)
    base = parents[0].start[1] if cfg.tasks else None
    return Plan(parents, points, formats, choose, base)


def _check(cfg: Any) -> None:
    if cfg.init_from is not None:
        raise InputError("stage=merge takes runs=[…]: leave init_from out")
    if cfg.model.get("quantise") is not None:
        raise InputError("stage=merge writes whole weights: set model.quantise=null")


def _choice(cfg: Any, points: int) -> tuple[str, str] | None:
    evaluated = OmegaConf.select(cfg, "evaluation._target_") is not None
    if points == 1:
        return None
    if not evaluated:
        raise InputError(
            f"{points} points of weights, and nothing to choose by: add evaluation=signs (or "
            "another) and choose=[ocr_exact,max]"
        )
    choose = tuple(cfg.choose or ())
    if len(choose) != 2 or choose[1] not in ("max", "min"):
        raise InputError(
            "choose= names the value to choose by, and max or min: e.g. choose=[ocr_exact,max]"
        )
    return str(choose[0]), str(choose[1])


def merge(cfg: Any) -> dict[str, Any]:
    """Runs the stage on every rank; returns its summary (on rank 0)."""
    from flux2.distributed import pick_device
    from flux2.lineage import rewards_of
    from flux2.merge import parts_of, put
    from flux2.model import cut, load_model
    from flux2.scorer import close
    from flux2.train import build

    plan, run = planned(cfg), Run(Path(cfg.run.dir))
    held: HeldOut | None = None
    if OmegaConf.select(cfg, "evaluation._target_") is not None:
        held = build(cfg.evaluation)
    try:
        found = [r for p in plan.parents for r in rewards_of(p.init.run)]
        rewards = distributed.broadcast(list(dict.fromkeys(found)))
        if held is not None:
            held.suite = held.suite.mark(rewards)
            held.suite.ready()
        chosen, seed = plan.parents[0].root_model(cfg.model)
        if cfg.dtype == "fp32":
            chosen.dtype = "fp32"  # else the export would be of rounded weights
        model = load_model(chosen, pick_device(cfg.engine.device), seed)
        cut(model, plan.parents[0].weights.shapes)
        _check_shapes(plan, model)
        results = [p.weights for p in plan.parents]
        shots: list[Evaluation | None] = []
        for number, weights in enumerate(plan.points):
            put(model.transformer, parts_of(weights, results, plan.base))
            if held is not None:
                shots.append(_evaluate(cfg, held, model, run, number, weights))
                _check_choice(plan, shots[-1])
        best = _best(plan, shots, run) if held is not None else 0
        best = distributed.broadcast(best)
        if best != len(plan.points) - 1:
            put(model.transformer, parts_of(plan.points[best], results, plan.base))
        _note(cfg, plan, plan.points[best], model, run, rewards)
        exports = _export(cfg, plan, plan.points[best], model, run)
    finally:
        close(held)
    if not distributed.is_main():
        return {}
    return _summary(plan, shots, best, exports)


def _check_shapes(plan: Plan, model: Flux2) -> None:
    mine = {k: tuple(v.shape) for k, v in model.transformer.state_dict().items()}
    if mine != dict(plan.parents[0].weights.shapes):
        raise InputError(
            f"{plan.parents[0].init.run} is not what its configuration says: train it again"
        )


def _check_choice(plan: Plan, shot: Evaluation | None) -> None:
    """Before the other points take their time. Raises InputError for an unknown value."""
    known = summarise(shot.results) if shot is not None else {}
    if plan.choose is not None and known and plan.choose[0] not in known:
        raise InputError(f"choose names {plan.choose[0]!r}: choose from {', '.join(known)}")


def _evaluate(
    cfg: Any, held: HeldOut, model: Flux2, run: Run, number: int, weights: tuple[float, ...]
) -> Evaluation | None:
    """Of one point, in a folder of its own; what a resumed run finds there is not done again."""
    from flux2.roles import velocity_of

    folder = run.path / "grid" / f"{number:02d}"
    name = f"{run.path.name}, weights {label(weights)}"
    facts = {"run": cfg.run.id, "name": name, "stage": "merge", "step": 0}
    if distributed.broadcast((folder / "evaluation.json").is_file()):
        shot = Evaluation.load(folder) if distributed.is_main() else None
        if distributed.broadcast(shot is not None and shot.identity["name"] == name):
            return shot
    role = velocity_of(model, cfg.engine.autocast)
    return held.evaluate(model, role, f"weights {label(weights)}", facts, folder)


# ---------------------------------------------------------------- which is best


def _best(plan: Plan, shots: Sequence[Evaluation | None], run: Run) -> int:
    """The chosen point, on rank 0; its evaluation becomes the run's, a table and a picture are
    made."""
    if not distributed.is_main():
        return 0
    found = [s for s in shots if s is not None]
    means = [summarise(s.results) for s in found]
    best = 0
    if plan.choose is not None:
        name, mode = plan.choose
        if not all(math.isfinite(m[name]["mean"]) for m in means):
            raise InputError(f"choose names {name!r}, which no sample of a point has: take another")
        values = [m[name]["mean"] for m in means]
        best = values.index(max(values) if mode == "max" else min(values))
        rows = compared(plan.points, found, name, mode)
        text = told(name, rows, best)
        (run.path / "grid" / "table.txt").write_text(text)
        print(text, flush=True)
        path = picture(plan.points, rows, name, best, run.path / "samples" / "merge.png")
        print(f"picture: {path}", flush=True)
    target = run.path / FOLDER / "step_000000"
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    folder = found[best].folder
    assert folder is not None
    shutil.copytree(folder, target)
    return best


# ---------------------------------------------------------------- what comes out


def _note(
    cfg: Any, plan: Plan, weights: Sequence[float], model: Flux2, run: Run, rewards: list[str]
) -> None:
    """The manifest: all parents, and what their weights were."""
    from flux2.lineage import result_role

    pairs = zip(plan.parents, weights, strict=True)
    parents = [{**p.init.parent(), "weight": w} for p, w in pairs]
    first = plan.parents[0].init.manifest
    run.update(
        parents=parents,
        base=asdict(model.info),
        trained=list(TRAINED),
        rewards=rewards,
        result_role=result_role(first),
        schedule_hash=first.get("schedule_hash"),
        tasks=bool(cfg.tasks),
    )


def _export(
    cfg: Any, plan: Plan, weights: Sequence[float], model: Flux2, run: Run
) -> dict[str, Any]:
    """Each format in a folder of its own, as stage=export writes them. Rank 0 writes."""
    from flux2.checkpoint import on_main
    from flux2.export import LORA, Target, expected, export_weights, tensors_of
    from flux2.lineage import result_role
    from flux2.merge import joined
    from flux2.model import DTYPES
    from flux2.train import build

    want = expected(model, model.transformer, None)
    whole, _ = tensors_of(model.transformer, None)
    schedule = build(cfg.sampler.schedule)

    def write() -> dict[str, Any]:
        exports: dict[str, Any] = {}
        manifest = run.manifest
        for name in plan.formats:
            target = Target(name, DTYPES[cfg.dtype], schedule=schedule, source=manifest,
                            role=result_role(manifest) or cfg.model.role)  # fmt: skip
            folder, under, adapter = run.path / "export" / name, whole, None
            if name in LORA:
                adapter = joined([p.adapter for p in plan.parents if p.adapter], weights)
                base = plan.parents[0].start[1]
                under = {k: base.read(k).to(whole[k]) for k in base.shapes}
            report = export_weights(model, under, adapter, folder, target, want)
            print(report.line(), flush=True)
            facts = {**read_json(folder / MANIFEST), "parents": manifest["parents"]}
            write_json(folder / MANIFEST, facts)
            exports[name] = {"folder": str(folder), "differences": dict(report.differences)}
        return exports

    return on_main(write)


def _summary(
    plan: Plan, shots: Sequence[Evaluation | None], best: int, exports: Mapping[str, Any]
) -> dict[str, Any]:
    found = [s for s in shots if s is not None]
    out: dict[str, Any] = {
        "stage": "merge",
        "runs": [str(p.init.weights) for p in plan.parents],
        "weights": list(plan.points[best]),
        "exports": dict(exports),
    }
    if found:
        out["metrics"] = summarise(found[best].results)
    if plan.choose is not None:
        out["choose"] = list(plan.choose)
        out["points"] = compared(plan.points, found, *plan.choose)
    return out
