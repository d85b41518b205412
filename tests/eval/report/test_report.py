"""What a report says: which runs are opened, what is compared, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from PIL import Image

import run as entry_point
from eval.evaluation import Evaluation, write_image
from eval.records import Aggregate, Fingerprint, Results, Score, compare
from eval.report.data import clock, curves, direction, held_out, margin_of, open_runs
from eval.report.numbers import Settings, numbers, title_of
from eval.report.page import (
    embed,
    glance,
    interval,
    number,
    pictures,
    priority,
    render,
    signed,
    thumbnail,
)
from eval.report.stage import markdown, report, text_tables
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.rng import keyed

HOSTILE = '</script><script>document.title="owned"</script>"\'&lt; <img src=x onerror=alert(1)>'
PROMPTS = 30


def fingerprint(metric: str, **changes: Any) -> Fingerprint:
    return replace(
        Fingerprint(metric, "reader(1)", PROMPTS, "prompts", "euler8:ab", 3.0), **changes
    )


def evaluation(
    name: str,
    right: float,
    prompts: int = PROMPTS,
    trained: bool = False,
    changed: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
    aggregate: bool = True,
) -> Evaluation:
    """Scores of the first signs: `exact` is 1 for the share `right` of them, and `cer` its mirror;
    prompt 3 has no `exact`; `vague` is noise that is the same in all."""
    world = SignWorld("heldout", length=400, loose=0.0)
    draws = keyed(5, "report").random((prompts, 2))
    scores = []
    for p in range(prompts):
        exact = float(draws[p, 0] < right)
        scores.append(Score(p, 0, "exact", math.nan if p == 3 else exact, trained))
        scores.append(Score(p, 0, "cer", 0.5 * (1 - exact)))
        scores.append(Score(p, 0, "vague", float(draws[p, 1])))
    prints = {m: fingerprint(m, n=prompts, **(changed or {})) for m in ("exact", "cer", "vague")}
    sets: tuple[Aggregate, ...] = ()
    if aggregate:
        values = tuple(10 * (1 - right) + 0.1 * right * k for k in range(20))
        sets = (Aggregate("fid", 10 * (1 - right), 1.0, 9.0, prompts, values, "biased upwards"),)
        prints["fid"] = fingerprint("fid", n=prompts)
    facts = {
        "run": name, "name": name, "model": "nano", "model_hash": "ab", "role": "base",
        "stage": "eval", "step": 0, "solver": "euler", "steps": 8, "guidance": 3.0, "grid": "ab",
        "forwards": 16, "seconds": 0.5, "device": "cpu", "dataset": "signs", "size": [[64, 64]],
    }  # fmt: skip
    texts = {p: world[p].prompt for p in range(prompts)}
    return Evaluation(
        Results(tuple(scores), prints, sets), texts, facts | (identity or {}), {"exact": 0.9}
    )


def save(run: Path, found: Evaluation, step: int = 0, images: bool = True, side: int = 64) -> Path:
    """Puts an evaluation into a run directory, with the signs themselves as images."""
    world = SignWorld("heldout", length=400, loose=0.0)

    def write(folder: Path) -> None:
        for prompt, seed in dict.fromkeys((s.prompt_id, s.seed) for s in found.results.scores):
            pixels = world[prompt].target
            assert pixels is not None
            if side != 64:
                noise = keyed(prompt, "noise").integers(0, 255, (side, side // 2, 3))
                pixels = noise.astype(np.uint8)
            write_image(folder, prompt, seed, pixels)

    run.mkdir(parents=True, exist_ok=True)
    found.save(run / "evaluation" / f"step_{step:06d}", write if images else lambda _: None)
    return run


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    save(tmp_path / "before", evaluation("before", 0.4))
    save(tmp_path / "after", evaluation("after", 0.9, trained=True))
    return [str(tmp_path / "before"), str(tmp_path / "after")]


def composed(folder: Path, *overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(entry_point.CONF), version_base="1.3"):
        folder.mkdir(parents=True, exist_ok=True)
        return compose("config", ["stage=report", f"run.dir={folder}", *overrides])


def cells(found: dict[str, Any], metric: str) -> dict[str, Any]:
    return next(m for m in found["metrics"] if m["name"] == metric)["cells"]


# ---------------------------------------------------------------- opening


def test_the_latest_evaluation_or_the_one_of_a_step(tmp_path: Path) -> None:
    for step in (0, 20, 100):
        save(tmp_path / "a", evaluation("a", 0.4), step, images=False)
    path = str(tmp_path / "a")
    assert [e.step for e in open_runs([path], None)] == [100]
    entries = open_runs([f"{path}@20", f"mine={path}@0", path], None)
    assert [(e.name, e.step) for e in entries] == [("a@20", 20), ("mine", 0), ("a@100", 100)]
    assert list(entries[0].history) == [0, 20, 100]
    [one] = open_runs([f"{path}/evaluation/step_000020"], None)
    assert (one.step, one.run.resolve()) == (20, (tmp_path / "a").resolve())
    named = open_runs({"x": path, "y": f"{path}@0"}, baseline="y")
    assert [(e.name, e.step) for e in named] == [("y", 0), ("x", 100)]


def test_without_a_step_it_is_that_of_the_result(tmp_path: Path) -> None:
    for step in (0, 20, 100):
        save(tmp_path / "a", evaluation("a", 0.4), step, images=False)
    for status, chosen, want in (("done", 20, 20), ("running", 20, 100), ("done", 40, 100)):
        facts = {"status": status, "exported": {"step": chosen, "of": 100, "why": "better"}}
        (tmp_path / "a" / "manifest.json").write_text(json.dumps(facts))
        assert [e.step for e in open_runs([str(tmp_path / "a")], None)] == [want]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for folder in ("one/a", "two/a"):
        save(tmp_path / folder, evaluation("a", 0.4), images=False)
    paths = [str(tmp_path / f) for f in ("one/a", "two/a")]
    assert [e.name for e in open_runs(paths, None)] == ["one/a", "two/a"]
    with pytest.raises(InputError, match="two runs are named 'x'"):
        open_runs([f"x={p}" for p in paths], None)
    with pytest.raises(InputError, match="two runs are named"):
        open_runs([paths[0], paths[0]], None)


def test_a_path_may_hold_signs_that_mean_something(tmp_path: Path) -> None:
    path = save(tmp_path / "lr=0.1@3", evaluation("odd", 0.4), images=False)
    [entry] = open_runs([str(path)], None)
    assert entry.run == path


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "runs= names nothing"),
        (["{tmp}/absent"], "no run .*absent"),
        (["{tmp}/empty"], "holds no evaluation: .*stage=eval"),
        (["{tmp}/a@7"], "was not evaluated at step 7: choose from 0"),
        (["=x"], "write name=path"),
        (["{tmp}/a", "{tmp}/broken"], "holds no evaluation"),
        (["{tmp}/a", "{tmp}/other"], "none is shared: evaluate both on the same data"),
    ],
)
def test_wrong_runs_are_refused_in_one_line(tmp_path: Path, items: list[str], message: str) -> None:
    save(tmp_path / "a", evaluation("a", 0.4), images=False)
    (tmp_path / "empty").mkdir()
    broken = save(tmp_path / "broken", evaluation("broken", 0.4), images=False)
    (broken / "evaluation/step_000000/evaluation.json").write_text("{}")
    other = evaluation("other", 0.4)
    texts = {k: f"photograph {k}" for k in other.prompts}
    save(tmp_path / "other", replace(other, prompts=texts), images=False)
    with pytest.raises(InputError, match=message) as caught:
        open_runs([i.format(tmp=tmp_path) for i in items], None)
    assert "\n" not in str(caught.value)


def test_an_unknown_baseline_is_refused(two: list[str]) -> None:
    with pytest.raises(InputError, match="baseline=x is none of the runs: before, after"):
        open_runs(two, "x")


# ---------------------------------------------------------------- what is better


@pytest.mark.parametrize(
    ("metric", "side"),
    [
        ("ocr_exact", "higher"), ("ocr_cer", "lower"), ("tesseract_ocr_cer", "lower"),
        ("fid", "lower"), ("fd_dinov2", "lower"), ("kid", "lower"), ("ground_delta", "lower"),
        ("lpips", "lower"), ("diversity_lpips", "higher"), ("vendi", "higher"), ("psnr", "higher"),
        ("ocr_ned", "higher"), ("ocr_pned", "lower"), ("identity_copy", "lower"),
        ("ocr_recall", "higher"), ("face_swap", "lower"), ("certainty", "higher"),
        ("kl_path", "none"), ("hsv_saturation", "none"),
    ],
)  # fmt: skip
def test_the_name_tells_the_better_side(metric: str, side: str) -> None:
    assert direction(metric) == side


def test_a_title_names_few_runs_and_counts_many() -> None:
    assert title_of(["base"]) == "base" and title_of(["base", "a", "b"]) == "a, b against base"
    assert title_of(["base", *map(str, range(30))]) == "30 runs against base"


def test_rules_come_before_names() -> None:
    rules = {"ocr_*": "none", "*": "lower"}
    assert [direction(m, rules) for m in ("ocr_cer", "psnr")] == ["none", "lower"]
    assert margin_of("ocr_ned", {"ocr_*": 0.1, "*": 1.0}) == 0.1
    assert margin_of("ocr_ned", None) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"directions": {"a": "up"}}, "page.directions"), ({"margins": {"a": 0}}, "page.margins"),
        ({"level": 95}, "page.level"), ({"side": 0}, "page.side"),
        ({"prompts": -1}, "page.prompts"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**wrong)


# ---------------------------------------------------------------- numbers


def test_differences_are_those_of_compare(two: list[str]) -> None:
    entries = open_runs(two, None)
    found = numbers(entries, Settings())
    whole = compare(entries[0].results, entries[1].results)
    for metric, row in whole.items():
        mine = cells(found, metric)["after"]["difference"]
        assert {k: mine[k] for k in row} == pytest.approx(row, nan_ok=True)
    assert cells(found, "exact")["before"]["difference"] is None
    verdicts = {m["name"]: m["cells"]["after"]["verdict"] for m in found["metrics"]}
    assert verdicts["exact"] == verdicts["cer"] == "better"  # the one rises, the other falls
    assert verdicts["vague"] == "no difference found"
    trained = {m["name"]: m["trained_on"] for m in found["metrics"]}
    assert trained == {"exact": ["after"], "cer": [], "vague": [], "fid": []}
    assert cells(found, "exact")["after"]["missing"] == 1
    assert cells(found, "fid")["after"]["note"] == "biased upwards"
    assert json.dumps(found["samples"]) == json.dumps([[p, 0] for p in range(PROMPTS)])


def test_at_a_glance_what_was_rewarded_is_counted_apart(two: list[str]) -> None:
    found = numbers(open_runs(two, None), Settings())
    [row] = glance(found)
    assert row["name"] == "after"
    assert row["counts"] == [
        ("2 better", "good"),
        ("1 better, but rewarded", "reward"),
        ("1 no difference found", "open"),
    ]
    [back] = glance(numbers(open_runs(two, "after"), Settings()))
    assert back["counts"][0] == ("3 worse", "bad")


def test_the_other_way_round_it_is_worse(two: list[str]) -> None:
    found = numbers(open_runs(two, "after"), Settings())
    assert found["baseline"] == "after"
    assert cells(found, "cer")["before"]["verdict"] == "worse"
    none = numbers(open_runs(two, "after"), Settings(directions={"cer": "none"}))
    assert cells(none, "cer")["before"]["verdict"] == "higher"


def test_equal_runs_are_equal_within_a_margin_and_not_without(two: list[str]) -> None:
    entries = open_runs([two[0], f"again={two[0]}"], None)
    plain, told = numbers(entries, Settings()), numbers(entries, Settings(margins={"exact": 0.1}))
    assert cells(plain, "exact")["again"]["verdict"] == "no difference found"
    assert cells(told, "exact")["again"]["verdict"] == "equal within margin"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"engine": "reader(2)"}, r"^scored by reader\(2\) instead of reader\(1\)$"),
        ({"reference": "others"}, "^evaluated on other prompts or against"),
    ],
)
def test_another_measure_is_refused_and_told(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    a = save(tmp_path / "a", evaluation("a", 0.4), images=False)
    b = save(tmp_path / "b", evaluation("b", 0.9, changed=change), images=False)
    found = numbers(open_runs([str(a), str(b)], None), Settings())
    cell = cells(found, "exact")["b"]
    assert cell["verdict"] == "not compared" and cell["difference"] is None
    assert re.search(reason, cell["refused"]) and cell["mean"] > 0.5
    assert cells(found, "fid")["b"]["difference"] is not None
    [warning] = [w for w in found["warnings"] if "not compared" in w]
    assert warning.startswith("b: not compared in exact, cer, vague: ") and "fid" not in warning


def test_fewer_prompts_are_refused_though_some_are_shared(tmp_path: Path) -> None:
    a = save(tmp_path / "a", evaluation("a", 0.4), images=False)
    b = save(tmp_path / "b", evaluation("b", 0.9, prompts=12), images=False)
    found = numbers(open_runs([str(a), str(b)], None), Settings())
    assert {m["cells"]["b"]["verdict"] for m in found["metrics"]} == {"not compared"}
    assert cells(found, "cer")["b"]["refused"] == "12 images instead of 30"
    assert any("only 12 prompts" in w for w in found["warnings"])
    assert sum(found["measured"]["b"]) == 12 and sum(found["measured"]["a"]) == PROMPTS


def test_other_sampling_is_compared_and_told(tmp_path: Path) -> None:
    a = save(tmp_path / "a", evaluation("a", 0.4), images=False)
    quick = evaluation(
        "b", 0.9, changed={"grid": "euler4:cd"}, identity={"steps": 4, "forwards": 8},
        aggregate=False,
    )  # fmt: skip
    b = save(tmp_path / "b", replace(quick, skipped={"fid": "no weights"}), images=False)
    found = numbers(open_runs([str(a), str(b)], None), Settings())
    assert cells(found, "exact")["b"]["verdict"] == "better"
    assert any("sampled otherwise than a (steps 4 instead of 8)" in w for w in found["warnings"])
    assert "b: not measured: fid (no weights)." in found["warnings"]
    assert cells(found, "fid")["b"]["refused"] == "b has no value: no weights"
    assert cells(found, "fid")["b"]["mean"] is None


def test_curves_are_binned_means_over_steps_and_seconds(tmp_path: Path) -> None:
    path = save(tmp_path / "a", evaluation("a", 0.4), 4, images=False)
    save(path, evaluation("a", 0.9), 10, images=False)
    rows = [{"step": k, "reward": float(k), "time/step": 2.0, "odd": None} for k in range(10)]
    lines = [json.dumps(r) for r in rows]
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 10, "rew']))
    [entry] = open_runs([str(path)], None)
    assert clock(entry.steps)[-1] == (9, 20.0) and entry.seconds == 20.0
    found = curves(entry, points=4)  # three steps a point
    assert found["reward"]["value"] == [1.0, 4.0, 7.0, 9.0]
    assert found["reward"]["step"] == [3, 6, 9, 10]
    assert found["reward"]["seconds"] == [6.0, 12.0, 18.0, 20.0]
    assert "odd" not in found
    held = held_out(entry)["exact"]
    assert (held["step"], held["seconds"]) == ([4, 10], [8.0, 20.0])
    assert held["low"][0] < held["value"][0] < held["high"][0] < held["value"][1]  # type: ignore[operator]


# ---------------------------------------------------------------- images


def test_failures_come_first_then_the_biggest_change(two: list[str]) -> None:
    found = numbers(open_runs(two, None), Settings(metric="cer"))
    order = priority(found)
    cer = found["values"]["cer"]
    change = [abs(b - a) for a, b in zip(cer["before"], cer["after"], strict=True)]
    assert [change[p] for p in order] == sorted(change, reverse=True)
    values = found["values"]["vague"]["after"]
    values[5] = None  # the other run has it
    values[7] = 0.0
    assert priority({**found, "order": "vague"})[:2] == [7, 5]  # 7 has changed as well


def test_images_are_kept_within_the_limits(tmp_path: Path) -> None:
    a = save(tmp_path / "a", evaluation("a", 0.4, prompts=6), side=300)
    entries = open_runs([str(a)], None)
    found = numbers(entries, Settings())
    kept, said = pictures(entries, found, Settings(side=100))
    assert sum(x is not None for x in kept["a"]) == 6
    assert "6 of 6 prompts" in said and "at most 100 pixels" in said
    picture = Image.open(io.BytesIO(base64.b64decode(kept["a"][0])))
    assert picture.size == (50, 100) and picture.format == "PNG"
    size = max(len(x) for x in kept["a"])
    few, said = pictures(entries, found, Settings(side=100, megabytes=3.5 * size / 1e6))
    assert sum(x is not None for x in few["a"]) == 3 and "3 of 6 prompts" in said
    none, said = pictures(entries, found, Settings(prompts=0))
    assert none["a"] == [None] * 6 and "0 of 6" in said


def test_small_images_are_kept_as_they_are(two: list[str]) -> None:
    path = next(Path(two[0]).glob("evaluation/*/images/*.png"))
    assert thumbnail(path, 64) == (path.read_bytes(), False)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.png is no PNG image .*: evaluate again"):
        thumbnail(tmp_path / "x.png", 64)


def test_runs_without_images_are_named(tmp_path: Path) -> None:
    a = save(tmp_path / "a", evaluation("a", 0.4), images=False)
    entries = open_runs([str(a)], None)
    _, said = pictures(entries, numbers(entries, Settings()), Settings())
    assert said.endswith("No images were kept of a.")


# ---------------------------------------------------------------- text


def test_numbers_as_text() -> None:
    assert [number(x) for x in (0.12345, 12.345, 123.45, 12345.6, 0.0, 1e-5, None, math.nan)] == [
        "0.123", "12.35", "123.5", "12346", "0.000", "1.0e-05", "–", "–",
    ]  # fmt: skip
    assert [signed(x) for x in (0.5, -0.5, 0.0)] == ["+0.500", "−0.500", "±0.000"]
    assert interval({"low": -1.0, "high": 2.0}, signed) == "[−1.000, +2.000]"
    assert interval({"low": math.nan, "high": 2.0}) == ""


def test_json_in_the_page_cannot_leave_its_element() -> None:
    value = {"a": HOSTILE + "\u2028\u2029<!--", "b": math.nan, "c": "灯籠 🦊"}
    text = str(embed(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {**value, "b": None}


def test_the_page_shows_hostile_prompts_as_text_and_asks_for_nothing(two: list[str]) -> None:
    entries = open_runs(two, None)
    named = [replace(e, name=f"{e.name} {HOSTILE}") for e in entries]
    found = numbers(named, Settings(title=HOSTILE))
    page = render(found, *pictures(named, found, Settings()))
    assert page.count("<script") == 3  # numbers, images, and the program
    assert "<img" not in page.split("<script")[0] and "onerror=alert" in page
    assert re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z]+\.[a-z]", page) == []
    assert "src=" not in re.sub(r"(?s)<script.*?</script>", "", page).replace("src=x", "")


def test_tables_for_papers(two: list[str]) -> None:
    found = numbers(open_runs(two, None), Settings())
    plain, marked = text_tables(found), markdown(found)
    assert "after against before" in plain and "* training maximised" in plain
    row = next(x for x in plain.splitlines() if x.startswith("cer"))
    assert row.startswith("cer ↓")
    lines = [x for x in marked.splitlines() if x.startswith("|")]
    assert "exact\\*" in marked and "better" in marked
    assert len({line.replace("\\|", "").count("|") for line in lines[:6]}) == 1


def test_a_run_that_is_not_comparable_is_told_in_one_line(two: list[str], tmp_path: Path) -> None:
    odd = evaluation("odd", 0.9, changed={"engine": "reader(2)"}, aggregate=False)
    save(tmp_path / "odd", odd, images=False)
    alike = numbers(open_runs([two[0], str(tmp_path / "odd")], None), Settings())
    for text, head in ((text_tables(alike), "odd against before: "), (markdown(alike), "")):
        [line] = [x for x in text.splitlines() if "comparable" in x]
        assert line == (
            f"{head}nothing is comparable (exact, cer, vague: scored by reader(2) instead of "
            "reader(1); fid: odd has no value: not among its metrics)"
        )
        assert "verdict" not in text and "not compared" not in text.split("\n- ")[0]
    assert "sign-flip" not in text_tables(alike)
    entries = open_runs([*two, str(tmp_path / "odd")], None)
    both = numbers([replace(e, evaluation=without_fid(e.evaluation)) for e in entries], Settings())
    text = text_tables(both)
    assert "nothing is comparable: scored by reader(2) instead of reader(1)" in text
    assert "verdict" in text and "sign-flip" in text  # the other run's


def without_fid(found: Evaluation) -> Evaluation:
    prints = {k: f for k, f in found.results.fingerprints.items() if k != "fid"}
    return replace(found, results=replace(found.results, aggregates=(), fingerprints=prints))


# ---------------------------------------------------------------- the stage


def test_the_stage_writes_all_its_files(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    summary = report(composed(folder, f"runs=[{','.join(two)}]", "page.margins={vague:0.1}"))
    assert {p.name for p in folder.iterdir()} == {
        "report.html", "report.json", "table.md", "table.txt",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert str(folder / "report.html") in said and "after against before" in said
    assert summary["verdicts"]["after"]["vague"] == "equal within margin"
    stored = json.loads((folder / "report.json").read_text())
    assert stored["baseline"] == "before" and len(stored["values"]["exact"]["after"]) == PROMPTS
    assert (folder / "table.txt").read_text() in said


def test_the_command_line_takes_names(two: list[str], tmp_path: Path) -> None:
    given = f"runs={{old: {two[0]}, new: {two[1]}@0}}"
    summary = report(composed(tmp_path / "out", given, "baseline=new"))
    assert summary["baseline"] == "new" and list(summary["verdicts"]) == ["old"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "runs= names nothing"),
        (("runs=out/a",), r"write runs=\[out/a,…\]"),
        (("runs=[{a}]", "page.metric=beauty"), "page.metric=beauty was not measured: exact"),
        (("runs=[{a}]", "page.level=2"), "page.level is 2"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    two: list[str], tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    folder = tmp_path / "out"
    cfg = composed(folder, *(o.format(a=two[0]) for o in overrides))
    with pytest.raises(Exception, match=message) as caught:
        report(cfg)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    assert error is not None and not list(folder.iterdir())


def test_wandb_offline_gets_both_tables_with_images(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "out"
    report(composed(folder, f"runs=[{','.join(two)}]", "logger=offline", "page.wandb_prompts=4"))
    [media] = folder.glob("wandb/offline-run-*/files/media")
    tables = {
        name: json.loads(next(media.glob(f"table/{name}_*.table.json")).read_text())
        for name in ("metrics", "prompts")
    }
    metrics = tables["metrics"]
    rows = [dict(zip(metrics["columns"], row, strict=True)) for row in metrics["data"]]
    assert len(rows) == 8 and {r["run"] for r in rows} == {"before", "after"}
    [exact] = [r for r in rows if r["metric"] == "exact" and r["run"] == "after"]
    assert exact["verdict"] == "better" and exact["trained_on"] is True
    assert exact["difference_low"] < exact["difference_gain"] < exact["difference_high"]
    assert len(tables["prompts"]["data"]) == 4
    staged = [p for p in (tmp_path / "WANDB_DATA_DIR").rglob("*") if _is_png(p)]
    assert len(staged) == 8  # an image of each run in each row
    assert tables["prompts"]["data"][0][0].startswith(("a ", "two ", "three "))


def _is_png(path: Path) -> bool:
    return path.is_file() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_seeds_of_a_method_share_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "runs" / "base", evaluation("base", 0.4), images=False)
    for seed, level in enumerate((0.6, 0.9)):
        save(tmp_path / "runs" / f"nft-{seed}", evaluation(f"nft-{seed}", level), images=False)
    (tmp_path / "runs" / "unfinished").mkdir()
    folder = tmp_path / "out"
    report(composed(
        folder, f"runs=['{tmp_path}/runs/*']", "page.seeds='(.+)-[0-9]+'", "page.columns=[exact]"
    ))  # fmt: skip
    rows = [x.split("|")[1:4] for x in (folder / "methods.md").read_text().splitlines()]
    assert [[c.strip() for c in row[:2]] for row in rows[2:]] == [["base", "1"], ["nft", "2"]]
    assert "nft" in capsys.readouterr().out
    stored = json.loads((folder / "report.json").read_text())["methods"][1]["metrics"]["exact"]
    means = []
    for name in ("nft-0", "nft-1"):
        [entry] = open_runs([str(tmp_path / "runs" / name)], None)
        values = [s.value for s in entry.results.scores if s.metric == "exact"]
        known = [v for v in values if not math.isnan(v)]
        means.append(sum(known) / len(known))
    assert stored["mean"] == pytest.approx(sum(means) / 2)
    with pytest.raises(InputError, match="fits no run"):
        open_runs([f"{tmp_path}/none*"], None)
