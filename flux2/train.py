"""A training stage from its configuration: build the parts, run the loop, write what came out.

Everything that can be refused is refused before a weight is read.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flux2.adapters import LoRA
from flux2.checkpoint import Run, load_checkpoint, resolve_resume, write_checkpoint
from flux2.data.cache import RowCache, fingerprint
from flux2.data.loader import Collator, Loader
from flux2.data.sampler import IndexSampler
from flux2.engine import Engine, pick_device
from flux2.errors import InputError
from flux2.export import export_autoencoder, export_pipeline
from flux2.log import Log
from flux2.loop import Hook, fit
from flux2.model import AUTOCAST, DTYPES, Flux2, check_model, load_initial
from flux2.optim import LearningRate
from flux2.roles import Roles
from flux2.types import Batch, Deferred, Method, Scores


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


def check(cfg: DictConfig) -> None:
    """Refuses what a training stage cannot run, before anything heavy."""
    if cfg.train.steps < 1:
        raise InputError(f"train.steps is {cfg.train.steps}: it must be at least 1")
    if cfg.train.save_every < 0 or cfg.train.keep < 1:
        raise InputError("train.save_every must be at least 0 and train.keep at least 1")
    if cfg.engine.autocast not in AUTOCAST:
        raise InputError(f"engine.autocast is {cfg.engine.autocast!r}: choose fp32 or bf16")
    if cfg.optim.clip < 0:
        raise InputError(f"optim.clip is {cfg.optim.clip}: it must be at least 0 (0: no clipping)")
    if not 0 <= cfg.data.caption_dropout <= 1:
        raise InputError(f"data.caption_dropout is {cfg.data.caption_dropout}: give 0 to 1")
    check_model(cfg.model)
    OmegaConf.to_container(cfg, throw_on_missing=True, resolve=True)


class Scorer:
    """reward ∘ decode, as methods get it. Made before the model, so that a method can be checked
    first. No dataclass: Hydra would hand methods a dictionary of it."""

    def __init__(self, reward: Any, model: Flux2 | None = None) -> None:
        self.reward, self.model = reward, model
        self._works = False

    def __call__(self, x: torch.Tensor, batch: Batch) -> Callable[[], Scores]:
        """Starts scoring; rewards that work in processes of their own are not waited for."""
        assert self.model is not None
        images, reward = self.model.codec.decode(x, batch.grid), self.reward
        if isinstance(reward, Deferred):
            pending = reward.submit(images, batch)
            return lambda: self._checked(reward.result(pending))
        scores = self._checked(reward(images, batch))
        return lambda: scores

    def _checked(self, scores: Scores) -> Scores:
        """Refuses a reward that scores nothing at all: later failures are masked, but a run whose
        first chunk has no score is set up wrongly."""
        if not self._works and bool(scores["reward"].isnan().all()):
            why = ", ".join(f"{k} × {n}" for k, n in getattr(self.reward, "failures", {}).items())
            raise InputError(
                f"the reward scored no sample of the first chunk ({why or 'all NaN'}): give "
                "prompts that it can score, or another reward (reward=ocr-whole reads without a "
                "known region)"
            )
        self._works = True
        return scores


def learning_rate(cfg: Any, steps: int) -> LearningRate:
    """conf/optim's schedule; decays reach 0 at the run's end unless `total` says otherwise."""
    total = cfg.total if cfg.total is not None else steps
    return LearningRate(cfg.warmup, cfg.decay, total, cfg.hold)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Runs a training stage; returns its summary."""
    check(cfg)
    dataset = build(cfg.data.dataset)
    IndexSampler(dataset, cfg.data.batch_size, cfg.seed)
    lora: LoRA | None = build(cfg.adapter) if cfg.adapter is not None else None
    rate = learning_rate(cfg.optim, cfg.train.steps)
    # Refuses the optimizer's settings before the weights are read: a matrix and a vector to hold.
    shapes = {"block": (1, 1), "bias": (1,)}
    probe = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    build(cfg.optim.optimizer, roles={"probe": probe})
    evaluation = build(cfg.evaluation) if cfg.evaluation is not None else None
    reward = build(cfg.reward) if cfg.reward is not None else None
    score = Scorer(reward)
    method: Method = build(cfg.method, **({} if reward is None else {"score": score}))
    run, started = Run(Path(cfg.run.dir)), time.monotonic()
    resumed, device = resolve_resume(cfg), pick_device(cfg.engine.device)
    try:
        if isinstance(reward, Deferred):
            reward.ready()
        model = score.model = load_initial(cfg, device)
        roles = Roles(
            method.roles,
            model,
            lora,
            AUTOCAST[cfg.engine.autocast],
            cfg.engine.checkpointing,
            cfg.seed,
        )
        named = {name: roles.parameters(name) for name in roles.trainable}
        engine = Engine(roles, build(cfg.optim.optimizer, roles=named), rate, cfg.optim.clip)
        if resumed is not None:
            _restore(engine, method, load_checkpoint(resumed, verify=False))
        collate = Collator(model, **cfg.data.collate, cache=_cache(cfg, model, dataset))
        data = Loader(
            dataset, collate, cfg.data.batch_size, cfg.seed, cfg.data.caption_dropout
        )
        run.update(model_role=cfg.model.role, base=asdict(model.info), trained=list(named))
        with Log(run.path, cfg.logger, cfg.train.steps, engine.step) as log:
            log.print(_headline(cfg, model, named, lora))
            hooks: tuple[Hook, ...] = ()
            if evaluation is not None:
                evaluation.start(cfg, model, roles, log, engine.step)
                hooks = (evaluation.after_step,)
            fit(
                engine,
                method,
                data,
                log,
                steps=cfg.train.steps,
                seed=cfg.seed,
                save=_saver(run, engine, method, cfg.train.keep),
                save_every=cfg.train.save_every,
                hooks=hooks,
                budget=cfg.train.budget,
            )
            summary: dict[str, Any] = {"stage": cfg.stage.name, "steps": engine.step}
            summary["unreadable_records"] = len(data.unreadable)
            if cfg.train.export:
                summary["export"] = str(_export(cfg, run, model, roles, data, lora))
            if evaluation is not None:
                summary |= evaluation.finish(engine.step)
            summary["seconds"] = round(time.monotonic() - started, 1)
            return summary
    finally:
        parts: list[Any] = [reward, evaluation]
        for part in parts:
            if hasattr(part, "close"):
                part.close()


def _cache(cfg: DictConfig, model: Flux2, dataset: Any) -> RowCache | None:
    """conf/data's cache, under a key of everything that its rows depend on."""
    if cfg.data.cache is None:
        return None
    text, codec = model.text, model.codec
    code = Path(inspect.getsourcefile(type(dataset)) or "").read_bytes()  # how it draws and reads
    spelling = (text.tokenizer.get_vocab(), text.tokenizer.chat_template)
    facts = (dataset, code, spelling, text.max_length, text.layers, codec.autocast, codec.patch)
    key = fingerprint(*facts, modules=(model.vae, text.encoder))
    return RowCache(Path(cfg.data.cache), key, len(dataset))


def _restore(engine: Engine, method: Method, checkpoint: Any) -> None:
    engine.roles.load_state_dict(checkpoint.weights)
    engine.load_state_dict(checkpoint.state["engine"])
    method.load_state_dict(checkpoint.state["method"])


def _saver(run: Run, engine: Engine, method: Method, keep: int) -> Callable[[int], None]:
    def save(step: int) -> None:
        state = {"engine": engine.state_dict(), "method": method.state_dict()}
        weights = engine.roles.state_dict()
        write_checkpoint(run.checkpoints, step, weights, state, {"step": step}, keep)

    return save


def _headline(cfg: DictConfig, model: Flux2, named: dict[str, Any], lora: LoRA | None) -> str:
    counts = ", ".join(
        f"{name} {sum(p.numel() for p in group.values()) / 1e6:.2f}M"
        + (f" (LoRA rank {lora.rank})" if lora is not None else "")
        for name, group in named.items()
    )
    return (
        f"{cfg.stage.name} on {model.info.name} ({model.info.parameters / 1e6:.1f}M, "
        f"{model.info.role}), training {counts}, {cfg.train.steps} steps → {cfg.run.dir}"
    )


def _export(
    cfg: DictConfig, run: Run, model: Flux2, roles: Roles, data: Loader, lora: LoRA | None
) -> Path:
    """Writes export/: the autoencoder, or the whole pipeline with the first trained role in it."""
    folder, name = run.path / "export", roles.trainable[0]
    if roles.specs[name].kind == "autoencoder":
        images = (_pixels(data(10**6 + k)) for k in range(cfg.train.statistics_batches))
        return export_autoencoder(model, images, folder)
    result = next((n for n, s in roles.specs.items() if s.follows == name and s.decay > 0.9), name)
    result = result if cfg.train.export_ema else name
    return export_pipeline(model, roles, result, folder, DTYPES[cfg.train.export_dtype])


def _pixels(batch: Batch) -> torch.Tensor:
    assert batch.images is not None
    return batch.images
