"""Trains small cases and writes their metrics: what tests/flux2/test_zero.py runs on one process
and on two ranks, and compares.

    torchrun --nproc-per-node 2 ranks_job.py MODEL.yaml ENGINE:CASE:STEPS:FOLDER …

A case that finds a checkpoint in its folder goes on from it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from torch import Tensor

from distill._common import Renoise
from distill.consistency import FlowMapDistillation
from distill.dmd import DMD
from distill.flowmap import Squared, ToPhase
from distill.guidance import GuidanceDistillation
from flux2 import distributed
from flux2.adapters import LoRA
from flux2.checkpoint import latest_checkpoint, load_checkpoint, write_checkpoint
from flux2.data.loader import Collator, Loader
from flux2.data.record import Record
from flux2.data.signs import SignWorld
from flux2.engine import Engine
from flux2.log import Log
from flux2.loop import fit
from flux2.model import Flux2, load_model
from flux2.optim import LearningRate, TurnAdamW
from flux2.roles import Roles
from flux2.types import Batch, RoleSpec, Turn
from flux2.zero import Sharded, Zero
from posttrain.advantages import PerReward
from posttrain.awm import AWM
from posttrain.axes import Anchor, Clip, FirstSteps
from posttrain.direct import Direct, LastSteps, OneStep
from posttrain.dpo import DPO
from posttrain.grpo import GRPO
from posttrain.kto import KTO
from posttrain.nft import NFT
from posttrain.sft import FlowMatching

LOGGER = OmegaConf.create(
    {"wandb": "off", "project": "x", "entity": None, "group": None, "tags": [], "show": [],
     "interval": 1e9}
)  # fmt: skip


def smooth(x: Tensor, batch: Batch):
    """A reward without jumps; some samples have none, and the groups of some prompts no spread."""
    reward = torch.tanh(x.mean((1, 2)) * 20)
    reward = torch.where(batch.groups % 4 == 1, torch.ones_like(reward), reward)
    reward = torch.where(batch.ids % 7 == 3, torch.full_like(reward, torch.nan), reward)
    return lambda: {"reward": reward.cpu()}


def composed(x: Tensor, batch: Batch):
    """Two rewards of unlike scale, as a composed one tells them."""
    one = smooth(x, batch)()["reward"]
    two = 10 * torch.tanh(x[:, 0].mean(1)).cpu()
    return lambda: {"reward": one + two, "one/reward": one, "two/reward": two}


class Slope:
    """A reward of latents with a gradient; some samples have none."""

    def check_gradient(self) -> None:
        pass

    def differentiable(self, latents: Tensor, batch: Batch) -> Tensor:
        reward = torch.tanh(latents.mean((1, 2)) * 5)
        return torch.where(batch.ids.to(reward.device) % 7 == 3, torch.nan, reward)


@dataclass(frozen=True)
class Judged:
    """Records as pairs: each wins against the target of the one half the world away."""

    world: SignWorld

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int) -> Record:
        record = self.world[index]
        loser = self.world[(index + len(self) // 2) % len(self)].target
        assert record.target is not None and loser is not None
        return replace(record, preference=(record.target, loser, 1.0))

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        return self.world.bucket_of(index)


class TwoTurns:
    """A student that follows the data through a second trained role, which has turns of its own."""

    roles: ClassVar = {
        "student": RoleSpec(trainable=True),
        "fake": RoleSpec(trainable=True),
        "ema": RoleSpec(follows="student", decay=0.5),
        "teacher": RoleSpec(),
    }

    def __init__(self) -> None:
        self.turns = (Turn("fake", self.fake, every=2), Turn("student", self.student))

    def collect(self, roles, batch, rng):
        weight = (batch.ids % 4 != 3).float()  # uneven: a rank may have more than the other
        yield replace(batch, weight=weight).split(1)

    def student(self, roles, batch, rng):
        return self._loss(roles["student"], roles["fake"], batch, rng)

    def fake(self, roles, batch, rng):
        return self._loss(roles["fake"], roles["teacher"], batch, rng)

    def _loss(self, role, other, batch, rng):
        x, t = rng("noise", batch.ids, batch.shape), rng.uniform("time", batch.ids)
        v = role(x, t, batch.cond)
        gap = v - 0.5 * other(x, t, batch.cond) - batch.x0  # through the other role, and it calls
        loss = (batch.weight * gap.square().mean((1, 2))).sum()
        return loss, {"gap": gap.square().mean()}

    def metrics(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def sft():
    return FlowMatching(micro=2, ema=0.9)


def dpo():
    return DPO(beta=10.0, hold=0.3, smoothing=0.1, micro=1, alarm=1e9)


def kto():
    return KTO(beta=10.0, desirable=1.3, micro=1)  # which cuts through pairs


def grpo():
    return GRPO(smooth, group=4, steps=3, guidance=1.5, surrogate=Clip(0.05),
                anchor=Anchor(0.1), chunk=4, updates=2,
                window=FirstSteps(2))  # fmt: skip


def nft():
    return NFT(smooth, group=4, steps=3, guidance=1.5, chunk=4, times=2,
               anchor=Anchor(0.1, "velocity"))  # fmt: skip


def awm():
    return AWM(composed, group=4, steps=3, chunk=4, times=2, updates=2, advantage=PerReward(),
               anchor=Anchor(0.1, "velocity", to="ema", decay=0.8))  # fmt: skip


def direct():
    return Direct(Slope(), samples=2, steps=3, guidance=1.5, chunk=2, through=LastSteps(2),
                  anchor=Anchor(0.1, "velocity"))  # fmt: skip


def refl():
    return Direct(Slope(), samples=2, steps=4, chunk=2, through=OneStep(0.3, 0.9))


def guidance():
    return GuidanceDistillation((1.0, 5.0), interval=(0.2, 0.9), rescale=0.7, micro=1)


def dmd():
    return DMD(guidance=2.0, steps=2, every=2, micro=1, ema=0.5)


def decoupled():
    return DMD(guidance=2.0, steps=2, every=2, micro=1, augment=Renoise(within="cleaner"))


def phased():
    return FlowMapDistillation(ToPhase(), Squared(), 2.0, share=0.3, micro=2, ema=0.5)


@dataclass(frozen=True)
class Case:
    """A method, what is trained, and what a batch brings: images, images with the empty prompt
    ("guided"), pairs or prompts."""

    build: Callable[[], Any]
    lora: bool
    checkpointing: bool
    data: str = "images"


CASES = {
    "sft-full": Case(sft, False, False),
    "sft-lora": Case(sft, True, True),
    "dpo-full": Case(dpo, False, True, "pairs"),
    "dpo-lora": Case(dpo, True, False, "pairs"),
    "kto-full": Case(kto, False, False, "pairs"),
    "kto-lora": Case(kto, True, True, "pairs"),
    "grpo-full": Case(grpo, False, True, "prompts"),
    "grpo-lora": Case(grpo, True, False, "prompts"),
    "nft-full": Case(nft, False, False, "prompts"),
    "nft-lora": Case(nft, True, True, "prompts"),
    "awm-full": Case(awm, False, True, "prompts"),
    "awm-lora": Case(awm, True, False, "prompts"),
    "direct-full": Case(direct, False, False, "prompts"),
    "direct-lora": Case(direct, True, True, "prompts"),
    "refl-lora": Case(refl, True, False, "prompts"),
    "guidance-full": Case(guidance, False, True, "guided"),
    "guidance-lora": Case(guidance, True, False, "guided"),
    "dmd-full": Case(decoupled, False, False, "prompts"),
    "dmd-lora": Case(dmd, True, True, "prompts"),
    "phased-lora": Case(phased, True, True, "guided"),
    "turns-full": Case(TwoTurns, False, False),
    "turns-lora": Case(TwoTurns, True, True),
}


def make(kind: str, roles: Roles) -> Engine:
    named = {n: roles.parameters(n) for n in roles.trainable}
    optimizer = TurnAdamW(named, lr=3e-3, weight_decay=0.1)
    rate = LearningRate(warmup=2)
    if kind in ("none", "ddp"):
        return Engine(roles, optimizer, rate, clip=0.1)
    stage, _, offload = kind.removeprefix("zero").partition("-")
    weights, extra = bool(offload) and stage == "3", {"sub_group_size": 20_000}  # many of them
    zero = Zero(int(stage), "fp32", bool(offload), weights, 5000, extra)
    return Sharded(roles, optimizer, rate, 0.1, zero, torch.device("cpu"))


def still(engine: Engine) -> None:
    """Notes how far the turns moved the roles that were idle: it must be 0."""
    update = engine._update

    def watched(role: str):
        idle = [n for n in engine.roles.trainable if n != role]
        before = {k: v.clone() for k, v in engine.tensors()}
        done = update(role)
        moved = [
            float((v - before[k]).abs().max())
            for k, v in engine.tensors()
            if any(k.startswith((f"{n}/", f"optimizer/{n}/")) for n in idle)
        ]
        engine._note(f"{role}/idle_moved", max(moved, default=0.0))
        return done

    engine._update = watched


def run(model: Flux2, kind: str, case: str, folder: Path, steps: int) -> None:
    chosen = CASES[case]
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    method, lora = chosen.build(), LoRA(3) if chosen.lora else None
    roles = Roles(method.roles, model, lora, None, chosen.checkpointing, seed=5)
    engine = make(kind, roles)
    if case.startswith("turns"):
        still(engine)
    world = SignWorld("train", length=12, tasks={"t2i": 0.5, "recolour": 0.5})
    rollout = chosen.data == "prompts"
    unconditional = rollout or chosen.data == "guided"
    collate = Collator(model, latents=not rollout, unconditional=unconditional)
    records = Judged(world) if chosen.data == "pairs" else world
    data = Loader(records, collate, 4, seed=4, caption_dropout=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    found = latest_checkpoint(folder / "checkpoints")
    if found is not None:
        checkpoint = load_checkpoint(found)
        engine.load(checkpoint.state["engine"], checkpoint.tensors)
        method.load_state_dict(checkpoint.state["method"])

    def save(step: int) -> None:
        state = {"engine": engine.state_dict(), "method": method.state_dict()}
        write_checkpoint(folder / "checkpoints", step, engine.own_tensors(), state, {})

    with Log(folder, LOGGER, steps, engine.step) as log:
        fit(engine, method, data, log, steps=steps, seed=3, save=save, save_every=0)


def main(model: str, *jobs: str) -> None:
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    loaded = load_model(OmegaConf.load(model), torch.device("cpu"))
    for job in jobs:
        kind, case, steps, folder = job.split(":", 3)
        run(loaded, kind, case, Path(folder), int(steps))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
