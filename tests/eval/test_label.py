"""Labelling by people: what is stored, what is asked, how far raters agree, what becomes of it."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from eval.evaluation import Evaluation, write_image
from eval.label import answers as answers_module
from eval.label.agreement import (
    TURNED,
    agreement,
    cohen_kappa,
    habits,
    krippendorff_alpha,
    votes_of,
)
from eval.label.answers import Answer, AnswerFile, read_all, read_answers
from eval.label.page import lines, pictures, shown
from eval.label.session import DISTANCE, Session, schedule
from eval.label.source import Pair, read
from eval.label.stage import Board, label
from eval.label.verdict import Rules, decide
from eval.records import Fingerprint, Results, Score
from flux2.data.pairs import Pairs
from flux2.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def picture(path: Path, colour: tuple[int, int, int]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)
    return path.name


def make_pairs(folder: Path, count: int = 6) -> Path:
    """`count` pairs: the given winner of pair k is (k, 255, 0), the loser (k, 0, 255)."""
    rows = []
    for k in range(count):
        names = [
            picture(folder / f"{k}{s}.png", (k, *c)) for s, c in (("w", (255, 0)), ("l", (0, 255)))
        ]
        rows.append({"prompt": f"prompt {k}", "winner": names[0], "loser": names[1], "margin": 0.4,
                     "meta": {"number": k}})  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def made_up(count: int) -> list[Pair]:
    return [Pair(f"{k:04d}", f"prompt {k}", Path(f"{k}a"), Path(f"{k}b")) for k in range(count)]


def configuration(folder: Path, **keys: Any) -> Any:
    cfg = OmegaConf.load(ROOT / "conf/stage/label.yaml")
    return OmegaConf.merge(cfg, {"seed": 0, "run": {"dir": str(folder)}, **keys})


def say(home: Path, rater: str, source: Any, votes: dict[int, str], seed: int = 0) -> None:
    """A rater's answers: number of a pair (meta) → a, b, tie or skip, whatever the sides are."""
    file = AnswerFile(home, rater)
    for item in schedule(source.pairs, seed, rater, 0.0):
        vote = votes.get(item.pair.meta["number"])
        if vote is not None:
            choice = vote if vote in ("tie", "skip") else "left" if vote == item.left else "right"
            file.add(item.pair.id, False, item.left, choice, 1.5)
    file.close()


# ---------------------------------------------------------------- agreement


def test_cohens_kappa_of_published_tables():
    """Of two raters' tables: .4 and .1304 (the usual textbook ones), and 0 where it is chance."""

    def of(table: list[list[int]]) -> float:
        both = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
        return cohen_kappa([i for i, _ in both], [j for _, j in both])

    assert of([[20, 5], [10, 15]]) == pytest.approx(0.4)
    assert of([[45, 15], [25, 15]]) == pytest.approx(0.1304, abs=1e-4)
    assert of([[25, 35], [5, 35]]) == pytest.approx(0.2593, abs=1e-4)
    assert of([[9, 3], [3, 1]]) == pytest.approx(0, abs=1e-12)
    assert of([[5, 0], [0, 5]]) == 1 and of([[0, 5], [5, 0]]) == -1
    assert math.isnan(of([[7, 0], [0, 0]])) and math.isnan(cohen_kappa([], []))


def test_krippendorffs_alpha_of_his_own_examples():
    """Krippendorff (2011), sections A and C: .095 of two observers, .743 of four with gaps."""
    two = zip("0100000010", "1110010000", strict=True)
    assert krippendorff_alpha([list(unit) for unit in two]) == pytest.approx(0.095, abs=5e-4)
    observers = ("123321412...", "12332241 25.3".replace(" ", ""), ".33323422 51.".replace(" ", ""),
                 "123324412 51.".replace(" ", ""))  # fmt: skip
    units = [[c for c in column if c != "."] for column in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["a", "a"], ["b", "b", "b"]]) == 1
    assert math.isnan(krippendorff_alpha([["a", "a"]])) and math.isnan(krippendorff_alpha([["a"]]))


def test_agreement_counts_every_pair_in_both_orders():
    """By hand: 3 of 4 alike; a, b, tie have shares 3/8, 3/8, 2/8 for both, so chance is 22/64."""
    votes = {"x": dict(zip("1234", ["a", "a", "tie", "b"], strict=True)),
             "y": dict(zip("1234", ["a", "b", "tie", "b"], strict=True))}  # fmt: skip
    found = agreement(votes)
    assert found is not None and (found.measure, found.pairs) == ("Cohen's kappa", 4)
    assert found.same == 0.75
    assert found.value == pytest.approx((0.75 - 22 / 64) / (1 - 22 / 64))
    for turned in ("1", "24", "1234"):  # which image is called a cannot matter
        other = {r: {p: TURNED[v] if p in turned else v for p, v in own.items()}
                 for r, own in votes.items()}  # fmt: skip
        assert agreement(other) == found
    three = agreement({**votes, "z": {"1": "a", "9": "b"}, "nobody": {}})
    assert three is not None and three.measure == "Krippendorff's alpha" and three.pairs == 4
    assert agreement({"x": votes["x"], "nobody": {}}) is None
    strangers = agreement({"x": {"1": "a"}, "y": {"2": "a"}})
    assert strangers is not None and strangers.pairs == 0 and math.isnan(strangers.value)


def test_raters_who_always_prefer_the_same_image_agree():
    """Without both orders kappa would not be defined here, and 0 after one other vote."""
    all_a = {str(k): "a" for k in range(9)}
    found = agreement({"x": all_a, "y": dict(all_a)})
    assert found is not None and found.value == 1
    assert math.isnan(cohen_kappa(list(all_a.values()), list(all_a.values())))


def test_a_vote_is_the_image_and_not_the_side():
    table = {("a", "left"): "a", ("a", "right"): "b", ("b", "left"): "b", ("b", "right"): "a",
             ("a", "tie"): "tie", ("b", "tie"): "tie", ("a", "skip"): None}  # fmt: skip
    for (left, choice), vote in table.items():
        assert Answer(1, "p", False, left, choice, 1.0).vote == vote


def test_habits_of_a_rater():
    rows = [("1", False, "a", "left", 1.0), ("2", False, "b", "left", 3.0),
            ("3", False, "a", "tie", 8.0), ("4", False, "a", "skip", math.nan),
            ("1", True, "b", "right", 2.0), ("2", True, "a", "left", 2.0),
            ("3", True, "b", "skip", 2.0)]  # fmt: skip
    given = [Answer(n, *row) for n, row in enumerate(rows, 1)]
    found = habits(given)
    assert (found.answers, found.ties, found.skips) == (7, 1, 2)
    assert found.left == 0.75 and found.seconds == 2.0
    assert (found.repeated, found.same) == (2, 1)  # 1: a and a; 2: b and a; 3 was skipped
    assert votes_of(given, ["1", "2", "4"]) == {"1": "a", "2": "b"}
    assert math.isnan(habits([]).left) and math.isnan(habits([]).seconds)


# ---------------------------------------------------------------- what is asked


def test_the_order_is_everybodys_and_the_sides_are_ones_own():
    pairs = made_up(1000)
    r1, r2 = (schedule(pairs, 0, rater, 0.0) for rater in ("r1", "r2"))
    assert [i.pair.id for i in r1] == [i.pair.id for i in r2] != [p.id for p in pairs]
    assert {i.pair.id for i in r1} == {p.id for p in pairs}
    left = np.array([[i.left == "a" for i in items] for items in (r1, r2)])
    assert np.abs(left.mean(1) - 0.5).max() < 4 * 0.5 / math.sqrt(1000)
    assert abs((left[0] == left[1]).mean() - 0.5) < 4 * 0.5 / math.sqrt(1000)
    assert schedule(pairs, 0, "r1", 0.0) == r1 != schedule(pairs, 1, "r1", 0.0)
    fewer = [i for i in r1 if int(i.pair.id) < 500]  # a pair more or less moves no other
    assert schedule(pairs[:500], 0, "r1", 0.0) == fewer


def test_some_pairs_come_again_with_sides_swapped():
    pairs = made_up(1000)
    items = schedule(pairs, 0, "r1", 0.1)
    places = {(i.pair.id, i.repeat): (at, i.left) for at, i in enumerate(items)}
    again = [i for i in items if i.repeat]
    assert abs(len(again) - 98) < 4 * math.sqrt(98)
    for item in again:
        at, side = places[item.pair.id, False]
        later, other = places[item.pair.id, True]
        assert later - at > DISTANCE and {side, other} == {"a", "b"}
    assert {i.pair.id for i in again} != {
        i.pair.id for i in schedule(pairs, 0, "r2", 0.1) if i.repeat
    }
    few = schedule(made_up(3), 0, "r1", 0.99)
    assert sum(i.repeat for i in few) == 2 and few[-1].repeat


def session(home: Path, pairs: list[Pair], rater: str = "r1", seed: int = 0) -> Session:
    return Session(schedule(pairs, seed, rater, 0.5), AnswerFile(home, rater))


def test_a_session_goes_on_where_it_stopped(tmp_path: Path):
    pairs = made_up(8)
    one = session(tmp_path / "whole", pairs)
    tokens = []
    while upcoming := one.upcoming(1):
        tokens.append(upcoming[0].token)
        assert one.answer(tokens[-1], ("left", "tie", "right")[len(tokens) % 3], 1.0)
    assert len(tokens) == len(set(tokens)) == one.progress[0] == one.progress[1] > 8
    seen = []
    for _ in tokens:
        part = session(tmp_path / "parts", pairs)  # a new one for each answer
        seen.append(part.upcoming(1)[0].token)
        part.answer(seen[-1], ("left", "tie", "right")[len(seen) % 3], 1.0)
        part.file.close()
    assert seen == tokens
    plain = [[(a.pair, a.repeat, a.left, a.choice) for a in read_all(tmp_path / name)["r1"]]
             for name in ("whole", "parts")]  # fmt: skip
    assert plain[0] == plain[1]


def test_a_stale_answer_is_not_stored_and_undo_goes_back(tmp_path: Path):
    one = session(tmp_path, made_up(8))
    first, second = (item.token for item in one.upcoming(2))
    assert not one.answer(second, "left", 1.0) and one.progress[0] == 0
    assert one.answer(first, "left", 1.0)
    assert not one.answer(first, "right", 1.0)  # a second key for the same pair
    assert one.answer(second, "right", 2.0) and one.progress[0] == 2
    assert one.undo() and one.upcoming(1)[0].token == second
    one.file.close()
    one = session(tmp_path, made_up(8))  # of an earlier session as well
    assert one.undo() and one.upcoming(1)[0].token == first and not one.undo()
    assert one.answer(first, "tie", None) and math.isnan(one.file.answers[0].seconds)
    with pytest.raises(InputError, match="'up' is no answer"):
        one.answer(second, "up", 1.0)
    for odd in (-1.0, math.inf, "soon"):
        one.undo()
        assert one.answer(first, "tie", odd)  # type: ignore[arg-type]
        assert math.isnan(one.file.answers[-1].seconds)
    one.file.close()


def test_a_repeat_is_swapped_from_what_was_shown_and_no_skipped_pair_comes_again(tmp_path: Path):
    pairs = made_up(40)
    one = session(tmp_path, pairs)
    twice = [i.pair.id for i in one.items if i.repeat]
    sides = {}
    for _ in range(20):
        item = one.upcoming(1)[0]
        sides[item.pair.id] = item.left
        one.answer(item.token, "skip" if item.pair.id == twice[0] else "left", 1.0)
    one.file.close()
    other = session(tmp_path, pairs, seed=5)  # whose own sides are other ones
    asked = [i for i in other.asked() if i.repeat and i.pair.id in sides]
    assert asked and all(i.left != sides[i.pair.id] for i in asked)
    again = Session(one.items, other.file)
    assert twice[0] not in {i.pair.id for i in again.asked() if i.repeat}
    assert again.progress[1] == len(one.items) - 1
    other.file.close()


# ---------------------------------------------------------------- what is stored


def test_what_a_kill_cuts_short_is_cut_off(tmp_path: Path):
    file = AnswerFile(tmp_path, "r1")
    for k in range(3):
        file.add(f"p{k}", False, "a", "left", 1.0)
    file.undo()
    file.close()
    path = tmp_path / "answers/r1.jsonl"
    whole = path.read_bytes()
    for torn in (b'{"n": 4, "pair": "p3', b'{"n"', b"\xe2\x80"):
        path.write_bytes(whole + torn)
        assert [a.pair for a in read_answers(path)] == ["p0", "p1"]
        file = AnswerFile(tmp_path, "r1")
        assert path.read_bytes() == whole and len(file.answers) == 2
        file.add("p3", True, "b", "skip", 1.0)
        file.close()
        assert [a.n for a in read_answers(path)] == [1, 2, 4]


def test_a_killed_process_loses_no_answer_it_had_told_of(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from eval.label.answers import AnswerFile\n"
        f"file = AnswerFile(Path({str(tmp_path)!r}), 'r1')\n"
        "for k in range(10**6):\n"
        "    file.add(f'p{k}', False, 'a', 'left', 1.0); print(k, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(20)]
        with pytest.raises(InputError, match="r1 is answering already"):
            AnswerFile(tmp_path, "r1")
        writer.send_signal(signal.SIGKILL)
    kept = [a.pair for a in read_all(tmp_path)["r1"]]
    assert told == list(range(20)) and kept == [f"p{k}" for k in range(len(kept))]
    assert len(kept) >= 20
    AnswerFile(tmp_path, "r1").close()  # and it can be taken up


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch):
    file = AnswerFile(tmp_path, "r1")
    file.add("p0", False, "a", "left", 1.0)
    before = file.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(answers_module.os, "fsync", full)
        for act in (lambda: file.add("p1", False, "a", "left", 1.0), file.undo):
            with pytest.raises(OSError, match="No space"):
                act()
            assert file.path.read_bytes() == before and len(file.answers) == 1
    file.add("p1", False, "b", "tie", 1.0)
    file.close()
    assert [a.n for a in read_answers(file.path)] == [1, 2]


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[]", '{"n": 1}', '{"undo": 7}',
     '{"n": 2, "pair": "p", "repeat": false, "left": "a", "choice": "left", "seconds": 1}',
     '{"n": 1, "pair": "p", "repeat": false, "left": "c", "choice": "left", "seconds": 1}',
     '{"n": 1, "pair": "p", "repeat": 0, "left": "a", "choice": "left", "seconds": 1}'],
)  # fmt: skip
def test_a_damaged_line_is_named(tmp_path: Path, line: str):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers/r1.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"r1.jsonl, line 1 is no"):
        read_all(tmp_path)
    with pytest.raises(InputError, match=r"r1.jsonl, line 1 is no"):
        AnswerFile(tmp_path, "r1")


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("votes", "rules", "winner", "margin", "why"),
    [
        ("a", {}, "a", 1.0, ""),
        ("abb", {}, "b", 1 / 3, ""),
        ("bbbb", {"votes": 4, "agreement": 1.0}, "b", 1.0, ""),
        ("abb", {"agreement": 0.7}, None, 0.0, "little agreement"),
        ("ab", {}, None, 0.0, "split"),
        ("at", {}, None, 0.0, "split"),
        ("aat", {}, "a", 2 / 3, ""),
        ("aattb", {}, None, 0.0, "split"),
        ("", {}, None, 0.0, "no vote"),
        ("aa", {"votes": 3}, None, 0.0, "few votes"),
        ("tta", {}, "tie", 0.0, "tie"),
        ("tta", {"ties": "keep"}, "tie", 0.0, ""),
        ("tta", {"ties": "keep", "agreement": 0.9}, None, 0.0, "little agreement"),
    ],
)
def test_the_majority_decides(votes: str, rules: Any, winner: Any, margin: float, why: str):
    given = [{"a": "a", "b": "b", "t": "tie"}[v] for v in votes]
    found = decide(given, Rules(**rules))
    assert (found.winner, found.why) == (winner, why) and found.margin == pytest.approx(margin)


@pytest.mark.parametrize("wrong", [{"votes": 0}, {"agreement": 1.1}, {"ties": "drop"}])
def test_wrong_rules(wrong: Any):
    with pytest.raises(InputError, match="rules"):
        Rules(**wrong)


def colour(image: np.ndarray) -> tuple[int, ...]:
    return tuple(int(c) for c in image[8, 8])


def test_what_people_preferred_becomes_pairs_that_training_reads(tmp_path: Path, capsys):
    folder = make_pairs(tmp_path / "given")
    (folder / "facts.json").write_text(json.dumps({"rewards": ["ocr"], "model": "abc"}))
    source = read(str(folder))
    home = folder / "labels"
    say(home, "r1", source, {0: "a", 1: "b", 2: "b", 3: "tie", 4: "a", 5: "skip"})
    say(home, "r2", source, {0: "a", 1: "b", 2: "a", 3: "tie", 4: "tie"})
    say(home, "r3", source, {0: "a", 1: "a", 2: "skip", 3: "b"})
    summary = label(configuration(tmp_path / "run", pairs=str(folder), finish=True))
    assert summary["kept"] == 2 and summary["given"] == 6
    assert summary["left_out"] == {"split": 2, "tie": 1, "no vote": 1}
    assert summary["pairs"] == str(home / "pairs")
    data = Pairs(summary["pairs"], sizes=[[16, 16]])
    assert data.rewards == ()  # people judged
    found = {r.meta["number"]: r for r in (data[k] for k in range(len(data)))}
    assert set(found) == {0, 1}
    assert found[0].prompt == "prompt 0" and found[0].meta["label"]["votes"] == {
        "a": 3,
        "b": 0,
        "tie": 0,
    }
    for number, winner, loser, margin in ((0, (0, 255, 0), (0, 0, 255), 1.0),
                                          (1, (1, 0, 255), (1, 255, 0), 1 / 3)):  # fmt: skip
        preference = found[number].preference
        assert preference is not None
        assert colour(preference[0]) == winner and colour(preference[1]) == loser
        assert preference[2] == pytest.approx(margin)
    facts = json.loads((home / "pairs/facts.json").read_text())
    assert facts["chosen_by"] == ["ocr"] and facts["raters"] == {"r1": 5, "r2": 5, "r3": 3}
    said = capsys.readouterr().out
    assert "Krippendorff's alpha" in said and "2 of 6 pairs" in said
    # b: 0, 2/3, 1/2, (1 + 2/2)/3, 1/4, without a vote
    want = np.mean([0, 2 / 3, 1 / 2, 2 / 3, 1 / 4])
    assert summary["preferred"]["share_of_b"]["mean"] == pytest.approx(want)
    kept = label(configuration(tmp_path / "run", pairs=str(folder), finish=True,
                               rules={"ties": "keep", "votes": 3, "agreement": 0.6}))  # fmt: skip
    data = Pairs(kept["pairs"], sizes=[[16, 16]])
    margins = {data[k].meta["number"]: data[k].preference[2] for k in range(len(data))}
    assert margins == pytest.approx({0: 1.0, 1: 1 / 3, 3: 0.0})


def test_no_verdict_leaves_no_pairs(tmp_path: Path):
    folder = make_pairs(tmp_path)
    source = read(str(folder))
    say(folder / "labels", "r1", source, {0: "a"})
    board = Board(source, folder / "labels", Rules())
    assert board.finish()["kept"] == 1 and (folder / "labels/pairs/pairs.jsonl").is_file()
    strict = Board(source, folder / "labels", Rules(votes=2))
    assert strict.finish()["kept"] == 0
    assert not (folder / "labels/pairs/pairs.jsonl").exists()  # no old verdict is left to train on
    say(tmp_path / "skipped", "r1", source, {0: "skip"})
    none = Board(source, tmp_path / "skipped", Rules()).finish()
    assert none["kept"] == 0 and math.isnan(none["preferred"]["share_of_b"]["mean"])


# ---------------------------------------------------------------- sources


def test_a_run_of_stage_pairs_and_its_folder_are_one_source(tmp_path: Path):
    make_pairs(tmp_path / "pairs", 3)
    named = [read(str(tmp_path / name)) for name in ("", "pairs", "pairs/pairs.jsonl")]
    assert named[0] == named[1] == named[2] and named[0].home == tmp_path / "pairs/labels"
    assert [p.prompt for p in named[0].pairs] == ["prompt 0", "prompt 1", "prompt 2"]
    moved = make_pairs(tmp_path / "elsewhere", 3)
    assert [p.id for p in read(str(moved)).pairs] == [p.id for p in named[0].pairs]


def test_references_and_what_cannot_be_told_apart(tmp_path: Path):
    make_pairs(tmp_path, 2)
    picture(tmp_path / "ref.png", (9, 9, 9))
    (tmp_path / "bad.png").write_bytes((tmp_path / "0w.png").read_bytes()[:60])
    rows = [
        {"text": "edit it", "winner": "0w.png", "loser": "1l.png", "references": ["ref.png"]},
        {"prompt": "same", "winner": "0w.png", "loser": "copy.png"},
        {"prompt": "twice", "winner": "0w.png", "loser": "1l.png", "source": "x"},
        {"prompt": "twice", "winner": "0w.png", "loser": "1l.png"},
        {"prompt": "bad", "winner": "0w.png", "loser": "bad.png"},
    ]
    (tmp_path / "copy.png").write_bytes((tmp_path / "0w.png").read_bytes())
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = read(str(tmp_path))
    assert [p.prompt for p in source.pairs] == ["edit it", "twice"]
    assert source.left_out == {"the same image twice": 1, "given before": 1, "unreadable image": 1}
    assert source.pairs[0].references == (tmp_path / "ref.png",)
    assert source.pairs[1].meta == {"source": "x"}
    board = Board(source, tmp_path / "labels", Rules())
    file = AnswerFile(board.home, "r1")
    file.add(source.pairs[0].id, False, "b", "left", 1.0)
    file.close()
    assert board.finish()["kept"] == 1
    record = Pairs(str(board.home / "pairs"), sizes=[[16, 16]])[0]
    assert colour(record.references[0]) == (9, 9, 9) and colour(record.target) == (1, 0, 255)


def make_run(folder: Path, shade: int, prompts: dict[int, str]) -> str:
    prints = {"exact": Fingerprint("exact", "exact(1)", 1, "p", "euler8:ab", 3.0)}
    found = Evaluation(
        Results((Score(0, 0, "exact", 1.0),), prints), prompts, {"name": folder.name}
    )

    def images(place: Path) -> None:
        for prompt in prompts:
            for seed in (0, 1):
                write_image(place, prompt, seed, np.full((8, 8, 3), shade + prompt + seed, "u1"))

    folder.mkdir()
    found.save(folder / "evaluation" / "step_000000", images)
    return str(folder)


def test_two_runs_are_matched_by_prompt_and_seed(tmp_path: Path):
    runs = [make_run(tmp_path / "base", 10, {0: "cat", 1: "dog", 2: "only here"}),
            make_run(tmp_path / "tuned", 100, {0: "dog", 5: "cat"})]  # fmt: skip
    source = read(runs)
    assert source.names == ("base", "tuned") and source.runs and source.home is None
    assert sorted((p.prompt, p.meta["seed"]) for p in source.pairs) == [
        ("cat", 0), ("cat", 1), ("dog", 0), ("dog", 1)]  # fmt: skip
    [pair] = [p for p in source.pairs if (p.prompt, p.meta["seed"]) == ("dog", 1)]
    assert (pair.a.name, pair.b.name) == ("000001-1.png", "000000-1.png")
    assert "base" in str(pair.a) and "tuned" in str(pair.b)
    file = AnswerFile(tmp_path / "labels", "r1")
    for item in schedule(source.pairs, 0, "r1", 0.0):
        better = "b" if item.pair.prompt == "cat" else "tie"
        side = "left" if item.left == "b" else "right"
        file.add(item.pair.id, False, item.left, side if better == "b" else "tie", 1.0)
    file.close()
    summary = label(configuration(tmp_path / "run", pairs=runs, finish=True,
                                  labels=str(tmp_path / "labels")))  # fmt: skip
    assert summary["preferred"]["b"] == "tuned" and summary["kept"] == 2
    assert summary["preferred"]["share_of_b"]["mean"] == 0.75
    with pytest.raises(InputError, match="labels says nothing"):
        label(configuration(tmp_path / "run", pairs=runs, rater="r1"))
    with pytest.raises(InputError, match="none is shared"):
        read([runs[0], make_run(tmp_path / "other", 0, {0: "bird"})])
    for image in (tmp_path / "tuned/evaluation/step_000000/images").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="kept no images"):
        read(runs)


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"pairs": None}, "pairs names nothing"),
        ({"pairs": "/nowhere"}, "/nowhere holds no pairs.jsonl"),
        ({"pairs": ["a", "b", "c"]}, "names 3 runs"),
        ({"pairs": ["/nowhere/a", "/nowhere/b"]}, "no run /nowhere/a"),
        ({"rater": None}, "rater=None"),
        ({"rater": "../x"}, r"rater=\.\./x"),
        ({"rater": "a" * 65}, "at most 64"),
        ({"repeat": 1.0}, "repeat is 1.0"),
        ({"finish": True}, "holds no answers"),
        ({"rules": {"votes": 0}}, "rules.votes"),
        ({"serve": {"port": 70000}}, "70000 is no port"),
    ],
)
def test_wrong_input_is_refused(tmp_path: Path, keys: dict[str, Any], says: str, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", sys)  # none of these gets as far
    folder = make_pairs(tmp_path / "given", 2)
    cfg = configuration(tmp_path / "run", **{"pairs": str(folder), "rater": "r1", **keys})
    with pytest.raises(Exception, match=says) as caught:
        label(cfg)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):  # Hydra wraps what Rules raises
        error = error.__cause__
    assert error is not None and "\n" not in str(error)


def test_a_taken_port_and_a_missing_gradio(tmp_path: Path, monkeypatch):
    folder = make_pairs(tmp_path / "given", 2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cfg = configuration(tmp_path, pairs=str(folder), rater="r1", serve={"port": port})
        monkeypatch.setitem(sys.modules, "gradio", sys)
        with pytest.raises(InputError, match=f"cannot serve at 127.0.0.1, port {port}"):
            label(cfg)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"gradio is not installed: pip install -e '\.\[label\]'"):
        label(cfg)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_an_unwritable_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="say labels="):
        AnswerFile(tmp_path / "file", "r1")


# ---------------------------------------------------------------- what the page is told


def test_the_page_learns_neither_files_nor_which_is_which(tmp_path: Path):
    source = read(str(make_pairs(tmp_path / "given", 4)))
    one = Session(schedule(source.pairs, 0, "r1", 0.0), AnswerFile(tmp_path / "labels", "r1"))
    states = []
    while (state := shown(one))["token"]:
        states.append(state)
        assert json.loads(json.dumps(state)) == state
        assert set(state["images"]) | {*state["next"]} <= {f"picture/{n}" for n in pictures(one)}
        assert not any(word in json.dumps(state) for word in ("winner", ".png", "0w", "margin"))
        one.answer(state["token"], "left", 1.0)
    assert [s["done"] for s in states] == [0, 1, 2, 3] and not states[-1]["next"]
    assert states[1]["images"] == states[0]["next"]
    board = Board(source, tmp_path / "labels", Rules())
    text = lines(board.standing())
    assert text[0][0] == "r1" and "answers 4" in text[0][1] and len(text) == 1
    one.file.close()
