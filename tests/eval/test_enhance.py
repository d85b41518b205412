"""Rewritten prompts: what is kept, what is asked again, what a second try repeats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from eval import enhance
from eval.enhance import Enhancer, finish
from eval.groups import claim
from eval.rewriting import Style
from flux2 import distributed
from flux2.data.captions import pick_caption
from flux2.data.derived import Derived
from flux2.data.loader import Collator
from flux2.data.readers import Prompts
from flux2.data.record import Record, UnreadableRecord
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from rewards.vlm.model import Request, Written
from tests.rewards.judge_server import Asked, JudgeServer, Reply
from tests.rewards.vlm.test_writing import wrote

ROOT = Path(__file__).resolve().parents[2]
PROMPT = re.compile(r"<prompt>(.*)</prompt>", re.DOTALL)


def asked_of(request: Request) -> str:
    found = PROMPT.search("".join(p for p in request.parts if isinstance(p, str)))
    assert found is not None
    return found[1]


class Scribe:
    """A writer that answers by a function of (prompt, request)."""

    licence, sees, engine = "none", True, "scribe"

    def __init__(self, answer: Callable[[str, Request], Written]) -> None:
        self.answer, self.asked = answer, list[Request]()

    def ready(self) -> None: ...

    def close(self) -> None: ...

    def write(self, requests: Sequence[Request]) -> list[Request]:
        self.asked += requests
        return list(requests)

    def written(self, pending: list[Request]) -> list[Written]:
        return [self.answer(asked_of(r), r) for r in pending]


def richer(prompt: str, request: Request) -> Written:
    return Written(f"{prompt}, in soft light, seed {'abcdefgh'[request.seed % 8]}")


def enhancer(folder: Path, answer: Any = richer, dataset: Any = None, **more: Any) -> Enhancer:
    (folder / "chunks").mkdir(parents=True, exist_ok=True)
    given = {"rewrites": 1, "attempts": 3, "seed": 5, **more}
    dataset = SignWorld("train", length=9) if dataset is None else dataset
    return Enhancer(dataset, Scribe(answer), Style(), **given, folder=folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "prompts.jsonl").read_text().splitlines()]


def test_prompts_are_rewritten_and_read_again_with_their_truth(tmp_path: Path):
    world = SignWorld("train", length=9)
    one = enhancer(tmp_path)
    one.run([[0, 1, 2], [3, 4]])
    summary = finish(tmp_path, 2, shown=1)
    assert (summary["prompts"], summary["rewritten"], summary["kept"]) == (5, 5, 0)
    assert summary["attempts"] == 1
    data = Prompts(str(tmp_path / "prompts.jsonl"))
    assert len(data) == 5
    for k in range(5):
        record, original = data[k], world[k]
        assert record.prompt == richer(original.prompt, one.writer.asked[k]).text
        assert record.meta["original_prompt"] == original.prompt
        assert record.meta["captions"] == {"raw": original.prompt, "enhanced": record.prompt}
        assert record.meta["text"] == original.meta["text"]
        assert record.meta["text_box"] == pytest.approx(original.meta["text_box"])
        assert record.meta["ground"] == original.meta["ground"] and record.meta["record"] == k
    # The mixture is a mixture of captions.
    mix = {"raw": 0.5, "enhanced": 0.5}
    low, high = (pick_caption(data[0], mix, u) for u in (0.2, 0.7))
    assert (low.prompt, high.prompt) == (world[0].prompt, data[0].prompt)
    assert low.meta["original_prompt"] == high.meta["original_prompt"] == world[0].prompt


def test_rewards_judge_by_what_was_asked_for(tiny: Any, tmp_path: Path):
    """The model is given the rewritten prompt, twice rewritten here; samples of one record are
    one group, whichever of its captions they have."""
    first = Derived(SignWorld("train", length=9), made(tmp_path / "one"))
    data = Derived(first, made(tmp_path / "two", dataset=first))
    assert data[1].prompt.count("at dusk, ") == 2
    mix = {"raw": 0.5, "enhanced": 0.5}
    records = [data[0], pick_caption(data[1], mix, 0.1), pick_caption(data[1], mix, 0.9)]
    batch = Collator(tiny, latents=False)(records, torch.arange(3))
    world = SignWorld("train", length=9)
    assert batch.prompts == tuple(world[k].prompt for k in (0, 1, 1))
    assert batch.groups.tolist() == [0, 1, 1] and batch.meta[2]["text"] == world[1].meta["text"]
    assert batch.cond is not None
    assert torch.equal(batch.cond.text, tiny.text([r.prompt for r in records]))
    assert not torch.equal(batch.cond.text[1], batch.cond.text[2])


def made(folder: Path, **more: Any) -> str:
    enhancer(folder, lambda p, r: Written(f"at dusk, {p}"), **more).run([[0, 1]])
    finish(folder, 1, 0)
    return str(folder)


def test_what_loses_something_is_asked_again_and_then_kept(tmp_path: Path):
    """The word of record 0 is lost in the first draw, that of record 1 in all."""
    world = SignWorld("train", length=9)
    words = [world[k].meta["text"][0] for k in range(3)]

    def forgetful(prompt: str, request: Request) -> Written:
        n = sum(asked_of(r) == prompt for r in scribe.asked)
        bad = words[1] in prompt or (words[0] in prompt and n == 1)
        return Written("a sign" if bad else richer(prompt, request).text)

    one = enhancer(tmp_path, forgetful)
    scribe = one.writer
    one.run([[0, 1, 2]])
    summary = finish(tmp_path, 1, 0)
    assert (summary["rewritten"], summary["kept"], summary["failed"]) == (2, 1, 0)
    assert summary["reasons"]["kept"] == {"lost": 1} and summary["attempts"] == (2 + 3 + 1) / 3
    first, second, third = lines(tmp_path)
    assert first["attempts"] == [2] and third["attempts"] == [1]
    assert second["prompt"] == second["original_prompt"] == world[1].prompt
    assert second["captions"] == {"raw": world[1].prompt}
    # What was wrong is told, and the draw is another.
    again = [r for r in scribe.asked if asked_of(r) == world[1].prompt]
    assert len(again) == 3 and len({r.seed for r in again}) == 3
    told = ["".join(p for p in r.parts if isinstance(p, str)) for r in again]
    assert "rejected" not in told[0] and f'it lost "{words[1]}"' in told[1]


@pytest.mark.parametrize(("failure", "draws"), [("too long", 3), ("no words", 3), ("HTTP 503", 1)])
def test_failures(tmp_path: Path, failure: str, draws: int):
    """The text's own faults are mended by another draw; a server's are left to a second run."""
    one = enhancer(tmp_path, lambda p, r: Written("", failure))
    one.run([[0, 1]])
    assert len(one.writer.asked) == 2 * draws
    with pytest.raises(InputError, match="none of 2 prompts") as caught:
        finish(tmp_path, 1, 0)
    assert "\n" not in str(caught.value) and failure.split()[-1] in str(caught.value)


def test_a_second_try_asks_only_for_what_is_missing_or_failed(tmp_path: Path):
    gone = {"once": True}

    def flaky(prompt: str, request: Request) -> Written:
        if prompt == world[3].prompt and gone["once"]:
            return Written("", "no connection")
        return richer(prompt, request)

    world = SignWorld("train", length=9)
    chunks = [[0, 1], [2, 3], [4]]
    one = enhancer(tmp_path, flaky, rewrites=2)
    one.run(chunks)
    assert len(one.writer.asked) == 10
    summary = finish(tmp_path, 3, 0)
    assert (summary["rewritten"], summary["failed"]) == (8, 2)
    assert lines(tmp_path)[3]["prompt"] == world[3].prompt  # until then the original stands
    (tmp_path / "chunks/000002.json").unlink()
    gone["once"] = False
    again = enhancer(tmp_path, flaky, rewrites=2)
    again.run(chunks)
    assert {asked_of(r) for r in again.writer.asked} == {world[3].prompt, world[4].prompt}
    assert len(again.writer.asked) == 4
    assert finish(tmp_path, 3, 0)["failed"] == 0
    whole = tmp_path / "whole"
    enhancer(whole, richer, rewrites=2).run(chunks)
    finish(whole, 3, 0)
    assert (whole / "prompts.jsonl").read_text() == (tmp_path / "prompts.jsonl").read_text()


def test_several_rewrites_are_captions_of_one_record(tmp_path: Path):
    def some(prompt: str, request: Request) -> Written:
        drawn = richer(prompt, request).text
        return Written("lost" if request is scribe.asked[1] else drawn)

    one = enhancer(tmp_path, some, rewrites=3, attempts=1)
    scribe = one.writer
    one.run([[7]])
    finish(tmp_path, 1, 0)
    (line,) = lines(tmp_path)
    assert set(line["captions"]) == {"raw", "enhanced", "enhanced3"}
    assert line["captions"]["enhanced"] == line["prompt"] != line["captions"]["enhanced3"]
    assert len({r.seed for r in scribe.asked}) == 3


def test_edits_show_their_images_and_keep_them(tmp_path: Path):
    world = SignWorld("train", length=4, tasks={"compose": 1.0})
    one = enhancer(tmp_path, richer, world)
    one.run([[0, 1]])
    finish(tmp_path, 1, 0)
    shown = [p for p in one.writer.asked[0].parts if not isinstance(p, str)]
    assert len(shown) == 2 and np.array_equal(shown[1].array, world[0].references[1])
    assert "image editor" in one.writer.asked[0].system
    data = Derived(world, str(tmp_path))
    record = data[1]
    assert record.prompt.endswith(richer("", one.writer.asked[1]).text)
    assert np.array_equal(record.target, world[1].target) and len(record.references) == 2


def test_two_ranks_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chunks = [[0, 1], [2, 3], [4]]
    enhancer(tmp_path / "one").run(chunks)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        enhancer(tmp_path / "two").run(chunks)
    for n in range(3):
        name = f"chunks/{n:06d}.json"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


class Torn:
    """A world whose record 1 cannot be read."""

    def __init__(self) -> None:
        self.world = SignWorld("train", length=3)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Record:
        if index == 1:
            raise UnreadableRecord("1.png is truncated")
        return self.world[index]

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        return self.world.bucket_of(index)


def test_what_cannot_be_read_is_told_and_counted(tmp_path: Path, capsys: Any):
    enhancer(tmp_path, dataset=Torn()).run([[0, 1, 2]])
    summary = finish(tmp_path, 1, 0)
    assert (summary["prompts"], summary["unreadable"]) == (2, 1)
    assert "left out record 1: 1.png is truncated" in capsys.readouterr().out
    assert [x["record"] for x in lines(tmp_path)] == [0, 2]


def test_other_settings_are_refused_in_the_same_folder(tmp_path: Path):
    claim(tmp_path / "x", {"writer": "a", "seed": 0}, "shown")
    claim(tmp_path / "x", {"writer": "a", "seed": 0}, "shown")
    with pytest.raises(InputError, match="another writer made: only shown may change"):
        claim(tmp_path / "x", {"writer": "b", "seed": 0}, "shown")


GIVEN = {"count": 4, "start": 0, "rewrites": 1, "attempts": 1, "chunk": 2, "shown": 0,
         "writer": {"model": "x"}}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [({"count": 0}, "count"), ({"start": -1}, "start"), ({"rewrites": 0}, "rewrites"),
     ({"attempts": 0}, "attempts"), ({"chunk": 0}, "chunk"), ({"shown": -1}, "shown"),
     ({"writer": {"model": None}}, "writer.model")],
)  # fmt: skip
def test_wrong_settings_are_one_line(change: dict[str, Any], says: str):
    enhance._check(OmegaConf.create(GIVEN))
    enhance._check(OmegaConf.create({**GIVEN, "count": None}))
    with pytest.raises(InputError, match=says) as caught:
        enhance._check(OmegaConf.create({**GIVEN, **change}))
    assert "\n" not in str(caught.value)


def configured(url: str, folder: Path, **more: Any) -> Any:
    style = {"system": None, "system_edit": None, "words": 50, "tokens": 99, "temperature": 0.7}
    data = {"dataset": {"_target_": "flux2.data.signs.SignWorld", "split": "train", "length": 6}}
    writer = {"_target_": "rewards.vlm.endpoint.Endpoint", "url": url, "model": "judge",
              "pause": 0.01, "longest_pause": 0.02}  # fmt: skip
    run = {"run": {"dir": str(folder)}, "seed": 3, "stage": {"name": "enhance"}}
    return OmegaConf.create({**GIVEN, **style, **run, "data": data, "writer": writer, **more})


def test_the_stage_over_a_server(tmp_path: Path, capsys: Any):
    """One prompt has the server fail at first; the resumed run asks for it alone."""
    failing = {"on": True}

    def answer(asked: Asked, number: int) -> Reply:
        words = asked.request["messages"][1]["content"][-1]["text"]
        prompt = PROMPT.search(words)
        assert prompt is not None
        if failing["on"] and prompt[1] == SignWorld("train", length=6)[2].prompt:
            return Reply(b"no", 400)
        return Reply(wrote(f"{prompt[1]}, at noon"))

    with JudgeServer(answer) as server:
        cfg = configured(server.url, tmp_path)
        summary = enhance.make(cfg)
        assert (summary["rewritten"], summary["failed"]) == (3, 1)
        assert summary["reasons"]["failed"] == {"HTTP 400": 1}
        asked, failing["on"] = len(server.asked), False
        summary = enhance.make(cfg)
        assert len(server.asked) == asked + 1 and summary["failed"] == 0
        with pytest.raises(InputError, match="another seed"):
            enhance.make(configured(server.url, tmp_path, seed=4))
    facts = json.loads((tmp_path / "enhance/facts.json").read_text())
    assert facts["writer"] == "vlm:judge" and facts["style"]["temperature"] == 0.7
    assert "resume this run" in capsys.readouterr().out
    with pytest.raises(InputError, match="no model answers"):
        enhance.make(configured(server.url, tmp_path / "gone"))


def test_a_writer_that_sees_nothing_gets_no_edits(tmp_path: Path, monkeypatch: Any):
    blind = Scribe(richer)
    blind.sees = False
    edits = {"dataset": {"_target_": "flux2.data.signs.SignWorld", "split": "train", "length": 6,
                         "tasks": {"move": 1.0}}}  # fmt: skip
    cfg = configured("http://x", tmp_path, data=edits)
    import flux2.train

    built = flux2.train.build
    monkeypatch.setattr(flux2.train, "build", lambda c, **k: blind if "url" in c else built(c, **k))
    with pytest.raises(InputError, match="sees no images"):
        enhance.make(cfg)


@pytest.mark.slow
def test_through_the_command_then_sft_and_nft_on_the_mixture(tmp_path: Path, command: Any):
    def answer(asked: Asked, number: int) -> Reply:
        words = asked.request["messages"][1]["content"][-1]["text"]
        prompt = PROMPT.search(words)
        assert prompt is not None
        return Reply(wrote(f"at noon, {prompt[1]}"))

    run = tmp_path / "enhance"
    with JudgeServer(answer) as server:
        out = command("stage=enhance", "count=12", f"writer.url={server.url}",
                      "writer.model=judge", f"run.dir={run}")  # fmt: skip
    assert "12 rewrites of 12 prompts" in out and "→ at noon" in out
    assert json.loads((run / "summary.json").read_text())["rewritten"] == 12
    short = ("train.steps=2", "data.batch_size=4", "evaluation=none", "train.export=false",
             "launch.threads=1", "data.captions={raw: 0.5, enhanced: 0.5}")  # fmt: skip
    command("stage=sft", "data=derived", f"data.dataset.path={run}/enhance", *short,
            f"run.dir={tmp_path / 'sft'}")  # fmt: skip
    file = run / "enhance" / "prompts.jsonl"
    command("stage=nft", "data=prompts", f"data.dataset.path={file}", *short, "method.group=2",
            "reward=signs", "sampler.steps=2", f"run.dir={tmp_path / 'nft'}")  # fmt: skip
    out = command("stage=enhance", f"run.dir={tmp_path / 'none'}", code=2)
    assert [x for x in out.splitlines() if x.startswith("error:") and "writer.model" in x]
