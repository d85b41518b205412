"""A training stage from its configuration: build the parts, run the loop, write what came out.

Everything that can be refused is refused before a weight is read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flux2 import checkpoint, distributed, plan
from flux2.adapters import LoRA
from flux2.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from flux2.checks import check, check_data, check_role, sharding
from flux2.data.cache import RowCache, fingerprint
from flux2.data.loader import Collator, Loader
from flux2.data.order import identity, judges, report
from flux2.data.sampler import IndexSampler
from flux2.distributed import pick_device
from flux2.engine import Engine
from flux2.errors import InputError
from flux2.export import Target, check_target, export_autoencoder, export_run
from flux2.lineage import (
    check_lineage,
    check_same_base,
    describe,
    init_of,
    licence_note,
    schedule_hash,
    trained_rewards,
)
from flux2.log import Log
from flux2.loop import Hook, fit
from flux2.model import AUTOCAST, DTYPES, STRENGTH, Flux2, check_initial, load_initial
from flux2.monitor import Blind, Monitor, go_back
from flux2.optim import LearningRate
from flux2.results import (
    check_not_policy,
    check_same_teachers,
    check_source,
    lent,
    shape_of,
    sources_of,
    taught,
)
from flux2.roles import Roles
from flux2.runs import Run, resolve_resume
from flux2.schedule import Schedule
from flux2.scorer import Scorer, calibrate, close
from flux2.types import Batch, Deferred, Described, Method
from flux2.zero import Sharded

ASIDE = 10**6
"""Batches from this step on serve for measuring, beside those that are trained on."""


def build(cfg: Any, **kwargs: Any) -> Any:
    """Hydra's instantiate, with a component's InputError as itself and misfits as one line."""
    try:
        return instantiate(cfg, _convert_="all", **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        name = OmegaConf.select(cfg, "_target_") if OmegaConf.is_config(cfg) else cfg
        detail = str(error.__cause__ or error).split("\n")[0]
        raise InputError(f"cannot build {name}: {detail}: correct its configuration") from error


def learning_rate(cfg: Any, steps: int) -> LearningRate:
    """conf/optim's schedule; decays reach 0 at the run's end unless `total` says otherwise."""
    total = cfg.total if cfg.total is not None else steps
    return LearningRate(cfg.warmup, cfg.decay, total, cfg.hold)


@dataclass(frozen=True)
class Parts:
    """What a training stage consists of, before any weight is read."""

    dataset: Any
    lora: LoRA | None
    rate: LearningRate
    evaluation: Any
    heldout: Any
    monitor: Monitor
    reward: Any
    score: Scorer
    method: Method
    schedule: Schedule | None

    @property
    def schedule_hash(self) -> str | None:
        """Of the sampler's schedule; None where the stage has no sampler."""
        return None if self.schedule is None else schedule_hash(self.schedule)

    def close(self) -> None:
        """Ends the processes that the parts have started."""
        close(self.reward, self.evaluation, self.monitor)


def assemble(cfg: DictConfig) -> Parts:
    """Builds the parts and refuses what does not fit. Raises InputError."""
    check(cfg)
    dataset = build(cfg.data.dataset)
    IndexSampler(dataset, cfg.data.batch_size, cfg.seed)
    check_data(cfg, dataset)
    lora: LoRA | None = build(cfg.adapter) if cfg.adapter is not None else None
    rate = learning_rate(cfg.optim, cfg.train.steps)
    # Refuses the optimizer's settings before the weights are read: a matrix and a vector to hold.
    shapes = {"block": (1, 1), "bias": (1,)}
    probe = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    optimizer = build(cfg.optim.optimizer, roles={"probe": probe})
    if cfg.engine.kind == "deepspeed" and not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"engine={cfg.engine.name} shards an optimizer that works on flat pieces, and "
            f"{type(optimizer).__name__} does not: choose engine=none or ddp, or optim=adamw"
        )
    made: list[Any] = []

    def part(key: str, wanted: str) -> Any:
        found = OmegaConf.select(cfg, wanted) is not None
        made.append(build(cfg[key]) if found else None)
        return made[-1]

    try:
        names = ("evaluation", "heldout", "monitor")
        evaluation, heldout, monitor = (part(name, f"{name}._target_") for name in names)
        reward = part("reward", "reward")
        return _fitted(cfg, dataset, lora, rate, evaluation, heldout, monitor or Blind(), reward)
    except BaseException:
        close(*made)  # else their processes keep the command from ending
        raise


def _fitted(
    cfg: DictConfig, dataset: Any, lora: LoRA | None, rate: LearningRate, evaluation: Any,
    heldout: Any, monitor: Monitor, reward: Any,
) -> Parts:  # fmt: skip
    """The method over its reward, and whether all of it fits the model and its lineage."""
    score = Scorer(reward)
    score.tap = monitor.tap
    method: Method = build(cfg.method, **({} if reward is None else {"score": score}))
    for name, spec in method.roles.items():
        check_role(cfg, name, spec)
        if spec.source is not None:
            check_source(spec.source, cfg.model.name)
    monitor.check(method.roles)
    if evaluation is not None:
        evaluation.check(method.roles)
    check_initial(cfg)  # after the rest: it imports the models' classes, which takes seconds
    schedule = build(cfg.sampler.schedule) if cfg.get("sampler") is not None else None
    if schedule is not None and cfg.train.export:
        check_target(Target("diffusers", DTYPES[cfg.train.export_dtype], schedule=schedule), None)
    parts = Parts(
        dataset, lora, rate, evaluation, heldout, monitor, reward, score, method, schedule
    )
    init = init_of(cfg)
    check_lineage(cfg, init, method.accepts, parts.schedule_hash)
    check_not_policy(cfg, init)
    if shape_of(method.roles) is not None and cfg.get("sampler") is not None:
        build(cfg.sampler).check_policy()
    return parts


def build_engine(cfg: DictConfig, parts: Parts, model: Flux2) -> Engine:
    """The roles, their optimizer, and the engine over both."""
    sharded = cfg.engine.kind == "deepspeed"
    roles = Roles(
        parts.method.roles,
        model,
        parts.lora,
        AUTOCAST[cfg.engine.autocast],
        cfg.engine.checkpointing,
        cfg.seed,
        masters=not sharded or cfg.engine.precision == "fp32",
    )
    named = {name: roles.parameters(name) for name in roles.trainable}
    optimizer, clip = build(cfg.optim.optimizer, roles=named), cfg.optim.clip
    if not sharded:
        return Engine(roles, optimizer, parts.rate, clip)
    return Sharded(roles, optimizer, parts.rate, clip, sharding(cfg.engine), model.device)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Runs a training stage, on every rank alike; returns its summary (on rank 0)."""
    parts = assemble(cfg)
    run, started = Run(Path(cfg.run.dir)), time.monotonic()
    try:
        resumed, device = resolve_resume(cfg), pick_device(cfg.engine.device)
        if isinstance(parts.reward, Deferred):
            parts.reward.ready()
        if distributed.is_main():
            with distributed.apart():
                lines = (
                    describe(run.path), licence_note(cfg), parts.score.describe(), plan.line(cfg),
                    *report(parts.dataset),
                    parts.method.describe() if isinstance(parts.method, Described) else "",
                )  # fmt: skip
            for line in filter(None, lines):
                print(line, flush=True)
        model = parts.score.model = load_initial(cfg, device)
        collate = Collator(model, **cfg.data.collate, cache=_cache(cfg, model, parts.dataset))
        data = Loader(
            parts.dataset, collate, cfg.data.batch_size, cfg.seed, cfg.data.caption_dropout,
            cfg.data.get("captions"), bool(cfg.data.get("group_lengths")),
        )  # fmt: skip
        if cfg.data.release_encoder:
            _release(data, parts)
        teachers = sources_of(parts.method.roles, cfg.model.name)
        base = asdict(model.info)  # before a role is given what the base lacks
        engine = build_engine(cfg, parts, model)
        if resumed is not None:
            check_same_base(cfg, run.manifest, model.info.hash)
            check_same_teachers(cfg, run.manifest, teachers)
            _restore(engine, parts, data, load_checkpoint(resumed, verify=False))
        run.update(
            result_role=parts.method.result or cfg.model.role,
            base=base,
            **({STRENGTH: model.info.guidance} if model.info.guidance_embeds else {}),
            trained=list(engine.roles.trainable),
            **lent(parts.method.roles, teachers),
            # What judged pairs trains as a reward does.
            rewards=trained_rewards(
                cfg,
                run.path,
                (*parts.score.engines, *judges(parts.dataset), *taught(teachers)),
            ),
            schedule_hash=parts.schedule_hash,
        )
        with Log(run.path, cfg.logger, cfg.train.steps, engine.step) as log:
            log.print(_headline(cfg, model, engine.roles, parts.lora))
            _calibrate(cfg, parts, engine, data, log)
            summary = _fit(cfg, parts, engine, data, log)
        summary["seconds"] = round(time.monotonic() - started, 1)
        return summary
    finally:
        parts.close()


def _fit(cfg: DictConfig, parts: Parts, engine: Engine, data: Loader, log: Log) -> dict[str, Any]:
    """The loop, the export and the last evaluation."""
    model, run, evaluation = parts.score.model, Run(Path(cfg.run.dir)), parts.evaluation
    assert model is not None
    hooks: tuple[Hook, ...] = ()
    if evaluation is not None:
        evaluation.start(cfg, model, engine.roles, log, engine.step)
        hooks = (evaluation.after_step,)
        names = distributed.broadcast(list(evaluation.latest(0)))
        if cfg.train.best is not None and names and cfg.train.best[0] not in names:
            raise InputError(
                f"train.best names {cfg.train.best[0]!r}: choose from {', '.join(names)}"
            )
    heldout = parts.heldout
    if heldout is not None:
        heldout.start(cfg, model, engine.roles, log, engine.step)
    save, monitor = _saver(cfg, run, engine, parts, data), parts.monitor
    monitor.start(cfg, model, engine.roles, log, engine.step)
    if monitor.improved(engine.step):
        save(engine.step)  # the model as it is may turn out to be the best

    def watched(step: int) -> bool:
        if monitor.improved(step):
            save(step)
        return monitor.stopped is not None

    try:
        fit(
            engine,
            parts.method,
            data,
            log,
            steps=engine.step if monitor.stopped else cfg.train.steps,
            seed=cfg.seed,
            save=save,
            save_every=cfg.train.save_every,
            probe=lambda step: {
                **parts.score.probe(),
                **data.observe(*parts.score.noted()),
                **({} if heldout is None else heldout.probe(step)),
                **monitor.probe(step),
            },
            watch=monitor.watch,
            hooks=(*hooks, watched),
            budget=cfg.train.budget,
        )
    except Exception:
        if distributed.is_main() and [k for k, _ in checkpoint.steps(run.checkpoints)] == [0]:
            shutil.rmtree(run.checkpoints)  # nothing was trained: it may be started again
        raise
    exported = _settle(cfg, run, engine, monitor)
    summary: dict[str, Any] = {"stage": cfg.stage.name, "steps": engine.step}
    if cfg.train.export:
        summary["export"] = str(_export(cfg, run, model, engine.roles, data, parts))
    if evaluation is not None:
        summary |= evaluation.finish(exported["step"])
    if heldout is not None:
        summary |= heldout.finish(exported["step"])
    return summary | monitor.finish(exported)


def _settle(cfg: DictConfig, run: Run, engine: Engine, monitor: Monitor) -> dict[str, Any]:
    """Which step's weights are the result, in the engine's roles and the manifest: the last ones',
    unless the monitor, or train.best, says that an earlier checkpoint is better."""
    why = monitor.back(engine.step)
    if cfg.train.best is not None:
        why = f"best {cfg.train.best[0]} of the checkpoints"
    step = go_back(engine, run.checkpoints) if why is not None else None
    if step is None or step == engine.step:
        lost = why is not None and step is None
        step, why = engine.step, "the last" + (": no checkpoint has a rank" if lost else "")
    exported = {"step": step, "of": engine.step, "why": why}
    run.update(exported=exported)
    return exported


def _cache(cfg: DictConfig, model: Flux2, dataset: Any) -> RowCache | None:
    """conf/data's cache, under a key of everything that its rows depend on."""
    if cfg.data.cache is None:
        return None
    text, codec = model.text, model.codec
    spelling = (text.tokenizer.get_vocab(), text.tokenizer.chat_template)
    facts = (identity(dataset), spelling, text.max_length, text.layers, codec.autocast, codec.patch)
    key = fingerprint(*facts, modules=(model.vae, text.encoder))
    return RowCache(Path(cfg.data.cache), key, len(dataset))


def _release(data: Loader, parts: Parts) -> None:
    """Encodes every record into the cache, and what else will be asked for; frees the encoder."""
    text = data.collate.model.text
    data.fill()
    asked = [p for p in (parts.evaluation, parts.heldout, parts.monitor) if p is not None]
    text.keep(["", *(r.prompt for part in asked for r in part.records())])
    text.release()


def _restore(engine: Engine, parts: Parts, data: Loader, checkpoint: Checkpoint) -> None:
    engine.load(checkpoint.state["engine"], checkpoint.tensors)
    parts.method.load_state_dict(checkpoint.state["method"])
    parts.score.load_state_dict(checkpoint.state["score"])
    data.load_state_dict(checkpoint.state.get("data", {}))
    if checkpoint.state.get("monitor"):  # {}: the run was not watched until now
        parts.monitor.load_state_dict(checkpoint.state["monitor"])


def _calibrate(cfg: DictConfig, parts: Parts, engine: Engine, data: Loader, log: Log) -> None:
    """Lets a reward measure what it wants to know of the policy, on batches beside training's."""
    if parts.score.wants is None:
        return
    rollouts = {k: cfg.method[k] for k in ("steps", "guidance") if k in cfg.method}
    sampler, role = build(cfg.sampler, **rollouts), engine.roles[engine.roles.trainable[0]]

    def draw(k: int, times: int) -> tuple[torch.Tensor, Batch]:
        batch = data(ASIDE + k).repeat(times)
        return sampler(role, batch, cfg.seed + k), batch

    share = cfg.data.batch_size // distributed.size()
    calibrate(parts.score, draw, share, log, Path(cfg.run.dir) / "calibration.json")


def _saver(
    cfg: DictConfig, run: Run, engine: Engine, parts: Parts, data: Loader
) -> Callable[[int], None]:
    saved: set[int] = set()

    def save(step: int) -> None:
        if step in saved:
            return
        saved.add(step)
        parts_of = {"method": parts.method, "score": parts.score, "monitor": parts.monitor,
                    "data": data}  # fmt: skip
        state = {"engine": engine.state_dict(), **{k: p.state_dict() for k, p in parts_of.items()}}
        best = parts.monitor.score(step)
        if cfg.train.best is not None and parts.evaluation is not None:
            name, mode = cfg.train.best
            value = parts.evaluation.latest(step).get(name)
            best = None if value is None else (name, value, mode)
        tensors = engine.own_tensors()
        write_checkpoint(
            run.checkpoints, step, tensors, state, {"step": step}, cfg.train.keep, best
        )

    return save


def _headline(cfg: DictConfig, model: Flux2, roles: Roles, lora: LoRA | None) -> str:
    def adapted(name: str) -> str:
        whole = roles.specs[name].kind == "projector"
        return "" if whole or lora is None else f" (LoRA rank {lora.rank})"

    counts = ", ".join(
        f"{name} {roles.count(name) / 1e6:.2f}M{adapted(name)}" for name in roles.trainable
    )
    ranks = f", {distributed.size()} ranks" if distributed.size() > 1 else ""
    return (
        f"{cfg.stage.name} on {model.info.name} ({model.info.parameters / 1e6:.1f}M, "
        f"{model.info.role}), training {counts}, engine {cfg.engine.name}{ranks}, "
        f"{cfg.train.steps} steps → {cfg.run.dir}"
    )


def _export(
    cfg: DictConfig, run: Run, model: Flux2, roles: Roles, data: Loader, parts: Parts
) -> Path:
    """Writes export/: the autoencoder, or the whole pipeline with the first trained role in it."""
    folder, name = run.path / "export", roles.trainable[0]
    if roles.specs[name].kind == "autoencoder":
        images = (_pixels(data(ASIDE + k)) for k in range(cfg.train.statistics_batches))
        return export_autoencoder(model, images, folder)
    result = next((n for n, s in roles.specs.items() if s.follows == name and s.decay > 0.9), name)
    result = result if cfg.train.export_ema else name
    return export_run(
        model,
        roles,
        result,
        folder,
        DTYPES[cfg.train.export_dtype],
        role=parts.method.result or cfg.model.role,
        schedule=parts.schedule,
        renoise=parts.schedule is not None and cfg.sampler.solver == "renoise",
        lineage=run.manifest if distributed.is_main() else {},
    )


def _pixels(batch: Batch) -> torch.Tensor:
    assert batch.images is not None
    return batch.images
