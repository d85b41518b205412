"""Prompts worth training on: statistics by hand, what is written, what a second try repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from eval import filter as stage
from eval.filter import finish, found_in, reason, statistics
from eval.groups import Groups
from flux2.data.derived import Derived
from flux2.data.loader import Collator
from flux2.data.readers import Prompts
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.generate import Sampler
from flux2.model import Flux2
from flux2.roles import velocity_of
from flux2.types import Batch

ROOT = Path(__file__).resolve().parents[2]
NAN = float("nan")
REWARDS = {  # by prompt
    0: [0.1, 0.9, 0.5], 1: [0.5, 0.5, 0.5], 2: [NAN, NAN, 0.9], 3: [0.0, 0.2, NAN],
    4: [0.9, 1.0, 1.0], 5: [0.3, 0.3, 0.35],
}  # fmt: skip


def by_table(images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
    values = [REWARDS[g][i % 3] for g, i in zip(batch.groups.tolist(), batch.ids.tolist(),
                                                strict=True)]  # fmt: skip
    return {"reward": torch.tensor(values)}


def groups(model: Flux2, folder: Path, reward: Any = by_table) -> Groups:
    (folder / "chunks").mkdir(parents=True, exist_ok=True)
    sampler = Sampler(steps=1, guidance=1.0)
    collate = Collator(model, latents=False)
    world = SignWorld("train", length=6)
    return Groups(world, collate, sampler, velocity_of(model), reward, 3, 7, folder)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in file.read_text().splitlines()]


def test_statistics_by_hand():
    found = statistics([1.0, None, 2.0, 6.0])
    assert found == pytest.approx(
        {"mean": 3.0, "min": 1.0, "max": 6.0, "std": (14 / 3) ** 0.5, "range": 5.0}
    )
    assert all(v != v for v in statistics([None, None]).values())


@pytest.mark.parametrize(
    ("rewards", "bounds", "why"),
    [
        ([0.1, 0.3], (0.2, None, None), ""), ([0.1, 0.25], (0.2, None, None), "range"),
        ([0.5, 0.5], (0.0, None, None), "range"), ([None, 0.5], (0.0, None, None), "unscored"),
        ([None, 0.5, 0.9], (0.2, None, None), ""), ([0.0, 0.2], (0.1, 0.2, None), "low"),
        ([0.0, 0.2], (0.1, 0.1, None), ""), ([0.7, 1.0], (0.1, None, 0.8), "high"),
        ([0.7, 0.9], (0.1, 0.2, 0.8), ""),
    ],
)  # fmt: skip
def test_why_a_prompt_is_left_out(rewards: list[float | None], bounds: Any, why: str):
    assert reason(rewards, *bounds) == why


def test_what_is_written_and_read_again(tiny: Flux2, tmp_path: Path):
    folder = tmp_path / "filter"
    one = groups(tiny, folder)
    one.run([[0, 1, 2, 3], [4, 5]], found_in)
    summary = finish(folder, 2, 0.1, None, 0.9)
    assert summary["prompts"] == 6 and summary["kept"] == 2
    assert summary["left_out"] == {"unscored": 1, "range": 2, "low": 0, "high": 1}
    assert summary["samples_unscored"] == 3
    every, kept = lines(folder / "groups.jsonl"), lines(folder / "prompts.jsonl")
    assert [row["record"] for row in every] == list(range(6))
    assert [row["kept"] for row in every] == [True, False, False, True, False, False]
    assert every[2]["rewards"] == [None, None, pytest.approx(0.9)]
    assert every[3]["reward_mean"] == pytest.approx(0.1)
    assert summary["range"]["kept"] == pytest.approx((0.8 + 0.2) / 2)
    assert [row["record"] for row in kept] == [0, 3]
    with Image.open(summary["picture"]) as picture:
        assert picture.width > 300
    prompts, derived = Prompts(str(folder / "prompts.jsonl")), Derived(one.dataset, str(folder))
    for data in (prompts, derived):
        assert [r.prompt for r in (data[0], data[1])] == [one.dataset[k].prompt for k in (0, 3)]
        assert data[1].meta["reward_range"] == pytest.approx(0.2)
        assert data[1].meta["text"] == one.dataset[3].meta["text"]
    assert derived[1].meta["place"] == one.dataset[3].meta["place"]


def test_filtering_anew_samples_nothing_and_a_second_try_only_what_is_missing(
    tiny: Flux2, tmp_path: Path
):
    scored: list[int] = []

    def counted(images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        scored.extend(batch.groups.unique().tolist())
        return by_table(images, batch)

    folder = tmp_path / "filter"
    one, chunks = groups(tiny, folder, counted), [[0, 1], [2, 3], [4, 5]]
    one.run(chunks, found_in)
    assert finish(folder, 3, 0.11, None, None)["kept"] == 2 and len(scored) == 6
    assert finish(folder, 3, 0.04, None, None)["kept"] == 4
    (folder / "chunks/000001.json").unlink()
    one.run(chunks, found_in)
    assert scored[6:] == [2, 3] and finish(folder, 3, 0.04, None, None)["kept"] == 4
    with pytest.raises(InputError, match="none of 6 prompts") as caught:
        finish(folder, 3, 5.0, None, None)
    assert "\n" not in str(caught.value)


GIVEN = {"count": 4, "start": 0, "group": 2, "chunk": 2, "range": 0.1, "low": None, "high": None,
         "reward": {"_target_": "x"}, "model": {}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [({"count": 0}, "count"), ({"group": 1}, "group"), ({"range": -1}, "range"),
     ({"start": -1}, "start"), ({"chunk": 0}, "chunk"), ({"reward": None}, "reward"),
     ({"low": 0.6, "high": 0.5}, "low=0.6")],
)  # fmt: skip
def test_wrong_settings_are_one_line(change: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says) as caught:
        stage.make(OmegaConf.create({**GIVEN, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_filter_then_train_with_dynamic_sampling_and_resume(tmp_path: Path, command: Any):
    run = tmp_path / "filter"
    command("stage=filter", "reward=signs", "count=8", "group=3", "chunk=4", "range=0.01",
            "sampler.steps=3", "launch.threads=1", f"run.dir={run}")  # fmt: skip
    kept = len(Prompts(str(run / "filter/prompts.jsonl")))
    assert json.loads((run / "summary.json").read_text())["kept"] == kept > 1
    again = command(f"resume={run}", "range=1e9", code=2)
    assert [x for x in again.splitlines() if "error:" in x and "range=…" in x]
    for kind in ("nft", "grpo"):
        common = (
            f"stage={kind}", "data=prompts", f"data.dataset.path={run}/filter/prompts.jsonl",
            "filter=dynamic", "data.batch_size=4", "method.filter.min_range=0.01",
            "method.group=3", "reward=signs", "sampler.steps=4", "evaluation=none",
            "train.export=false", "launch.threads=1", *(["window=all"] if kind == "grpo" else []),
        )  # fmt: skip
        whole, half = tmp_path / f"{kind}-whole", tmp_path / f"{kind}-half"
        command(*common, "train.steps=2", f"run.dir={whole}")
        command(*common, "train.steps=1", f"run.dir={half}")
        command(f"resume={half}", "train.steps=2")
        rows = [[
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ] for folder in (whole, half)]  # fmt: skip
        assert rows[0] == rows[1] and len(rows[0]) == 2
        assert 0 < rows[0][0]["groups_trained"] <= 1
    wrong = command("stage=nft", "filter=dynamic", "data.batch_size=5", f"run.dir={tmp_path}/x",
                    code=2)  # fmt: skip
    assert [x for x in wrong.splitlines() if "error:" in x and "multiple of 2" in x]
