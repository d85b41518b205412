"""stage=size: a smaller model, from the blocks that matter most, healed by its whole self.

    python run.py stage=size keep=0.5
    python run.py stage=size keep='{double:3,single:10}' model=klein-4b-base
    python run.py stage=size method.blocks=[[0],[0,2]]           none is measured

Blocks are measured and chosen before training (eval.importance), then `flux2.train.train` heals
what is left (distill.size). The run holds, besides what every training run has,

    importance/importance.json    what was measured and chosen: a resumed run does not measure again
    importance/table.txt          the same for people; samples/importance.png as a picture
    parent/                       the whole model's evaluation, and the result's beside it
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from eval import tables
from eval.evaluation import Evaluation, find
from eval.importance import Importance, picture, plain, told
from eval.records import compare
from flux2 import depth, distributed
from flux2.checkpoint import on_main
from flux2.depth import Blocks
from flux2.errors import InputError
from flux2.files import jsonable, read_json, write_json, write_text
from flux2.lineage import find_init, rewards_of
from flux2.runs import Run

FOLDER, FILE, PARENT = "importance", "importance.json", "parent"
PASSES = 5
"""Forwards that are timed; the quickest counts, for others share the machine."""


def shorten(cfg: Any) -> dict[str, Any]:
    """Runs the stage on every rank; returns its summary (on rank 0)."""
    from flux2.train import assemble, build, train

    run, importance = Run(Path(cfg.run.dir)), build(cfg.importance)
    wanted, facts = asked(cfg), facts_of(cfg)
    found = on_main(lambda: _known(run.path / FOLDER / FILE, facts))
    if found is None or not _has_parent(cfg, run):
        # What training will refuse is refused before minutes of measuring; train() checks again.
        given = cfg.method.blocks or [range(n) for n in wanted]
        assemble(with_blocks(cfg, given)).close()
        found = _measured(cfg, run, importance, wanted, facts, found)
    run.update(blocks=found["blocks"])
    out = train(with_blocks(cfg, found["blocks"]))
    if not distributed.is_main():
        return {}
    return {**out, **{k: found[k] for k in ("blocks", "parameters", "seconds")}, **compared(run)}


def asked(cfg: Any) -> tuple[int, int]:
    """How many blocks of each kind are to be kept.

    Raises:
        InputError: a choice that cannot be made, or LoRA.
    """
    from flux2.model import check_initial, initial_depth
    from flux2.results import check_not_policy

    if cfg.adapter is not None:
        raise InputError(
            "stage=size trains all weights of a network of its own, and an adapter would lie on "
            "the whole one: leave out adapter="
        )
    check_initial(cfg)
    check_not_policy(cfg, None if cfg.init_from is None else find_init(cfg.init_from))
    there = initial_depth(cfg)
    if cfg.method.blocks is None:
        return depth.counts(_plain(cfg.keep), there)
    double, single = depth.checked(_plain(cfg.method.blocks), there)
    if (double, single) == depth.all_blocks(there):
        raise InputError(f"method.blocks keeps all of {there[0]} + {there[1]} blocks: keep fewer")
    return len(double), len(single)


def with_blocks(cfg: Any, blocks: Any) -> Any:
    """A copy of the configuration whose method keeps these blocks."""
    out = cfg.copy()
    OmegaConf.update(out, "method.blocks", [list(kind) for kind in blocks], force_add=True)
    return out


def facts_of(cfg: Any) -> dict[str, Any]:
    """What the choice depends on, of the configuration."""
    keys = ("model", "init_from", "keep", "importance", "sampler")
    return jsonable({**{k: _plain(cfg[k]) for k in keys}, "blocks": _plain(cfg.method.blocks)})


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _known(file: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What this run has chosen before; None where it has not.

    Raises:
        InputError: it chose by other settings.
    """
    if not file.is_file():
        return None
    found = read_json(file)
    for name, value in facts.items():
        if found["facts"].get(name) != value:
            raise InputError(
                f"{file} was made with another {name}: resume with what it began with, or choose "
                "another run.dir"
            )
    return found


# ---------------------------------------------------------------- measuring


def _measured(
    cfg: Any, run: Run, importance: Importance, wanted: tuple[int, int],
    facts: Mapping[str, Any], found: Any,
) -> dict[str, Any]:  # fmt: skip
    """Loads the whole model, chooses the blocks unless that is `found` already, and evaluates it;
    all ranks together."""
    from flux2.distributed import pick_device
    from flux2.model import load_initial
    from flux2.roles import VelocityRole, velocity_of

    model = load_initial(cfg, pick_device(cfg.engine.device))
    role = velocity_of(model, cfg.engine.autocast)
    assert isinstance(role, VelocityRole)  # `asked` refuses a policy student
    if found is None:
        rows = []
        if cfg.method.blocks is None:
            blocks, rows = importance.measure(model, role, wanted)
        else:
            blocks = depth.checked(_plain(cfg.method.blocks), role.depth)
        found = {
            "blocks": [list(kind) for kind in blocks],
            "depth": list(role.depth),
            "by": importance.by if rows else "given",
            "rows": plain(rows),
            "parameters": _parameters(model.transformer, blocks),
            "seconds": _seconds(importance, model, role, blocks),
            "facts": facts,
        }
        if distributed.is_main():
            _write(run.path, found, told(rows) if rows else "", rows)
        distributed.barrier()
    _evaluate_parent(cfg, run, model, role)
    return found


def _parameters(transformer: Any, blocks: Blocks) -> dict[str, int]:
    """Of the whole transformer, and of these blocks with what they share."""

    def count() -> int:
        return sum(p.numel() for p in transformer.parameters())

    whole = count()
    with depth.only(transformer, blocks):
        return {"parent": whole, "student": count()}


@torch.no_grad()
def _seconds(importance: Importance, model: Any, role: Any, blocks: Blocks) -> dict[str, Any]:
    """Of a forward of `samples` samples of the whole transformer, and of these blocks alone."""
    probe = next(importance.probes(model, role))

    def timed() -> float:
        spent = []
        for _ in range(PASSES):
            if probe.x.is_cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            role(probe.x, probe.t, probe.cond)
            if probe.x.is_cuda:
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - began)
        return min(spent)

    out: dict[str, Any] = {"samples": len(probe.x), "parent": timed()}
    with depth.only(model.transformer, blocks):
        return {**out, "student": timed()}


def _write(path: Path, found: Mapping[str, Any], text: str, rows: Any) -> None:
    """The files, the choice last: a run that is killed before it measures again."""
    folder, sizes, spent = path / FOLDER, found["parameters"], found["seconds"]
    folder.mkdir(exist_ok=True)
    double, single = found["blocks"]
    line = (
        f"kept: double {double} of {found['depth'][0]}, single {single} of {found['depth'][1]}; "
        f"{sizes['student'] / 1e6:,.2f}M of {sizes['parent'] / 1e6:,.2f}M parameters, "
        f"{spent['student']:.4f} s of {spent['parent']:.4f} s a forward of {spent['samples']}"
    )
    text = f"{text}\n{line}" if text else line
    write_text(folder / "table.txt", f"{text}\n")
    print(text, flush=True)
    if rows:
        print(f"picture: {picture(rows, path / 'samples' / 'importance.png')}", flush=True)
    write_json(folder / FILE, dict(found))


# ---------------------------------------------------------------- the whole model beside it


def _evaluated(cfg: Any) -> bool:
    return OmegaConf.select(cfg, "evaluation._target_") is not None


def _has_parent(cfg: Any, run: Run) -> bool:
    """Whether the whole model's evaluation is there, or none is asked for."""
    there = (run.path / PARENT / "evaluation.json").is_file()
    return not _evaluated(cfg) or distributed.broadcast(there)


def _evaluate_parent(cfg: Any, run: Run, model: Any, role: Any) -> None:
    from flux2.train import build

    if _has_parent(cfg, run):
        return
    held = build(cfg.evaluation)
    try:
        facts = {"run": cfg.run.id, "name": "parent", "stage": "size", "step": 0}
        held.suite = held.suite.mark(distributed.broadcast(rewards_of(run.path)))
        held.suite.ready()
        held.evaluate(model, role, "evaluating the whole model", facts, run.path / PARENT)
    finally:
        held.close()


def compared(run: Run) -> dict[str, Any]:
    """The result beside the whole model, on the same prompts and noise: printed, kept as
    parent/table.txt, returned for the summary. {} without an evaluation. On rank 0."""
    result = find(run.path).get(run.manifest["exported"]["step"])
    if result is None or not (run.path / PARENT / "evaluation.json").is_file():
        return {}
    parent, student = Evaluation.load(run.path / PARENT), Evaluation.load(result)
    both = [n for n in parent.results.fingerprints if n in student.results.fingerprints]
    changes = compare(parent.results.only(*both), student.results.only(*both))
    rows = [
        [
            name, tables.number(c["before"]), tables.number(c["after"]), tables.signed(c["gain"]),
            tables.span(c["low"], c["high"], tables.signed), tables.probability(c["p_holm"]),
        ]
        for name, c in changes.items()
        if c["n"]
    ]  # fmt: skip
    header = ["held-out", "parent", "student", "change", "95 % interval", "p (Holm)"]
    text = tables.table(header, rows)
    write_text(run.path / PARENT / "table.txt", f"{text}\n")
    print(f"\n{text}", flush=True)
    return {
        "parent": {name: c["before"] for name, c in changes.items()},
        "against_parent": changes,
    }
