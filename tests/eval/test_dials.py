"""Dials: what they say of images that are known, and when they are flagged."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.dials import (
    DIALS,
    HELDOUT,
    IMAGE,
    Dial,
    Flag,
    ImageDials,
    Series,
    Watch,
    check_limits,
    column_of,
    dial_in,
    dial_of,
)
from flux2.data.loader import stack_images
from flux2.data.signs import SignWorld
from flux2.errors import InputError
from flux2.types import Batch

NAN = math.nan


def batch(*groups: int) -> Batch:
    ids = torch.arange(len(groups))
    n = len(groups)
    return Batch(ids, ("p",) * n, None, torch.tensor(groups), ({},) * n, (4, 4))


def look(images: Tensor, *groups: int) -> dict[str, Tensor]:
    return dict(ImageDials()(images, batch(*(groups or range(len(images))))))


def plain(*colours: tuple[int, int, int], side: int = 64) -> Tensor:
    """One image of one colour each."""
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, side, side)


# ---------------------------------------------------------------- images


def test_dark_saturation_and_entropy_of_known_images():
    half = plain((255, 0, 0)).clone()
    half[..., :32] = 0  # the left half is black
    found = look(torch.cat([half, plain((255, 255, 255)), plain((255, 0, 0))]))
    assert found["dark"].tolist() == [0.5, 0.0, 0.0]  # red's luma is .299
    assert found["saturation"].tolist() == [0.5, 0.0, 1.0]
    torch.testing.assert_close(found["colour_entropy"], torch.tensor([1.0, 0.0, 0.0]))
    assert set(found) == set(IMAGE)


def test_all_cells_alike_are_nine_bits():
    levels = torch.arange(0, 256, 32, dtype=torch.uint8)
    cells = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 16, 32)
    torch.testing.assert_close(look(cells)["colour_entropy"], torch.tensor([9.0]))


def test_edges_are_counted_between_neighbours():
    stripes = plain((0, 0, 0)).clone()
    stripes[..., ::2] = 255  # every step across is an edge, none down
    faint = plain((100, 100, 100)).clone()
    faint[..., ::2] = 110
    assert look(stripes)["edges"].item() == 0.5
    assert look(faint)["edges"].item() == 0.0


@pytest.mark.parametrize("side", [64, 96, 256])
def test_seams_between_tokens_raise_the_grid_score(side: int):
    g = torch.Generator().manual_seed(0)
    noise = torch.randint(60, 140, (4, 3, side, side), generator=g)
    seams, other = noise.clone(), noise.clone()
    seams[..., ::16] += 60
    seams[..., ::16, :] += 60
    other[..., ::12] += 60  # of the harmonics of this period one in four is shared
    other[..., ::12, :] += 60
    none, some, wrong = (look(x.to(torch.uint8))["grid"].mean() for x in (noise, seams, other))
    assert abs(none) < 0.1 and some > none + DIALS["grid"].limit and wrong < none + 0.3


def test_images_too_small_for_a_spectrum_have_none_and_plain_ones_have_no_seams():
    assert look(plain((9, 9, 9), side=32))["grid"].isnan().all()
    assert look(plain((9, 9, 9)))["grid"].item() == 0.0


def test_diversity_is_the_distance_within_a_prompt():
    images = plain((0, 0, 0), (255, 255, 255), (51, 51, 51), (51, 51, 51), (7, 7, 7))
    found = look(images, 3, 3, 5, 5, 8)["diversity"]
    torch.testing.assert_close(found, torch.tensor([1.0, 1.0, 0, 0, NAN]), equal_nan=True)


def test_large_images_cost_and_say_the_same():
    small = stack_images([SignWorld("train", length=4)[i].target for i in range(4)])
    large = small.repeat_interleave(16, 2).repeat_interleave(16, 3)  # 1024 × 1024
    a, b = look(small), look(large)
    for name in ("dark", "saturation", "colour_entropy"):
        torch.testing.assert_close(a[name], b[name])


# ---------------------------------------------------------------- limits


def test_a_limit_is_a_change_a_share_or_a_level():
    both, up, down = Dial(0.2, "", ""), Dial(0.2, "", "", "up"), Dial(0.2, "", "", "down")
    assert [d.beyond(1.0, 1.3) for d in (both, up, down)] == [True, True, False]
    assert [d.beyond(1.0, 0.7) for d in (both, up, down)] == [True, False, True]
    share, level = Dial(0.2, "", "", kind="relative"), Dial(0.2, "", "", kind="level")
    assert share.beyond(10.0, 12.1) and not share.beyond(10.0, 11.9)
    assert level.beyond(5.0, 0.3) and not level.beyond(5.0, 0.1)
    assert [d.bounds for d in (both, up, down)] == ["±0.2", "+0.2", "−0.2"]
    assert share.bounds == "±20 %" and level.bounds == "0.2"
    assert share.band(10.0) == (8.0, 12.0) and level.band(1.0) == (-math.inf, 0.2)
    assert up.band(1.0) == (-math.inf, 1.2) and down.band(1.0) == (0.8, math.inf)


def test_a_number_finds_its_dial_and_the_limit_that_was_asked_for():
    assert dial_of("dark", {}) is DIALS["dark"] is dial_of("heldout/dark", {})
    assert dial_of("dlogp/3", {}) is DIALS["dlogp"] and dial_of("loss", {}) is None
    assert dial_of("heldout/signs_ink_colour", {}) is HELDOUT
    assert dial_of("heldout/speed", {}) is not dial_of("speed", {})
    limits = {"dark": 0.4, "heldout/grid": 2.0, "edges": None}
    assert dial_of("heldout/dark", limits).limit == 0.4 == dial_of("dark", limits).limit
    assert dial_of("heldout/grid", limits).limit == 2.0
    assert dial_of("grid", limits) is DIALS["grid"] and dial_of("edges", limits) is None
    with pytest.raises(InputError, match=r"monitor\.limits\.dark is -1"):
        check_limits({"dark": -1.0})


def test_columns_of_the_log_and_dials_are_told_apart():
    for name in (*IMAGE, "speed", "groups_flat", "clip_low", "dlogp/2"):
        assert dial_in(column_of(name)) == name
    # A reward may have a score of the same name; held-out means are judged elsewhere.
    for column in ("dark", "grid", "monitor/heldout/dark", "policy/lr", "reward"):
        assert dial_in(column) is None


# ---------------------------------------------------------------- when


def numbers(rows: np.ndarray) -> dict[str, tuple[float, float]]:
    """What a step of these prompts (n dials) shows."""
    error = rows.var(0, ddof=1) / len(rows)
    return {name: (float(rows[:, k].mean()), float(error[k])) for k, name in enumerate(SEEN)}


SEEN = ("dark", "saturation", "colour_entropy", "edges", "grid")


@pytest.fixture(scope="module")
def signs() -> np.ndarray:
    """Dials of 400 drawn signs, 400 5: what prompts differ by in a healthy run."""
    world = SignWorld("train", length=400)
    found = look(stack_images([world[i].target for i in range(400)]))
    return torch.stack([found[n] for n in SEEN], 1).numpy()


@pytest.mark.parametrize("prompts", [2, 8, 16])
def test_a_healthy_run_is_not_flagged(signs, prompts):
    rng, flagged = np.random.default_rng(0), 0
    for _ in range(20):
        watch = Watch()
        for step in range(60):
            watch.add(step + 1, numbers(signs[rng.integers(0, 400, prompts)]), prompts)
        assert len(watch.series["dark"].first) == max(5, 40 // prompts)
        flagged += bool(watch.flags)
    assert flagged <= 1


def test_a_run_that_darkens_is_flagged_once_with_what_to_do(signs):
    rng, watch, found = np.random.default_rng(0), Watch(), []
    for step in range(40):
        rows = signs[rng.integers(0, 400, 8)].copy()
        rows[:, 0] = np.minimum(1, rows[:, 0] + 0.05 * max(0, step - 10))
        found += watch.add(step + 1, numbers(rows), 8).items()
    assert [name for name, _ in found] == ["dark"]
    flag = found[0][1]
    assert 15 < flag.step < 32 and flag.value > flag.baseline + 0.15
    line = flag.line("dark", DIALS["dark"])
    assert line.startswith(f"monitor, step {flag.step}: dark 0.") and "\n" not in line
    assert "(limit ±0.15): images turn dark or light; look at the images" in line


def test_a_level_needs_a_window_and_no_baseline():
    watch = Watch(begin=2, window=3)
    for step, share in enumerate([0.2, 0.2, 1.0, 1.0, 1.0], 1):
        new = watch.add(step, {"groups_flat": (share, NAN), "loss": (9.0, NAN)})
        assert bool(new) == (step == 5)
    assert watch.flags == {"groups_flat": Flag(5, 0.2, 1.0)}
    assert watch.flags["groups_flat"].line("groups_flat", DIALS["groups_flat"]).startswith(
        "monitor, step 5: groups_flat 1 (limit 0.9): "
    )


def test_the_published_demo_is_healthy():
    """Shares of flat groups and ‖v‖² as three healthy runs of the demo logged them."""
    flat = [0.2, 0.12, 0.3, 0.22, 0.15, 0.15, 0.28, 0.42, 0.48, 0.55, 0.75]
    speed = [1.97, 1.87, 1.91, 1.9, 1.94, 1.88, 1.86, 1.91, 1.96, 1.91, 1.89]
    watch = Watch()
    for step in range(55):
        row = {"groups_flat": (flat[step // 5], NAN), "speed": (speed[step // 5], NAN)}
        assert watch.add(step + 1, row, 8) == {}


def test_spread_of_prompts_counts_in_the_baseline_and_in_the_window():
    series = Series([[0.0, 0.04], [0.0, 0.04]], [[0.5, 0.01], [0.5, 0.01]])
    assert series.error == pytest.approx(0.2)  # √(.04 · (1/2 + 1/2))
    series.last = [[0.5, 0.16], [0.5, 0.16]]
    assert series.error == pytest.approx(0.4)
    assert Series([[0.0, NAN], [2.0, NAN]], [[1.0, NAN]]).error == pytest.approx(math.sqrt(3))


def test_the_state_comes_back_exactly(signs):
    rng = np.random.default_rng(3)
    rows = [numbers(signs[rng.integers(0, 400, 8)]) for _ in range(20)]
    whole, first = Watch(limits={"edges": 1e-4}, z=0.1), Watch(limits={"edges": 1e-4}, z=0.1)
    for step, row in enumerate(rows):
        whole.add(step, row, 8)
        if step < 13:
            first.add(step, row, 8)
    again = Watch(limits={"edges": 1e-4}, z=0.1)
    again.load_state_dict(torch_round_trip(first.state_dict()))
    for step, row in enumerate(rows[13:], 13):
        again.add(step, row, 8)
    assert again == whole and "edges" in whole.flags


def torch_round_trip(state):
    """As a checkpoint keeps it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
