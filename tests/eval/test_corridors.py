"""Corridors: when a value lies outside, when it has left, and what becomes of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from eval.checks import PromptsOnly
from eval.corridors import Corridor, Corridors, check_corridors
from eval.dials import ImageDials
from eval.heldout import HeldOut
from eval.monitor import HackMonitor
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.generate import Sampler
from flux2.rng import keyed
from tests.eval.test_monitor import Toy

PROMPTS = 40


def check(**means: float) -> dict[str, dict[tuple[int, int], float]]:
    """A check of PROMPTS prompts, two samples each: the same noise of std 0.05 round each mean."""
    noise = keyed(3, "corridors").standard_normal((PROMPTS, 2)) * 0.05
    noise -= noise.mean()
    return {
        name: {(p, k): mean + float(noise[p, k]) for p in range(PROMPTS) for k in range(2)}
        for name, mean in means.items()
    }


def followed(rule: Corridor, values: list[float], teacher: float | None = None) -> Corridors:
    found = Corridors({"x": rule}, 0.01, None if teacher is None else check(x=teacher))
    for step, value in enumerate(values):
        found.add(step, check(x=value))
    return found


def test_a_share_of_the_best_that_is_lost_twice_ends_the_run() -> None:
    rule = Corridor(min_share=0.9, patience=2)
    rising = [0.3, 0.5, 0.7]
    # One check below, then back: nothing. The bound follows the best, which is not the newest.
    assert followed(rule, [*rising, 0.5, 0.68, 0.5]).left is None
    found = followed(rule, [*rising, 0.5, 0.5])
    assert found.axes["x"].left == 4 and found.outside == ["x"]
    assert found.axes["x"].bound == pytest.approx(0.63)
    assert found.axes["x"].value == pytest.approx(0.5)
    said = found.left
    assert said is not None and "x has left its corridor (at least 90% of the best)" in said
    assert "0.5 against 0.63, in 2 checks" in said


def test_only_what_was_inside_can_leave() -> None:
    """A student begins far below its teacher: that ends nothing. Once there, it must stay."""
    rule = Corridor(min_share=0.95, of="teacher", patience=1)
    below = followed(rule, [0.1, 0.2, 0.3], teacher=0.8)
    assert below.left is None and not below.axes["x"].entered and below.outside == ["x"]
    fell = followed(rule, [0.1, 0.77, 0.3], teacher=0.8)
    assert fell.axes["x"].left == 2


@pytest.mark.parametrize(
    ("rule", "values", "left"),
    [
        (Corridor(min=0.4), [0.5, 0.3, 0.3], 2), (Corridor(max=0.6), [0.5, 0.7, 0.7], 2),
        (Corridor(max=0.6), [0.5, 0.3, 0.3], None), (Corridor(min=0.4), [0.5, 0.6, 0.7], None),
        (Corridor(within=0.1, of=0.5), [0.5, 0.65, 0.65], 2),
        (Corridor(within=0.1, of=0.5), [0.5, 0.35, 0.35], 2),
        (Corridor(within=0.1, of="first"), [0.5, 0.58, 0.42], None),
        (Corridor(within=0.1, of="first"), [0.5, 0.7, 0.3], 2),  # on either side is outside
        (Corridor(max_share=1.2, of="first"), [0.5, 0.7, 0.7], 2),
        (Corridor(min_share=0.8, of=0.5), [0.5, 0.3, 0.3], 2),
    ],
)  # fmt: skip
def test_bounds_on_either_side(rule: Corridor, values: list[float], left: int | None) -> None:
    rule.check("x")
    assert followed(rule, values).axes["x"].left == left


def test_chance_ends_no_run() -> None:
    """48 prompts, right or wrong by a coin: of 20 runs of 20 checks with a corridor of 95 % of the
    best, which is the luckiest of them, none ends. A real fall, from .5 to .1, ends each."""

    def ends(run: int, fall: float) -> bool:
        draws = keyed(run, "coins").random((20, 48))
        found = Corridors({"x": Corridor(min_share=0.95)}, 0.01)
        for step, row in enumerate(draws):
            right = row < (0.5 if step < 10 else 0.5 - fall)
            found.add(step, {"x": {(p, 0): float(v) for p, v in enumerate(right)}})
        return found.left is not None

    assert not any(ends(k, 0.0) for k in range(20))
    assert all(ends(k, 0.4) for k in range(3))


def test_a_value_that_is_not_there_judges_nothing() -> None:
    found = Corridors({"x": Corridor(min=0.4, patience=1), "y": Corridor(min=0.4)}, 0.01)
    assert found.add(0, check(x=0.5))
    assert found.add(1, {"x": {(0, 0): math.nan}})  # not scored: as it was
    assert list(found.axes) == ["x"] and found.axes["x"].inside
    assert not found.add(2, check(x=0.3)) and found.axes["x"].left == 2


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"x": {}}, "no bound"), ({"x": {"mini": 1.0}}, "'mini'"),
        ({"x": {"min_share": 0.0}}, "above 0"), ({"x": {"min": 1.0, "patience": 0}}, "patience"),
        ({"x": {"min_share": 0.9, "of": "last"}}, "'last'"),
        ({"x": {"within": 0.1}}, "fits min_share alone"),
        ({"x": {"min_share": 0.9, "of": "teacher"}}, r"monitor\.teacher=null"),
    ],
)  # fmt: skip
def test_wrong_corridors_are_refused(rules: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_corridors(rules, teacher=False)


def test_a_corridor_is_switched_off_by_null_and_needs_checks() -> None:
    assert check_corridors({"x": None, "y": {"min": 1.0}}, False) == {"y": Corridor(min=1.0)}
    with pytest.raises(InputError, match=r"give monitor\.heldout"):
        HackMonitor(corridors={"x": {"min": 1.0}})
    with pytest.raises(InputError, match="its steps"):
        HackMonitor(teacher={"steps": 0, "guidance": 3.0})


# ---------------------------------------------------------------- in a run


def test_a_run_whose_value_leaves_ends_and_goes_back_to_the_best_within(tiny, tmp_path) -> None:
    """A reward that wants black: `dark` may not pass .6. The held-out criterion alone would have no
    patience to end it, and chooses among the checks within."""
    torch.manual_seed(0)
    keys = {"patience": 0, "corridors": {"dark": {"max": 0.6, "patience": 2}}}
    toy = Toy(tiny, tmp_path / "run", level=0.0, **keys)
    found = toy.run(30)["monitor"]
    end, dark = toy.engine.step, {int(k): v["dark"] for k, v in found["heldout"].items()}
    assert end < 30 and "dark has left its corridor (at most 0.6)" in found["stopped"]
    axis = found["corridors"]["dark"]
    assert axis["left"] == end == max(dark) and not axis["inside"] and axis["entered"]
    assert dark[end] > 0.6 and dark[end - 2] > 0.6
    best = found["exported"]["step"]
    assert best == found["best"] and dark[best] <= 0.6
    assert toy.same_as(toy.folder / "checkpoints" / f"step_{best:06d}")
    # Taken up again it stays ended, and judges as it did; without corridors it goes on.
    again = Toy(tiny, toy.folder, level=0.0, **keys)
    same = again.run(30)["monitor"]
    assert again.engine.step == end and same["corridors"] == found["corridors"]
    assert same["exported"] == found["exported"]
    free = Toy(tiny, toy.folder, level=0.0, patience=0)
    assert free.run(end + 2)["monitor"]["stopped"] is None and free.engine.step == end + 2


def test_where_training_maximises_all_of_the_criterion_the_newest_within_is_the_result(
    tiny, tmp_path
) -> None:
    torch.manual_seed(0)
    keys = {"criterion": {"reward": 1.0}, "corridors": {"dark": {"max": 0.6, "patience": 1}}}
    toy = Toy(tiny, tmp_path / "run", level=0.0, **keys)
    found = toy.run(30)["monitor"]
    inside = [int(k) for k, v in found["heldout"].items() if v["dark"] <= 0.6]
    assert found["criterion"] == {} and found["exported"]["step"] == max(inside) < toy.engine.step
    assert toy.same_as(toy.folder / "checkpoints" / f"step_{max(inside):06d}")


def test_the_teacher_is_sampled_once_on_the_checks_own_noise(tiny, tmp_path) -> None:
    torch.manual_seed(0)
    keys = {
        "teacher": {"steps": 3, "guidance": 2.0},
        "corridors": {"dark": {"within": 0.5, "of": "teacher"}, "lit": {"min": 0.1}},
    }
    toy = Toy(tiny, tmp_path / "run", level=0.5, lr=1e-6, **keys)
    calls: list[int] = []
    student = toy.roles["policy"] if "policy" in toy.roles else toy.roles[toy.roles.trainable[0]]

    def teacher(x, t, cond):
        calls.append(len(x))
        return student(x, t, cond)

    toy.roles._roles["teacher"] = teacher
    found = toy.run(2)["monitor"]
    assert len(calls) == 3  # 16 prompts in one chunk, guided in one forward, 3 steps
    alone = HeldOut(
        PromptsOnly(SignWorld("heldout", length=16)), Sampler(steps=3, guidance=2.0),
        {"images": ImageDials()}, prompts=16, images=False, shown=2,
    )  # fmt: skip
    model = toy.parts.score.model
    shot = alone.evaluate(model, student, "x", {}, tmp_path / "alone")
    assert shot is not None
    dark = [s.value for s in shot.results.scores if s.metric == "dark"]
    bound = found["corridors"]["dark"]["bound"]
    assert min(abs(bound - sum(dark) / 16 - w) for w in (0.5, -0.5)) < 1e-3
    assert "lit" not in found["corridors"]  # nothing measures it, and the start said so
    again = Toy(tiny, toy.folder, level=0.5, lr=1e-6, **keys)
    again.roles._roles["teacher"] = teacher
    assert again.run(4)["monitor"]["corridors"]["dark"]["inside"] and len(calls) == 3
