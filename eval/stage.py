"""stage=eval: scores of a model, a run, a checkpoint or a folder of images, as one evaluation.

    python run.py stage=eval init_from=outputs/nft                            a run's result
    python run.py stage=eval init_from=outputs/nft/checkpoints/step_000020    a checkpoint
    python run.py stage=eval model.path=<folder>                              a diffusers folder
    python run.py stage=eval images=<folder>                                  images, with prompts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.evaluation import FOLDER, Evaluation
from eval.heldout import HeldOut, first_images, trained
from eval.images import check_folder
from eval.ladder import climb
from eval.measure import Measure, save, staging
from eval.pictures import batches, read_folder
from eval.records import summarise
from eval.suite import table
from flux2 import distributed
from flux2.errors import InputError
from flux2.lineage import rewards_of, trained_rewards
from flux2.log import grid, progress
from flux2.runs import MANIFEST, Run

UNKNOWN = ("model", "model_hash", "role", "solver", "steps", "guidance", "forwards", "seconds")


def evaluate(cfg: Any) -> dict[str, Any]:
    """Runs the stage on every rank; returns its summary (on rank 0)."""
    from flux2.train import build

    if cfg.images is not None:
        check_folder("images", Path(cfg.images), "images and their prompts")
    run = Run(Path(cfg.run.dir))
    facts = {"run": cfg.run.id, "name": run.path.name, "stage": "eval", "step": 0}
    if cfg.images is not None:
        if cfg.init_from is not None:
            raise InputError("images= and init_from= name two things to evaluate: give one")
        held: HeldOut = build(cfg.evaluation)
        if held.ladder is not None:
            held.close()
            raise InputError("evaluation.ladder samples a model, and images= has none: drop one")
        try:
            shot, ladder = _pictures(held, Path(cfg.images), facts, run.path), {}
        finally:
            held.close()
    else:
        shot, ladder = _model(cfg, facts, run)
    if shot is None:
        return {}
    summary = _tell(shot, run.path)
    if ladder:
        print(f"\n{ladder.pop('table')}\nladder: {ladder['picture']}")
        summary["ladder"] = ladder
    return summary


def _model(
    cfg: Any, facts: dict[str, Any], run: Run
) -> tuple[Evaluation | None, dict[str, Any]]:
    """The evaluation, and its ladder where there is one; on rank 0."""
    from flux2.distributed import pick_device
    from flux2.generate import check_sampled
    from flux2.lineage import ROLES, check_lineage, init_of, result_role
    from flux2.model import check_initial, load_initial
    from flux2.roles import velocity_of
    from flux2.train import build

    check_initial(cfg)
    init = init_of(cfg)
    check_lineage(cfg, init, ROLES)
    held: HeldOut = build(cfg.evaluation)
    try:
        check_sampled(cfg, init, held.sampler)
        if held.ladder is not None:
            made = None if init is None else result_role(init.manifest)
            held.ladder.check(made or cfg.model.role)
        rewards = distributed.broadcast(trained_rewards(cfg, run.path, ()))
        held.suite = held.suite.mark(rewards)
        held.suite.ready()
        if init is not None:
            facts |= {"name": init.run.name, "stage": init.manifest.get("stage")}
        model = load_initial(cfg, pick_device(cfg.engine.device))
        role = velocity_of(model, cfg.engine.autocast)
        if distributed.is_main():
            print(
                f"evaluating {facts['name']} ({model.info.name}): {held.prompts} prompts × "
                f"{held.noises}, {held.sampler.steps} steps, guidance {held.sampler.guidance:g} → "
                f"{run.path}", flush=True,
            )  # fmt: skip
        folder = run.path / FOLDER / "step_000000"
        shot, ladder = held.evaluate(model, role, "evaluating", facts, folder), {}
        if held.ladder is not None:
            ladder = climb(held, model, role, None, facts, run.path, 0, shot)
        return shot, ladder
    finally:
        held.close()


def _pictures(
    held: HeldOut, folder: Path, facts: dict[str, Any], run: Path
) -> Evaluation | None:
    """Scores images that were drawn elsewhere."""
    if distributed.size() > 1:
        raise InputError("images= is scored by one process: leave launch.processes out")
    pictures, matched = read_folder(folder, held.dataset, held.prompts)
    homes = [p for p in folder.resolve().parents if (p / MANIFEST).is_file()]
    held.suite = held.suite.mark(rewards_of(homes[0]) if homes else [])
    held.suite.ready()
    if not matched:
        print(
            f"the prompts in {folder} are not evaluation.dataset's: metrics that need ground truth "
            "have no values"
        )
    place, sizes = run / FOLDER / "step_000000", set()
    images = staging(place)
    measure = Measure(held.suite, images)
    chunks = batches(pictures, held.sampler.chunk)
    for shots, batch, seeds in progress(chunks, "scoring", len(pictures), lambda c: len(c[1])):
        measure.add(shots, batch, seeds, len(batch))
        sizes.add((shots.shape[-2], shots.shape[-1]))
    found = measure.finish()
    assert found is not None
    identity = {
        **dict.fromkeys(UNKNOWN), **facts, "name": folder.name, "grid": "images",
        "device": None, "dataset": str(folder), "noise_seed": None, "size": sorted(sizes),
    }  # fmt: skip
    return save(found, identity, {}, images, place)


def _tell(shot: Evaluation, run: Path) -> dict[str, Any]:
    summary, marks = summarise(shot.results), trained(shot)
    text = table(summary, shot.ceilings, marks)
    assert shot.folder is not None
    (shot.folder / "table.txt").write_text(text)
    print(text)
    images, captions = first_images(shot, 24)
    path = run / "samples" / "grid.png"
    path.parent.mkdir(exist_ok=True)
    grid(images, captions, None).save(path)
    print(f"evaluation: {shot.folder}\nimages: {path}")
    return {
        "stage": "eval",
        "metrics": summary,
        "ceiling": dict(shot.ceilings),
        "identity": dict(shot.identity),
        "skipped": dict(shot.skipped),
    }
