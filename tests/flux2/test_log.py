"""What a run says: the metrics file, progress, pictures, tables."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from flux2 import distributed
from flux2.errors import InputError
from flux2.log import TILE, Log, curve, grid, progress, table


def config(**more):
    base = {
        "wandb": "off", "project": "p", "entity": None, "group": None, "tags": [], "show": [],
        "interval": 10.0,
    }  # fmt: skip
    return OmegaConf.create({**base, **more})


def lines(path):
    return (path / "metrics.jsonl").read_text().splitlines()


def test_a_sorted_object_a_step_and_null_for_what_is_not_finite(tmp_path):
    with Log(tmp_path, config(), 2) as log:
        log.log(0, {"loss": torch.tensor(0.5, requires_grad=True), "a": 1})
        log.log(0, {"reward": math.nan, "grad": torch.tensor(math.inf)})
        log.flush(0)
        assert log.flush(1) == {}
    assert lines(tmp_path) == [
        '{"a": 1.0, "grad": null, "loss": 0.5, "reward": null, "step": 0}',
        '{"step": 1}',
    ]


def test_floats_survive_exactly(tmp_path):
    values = np.random.default_rng(0).standard_normal(50) * 10.0 ** np.arange(-25, 25)
    with Log(tmp_path, config(), len(values)) as log:
        for step, value in enumerate(values):
            log.log(step, {"x": float(value)})
            log.flush(step)
    assert [json.loads(line)["x"] for line in lines(tmp_path)] == values.tolist()


def test_repeated_names_are_averaged(tmp_path):
    with Log(tmp_path, config(), 1) as log:
        for value in (1.0, 2.0, 6.0):
            log.log(0, {"loss": torch.tensor(value)})
        assert log.flush(0) == {"loss": 3.0}


def test_a_resumed_file_reads_as_if_it_had_never_stopped(tmp_path):
    def steps(folder, start, stop):
        folder.mkdir(exist_ok=True)
        with Log(folder, config(), 9, start) as log:
            for step in range(start, stop):
                log.log(step, {"x": step**2})
                log.flush(step)
            return log.history("x")

    whole = steps(tmp_path / "whole", 0, 9)
    steps(tmp_path / "parts", 0, 6)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "x')  # killed while writing
    assert steps(tmp_path / "parts", 4, 9) == whole == (list(range(9)), [s**2 for s in range(9)])
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert steps(tmp_path / "parts", 0, 1) == ([0], [0])  # from the start: nothing old remains


def test_history_leaves_out_nulls(tmp_path):
    with Log(tmp_path, config(), 3) as log:
        for step, x in enumerate([1.0, math.nan, 3.0]):
            log.log(step, {"x": x})
            log.flush(step)
        assert log.history("x") == ([0, 2], [1.0, 3.0])


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("flux2.log.time.monotonic", lambda: clock[0])
    with Log(tmp_path, config(show=["reward", "absent"]), 100) as log:
        for step in range(100):
            clock[0] += 2.0
            log.log(step, {"loss": 1.0, "reward": step / 4})
            log.flush(step)
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "step 1/100 · 2 s/step · left 03:18 · reward 0"
    assert err[1] == "step 6/100 · 2 s/step · left 03:08 · reward 1.25"  # 10 s later
    assert err[-1] == "step 100/100 · 2 s/step · left 00:00 · reward 24.75"
    assert len(err) == 21  # the first, every fifth after it, and the last


def test_progress_after_a_resume_counts_this_process_only(tmp_path, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("flux2.log.time.monotonic", lambda: clock[0])
    with Log(tmp_path, config(), 100, start=90) as log:
        clock[0] = 3.0
        log.flush(90)
    assert capsys.readouterr().err == "step 91/100 · 3 s/step · left 00:27\n"


def test_on_a_terminal_there_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Log(tmp_path, config(), 4, start=1) as log:
        log.log(1, {"loss": 0.25})
        log.flush(1)
        log.print("noise floor 1e-6")
        log.flush(2)
        log.flush(3)
    out, err = capsys.readouterr()
    assert "4/4" in err and "step " not in err
    assert out == "noise floor 1e-6\n"


def test_long_work_says_how_far_it_is(capsys, monkeypatch):
    """Of 10 chunks of 4 samples, 12 s each: a line at the first end of a chunk after 30 s."""
    clock = [0.0]
    monkeypatch.setattr("flux2.log.time.monotonic", lambda: clock[0])
    seen = []
    for chunk in progress(iter([range(4)] * 10), "evaluating", 40, len):
        seen.append(chunk)
        clock[0] += 12
    assert seen == [range(4)] * 10
    assert capsys.readouterr().err.splitlines() == [
        "evaluating 12/40 · left 01:24", "evaluating 24/40 · left 00:48",
        "evaluating 36/40 · left 00:12",
    ]  # fmt: skip
    for _ in progress(range(3), "short", 3):
        clock[0] += 9
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    for _ in progress(range(9), "another rank's", 9):
        clock[0] += 12
    assert capsys.readouterr().err == ""


def test_long_work_has_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress([3, 1], "evaluating", 4, lambda n: n)) == [3, 1]
    assert "evaluating" in capsys.readouterr().err


def test_unknown_wandb_mode_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"logger\.wandb=maybe"):
        Log(tmp_path, config(wandb="maybe"), 1)
    Log(tmp_path, config(wandb=False), 1).close()  # a bare `off` in YAML


def test_grid_places_each_image_and_keeps_its_pixels():
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 64, 64), generator=gen, dtype=torch.uint8)
    sheet = np.asarray(grid(images, columns=3))
    zoom, pad = 3, 6
    assert sheet.shape == (2 * (64 * zoom + pad) + pad, 3 * (64 * zoom + pad) + pad, 3)
    for i, image in enumerate(images):
        y, x = (pad + k * (64 * zoom + pad) for k in (i // 3, i % 3))
        tile = sheet[y : y + 64 * zoom, x : x + 64 * zoom]
        wanted = image.permute(1, 2, 0).numpy().repeat(zoom, 0).repeat(zoom, 1)
        assert np.array_equal(tile, wanted)
    assert (sheet[-pad:] == 255).all()


def test_large_images_are_not_enlarged():
    assert grid(torch.zeros(1, 3, 256, 256, dtype=torch.uint8)).size == (268, 268)


def test_captions_are_drawn_inside_their_tiles(tmp_path):
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    short, long = "TAXI", "a red circle above the word “TAXI” in white on #1F77B4 " * 9 + "x" * 99
    with Log(tmp_path, config(), 1) as log:
        path = log.image("before", images, [short, long], columns=2)
    assert path == tmp_path / "samples" / "before.png"
    sheet = np.asarray(Image.open(path).convert("L"))
    below = sheet[6 + TILE :]
    left, right = below[:, 6 : 6 + TILE], below[:, 12 + TILE : 12 + 2 * TILE]
    assert (left < 100).sum() > 30 and (right < 100).sum() > 5 * (left < 100).sum()
    assert (below[:, :6] == 255).all() and (below[:, 6 + TILE : 12 + TILE] == 255).all()
    assert (below[:, -6:] == 255).all() and (below[-3:] == 255).all()
    assert below.shape[0] < 90  # a long caption is cut


def test_grid_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="uint8"):
        grid(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        grid(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["one"])


def test_table():
    assert table(["metric", "before", "after"], [["ocr", 0.4, 0.5125], ["n", 400, 400]]) == (
        "metric  before  after\n─────────────────────\nocr      0.400  0.512\nn          400    400"
    )
    assert table(["a", "b"], [["x", 1]], rule=False) == "a  b\nx  1"
    with pytest.raises(ValueError, match="2 cells"):
        table(["a", "b"], [["x"]])


def test_curve_draws_every_series(tmp_path):
    path = curve(tmp_path / "c" / "reward.png", {"a": ([0, 1, 2], [0, 1, 4])}, "reward")
    both = curve(tmp_path / "both.png", {"a": ([0, 1, 2], [0, 1, 4]), "b": ([0, 2], [4, 0])})

    def coloured(file, rgb):
        pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
        return int((abs(pixels - np.array(rgb)).sum(-1) < 12).sum())

    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    assert coloured(path, blue) > 300 and coloured(path, orange) == 0
    assert coloured(both, blue) > 300 and coloured(both, orange) > 300


def test_wandb_offline_leaves_a_run(tmp_path, monkeypatch):
    """W&B itself, without a network."""
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "manifest.json").write_text('{"id": "cafe0123"}')
    with Log(tmp_path, config(wandb="offline", group="g"), 2) as log:
        for step in range(2):
            log.log(step, {"loss": 1.0 / (step + 1)})
            log.flush(step)
        log.image("grid", torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["black"])
    [file] = tmp_path.glob("wandb/offline-run-*/run-cafe0123.wandb")
    assert file.stat().st_size > 0
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples/grid_1_*.png"))
    assert len(lines(tmp_path)) == 2
