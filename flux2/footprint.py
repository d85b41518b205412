"""What one rank of a run holds in GPU and host memory, part by part, and at its peak.

    peak = what stays (weights, masters, optimizer states, encoders, buckets)
         + the largest of: a micro-batch's pass, the update, sampling, decoding, encoding

What stays is counted on the meta device; passes are run without data (flux2.activations) for the
forwards that the method itself makes (flux2.rehearsal). docs/memory.md has the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from flux2 import adapters, depth, quantise
from flux2.activations import Curve
from flux2.adapters import LoRA
from flux2.checkpoint import MAX_BYTES
from flux2.errors import InputError
from flux2.model import AUTOCAST, DTYPES, initial_depth, meta_parts
from flux2.optim8 import state_bytes
from flux2.passes import (
    Call,
    Decoder,
    Setting,
    Shape,
    autoencoder_curve,
    codec_curve,
    text_curve,
    velocity_curve,
)
from flux2.rehearsal import Rehearsal, rehearse
from flux2.types import Method, RoleSpec

LIBRARIES = 64 << 20
"""cuBLAS's workspaces, which torch's allocator holds."""
LIVE = SUBGROUP = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered (flux2/zero.py), and steps at a time (DeepSpeed)."""
PROMPTS = 1 << 30
"""Host memory of remembered prompts (flux2.text.TextEncoder)."""
PROCESS = 5 << 29
"""Host memory of a process with its libraries, CUDA's included: 2.5 GiB."""


@dataclass(frozen=True)
class Engine:
    """How a run is spread.

    Attributes:
        kind: none, ddp or deepspeed. stage: ZeRO's, 0 otherwise.
        half: weights in bf16 with fp32 masters, as DeepSpeed's bf16 has them.
        offload, offload_weights: what is in host memory.
        bucket: elements reduced or gathered at a time.
    """

    kind: str
    stage: int = 0
    half: bool = False
    offload: bool = False
    offload_weights: bool = False
    bucket: int = 50_000_000

    @property
    def name(self) -> str:
        """As in engine=."""
        if self.kind != "deepspeed":
            return self.kind
        return f"zero{self.stage}{'-offload' if self.offload else ''}"


@dataclass(frozen=True)
class Prediction:
    """Bytes of one rank.

    Attributes:
        stays: parts that are there all the time.
        passing: phases; the largest counts.
        host: parts of host memory, of the first rank, which exports.
    """

    stays: Mapping[str, int]
    passing: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def peak(self) -> int:
        """GPU memory."""
        return sum(self.stays.values()) + max(self.passing.values())

    @property
    def host_peak(self) -> int:
        """Host memory."""
        return sum(self.host.values())

    @property
    def phase(self) -> str:
        """The one that needs most."""
        return max(self.passing, key=lambda k: self.passing[k])


class Footprint:
    """A configuration's memory, for any engine and number of ranks. cfg: of a training stage.

    Args:
        cuda: as on GPUs, or as on a CPU.
        size: (height, width, references) of samples; None takes them from the data.
        brief: leave out phases that come rarely: encoding and evaluation.

    Raises:
        InputError: not a training stage, or data whose sizes cannot be known.
    """

    def __init__(
        self,
        cfg: Any,
        cuda: bool = True,
        size: tuple[int, int, int] | None = None,
        brief: bool = False,
    ) -> None:
        if cfg.get("method") is None or cfg.get("optim") is None:
            raise InputError("there is nothing to plan: choose a stage that trains, e.g. plan=sft")
        self.quantised: str | None = cfg.model.get("quantise")
        quantise.check_use(self.quantised, "none", cfg.get("adapter") is not None)
        self.cuda, self.brief = cuda, brief
        self.parts: dict[str, Any] = meta_parts(cfg.model)
        if cfg.get("init_from") is not None:
            self._as_deep(initial_depth(cfg))
        self.cfg = cfg = _chosen(cfg, depth.depth_of(self.parts["transformer"]))
        self.lora: LoRA | None = (
            None if cfg.get("adapter") is None else instantiate(cfg.adapter, _convert_="all")
        )
        self.size = _size(cfg) if size is None else size
        height, width, references = self.size
        patch = 2 ** len(self.parts["vae"].config.block_out_channels)
        self.shape = Shape(height, width, cfg.model.max_sequence_length, references, patch)
        method = self._make()
        self.method = type(method).__name__
        specs = method.roles.values()
        self.short = self._shorter(list(specs))
        self.velocity = all(s.kind in ("velocity", "policy") for s in specs)
        self.heads = [s.policy.components for s in specs if s.kind == "policy"]
        self.others = sum(s.source is not None and not _lends(s.source) for s in specs)
        self.trained = sum(s.trainable for s in specs)
        self.followers = sum(s.follows is not None for s in specs)
        self.frozen = any(not s.trainable and s.follows is None for s in specs)
        self.released = bool(cfg.data.get("release_encoder", False)) or not self.velocity
        self.counts = self._shapes()
        self.trainable = sum(map(_product, self.counts))
        """Parameters of one trained role."""
        self._optimizer = str(cfg.optim.optimizer._target_).rpartition(".")[2]
        whole = self.velocity and not self.heads
        self.shardable = whole and self.quantised is None and self._elementwise
        self._curve = functools.cache(self._pass)

    def _as_deep(self, there: tuple[int, int]) -> None:
        """The transformer as a run has made it."""
        kept = depth.all_blocks(there)
        self.parts["transformer"] = depth.shortened(self.parts["transformer"], kept)

    def _shorter(self, specs: Sequence[RoleSpec]) -> Any:
        """The network of roles that have fewer blocks than the model; None without such.

        Raises:
            InputError: some of what is trained is shorter, and some is not.
        """
        kept = {s.blocks for s in specs if s.trainable}
        if all(s.blocks is None for s in specs):
            return None
        if len(kept) > 1 or any(s.blocks is not None and not s.trainable for s in specs):
            raise InputError("the plan knows one number of blocks for all that is trained")
        (blocks,) = kept
        assert blocks is not None
        return depth.shortened(self.parts["transformer"], blocks)

    @property
    def network(self) -> Any:
        """Of a trained role."""
        if not self.velocity:
            return self.parts["vae"]
        return self.parts["transformer"] if self.short is None else self.short

    @property
    def uncounted(self) -> str | None:
        """What takes memory of the GPU and is in no number: a reward's networks, whose weights no
        configuration tells. None without a reward."""
        reward = self.cfg.get("reward")
        if reward is None:
            return None
        parts = (reward.get("rewards") or {}).values()
        names = [str(r._target_).rpartition(".")[2] for r in (parts or [reward])]
        followed = any(
            c.owner == "decoder" for calls in self.rehearsal(1).turns.values() for c in calls
        )
        way = " and their graph, which the gradient comes through" if followed else ""
        return f"networks of the reward ({', '.join(names)}){way}"

    @property
    def _elementwise(self) -> bool:
        """Whether the optimizer can step pieces of parameters, in fp32."""
        return self._optimizer == "TurnAdamW"

    def _make(self, **given: Any) -> Method:
        if self.cfg.get("reward") is not None and "score" not in given:
            given["score"] = _Unscored()
        return instantiate(self.cfg.method, _convert_="all", **given)

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of what one trained role owns."""
        network = self.parts["transformer"]
        if self.lora is None or not self.velocity:
            return [*(tuple(p.shape) for p in self.network.parameters()), *self._head()]
        out: list[tuple[int, ...]] = self._head()
        for path in adapters._matching(network, self.lora.targets):
            layer: Any = network.get_submodule(path)
            out += [(self.lora.rank, layer.in_features), (layer.out_features, self.lora.rank)]
        return out

    def _head(self) -> list[tuple[int, ...]]:
        """Of what a policy owns besides (flux2.policy.Head)."""
        if not self.heads:
            return []
        config: Any = self.parts["transformer"].config
        rows = self.heads[0] * (config.in_channels + 1) + 1
        return [(rows, config.num_attention_heads * config.attention_head_dim), (rows,)]

    @functools.cached_property
    def base(self) -> int:
        """Bytes of a frozen transformer."""
        network, name = self.parts["transformer"], self.quantised
        total = sum(p.numel() * p.element_size() for p in network.parameters())
        if name is None:
            return total
        for _, layer in quantise.layers(network):
            weight = layer.weight
            total -= weight.numel() * weight.element_size()
            total += quantise.stored_bytes(name, (weight.shape[0], weight.shape[1]))
        return total

    @functools.cache  # noqa: B019 (it lives for one answer)
    def rehearsal(self, rows: int) -> Rehearsal:
        """The method's forwards on a rank's `rows` of the batch."""
        collate = self.cfg.data.get("collate", {})
        return rehearse(
            self._make,
            rows,
            scored=self.cfg.get("reward") is not None,
            latents=collate.get("latents", True),
            images=collate.get("images", False),
            unconditional=collate.get("unconditional", False),
            guidance=bool(self.parts["transformer"].config.guidance_embeds),
            references=self.shape.references > 0,
            depth=depth.depth_of(self.parts["transformer"]),
        )

    # ------------------------------------------------------------ passes

    def _pass(self, what: str, argument: Any, half: bool, checkpointing: bool) -> Curve:
        """A curve, by what it is of; the same one is asked for by many engines."""
        cfg, vae = self.cfg, _config(self.parts["vae"])
        matmul = AUTOCAST[cfg.model.vae_autocast]
        if what == "text":
            layers, length = cfg.model.text_layers, self.shape.text
            encoder = meta_parts(cfg.model)["text_encoder"]
            return text_curve(encoder, layers, argument, length, self.cuda)
        if what in ("encode", "decode"):
            decode = what == "decode"
            return codec_curve(vae, argument, self.shape, matmul, decode, self.cuda)
        autocast = AUTOCAST[cfg.engine.autocast]
        if what == "autoencoder":
            return autoencoder_curve(vae, argument, self.shape, autocast, self.cuda)
        setting = Setting(
            base=torch.bfloat16 if half else DTYPES[cfg.model.dtype],
            trained=torch.bfloat16 if half else torch.float32,
            lora=self.lora,
            autocast=autocast,
            checkpointing=checkpointing,
            attention=cfg.model.get("attention"),
            masked=bool(cfg.model.get("mask_padding", False)),
            quantise=self.quantised,
            cuda=self.cuda,
        )
        config = _config(self.parts["transformer"])
        decoded = any(c.owner == "decoder" for c in argument)
        decoder = Decoder(vae, matmul, DTYPES[cfg.model.get("vae_dtype", "fp32")])
        return velocity_curve(
            config, argument, self.shape, setting, decoder if decoded else None,
            None if self.short is None else _config(self.short),
        )  # fmt: skip

    # ------------------------------------------------------------ the sum

    def predict(self, engine: Engine, ranks: int, checkpointing: bool) -> Prediction:
        """Bytes of each of `ranks` ranks."""
        rows = -(-self.cfg.data.batch_size // ranks)
        stays, host = self._stays(engine, ranks)
        passing = self._passing(engine, ranks, rows, checkpointing)
        return Prediction(stays, passing, host)

    def _stays(self, engine: Engine, ranks: int) -> tuple[dict[str, int], dict[str, int]]:
        one = self.trainable
        own = self.trained * one
        wide = 2 if engine.half else 4
        share = ranks if engine.stage == 3 else 1
        has_base = self.velocity and (self.lora is not None or self.frozen)
        # DeepSpeed's bf16 takes the whole model along.
        frozen = (2 * _count(self.parts["transformer"]) if engine.half else self.base) * has_base
        weights = frozen + wide * (self.trained + self.followers) * one
        # A bf16 network that follows another is shown, and its fp32 average is kept beside it.
        averages = 4 * self.followers * one if engine.half else 0
        states = self._states(engine, ranks)
        masters = 4 * own // ranks if engine.kind == "deepspeed" else 0
        stays = {
            "frozen base": frozen // share,
            **({"other runs": self.others * self._other(engine) // share} if self.others else {}),
            "trained weights": wide * self.trained * one // share,
            "averages": (wide * self.followers * one + averages) // share,
            "fp32 masters": masters,
            "optimizer states": states,
            "autoencoder": _bytes(self.parts["vae"]) if self.velocity else 0,
            "text encoder": 0 if self.released else _bytes(self.parts["text_encoder"]),
            "libraries": LIBRARIES if self.cuda else 0,
        }
        host = {"process": PROCESS, "prompts": PROMPTS}
        if engine.offload:
            host["fp32 masters"], host["optimizer states"] = masters, states
            host["gradients"] = 4 * own // ranks
            stays["fp32 masters"] = stays["optimizer states"] = 0
        if engine.offload_weights:
            host["weights"] = weights // ranks
            stays["frozen base"] = stays["trained weights"] = 0
        if engine.stage:
            stays["buckets"] = wide * engine.bucket * (1 if engine.stage < 3 else 2)
        if engine.stage == 3:  # one flat buffer, made at the beginning
            stays["gradient shards"] = 0 if engine.offload else wide * own // ranks
        whole = _count(self.network)
        exported = 4 * whole if self.cfg.train.get("export", False) else 0
        share = (4 * (self.trained + self.followers) * one + 8 * own) // ranks
        host["checkpoint or export"] = max(min(share, MAX_BYTES), exported)
        return stays, host

    def _other(self, engine: Engine) -> int:
        """Bytes of another run's transformer, which is not quantised."""
        network = self.parts["transformer"]
        return 2 * _count(network) if engine.half else _bytes(network)

    def _states(self, engine: Engine, ranks: int) -> int:
        """Bytes of optimizer states."""
        counts = [_product(s) for s in self.counts]
        if engine.kind == "deepspeed":
            return 8 * self.trained * sum(counts) // ranks
        if self._optimizer.endswith("8bit"):
            return self.trained * sum(map(state_bytes, counts))
        if self._optimizer.endswith("Muon"):
            matrices = sum(c for c, s in zip(counts, self.counts, strict=True) if len(s) > 1)
            return self.trained * (8 * sum(counts) - 4 * matrices)
        return 8 * self.trained * sum(counts)

    def _passing(
        self, engine: Engine, ranks: int, rows: int, checkpointing: bool
    ) -> dict[str, int]:
        acts = self.rehearsal(rows)
        one = self.trainable
        wide = 2 if engine.half else 4
        # Sharded gradients leave as they come; the rest of them waits for the update.
        kept = 0.0 if engine.stage in (2, 3) else 1.0
        beside = self._beside(engine, ranks)
        idle = wide * (self.trained - 1) * one if engine.stage == 1 else 0
        idle += wide * self.trained * one // ranks * (engine.stage == 2 and not engine.offload)
        phases = {"update": self._update(engine, ranks)}
        for role, calls in acts.turns.items():
            curve = self._curve("velocity", calls, engine.half, checkpointing)
            held = int(kept * wide * one) if acts.micros[role] > 1 else 0
            phases[f"pass of {role}"] = beside + idle + curve.peak(kept, held)
        for role, images in acts.autoencoder.items():
            curve = self._curve("autoencoder", images, False, False)
            held = 4 * one if acts.micros[role] > 1 else 0
            phases[f"pass of {role}"] = curve.peak(1.0, held)
        graded = max((c.rows for cs in acts.turns.values() for c in cs if c.graded), default=0)
        for call in acts.collected:
            if self.brief and not call.graded and call.rows <= graded:
                continue  # a pass with gradients of as many samples takes more
            # A graded forward without a backward pass keeps its activations alike.
            curve = self._curve("velocity", (call,), engine.half, checkpointing)
            most = beside + max(curve.other)
            phases["sampling"] = max(phases.get("sampling", 0), most)
        if acts.decoded:
            phases["decoding"] = self._codec("decode", acts.decoded)
        if self.brief:
            return phases
        collate = self.cfg.data.get("collate", {})
        cached = self.cfg.data.get("cache") is not None
        if collate.get("latents", True):
            phases["encoding"] = self._codec("encode", 16 if cached else rows)
        if collate.get("text", True) and self.velocity:
            phases["prompts"] = self._text(15 if cached else rows)
        if self.released and self.velocity:
            # The encoder is freed once the cache is full, when the engine is there already.
            begun = self._states(engine, ranks) if engine.kind != "deepspeed" else 0
            most = max(phases.pop("prompts", 0), phases.pop("encoding", 0))
            phases["filling the cache"] = _bytes(self.parts["text_encoder"]) + most - begun
        phases |= self._evaluation(engine, ranks, checkpointing)
        return phases

    def _beside(self, engine: Engine, ranks: int) -> int:
        """Bytes of weights that ZeRO-3 has gathered, or fetched, while a network runs."""
        if engine.stage < 3 or (ranks == 1 and not engine.offload_weights):
            return 0
        wide, network = 2 if engine.half else 4, _count(self.parts["transformer"])
        return wide * min(network, LIVE + engine.bucket)

    def _update(self, engine: Engine, ranks: int) -> int:
        """Bytes of an optimizer step: gradients, and what it makes for itself."""
        counts = [_product(s) for s in self.counts]
        whole, largest = sum(counts), max(counts)
        if engine.kind == "deepspeed":
            # This rank's gradients in fp32 (those in bf16 are gone), and AdamW's root of the second
            # moments: on a CPU that and its quotient.
            mine = self.trained * whole // ranks
            mine = min(mine, SUBGROUP) if engine.stage == 3 else mine
            return 0 if engine.offload else (8 if self.cuda else 12) * mine
        # Ranks with copies sum their gradients in flat pieces (flux2.distributed.sum_gradients).
        bucket = 4 * min(whole, (1 << 26) + largest) if ranks > 1 else 0
        if self._optimizer.endswith("8bit"):  # on a CPU both moments in fp32, and their successors
            own = 0 if self.cuda else 20 * largest
        elif self._optimizer.endswith("Muon"):
            own = 16 * largest
        elif self.cuda and not self.cfg.optim.optimizer.get("fused", False):
            own = 4 * whole  # torch steps all tensors together: a root of each
        else:
            own = 8 * largest
        return 4 * whole + max(own, bucket)

    def _codec(self, what: str, rows: int) -> int:
        return self._curve(what, rows, False, False).peak()

    def _text(self, rows: int) -> int:
        from flux2.text import AT_ONCE

        at_once = max(1, min(64, AT_ONCE // self.shape.text))
        return self._curve("text", min(rows + 1, at_once), False, False).peak()

    def _evaluation(self, engine: Engine, ranks: int, checkpointing: bool) -> dict[str, int]:
        cfg = self.cfg
        wanted = OmegaConf.select(cfg, "evaluation._target_")
        if not wanted or cfg.get("sampler") is None or not self.velocity:
            return {}
        samples = cfg.evaluation.prompts * cfg.evaluation.noises
        rows = min(cfg.sampler.chunk, -(-samples // ranks))
        call = Call(rows * (1 if cfg.sampler.guidance == 1 else 2), False)
        curve = self._curve("velocity", (call,), engine.half, checkpointing)
        decode = self._codec("decode", samples)
        sampling = self._beside(engine, ranks) + max(curve.other)
        return {"evaluation": max(sampling, decode)}


class _Unscored:
    """The score of a method that is only asked for its roles."""

    def __call__(self, *_: Any) -> Any:
        raise RuntimeError("a method must not score before `collect`")

    def check_gradient(self) -> None:
        """Whether there is one shows when the run's parts are made."""


def _chosen(cfg: Any, there: tuple[int, int]) -> Any:
    """The configuration with as many blocks in the place of those that are yet to be measured: all
    of a kind are alike."""
    if cfg.get("keep") is None or cfg.method.get("blocks") is not None:
        return cfg
    keep = OmegaConf.to_container(cfg.keep) if OmegaConf.is_config(cfg.keep) else cfg.keep
    out = cfg.copy()
    blocks = [list(range(n)) for n in depth.counts(keep, there)]
    OmegaConf.update(out, "method.blocks", blocks, force_add=True)
    return out


def _product(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _config(module: Any) -> dict[str, Any]:
    return dict(module.config)


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def _lends(source: str) -> bool:
    """Whether a run lends an adapter on the shared base, as far as its configuration tells."""
    config = Path(source) / "config.yaml"
    found: Any = OmegaConf.load(config) if config.is_file() else {}
    return found.get("adapter") is not None


def _size(cfg: Any) -> tuple[int, int, int]:
    """(height, width, references) of the largest of the data's first records. Data that is not
    there yet has the largest of the sizes that it is to be given, and no references."""
    path, sizes = cfg.data.dataset.get("path"), cfg.data.dataset.get("sizes")
    if path is not None and sizes and not Path(path).expanduser().exists():
        height, width = max(sizes, key=lambda s: s[0] * s[1])
        return int(height), int(width), 0
    missing = OmegaConf.missing_keys(cfg.data) if OmegaConf.is_config(cfg.data) else set()
    if missing:
        raise InputError(
            f"data.{min(missing)} has no value, so that sizes are not known: give it, or "
            "plan.height and plan.width"
        )
    dataset = instantiate(cfg.data.dataset, _convert_="all")
    buckets = [dataset.bucket_of(i) for i in range(0, len(dataset), max(1, len(dataset) // 64))]
    height, width, _ = max(buckets, key=lambda b: b[0] * b[1])
    return height, width, max(b[2] for b in buckets)


def engine_of(engine: Any) -> Engine:
    """conf/engine's choice."""
    sharded = engine.get("kind", "none") == "deepspeed"
    if not sharded:
        return Engine(engine.get("kind", "none"))
    return Engine(
        "deepspeed", engine.stage, engine.precision == "bf16", engine.offload,
        engine.offload_weights, engine.bucket,
    )  # fmt: skip
