"""The ladder of steps: its rungs, what it keeps on disk, beside a run and alone, in a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from distill.guidance import GuidanceDistillation
from eval import stage
from eval.evaluation import Evaluation, find
from eval.heldout import HeldOut
from eval.ladder import AtSize, Ladder, climb, drawn_by, frozen_teacher, stored
from eval.records import Fingerprint, Results, Score
from eval.report.data import direction, open_runs
from eval.rungs import Rung, fewest, picture, row_of, text_table
from eval.tone import Tone
from eval.triptych import Triptychs
from flux2.adapters import LoRA
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.files import write_json
from flux2.generate import Sampler
from flux2.lineage import MANIFEST
from flux2.log import Log
from flux2.model import Flux2
from flux2.roles import Roles as FluxRoles
from flux2.roles import velocity_of
from flux2.runs import Run
from flux2.schedule import StaticShift
from flux2.types import Batch

SAMPLER = Sampler(steps=2, guidance=1.0)


class Red:
    """How red images are."""

    engine = "red(v=1)"

    def __call__(self, images: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        return {"red": images[:, 0].float().mean((1, 2)) / 255}


class Roles(dict[str, Any]):
    trainable = ("student",)


def held_out(ladder: Ladder | None, **settings: Any) -> HeldOut:
    world = SignWorld("heldout", length=2, tasks={"t2i": 1.0})
    return HeldOut(world, SAMPLER, {"red": Red()}, ladder=ladder, shown=1, **settings)


def climbed(held: HeldOut, model: Flux2, run: Path) -> dict[str, Any]:
    """stage=eval in short: the evaluation, then its ladder."""
    facts = {"run": "1", "name": "run", "step": 0}
    velocity = velocity_of(model)
    main = held.evaluate(model, velocity, "x", facts, run / "evaluation" / "step_000000")
    return climb(held, model, velocity, None, facts, run, 0, main)


def begin(held: HeldOut, run: Path, roles: Any, step: int = 0, model: Any = None) -> Log:
    run.mkdir(exist_ok=True)
    write_json(run / MANIFEST, {"id": "1", "parents": [], "status": "done"})
    cfg = OmegaConf.create({
        "run": {"dir": str(run), "id": "1"}, "stage": {"name": "distill"},
        "logger": {"wandb": "off", "project": "p", "entity": None, "group": None, "tags": [],
                   "show": [], "interval": 10.0},
    })  # fmt: skip
    log = Log(run, cfg.logger, 2, step)
    try:
        held.start(cfg, model, roles, log, step)
    except InputError:
        log.close()
        raise
    return log


# ---------------------------------------------------------------- its rungs


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"steps": []}, "steps is"), ({"steps": [1, 1]}, "once, rising"),
        ({"steps": [4, 2]}, "once, rising"), ({"steps": [0, 1]}, "whole numbers"),
        ({"steps": [1.5]}, "whole numbers"), ({"guidance": -1.0}, "guidance is -1"),
        ({"sizes": [[64]]}, "height, width"), ({"sizes": [[60, 64]]}, "multiples of 16"),
        ({"sizes": [[64, 64], [64, 64]]}, "size twice"), ({"teacher": {"steps": 8}}, "guidance"),
        ({"teacher": {"steps": 0, "guidance": 1.0}}, "its steps"),
        ({"teacher": {"steps": 8, "guidance": 3.0, "solver": "x"}}, "sampler.solver"),
        ({"against": "/nowhere"}, "holds no evaluation"), ({"keep": {"red": 0.0}}, "above 0"),
    ],
)  # fmt: skip
def test_a_wrong_ladder_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Ladder(**keys)


def test_its_rungs_differ_in_steps_and_sizes_and_the_teacher_has_its_own() -> None:
    student = Sampler(steps=4, guidance=1.0, solver="renoise")
    ladder = Ladder([1, 4], sizes=[[64, 64], [64, 96]], teacher={"steps": 50, "guidance": 3})
    rungs = ladder.rungs(student)
    assert [r.name for r in rungs] == [
        "teacher-64x64", "n01-64x64", "n04-64x64", "teacher-64x96", "n01-64x96", "n04-64x96",
    ]  # fmt: skip
    assert rungs[2].sampler == student and rungs[1].sampler.solver == "renoise"
    assert rungs[0].sampler == Sampler(steps=50, guidance=3.0, solver="euler")
    assert [r.sampler.guidance for r in Ladder([2], guidance=2).rungs(student)] == [2.0]
    with pytest.raises(InputError, match="this model is distilled"):
        ladder.check("distilled")
    ladder.check("base")
    Ladder([1]).check("distilled")


def test_prompts_at_another_size_have_blank_targets_of_it() -> None:
    other = AtSize(SignWorld("heldout", length=3, tasks={"t2i": 1.0}), (32, 48))
    record = other[1]
    assert record.target is not None and record.target.shape == (32, 48, 3)
    assert not record.target.any() and len(other) == 3 and other.bucket_of(1) == (32, 48, 0)
    assert record.meta == other.dataset[1].meta
    edits = AtSize(SignWorld("heldout", length=3, tasks={"recolour": 1.0}), (32, 48))
    with pytest.raises(InputError, match=r"leave out evaluation\.ladder\.sizes"):
        edits[0]


# ---------------------------------------------------------------- what it measures


@pytest.fixture(scope="module")
def ladder(_tiny, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A base's ladder with a teacher's rung; the run, and what was found."""
    run = tmp_path_factory.mktemp("ladder") / "run"
    rungs = Ladder(
        [1, 2], teacher={"steps": 3, "guidance": 2.0}, keep={"red": 0.5}, drift=["red"], shown=2
    )
    return run, climbed(held_out(rungs), _tiny, run)


def test_a_rung_is_the_evaluation_under_its_own_sampler(ladder, _tiny, tmp_path) -> None:
    run, found = ladder
    assert [r["name"] for r in found["rungs"]] == ["teacher", "n01", "n02"]
    assert [r["forwards"] for r in found["rungs"]] == [6, 1, 2]
    for row, steps, scale in zip(found["rungs"], (3, 1, 2), (2.0, 1.0, 1.0), strict=True):
        alone = held_out(None)
        alone.sampler = Sampler(steps=steps, guidance=scale)
        facts = {"run": "1", "name": "alone", "step": 0}
        shot = alone.evaluate(_tiny, velocity_of(_tiny), "x", facts, tmp_path / row["name"])
        assert shot is not None
        kept = Evaluation.load(run / "ladder" / row["name"] / "evaluation" / "step_000000")
        assert kept.results == shot.results and kept.prompts == shot.prompts
        assert kept.identity["name"] == f"{row['name']}: run"
        assert row["metrics"]["red"]["mean"] == pytest.approx(
            sum(s.value for s in shot.results.scores) / 2
        )
    reds = [r["metrics"]["red"]["mean"] for r in found["rungs"]]
    assert len(set(reds)) == 3  # other steps are other images


def test_the_evaluation_itself_is_its_rung_and_is_not_sampled_again(ladder) -> None:
    run, _ = ladder
    main = Evaluation.load(run / "evaluation" / "step_000000")
    rung = Evaluation.load(run / "ladder" / "n02" / "evaluation" / "step_000000")
    assert rung.results == main.results
    # Measured again, the time would differ.
    assert rung.identity == {**main.identity, "name": "n02: run"}
    a, b = (sorted((x.folder / "images").iterdir()) for x in (main, rung) if x.folder)
    assert [f.read_bytes() for f in a] == [f.read_bytes() for f in b] != []


def test_what_was_found_is_stored_whole(ladder) -> None:
    run, found = ladder
    kept = json.loads((run / "ladder" / "step_000000.json").read_text())
    assert {k: kept[k] for k in ("step", "fewest", "settings")} == {
        k: found[k] for k in ("step", "fewest", "settings")
    }
    assert [r["name"] for r in kept["rungs"]] == ["teacher", "n01", "n02"]
    row = found["rungs"][1]
    share = row["metrics"]["red"]["mean"] / found["rungs"][0]["metrics"]["red"]["mean"]
    assert row["against"]["red"]["share"] == pytest.approx(share)
    assert row["drift"]["red"] == pytest.approx(row["against"]["red"]["gain"])
    assert row["keeps"] == {"red": share >= 0.5} and found["rungs"][0]["keeps"] == {"red": None}
    for file in (found["picture"], found["samples"]):
        assert Path(file).read_bytes()[:4] == b"\x89PNG"
    assert "teacher" in (run / "ladder" / "step_000000.txt").read_text()


def test_a_report_opens_the_rungs_as_runs(ladder) -> None:
    run, _ = ladder
    entries = open_runs([f"{run}/ladder/*"], "teacher: run")
    assert [e.name for e in entries] == ["teacher: run", "n01: run", "n02: run"]
    assert [e.evaluation.identity["forwards"] for e in entries] == [6, 1, 2]


def test_a_student_is_held_against_the_teachers_own_run(ladder, tiny, tmp_path) -> None:
    run, first = ladder
    rungs = Ladder([2], against=str(run / "ladder" / "teacher"), keep={"red": 0.01})
    found = climbed(held_out(rungs), tiny, tmp_path / "student")
    was = first["rungs"][0]["metrics"]["red"]["mean"]
    assert found["rungs"][0]["against"]["red"]["before"] == pytest.approx(was)
    assert found["fewest"] == "n02" and "n02" in found["table"].splitlines()[-1]
    other = held_out(rungs)
    other.prompts = 1
    with pytest.raises(InputError, match="measured otherwise"):
        climbed(other, tiny, tmp_path / "other")


def test_another_size_is_sampled_at_that_size(tiny, tmp_path) -> None:
    found = climbed(held_out(Ladder([1], sizes=[[32, 48]])), tiny, tmp_path / "run")
    [row] = found["rungs"]
    shot = Evaluation.load(tmp_path / "run" / "ladder" / "n01-32x48" / "evaluation" / "step_000000")
    assert shot.identity["size"] == [[32, 48]] and row["size"] == (32, 48)
    assert dict(shot.ceilings) == {}  # there are no true images of that size


# ---------------------------------------------------------------- beside a training run


def test_a_run_climbs_at_its_evaluations_and_measures_the_teacher_once(tiny, tmp_path) -> None:
    run, calls = tmp_path / "run", []

    def teacher(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        calls.append(len(x))
        return velocity_of(tiny)(x, t, cond)

    held = held_out(Ladder([1, 2], teacher={"steps": 2, "guidance": 1.0}), every=1)
    roles = Roles(student=velocity_of(tiny), teacher=teacher)
    with begin(held, run, roles, model=tiny):
        assert len(calls) == 2
        with torch.no_grad():
            for p in tiny.transformer.parameters():
                p.mul_(1.02)
        held.after_step(1)
        summary = held.finish(1)
    assert len(calls) == 2 and sorted(find(run / "ladder" / "n01")) == [0, 1]
    assert list(find(run / "ladder" / "teacher")) == [0]
    rows = summary["ladder"]["rungs"]
    before = stored(run, 0)
    assert before is not None and summary["ladder"] == stored(run, 1)
    # The student moved, the frozen teacher is the same evaluation.
    assert rows[0]["metrics"] == before["rungs"][0]["metrics"]
    assert rows[1]["metrics"] != before["rungs"][1]["metrics"]
    # The result's step is the run's, which rungs lie in.
    write_json(run / MANIFEST, {"status": "done", "exported": {"step": 0}})
    assert [e.step for e in open_runs([str(run / "ladder" / "n01")], None)] == [0]


def test_a_resumed_run_completes_its_ladder_and_refuses_another(tiny, tmp_path) -> None:
    run, roles = tmp_path / "run", Roles(student=velocity_of(tiny))
    with begin(held_out(Ladder([1])), run, roles, model=tiny):
        pass
    (run / "ladder" / "step_000000.json").unlink()  # killed before it was whole
    with begin(held_out(Ladder([1])), run, roles, model=tiny):
        assert stored(run, 0) is not None
    with pytest.raises(InputError, match="other rungs"):
        begin(held_out(Ladder([1, 3])), run, roles, model=tiny)


def test_a_teacher_that_the_method_has_not_is_refused(tiny, tmp_path) -> None:
    ladder = Ladder([1], teacher={"steps": 2, "guidance": 1.0})
    with pytest.raises(InputError, match="no frozen role"):
        begin(held_out(ladder), tmp_path / "run", Roles(student=velocity_of(tiny)), model=tiny)
    learning = Roles(student=velocity_of(tiny), teacher=velocity_of(tiny))
    learning.trainable = ("student", "teacher")
    with pytest.raises(InputError, match="no frozen role"):
        begin(held_out(ladder), tmp_path / "run", learning, model=tiny)


def test_a_ladder_whose_evaluation_is_there_is_completed_at_the_end(tiny, tmp_path) -> None:
    run, roles = tmp_path / "run", Roles(student=velocity_of(tiny))
    held = held_out(Ladder([1]))
    with begin(held, run, roles, model=tiny):
        held.finish(1)
    (run / "ladder" / "step_000001.json").unlink()  # killed between the two
    again = held_out(Ladder([1]))
    with begin(again, run, roles, step=1, model=tiny):
        found = again.finish(1)["ladder"]
    assert found is not None and found == stored(run, 1)


def test_a_teacher_is_known_by_all_that_it_was_sampled_with(ladder) -> None:
    run, _ = ladder
    shot = Evaluation.load(run / "ladder" / "teacher" / "evaluation" / "step_000000")
    held, sampler = held_out(None), Sampler(steps=3, guidance=2.0)
    assert drawn_by(shot, held.sampled(sampler))
    shifted = replace(sampler, schedule=StaticShift(2.0))
    for other in (shifted, replace(sampler, steps=2), replace(sampler, guidance=1.5)):
        assert not drawn_by(shot, held.sampled(other))
    fewer = held_out(None, prompts=1)
    edits = replace(held, dataset=SignWorld("heldout", length=2, tasks={"recolour": 1.0}))
    more = replace(held, metrics={"red": Red(), "tone": Tone()})
    for one in (fewer, edits, more, held_out(None, seed=1)):
        assert not drawn_by(shot, one.sampled(sampler))


def test_what_cannot_be_sampled_is_refused_before_there_is_a_model() -> None:
    world = SignWorld("heldout", length=2, tasks={"t2i": 1.0})
    maps = Sampler(steps=2, guidance=1.0, solver="flowmap")
    with pytest.raises(InputError, match="flowmap has no guidance"):
        HeldOut(world, maps, {"red": Red()}, ladder=Ladder([1], guidance=2.0))
    edits = SignWorld("heldout", length=2, tasks={"recolour": 1.0})
    with pytest.raises(InputError, match=r"leave out evaluation\.ladder\.sizes"):
        HeldOut(edits, SAMPLER, {"red": Red()}, ladder=Ladder([1], sizes=[[32, 48]]))


def test_a_distilled_run_is_no_teacher_whatever_the_model_it_began_with(
    tmp_path, monkeypatch
) -> None:
    held = held_out(Ladder([1], teacher={"steps": 2, "guidance": 2.0}))
    init = SimpleNamespace(manifest={"model_role": "base", "result_role": "distilled"})
    monkeypatch.setattr("flux2.lineage.init_of", lambda cfg: init)
    monkeypatch.setattr("flux2.lineage.check_lineage", lambda *a: None)
    monkeypatch.setattr("flux2.model.check_initial", lambda cfg: None)
    monkeypatch.setattr("flux2.train.build", lambda cfg: held)
    cfg = OmegaConf.create({"model": {"role": "base"}, "evaluation": None})
    with pytest.raises(InputError, match="this model is distilled"):
        stage._model(cfg, {}, Run(tmp_path))


def test_a_frozen_teacher_without_the_embedder_is_sampled_beside_a_student_with_it(tiny) -> None:
    """As `stage=guidance method.scale=[1,5]` has them: conditions carry the student's strength."""
    method = GuidanceDistillation((1.0, 5.0), micro=4)
    roles = FluxRoles(method.roles, tiny, LoRA(2), None)
    world = SignWorld("heldout", length=2, tasks={"t2i": 1.0})
    batch = Collator(tiny, latents=False, unconditional=True)([world[0], world[1]], torch.arange(2))
    assert batch.cond is not None and batch.cond.guidance is not None
    assert batch.cond.null is not None
    null = replace(batch.cond.null, guidance=None)
    silent = replace(batch, cond=replace(batch.cond, guidance=None, null=null))
    sampler = Sampler(steps=1, guidance=2.0)
    want = sampler(roles["teacher"], silent, 0)
    assert torch.equal(sampler(frozen_teacher(roles), batch, 0), want)
    part = Triptychs(world, SAMPLER, guidance=2.0)
    part.start(None, None, roles, None, step=5)  # type: ignore[arg-type]
    assert list(part.columns(batch))[1] == "real score at t = 0.6, guidance 2"


# ---------------------------------------------------------------- rows, by hand


def shot(values: Mapping[str, list[float]], ceilings: Mapping[str, float] | None = None) -> Any:
    """An evaluation of as many prompts as there are values."""
    n = len(next(iter(values.values())))
    scores = tuple(Score(p, 0, m, v) for m, row in values.items() for p, v in enumerate(row))
    prints = {m: Fingerprint(m, "by hand", n, "prompts", "euler4:ab", 1.0) for m in values}
    texts = {p: str(p) for p in range(n)}
    return Evaluation(Results(scores, prints), texts, {"seconds": 0.1}, ceilings or {})


def test_shares_and_drift_are_those_of_the_pairs() -> None:
    teacher = shot({"exact": [1, 1, 0, math.nan], "tone": [0.5, 0.5, 0.5, 0.5]})
    student = shot({"exact": [1, 0, 0, 1], "tone": [0.6, 0.6, 0.7, 0.7]})
    wants = Ladder([4], keep={"exact": 0.5}, drift=["tone"])
    rung = Rung("n04", Sampler(steps=4, guidance=1.0))
    row = row_of(rung, student, teacher, wants)
    # The prompt that the teacher could not be scored on counts on neither side.
    assert row["against"]["exact"]["share"] == pytest.approx((1 / 3) / (2 / 3))
    assert row["metrics"]["exact"]["mean"] == 0.5 and row["keeps"] == {"exact": True}
    assert row["drift"]["tone"] == pytest.approx(0.15)
    strict = replace(wants, keep={"exact": 0.51})
    assert row_of(rung, student, teacher, strict)["keeps"] == {"exact": False}
    # Without a reference, drift is away from the held-out images, and nothing is kept.
    alone = row_of(rung, shot({"tone": [0.6]}, {"tone": 0.5}), None, wants)
    assert alone["drift"]["tone"] == pytest.approx(0.1) and alone["keeps"] == {"exact": None}
    assert fewest([alone]) is None


def test_the_fewest_forwards_that_keep_everything(tmp_path) -> None:
    wants = Ladder([1, 2, 4], keep={"exact": 0.9}, shows=["exact"])
    teacher = shot({"exact": [1.0, 0.8]})
    rows = [
        row_of(Rung(f"n{n:02d}", Sampler(steps=n, guidance=1.0)), shot({"exact": [v, v]}), teacher,
               wants)
        for n, v in ((1, 0.3), (2, 0.85), (4, 0.9))
    ]  # fmt: skip
    assert fewest(rows) == "n02"
    text = text_table(rows, wants)
    assert "0.850 (94%)" in text and text.endswith("fewest forwards that keep exact 90%: n02")
    more = replace(wants, keep={"exact": 0.9, "other": 0.9})
    lacking = [{**r, "keeps": {**r["keeps"], "other": None}} for r in rows]
    assert text_table(lacking, more).endswith("no rung does (other: not compared)")
    assert picture(tmp_path / "x.png", rows, wants).stat().st_size > 3000
    assert fewest([{**r, "keeps": {}} for r in rows]) is None  # nothing was wanted


# ---------------------------------------------------------------- saturation and contrast


def test_tone_of_images_whose_tone_is_known() -> None:
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    pixels[0, 0] = 200  # pure red
    pixels[1] = 128  # grey
    pixels[3, :, :, ::2] = 255  # black and white stripes
    found = Tone()(pixels, SimpleNamespace())  # type: ignore[arg-type]
    assert found["hsv_saturation"].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert found["contrast"].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5], abs=1e-6)
    half = torch.tensor([200, 100, 100], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 4)
    saturation = Tone()(half, SimpleNamespace())["hsv_saturation"]  # type: ignore[arg-type]
    assert saturation.item() == pytest.approx(0.5)
    assert [direction(n) for n in ("hsv_saturation", "contrast", "ocr_cer")] == [
        "none", "none", "lower",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_nano_models_ladder_by_its_command(command, tmp_path) -> None:
    run = tmp_path / "run"
    out = command(
        "stage=eval", "evaluation=ladder", "evaluation.prompts=6", "sampler.guidance=1",
        "evaluation.ladder.steps=[1,4]", "evaluation.ladder.teacher={steps: 8, guidance: 3}",
        "~evaluation.metrics.ocr", "~evaluation.metrics.tesseract", "launch.threads=1",
        f"run.dir={run}",
    )  # fmt: skip
    found = json.loads((run / "summary.json").read_text())["ladder"]
    assert [r["name"] for r in found["rungs"]] == ["teacher", "n01", "n04"]
    assert [r["forwards"] for r in found["rungs"]] == [16, 1, 4] and "n04" in out
    said = command("stage=eval", "evaluation=ladder", "evaluation.ladder.steps=[4,2]", code=2)
    assert "give each number once, rising" in said
