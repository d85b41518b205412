"""Preference pairs from a model: which are found, what is written, what a second try repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from eval import pairs
from eval.groups import Groups, calibrate, claim, split
from eval.pairs import best_and_worst, finish, found_in
from flux2 import distributed
from flux2.data.loader import Collator
from flux2.data.pairs import Pairs
from flux2.data.record import UnreadableRecord
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.generate import Sampler
from flux2.model import Flux2
from flux2.roles import velocity_of
from flux2.types import Batch

ROOT = Path(__file__).resolve().parents[2]
NAN = math.nan
GROUP = 3


def red(images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
    """How red an image is; a prompt that ends in "?" cannot be scored."""
    value = images[:, 0].float().mean((1, 2)) / 255
    missing = torch.tensor([p.endswith("?") for p in batch.prompts])
    return {"reward": torch.where(missing, NAN, value)}


def maker(model: Flux2, folder: Path, dataset: Any = None, reward: Any = red) -> Groups:
    dataset = SignWorld("train", length=6) if dataset is None else dataset
    (folder / "chunks").mkdir(parents=True, exist_ok=True)
    sampler = Sampler(steps=2, guidance=2.0)
    collate = Collator(model, latents=False, unconditional=True)
    return Groups(dataset, collate, sampler, velocity_of(model), reward, GROUP, 7, folder)


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_the_best_and_the_worst_of_each_group():
    rewards = torch.tensor([
        [0.2, 0.9, 0.5], [NAN, 0.3, 0.1], [0.4, 0.4, 0.4], [NAN, NAN, 0.7], [NAN] * 3,
        [0.1, 0.8, 0.8], [-0.5, -0.2, -0.2],
    ])  # fmt: skip
    best, worst, why = best_and_worst(rewards)
    assert why == ["", "", "flat", "unscored", "unscored", "", ""]
    kept = [(int(best[k]), int(worst[k])) for k, reason in enumerate(why) if not reason]
    assert kept == [(1, 0), (1, 2), (1, 0), (1, 0)]


def test_chunks_are_of_one_bucket_and_hold_every_record_once():
    world = SignWorld("train", length=40, tasks={"t2i": 1.0, "move": 1.0, "compose": 1.0})
    chunks = split(world, 3, 20, 4)
    assert sorted(i for c in chunks for i in c) == list(range(3, 23))
    assert all(len({world.bucket_of(i) for i in c}) == 1 and len(c) <= 4 for c in chunks)
    assert split(world, 38, 20, 4) and split(world, 40, 20, 4) == []
    assert max(i for c in split(world, 38, 20, 4) for i in c) == 39


def test_pairs_are_the_samplers_best_and_worst(tiny, tmp_path: Path):
    """Against samples drawn one prompt at a time, by evaluation's rule for their ids."""
    folder = tmp_path / "pairs"
    one = maker(tiny, folder)
    chunks = split(one.dataset, 0, 4, 2)
    one.run(chunks, found_in)
    summary = finish(folder, len(chunks), 0.0, shown=2)
    assert summary["prompts"] == summary["kept"] == 4
    data = Pairs(str(folder))
    for index in range(4):
        record = one.dataset[index]
        ids = torch.tensor([index * GROUP + k for k in range(GROUP)])
        batch = one.collate([record] * GROUP, ids)
        images = tiny.codec.decode(one.sampler(one.role, batch, 7), batch.grid)
        rewards = red(images, batch)["reward"]
        pair = data[index]
        assert pair.prompt == record.prompt and pair.meta["record"] == index
        assert pair.meta["text"] == record.meta["text"]
        assert pair.preference is not None
        winner, loser, margin = pair.preference
        for image, k in ((winner, rewards.argmax()), (loser, rewards.argmin())):
            # Batches of another size round differently.
            want = images[k].permute(1, 2, 0).numpy()
            assert np.abs(image.astype(int) - want).max() <= 1
        assert margin == pytest.approx(float(rewards.max() - rewards.min()), abs=1e-4)
    with Image.open(summary["picture"]) as shown:
        assert shown.width > 4 * 64
    judged = [r for c in range(2) for r in json.loads(
        (folder / "chunks" / f"{c:06d}.json").read_text())["rewards"]]  # fmt: skip
    assert summary["reward"]["all"] == pytest.approx(sum(judged) / 12)
    assert summary["reward"]["winners"] > summary["reward"]["all"] > summary["reward"]["losers"]


def test_two_ranks_make_what_one_makes(tiny, tmp_path: Path, monkeypatch):
    chunks = split(SignWorld("train", length=6), 0, 5, 2)
    maker(tiny, tmp_path / "one").run(chunks, found_in)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        maker(tiny, tmp_path / "two").run(chunks, found_in)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sum(name.startswith("chunks/") for name in content(tmp_path / "two")) == 3


def test_a_second_try_repeats_only_what_is_missing(tiny, tmp_path: Path):
    scored: list[int] = []

    def counted(images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        scored.extend(batch.groups.unique().tolist())
        return red(images, batch)

    folder = tmp_path / "pairs"
    one = maker(tiny, folder, reward=counted)
    chunks = split(one.dataset, 0, 6, 2)
    one.run(chunks, found_in)
    whole = content(folder)
    assert scored == list(range(6))
    for name in ("chunks/000001.json", "images/000002-0.png", "images/000002-1.png"):
        (folder / name).unlink(missing_ok=True)
    scored.clear()
    one.run(chunks, found_in)
    assert scored == [2, 3] and content(folder) == whole


def test_a_chunk_that_fails_leaves_nothing_that_counts(tiny, tmp_path: Path):
    def broken(images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        if 2 in batch.groups:
            raise RuntimeError("the judge left")
        return red(images, batch)

    folder = tmp_path / "pairs"
    with pytest.raises(RuntimeError):
        maker(tiny, folder, reward=broken).run([[0, 1], [2, 3]], found_in)
    assert not (folder / "chunks/000001.json").exists()
    maker(tiny, folder).run([[0, 1], [2, 3]], found_in)
    assert finish(folder, 2, 0.0, 0)["kept"] == 4


@dataclass(frozen=True)
class Doubtful:
    """A world whose first record cannot be scored, and whose second cannot be read."""

    world: SignWorld

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: int):
        if index == 1:
            raise UnreadableRecord("1.png is truncated")
        record = self.world[index]
        return replace(record, prompt=record.prompt + "?") if index == 0 else record

    def bucket_of(self, index: int):
        return self.world.bucket_of(index)


def test_what_gives_no_pair_is_counted(tiny, tmp_path: Path, capsys):
    folder = tmp_path / "pairs"
    one = maker(tiny, folder, Doubtful(SignWorld("train", length=6)))
    one.run([[0, 1], [1], [2, 3]], found_in)
    summary = finish(folder, 3, 0.0, shown=0)
    assert (summary["prompts"], summary["kept"], summary["unscored"]) == (3, 2, 1)
    assert summary["samples_unscored"] == GROUP and "picture" not in summary
    assert "left out record 1: 1.png is truncated" in capsys.readouterr().out
    flat = maker(tiny, tmp_path / "flat", reward=lambda x, b: {"reward": torch.ones(len(x))})
    flat.run([[2, 3]], found_in)
    with pytest.raises(InputError, match="flat 2"):
        finish(tmp_path / "flat", 1, 0.0, 0)


def test_the_margin_filters_at_the_end_and_anew(tiny, tmp_path: Path):
    folder = tmp_path / "pairs"
    maker(tiny, folder).run([[0, 1, 2, 3]], found_in)
    margins = sorted(r["margin"] for r in json.loads(
        (folder / "chunks/000000.json").read_text())["rows"])  # fmt: skip
    assert len(margins) == 4 and margins[0] < margins[-1]
    summary = finish(folder, 1, margins[2], 0)
    assert summary["kept"] == 2 and summary["below_margin"] == 2 and len(Pairs(str(folder))) == 2
    assert summary["margin"]["least"] == margins[2] and summary["margin"]["most"] == margins[3]
    assert finish(folder, 1, 0.0, 0)["kept"] == 4 and len(Pairs(str(folder))) == 4
    with pytest.raises(InputError, match="lower margin") as caught:
        finish(folder, 1, 10.0, 0)
    assert "\n" not in str(caught.value)


def test_references_come_with_their_pair(tiny, tmp_path: Path):
    world = SignWorld("train", length=2, tasks={"compose": 1.0})
    folder = tmp_path / "pairs"
    maker(tiny, folder, world).run([[0, 1]], found_in)
    finish(folder, 1, 0.0, 0)
    record = Pairs(str(folder))[1]
    assert len(record.references) == 2
    for mine, theirs in zip(record.references, world[1].references, strict=True):
        assert np.array_equal(mine, theirs)


def test_other_settings_are_refused_in_the_same_folder(tmp_path: Path):
    facts = {"model": "abc", "seed": 0, "chunks": "x"}
    claim(tmp_path / "pairs", facts, "margin")
    claim(tmp_path / "pairs", facts, "margin")
    with pytest.raises(InputError, match="another seed"):
        claim(tmp_path / "pairs", {**facts, "seed": 1}, "margin")


class Measured:
    """A reward in units of what it measures at the start."""

    def __init__(self, prompts: int = 2) -> None:
        self.scale: float | None = None
        self.prompts, self.seen = prompts, []

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        assert self.scale is not None
        return {"reward": red(images, batch)["reward"] / self.scale}

    @property
    def wants(self) -> tuple[int, int] | None:
        return (self.prompts, 5)

    def calibrate(self, chunks: Any) -> Mapping[str, Mapping[str, float]]:
        self.seen = [(len(images), batch.groups.unique().tolist()) for images, batch in chunks]
        self.scale = 0.5
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale = state["scale"]


def test_a_reward_measures_the_model_once(tiny, tmp_path: Path):
    folder = tmp_path / "pairs"
    first, again = Measured(), Measured()
    one = maker(tiny, folder, reward=first)
    calibrate(one, [[0, 1], [2]])
    assert first.seen == [(5, [0]), (5, [1])]
    calibrate(maker(tiny, folder, reward=again), [[0, 1], [2]])
    assert again.seen == [] and again.scale == 0.5
    one.run([[0, 1]], found_in)
    assert finish(folder, 1, 0.0, 0)["kept"] == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [({"count": 0}, "count"), ({"group": 1}, "group"), ({"margin": -1}, "margin"),
     ({"start": -1}, "start"), ({"chunk": 0}, "chunk"), ({"reward": None}, "reward")],
)  # fmt: skip
def test_wrong_settings_are_one_line(change: dict[str, Any], says: str):
    given = {"count": 4, "start": 0, "group": 2, "chunk": 2, "shown": 0, "margin": 0.1,
             "reward": {"_target_": "x"}}  # fmt: skip
    pairs._check(OmegaConf.create(given))
    with pytest.raises(InputError, match=says) as caught:
        pairs._check(OmegaConf.create({**given, **change}))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- through run.py


@pytest.mark.slow
def test_pairs_then_dpo_and_kto_on_the_nano_model(tmp_path: Path, command: Any):
    """A round: pairs of the base, DPO on them (interrupted and resumed), pairs of the result."""
    make = ("stage=pairs", "reward=signs", "count=6", "group=3", "margin=0", "chunk=2",
            "sampler.steps=3", "launch.threads=1")  # fmt: skip
    base = tmp_path / "pairs"
    out = command(*make, f"run.dir={base}")
    summary = json.loads((base / "summary.json").read_text())
    assert summary["kept"] == len(Pairs(str(base / "pairs"))) > 1 and "pairs of 6 prompts" in out
    assert Pairs(str(base / "pairs")).rewards
    again = command(f"resume={base}", "margin=1e9", code=2)
    assert [x for x in again.splitlines() if "error:" in x and "lower" in x]
    common = (
        f"data.dataset.path={base / 'pairs'}", "data.batch_size=4", "sampler.steps=3",
        "method.micro=2", "evaluation=none", "train.export=false", "launch.threads=1",
    )  # fmt: skip
    for stage, extra in (("dpo", ()), ("kto", ("adapter=lora",))):
        whole, half = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-half"
        command(f"stage={stage}", *common, *extra, "train.steps=2", f"run.dir={whole}")
        command(f"stage={stage}", *common, *extra, "train.steps=1", f"run.dir={half}")
        command(f"resume={half}", "train.steps=2")
        rows = [[
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ] for folder in (whole, half)]  # fmt: skip
        assert rows[0] == rows[1] and len(rows[0]) == 2
        assert rows[0][0]["loss"] == pytest.approx(math.log(2) if stage == "dpo" else 0.5, abs=1e-3)
    second = tmp_path / "second"
    command(*make, f"init_from={tmp_path / 'dpo-whole'}", "start=6", "seed=1", f"run.dir={second}")
    parents = json.loads((second / "manifest.json").read_text())["parents"]
    assert len(parents) == 1


@pytest.mark.slow
def test_what_cannot_be_is_one_line_and_exit_2(tmp_path: Path, command: Any):
    for arguments in (("stage=pairs", "group=1"), ("stage=pairs", "reward=null"),
                      ("stage=dpo",), ("stage=kto", "data.dataset.path=/nowhere"),
                      ("stage=dpo", "method.beta=0", "data.dataset.path=/nowhere")):  # fmt: skip
        out = command(*arguments, f"run.dir={tmp_path / 'run'}", code=2)
        assert len([x for x in out.splitlines() if x.startswith("error:")]) == 1, out


def numbers(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("stage", "engine"), [("dpo", "ddp"), ("dpo", "zero3"), ("kto", "zero3")])
def test_two_ranks_train_as_one_does(stage: str, engine: str, tmp_path: Path, command: Any):
    """Winners are signs, losers the next record's; each rank has two pairs, in micro-batches."""
    world, rows = SignWorld("train", length=9), []
    for k in range(8):
        for name, index in (("w", k), ("l", k + 1)):
            Image.fromarray(world[index].target).save(tmp_path / f"{name}{k}.png")
        rows.append({"prompt": world[k].prompt, "winner": f"w{k}.png", "loser": f"l{k}.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    common = (
        f"stage={stage}", f"data.dataset.path={tmp_path}", "data.batch_size=4", "train.steps=3",
        "method.micro=1", "evaluation=none", "train.export=false", "launch.threads=1",
        "model.dtype=fp32",
    )  # fmt: skip
    fp32 = ("engine.autocast=fp32", *(("engine.precision=fp32",) if engine == "zero3" else ()))
    command(*common, "engine.autocast=fp32", f"run.dir={tmp_path / 'one'}")
    command(*common, f"engine={engine}", *fp32, "launch.processes=2", f"run.dir={tmp_path / 'two'}")
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert len(one) == len(two) == 3 and one[0]["policy/grad_norm"] > 0.1
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
