"""The dials of a distillation: silent where it goes well, heard where it does not; triptychs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from eval.distillation import GAUGES, Gauges
from eval.triptych import Triptychs
from flux2.analytic import ConditionalGaussian, Gaussian, toy_condition
from flux2.data.loader import Collator
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.flow import interpolate, target_velocity, x0_from_velocity
from flux2.generate import Sampler
from flux2.log import Log
from flux2.rng import Rng
from flux2.roles import velocity_of
from flux2.types import Batch

LOGGER = OmegaConf.create(
    {"wandb": "off", "project": "x", "entity": None, "group": None, "tags": [], "show": [],
     "interval": 1e9}
)  # fmt: skip


Rows = Sequence[Mapping[str, float | None]]


def watched(folder: Path, rows: Rows, **keys: Any) -> Gauges:
    """Gauges that have seen these lines of the log."""
    gauges = Gauges(**{"window": 4, "wait": 3, **keys})
    folder.mkdir(exist_ok=True)
    with Log(folder, LOGGER, len(rows)) as log:
        started(gauges, folder, log)
        for step, row in enumerate(rows):
            log.log(step, {k: math.nan if v is None else v for k, v in row.items()})
            gauges.watch(step + 1, log.flush(step))
        gauges.panels()
    return gauges


def started(gauges: Gauges, folder: Path, log: Log, step: int = 0, model: Any = None) -> None:
    cfg = SimpleNamespace(run=SimpleNamespace(dir=str(folder)))
    gauges.start(cfg, model, {}, log, step)


def events(gauges: Gauges) -> list[tuple[str, str]]:
    return [(e["gauge"], e["side"]) for e in gauges.finish()["events"]]


# ---------------------------------------------------------------- when a dial speaks


def test_a_crossing_is_told_once_and_again_when_it_is_back(tmp_path, capsys) -> None:
    cos = [-0.5] * 8 + [0.8] * 20 + [-0.5] * 20 + [0.8] * 8
    gauges = watched(tmp_path / "run", [{"dmd/cos": c} for c in cos])
    assert events(gauges) == [("cos", "high"), ("cos", ""), ("cos", "high")]
    said = [x for x in capsys.readouterr().out.splitlines() if "cos (dmd/cos)" in x]
    assert len(said) == 3 and "at most 0.3 is healthy: matching pulls where guidance" in said[0]
    assert "lower the student's learning rate" in said[0] and "back within" in said[1]
    lines = (tmp_path / "run" / "monitor" / "gauges.jsonl").read_text().splitlines()
    assert [json.loads(x)["side"] for x in lines] == ["high", "", "high"]
    assert json.loads(lines[0])["step"] == 12  # its whole window lies beyond, not one value of it


def test_one_value_or_noise_is_no_crossing(tmp_path) -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=g).tolist()
    rows = [{"dmd/cos": 0.1 + 0.3 * n, "fake/loss": 0.1 * math.exp(0.6 * n)} for n in noise]
    rows[50]["dmd/cos"] = 5.0  # the mean of its windows is above the bound
    gauges = watched(tmp_path / "run", rows, window=10)
    assert events(gauges) == []


def test_a_dial_that_starts_outside_is_given_time(tmp_path) -> None:
    """Before the first updates the fake score is the teacher: no difference yet."""
    early = [{"dmd/delta": 0.0}] * 8 + [{"dmd/delta": 0.1}] * 20
    assert events(watched(tmp_path / "a", early)) == []
    never = [{"dmd/delta": 0.0}] * 30
    assert events(watched(tmp_path / "b", never)) == [("delta", "low")]


def test_what_is_divided_by_the_baseline_the_floor_and_another_column(tmp_path) -> None:
    rows: list[dict[str, float | None]]
    rows = [{"fake/loss": x, "dmd/std": s} for x, s in zip([0.4] * 8 + [0.08] * 8 + [0.2] * 8,
            [1.0] * 16 + [0.6] * 8, strict=True)]  # fmt: skip
    rows[0]["real/std"] = 1.0  # logged once: it stays
    gauges = watched(tmp_path / "run", rows)
    assert events(gauges) == [
        ("fake_ease", "low"), ("fake_ease", ""), ("fake_lag", "high"), ("std", "low"),
    ]  # fmt: skip
    found = {e["gauge"]: e["value"] for e in gauges.finish()["events"] if e["side"]}
    assert found["std"] < 0.8 and 1.5 < found["fake_lag"] <= 2.5 and found["fake_ease"] < 0.25


def test_a_number_that_is_not_finite_is_told_at_once(tmp_path) -> None:
    rows: Rows = [{"fake/loss": 0.1}] * 6 + [{"fake/loss": None}] * 6
    assert events(watched(tmp_path / "run", rows)) == [("fake_lag", "nan"), ("fake_ease", "nan")]


def test_what_is_not_logged_is_not_judged_and_said_so(tmp_path, capsys) -> None:
    gauges = watched(tmp_path / "run", [{"dmd/std": 1.0, "dmd/delta": 0.1}] * 10)
    assert set(gauges.finish()["silent"]) == {"cos", "fake_lag", "fake_ease", "std"}
    assert "too few values, or none, of cos" in capsys.readouterr().out


def test_a_resume_judges_as_an_uninterrupted_run(tmp_path) -> None:
    cos: Rows = [{"dmd/cos": c} for c in [-0.5] * 6 + [0.8] * 12]
    whole = watched(tmp_path / "whole", cos)
    first = watched(tmp_path / "part", cos[:9])
    again = Gauges(window=4, wait=3)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with Log(tmp_path / "part", LOGGER, 18, 9) as log:
        started(again, tmp_path / "part", log, 9)
        for step, row in enumerate(cos[9:], 9):
            again.watch(step + 1, row)
        assert again.finish() == whole.finish()
    files = [(tmp_path / k / "monitor" / "gauges.jsonl").read_text() for k in ("whole", "part")]
    assert files[0] == files[1] != ""


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"window": 0}, "window is 0"), ({"bounds": {"sin": [0, 1]}}, "'sin'"),
        ({"bounds": {"cos": [1]}}, "give"), ({"bounds": {"cos": [None, None]}}, "give"),
        ({"bounds": {"cos": [1, 0]}}, "low must be below high"),
    ],
)  # fmt: skip
def test_wrong_bounds_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Gauges(**keys)


def test_bounds_can_be_moved_and_gauges_switched_off(tmp_path) -> None:
    rows: Rows = [{"dmd/cos": -0.5}] * 4 + [{"dmd/cos": 0.2}] * 6
    bounds = {"cos": [None, 0.1], "delta": None}
    gauges = watched(tmp_path / "run", rows, bounds=bounds)
    assert events(gauges) == [("cos", "high")] and "delta" not in gauges.finish()["means"]
    assert GAUGES["cos"].high == 0.3


def test_the_data_stand_in_for_a_real_std_that_is_not_logged(tiny, tmp_path) -> None:
    world = SignWorld("heldout", length=3, tasks={"t2i": 1.0})
    gauges = Gauges(window=2, dataset=world, samples=3)
    with Log(tmp_path, LOGGER, 1) as log:
        started(gauges, tmp_path, log, model=tiny)
    batch = Collator(tiny, text=False)([world[k] for k in range(3)], torch.arange(3))
    assert batch.x0 is not None
    assert gauges._others["real/std"] == pytest.approx(float(batch.x0.std()))


# ---------------------------------------------------------------- on a distillation in closed form


def distilled(pace: float, steps: int = 100) -> list[dict[str, float | None]]:
    """DMD with guidance 3 of a student N(m, s²) by its own equations; each step the fake score's
    mean moves `pace` of the way to the student's. The log that it would write."""
    s, tau, alpha, n, c = 0.7, 0.6, 3.0, 4, 8
    teacher = ConditionalGaussian(torch.full((n, c), 0.5), torch.zeros(n, c), s)
    mean, fake_mean, rows = torch.full((n, c), 0.5), torch.full((n, c), 0.5), []
    cond = toy_condition(64, n)
    assert cond.null is not None
    for step in range(steps):
        rng, ids = Rng(1, step), torch.arange(64)
        x0 = mean + s * rng("data", ids, (n, c))
        eps, t = rng("noise", ids, (n, c)), torch.full((64,), tau)
        x, fake = interpolate(x0, eps, t), Gaussian(fake_mean, s)
        real, free, made = (
            x0_from_velocity(x, v, t)
            for v in (teacher(x, t, cond), teacher(x, t, cond.null), fake(x, t))
        )
        dm, ca = made - real, -(alpha - 1) * (real - free)
        rows.append({
            "dmd/delta": float((dm.flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)).mean()),
            "dmd/cos": float(torch.cosine_similarity(ca.flatten(1), dm.flatten(1), 1).mean()),
            "fake/loss": float((fake(x, t) - target_velocity(x0, eps)).square().mean()),
            "dmd/std": float(x0.std()), "real/std": s,
        })  # fmt: skip
        mean = mean - 0.2 * (dm + ca).mean(0)
        fake_mean = fake_mean + pace * (mean - fake_mean)
    return rows


def test_a_healthy_distillation_is_left_alone(tmp_path) -> None:
    rows = distilled(pace=0.5)
    # It arrives at the guided law, whose mean is 1.5: the fake score is 1.0 beyond the teacher's.
    k = 0.6**2 / (0.4**2 * 0.7**2 + 0.6**2)
    last, norm = rows[-1]["dmd/delta"], math.sqrt(1.5**2 + 0.7**2)
    assert last is not None and last == pytest.approx(k * 1.0 / norm, rel=0.05)
    assert rows[-1]["dmd/cos"] == pytest.approx(-1, abs=1e-4)
    assert events(watched(tmp_path / "run", rows, window=10, wait=5)) == []


@pytest.mark.parametrize(
    ("pace", "heard"),
    [(0.0, {("delta", "low"), ("fake_lag", "high")}), (0.01, {("fake_lag", "high")})],
)
def test_a_fake_score_that_does_not_follow_is_heard(tmp_path, pace: float, heard: set[Any]) -> None:
    """The negative control: frozen, guidance alone drives the student away; slow, it lags."""
    assert heard <= set(events(watched(tmp_path / "run", distilled(pace), window=10, wait=5)))


# ---------------------------------------------------------------- triptychs


class Analytic(dict[str, Any]):
    trainable = ("student", "fake")


def test_the_columns_are_what_each_score_makes_of_the_same_noise() -> None:
    """Where the fake score knows the student's law, its column is that law's posterior mean."""
    n, c = 4, 8
    law, real = Gaussian(torch.full((n, c), 0.3), 0.5), ConditionalGaussian(
        torch.full((n, c), 1.0), torch.zeros(n, c), 0.5
    )
    part = Triptychs(SignWorld("heldout", length=2), Sampler(steps=2, guidance=1.0), t=0.4,
                     guidance=2.0, seed=9)  # fmt: skip
    roles = Analytic(student=law, fake=law, teacher=real)
    part.start(None, None, roles, None, step=5)  # type: ignore[arg-type]  # a resume draws nothing
    ids = torch.arange(3)
    batch = Batch(ids, ("a", "b", "c"), toy_condition(3, n), ids, ({}, {}, {}), (2, 2), c)
    found = part.columns(batch)
    assert list(found) == ["student, 2 steps", "real score at t = 0.4, guidance 2",
                           "fake score at t = 0.4"]  # fmt: skip
    x0, guided, fake = found.values()
    t = torch.full((3,), 0.4)
    x = interpolate(x0, Rng(9, 0)("triptych", ids, (n, c)), t)
    torch.testing.assert_close(fake, law.x0(x, t))
    torch.testing.assert_close(guided, real.guided(2.0).x0(x, t))
    # The same at every check.
    again = part.columns(batch)
    assert all(torch.equal(a, b) for a, b in zip(again.values(), found.values(), strict=True))


def test_a_picture_at_the_start_and_at_every_check(tiny, tmp_path, monkeypatch) -> None:
    drawn: list[tuple[Tensor, list[str], int]] = []
    monkeypatch.setattr(
        "flux2.log.grid",
        lambda images, captions, columns: drawn.append((images, captions, columns))
        or SimpleNamespace(save=lambda path: Path(path).write_bytes(b"x")),
    )
    role = velocity_of(tiny)
    part = Triptychs(
        SignWorld("heldout", length=5, tasks={"t2i": 1.0}), Sampler(steps=1, guidance=1.0), every=3,
        count=2,
    )  # fmt: skip
    assert [r.id for r in part.records()] == [0, 1]
    cfg = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)))
    with Log(tmp_path, LOGGER, 9) as log:
        part.start(cfg, tiny, Analytic(student=role, teacher=role), log, 0)
        for step in range(1, 5):
            assert part.probe(step) == {}
    names = [Path(p).name for p in part.finish()["pictures"]]
    assert names == ["triptych_000000.png", "triptych_000003.png"]
    images, captions, columns = drawn[0]
    assert images.shape == (4, 3, 64, 64) and columns == 2  # there is no fake score
    world = SignWorld("heldout", length=5, tasks={"t2i": 1.0})
    assert captions == [
        f"student, 1 steps: {world[0].prompt}", "real score at t = 0.6",
        f"student, 1 steps: {world[1].prompt}", "real score at t = 0.6",
    ]  # fmt: skip
    assert torch.equal(images, drawn[1][0])  # nothing was trained
    again = Triptychs(SignWorld("heldout", length=5), Sampler(steps=1, guidance=1.0))
    again.load_state_dict(part.state_dict())
    assert again.finish() == part.finish()


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"every": 0}, "every"), ({"count": 0}, "count"), ({"t": 1.0}, "between 0 and 1"),
     ({"guidance": -1.0}, "guidance")],
)  # fmt: skip
def test_wrong_triptychs_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Triptychs(SignWorld("heldout", length=2), Sampler(steps=1, guidance=1.0), **keys)
