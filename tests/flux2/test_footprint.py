"""What stays, counted against modules that are there; passes, against the allocator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig

import run  # noqa: F401  (registers what conf/ interpolates)
from benchmarks.memory import (
    CASES,
    SHAPES,
    batch_of,
    case,
    configuration,
    cpu_peak,
    own_passes,
    update,
)
from flux2 import adapters
from flux2.engine import Engine as Training
from flux2.errors import InputError
from flux2.footprint import Engine, Footprint, engine_of
from flux2.model import load_model
from flux2.optim import LearningRate
from flux2.roles import Roles
from flux2.types import Batch

CONF = Path(__file__).parents[2] / "conf"
ZERO = Engine("deepspeed", 1, half=True, bucket=1000)


def composed(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture(scope="module")
def klein() -> Footprint:
    """klein-4b, NFT, all weights."""
    cfg = composed("stage=nft", "model=klein-4b-base")
    return Footprint(cfg, size=(512, 512, 0), brief=True)


def test_the_measure_itself_on_a_case_counted_by_hand() -> None:
    def allocate() -> None:
        a = torch.empty(10 << 20, dtype=torch.uint8)
        b = torch.empty(20 << 20, dtype=torch.uint8)  # 30 MiB, the most
        del a
        c = torch.empty(5 << 20, dtype=torch.uint8)
        del b, c

    assert cpu_peak(allocate) == 30 << 20


@pytest.mark.parametrize(
    "name", ["lora, checkpointing", "full", "full, 8-bit AdamW", "lora, nf4"]
)
def test_prediction_and_allocator_agree_within_15_percent(name: str) -> None:
    """18M parameters at 128²; benchmarks/memory.py has 300M and two sizes."""
    if "8-bit" in name or "nf4" in name:
        pytest.importorskip("bitsandbytes")
    cfg = configuration("18m", "engine.device=cpu", *CASES[name])
    row = case(name, cfg, 128, torch.device("cpu"))
    assert abs(row.error) < 0.15 and abs(row.passing_error) < 0.15, row


class Brightness:
    """A reward of the pixels alone: what the plan counts, and nothing else."""

    def __init__(self, cfg: DictConfig) -> None:
        self.model = load_model(cfg.model, torch.device("cpu"))

    def check_gradient(self) -> None:
        """It has one."""

    def differentiable(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        images = (self.model.codec.decode_float(x, batch.grid) / 2 + 0.5).clamp(0, 1)
        return images.square().mean((1, 2, 3))


def followed(*overrides: str) -> tuple[int, int]:
    """(predicted, measured) bytes of an update of stage=direct; 18M parameters at 128², two samples
    of four guided steps."""
    double, single, heads = SHAPES["18m"]
    shape = "model.architecture.transformer"
    cfg = composed(
        "stage=direct", "model=nano-scratch", "model.attention=null", "model.dtype=bf16",
        "model.max_sequence_length=64", "data.batch_size=2", "method.samples=1", "method.chunk=2",
        "method.steps=4", "engine.device=cpu", "evaluation=none",
        f"{shape}.num_layers={double}", f"{shape}.num_single_layers={single}",
        f"{shape}.num_attention_heads={heads}", f"{shape}.attention_head_dim=128",
        f"{shape}.axes_dims_rope=[32,32,32,32]", *overrides,
    )  # fmt: skip
    footprint = Footprint(cfg, False, (128, 128, 0), brief=True)
    found = footprint.predict(Engine("none"), 1, cfg.engine.checkpointing)
    score = Brightness(cfg)
    method = instantiate(cfg.method, _convert_="all", score=score)
    lora = None if cfg.adapter is None else instantiate(cfg.adapter, _convert_="all")
    roles = Roles(method.roles, score.model, lora, torch.bfloat16, cfg.engine.checkpointing)
    named = {name: roles.parameters(name) for name in roles.trainable}
    optimizer = instantiate(cfg.optim.optimizer, _convert_="all", roles=named)
    for p in named["policy"].values():  # states as after a first update, without its pass
        p.grad = torch.zeros_like(p)
    optimizer.active = "policy"
    optimizer.step()
    for p in named["policy"].values():
        p.grad = None
    batch = batch_of(cfg, score.model, 128)
    assert batch.cond is not None
    batch = replace(batch, x0=None, cond=replace(batch.cond, null=batch.cond))
    engine = Training(roles, optimizer, LearningRate(), 1.0)
    return own_passes(found.passing), cpu_peak(lambda: update(engine, method, batch))


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter=lora",),
        # A larger autoencoder, whose graph outweighs the transformer's.
        ("adapter=lora", "engine.checkpointing=true", "model.architecture.vae.block_out_channels="
         "[32,32,64,64]"),
        pytest.param(
            ("adapter=lora", "method.through.count=2", "anchor=velocity"), marks=pytest.mark.slow
        ),
        pytest.param(("through=align",), marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_reward_that_is_followed_is_predicted_within_5_percent(overrides) -> None:
    predicted, measured = followed(*overrides)
    assert abs(predicted / measured - 1) < 0.05, (predicted, measured)


def test_what_a_reward_holds_is_named_and_not_counted() -> None:
    direct = Footprint(composed("stage=direct"), cuda=False)
    assert direct.uncounted == (
        "networks of the reward (SpellingReward) and their graph, which the gradient comes through"
    )
    several = Footprint(composed("stage=nft", "reward=mixed"), cuda=False)
    assert several.uncounted == "networks of the reward (OCRReward, SignReward)"
    assert Footprint(composed("stage=sft"), cuda=False).uncounted is None


def test_data_that_is_not_there_yet_has_its_largest_size() -> None:
    cfg = composed("stage=sft", "data=folder", "data.dataset.path=nowhere",
                   "data.dataset.sizes=[[64,64],[96,112],[128,80]]")  # fmt: skip
    assert Footprint(cfg).size == (96, 112, 0)


def test_lora_is_counted_as_peft_makes_it(tiny_config) -> None:
    cfg = composed("stage=sft", "adapter=lora", "adapter.rank=5")
    cfg.model = tiny_config
    footprint = Footprint(cfg, size=(64, 64, 0))
    model = load_model(cfg.model, torch.device("cpu"))
    adapters.add(model.transformer, adapters.LoRA(rank=5), "policy")
    theirs = adapters.parameters(model.transformer, "policy")
    assert footprint.trainable == sum(p.numel() for p in theirs.values())
    assert sorted(footprint.counts) == sorted(tuple(p.shape) for p in theirs.values())


def test_full_training_of_klein_has_a_copy_for_each_role(klein: Footprint) -> None:
    count = 3_875_544_576
    assert klein.trainable == count and (klein.trained, klein.followers) == (1, 1)
    stays, _ = klein._stays(Engine("none"), 1)
    assert stays["trained weights"] == stays["averages"] == 4 * count
    assert stays["optimizer states"] == 8 * count and stays["frozen base"] == 0


def test_zero_shards_what_its_stage_says(klein: Footprint) -> None:
    """bf16: weights 2, gradients 2, masters 4, states 8 bytes (arXiv 1910.02054, section 3)."""
    count, ranks = 3_875_544_576, 8
    one, two, three = (
        klein._stays(replace(ZERO, stage=stage), ranks)[0] for stage in (1, 2, 3)
    )
    for stays in (one, two, three):
        assert stays["fp32 masters"] == 4 * count // ranks
        assert stays["optimizer states"] == 8 * count // ranks
    assert one["trained weights"] == two["trained weights"] == 2 * count
    assert three["trained weights"] == 2 * count // ranks
    # The network that follows in bf16, and its average in fp32 beside it.
    assert one["averages"] == 6 * count and three["averages"] == 6 * count // ranks
    assert three["gradient shards"] == 2 * count // ranks
    # While a network runs: at most a billion gathered parameters and a bucket.
    assert klein._beside(replace(ZERO, stage=3), ranks) == 2 * (1_000_000_000 + 1000)
    assert klein._beside(replace(ZERO, stage=2), ranks) == 0
    single = klein._stays(ZERO, 1)[0]
    assert single["fp32 masters"] == 4 * count


def test_offload_moves_masters_and_states_to_the_host(klein: Footprint) -> None:
    count, ranks = 3_875_544_576, 4
    engine = replace(ZERO, stage=3, offload=True, offload_weights=True)
    stays, host = klein._stays(engine, ranks)
    assert not any(stays[k] for k in ("fp32 masters", "optimizer states", "trained weights"))
    assert host["fp32 masters"] == 4 * count // ranks
    assert host["optimizer states"] == 8 * count // ranks
    assert host["gradients"] == 4 * count // ranks


def test_sharding_lowers_the_peak_in_order(klein: Footprint) -> None:
    def peak(stage: int, ranks: int = 8) -> int:
        return klein.predict(replace(ZERO, stage=stage), ranks, True).peak

    assert peak(1) > peak(2) > peak(3)
    assert peak(3, 8) < peak(3, 2)
    copies = klein.predict(Engine("ddp"), 8, True)
    assert copies.peak > peak(1) and copies.phase in copies.passing


def test_a_quantised_base_is_a_quarter_and_refuses_full_training() -> None:
    pytest.importorskip("bitsandbytes")
    common = ("stage=sft", "model=klein-4b-base", "model.quantise=nf4")
    cfg = composed(*common, "adapter=lora")
    packed = Footprint(cfg, size=(512, 512, 0))
    cfg.model.quantise = None
    assert packed.base < 0.3 * Footprint(cfg, size=(512, 512, 0)).base and not packed.shardable
    with pytest.raises(InputError, match="adapter=lora"):
        Footprint(composed(*common), size=(512, 512, 0))


@pytest.mark.parametrize(
    ("optim", "each"), [("adamw", 8.0), ("adamw8bit", 2.03), ("muon", 4.0)]
)
def test_optimizer_states(optim: str, each: float) -> None:
    cfg = composed("stage=sft", "model=klein-4b-base", f"optim={optim}")
    footprint = Footprint(cfg, size=(512, 512, 0))
    states = footprint._states(Engine("none"), 1)
    assert states / footprint.trainable == pytest.approx(each, rel=0.01)
    assert footprint.shardable == (optim == "adamw")


def test_the_size_is_the_datas_largest_first_record() -> None:
    cfg = composed("stage=pretrain")
    footprint = Footprint(cfg)
    assert footprint.size[:2] == (64, 64) and footprint.size[2] >= 1  # edits have references
    with pytest.raises(InputError, match="has no value"):
        Footprint(composed("stage=sft", "data=folder"))


def test_a_stage_that_does_not_train_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to plan"):
        Footprint(composed("stage=eval"))


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("none", Engine("none")),
        ("ddp", Engine("ddp")),
        ("zero2", Engine("deepspeed", 2, True)),
        ("zero3-offload", Engine("deepspeed", 3, True, True, True)),
    ],
)
def test_engines_are_read_from_conf(name: str, engine: Engine) -> None:
    found = engine_of(composed("stage=sft", f"engine={name}").engine)
    assert found == engine and found.name == name


def test_phases_of_online_rl_and_of_the_autoencoder() -> None:
    cfg = composed("stage=nft")
    cfg.evaluation = None
    found = Footprint(cfg, cuda=False).predict(Engine("none"), 1, False)
    assert {"pass of policy", "sampling", "decoding", "update"} <= set(found.passing)
    assert "encoding" not in found.passing  # its samples are its own
    other: Any = Footprint(composed("stage=autoencoder"), cuda=False)
    seen = other.predict(Engine("none"), 1, False)
    assert set(seen.passing) == {"update", "pass of autoencoder"} and not other.shardable


def test_a_released_encoder_is_there_while_the_cache_fills() -> None:
    common = ("stage=sft", "model=klein-4b-base", "adapter=lora", "data.cache=cache")
    kept, freed = (
        Footprint(composed(*common, f"data.release_encoder={value}"), size=(64, 64, 0))
        for value in ("false", "true")
    )
    stays = [f._stays(Engine("none"), 1)[0] for f in (kept, freed)]
    encoder = stays[0]["text encoder"]
    assert encoder > 5 << 30 and stays[1]["text encoder"] == 0
    phases = freed._passing(Engine("none"), 1, 64, True)
    assert encoder < phases["filling the cache"] < 1.3 * encoder and "prompts" not in phases
