"""A smaller model under ZeRO-3 on two ranks, against one process: its student and its teacher have
different numbers of blocks, and hidden states leave both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from flux2.checkpoint import latest_checkpoint, load_checkpoint
from flux2.model import load_model

sys.path.insert(0, str(Path(__file__).parent))
import size_job

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.dist, pytest.mark.slow]


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def tensors(folder: Path) -> Any:
    newest = latest_checkpoint(folder / "checkpoints")
    assert newest is not None
    return load_checkpoint(newest).tensors


def agree(folder: Path, reference: Path) -> None:
    """Every number of every step, and the weights in the end."""
    got, want = metrics(folder), metrics(reference)
    assert len(got) == len(want) == 5
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
        assert theirs["features"] > 1e-4 and theirs["output"] > 1e-6
    ours, theirs = tensors(folder), tensors(reference)
    assert set(ours) == set(theirs)
    for name in theirs:
        # AdamW turns the rounding of a gradient near 0 into a whole step.
        far = (ours[name] - theirs[name]).abs() > 1e-5
        assert far.float().mean() < 0.01, name


def test_two_ranks_equal_one_process_and_go_on(tiny_config, tmp_path):
    shape = {"num_layers": 2, "num_single_layers": 3}
    cfg = OmegaConf.merge(tiny_config, {"architecture": {"transformer": shape}})
    OmegaConf.save(cfg, tmp_path / "model.yaml")
    model = load_model(cfg, torch.device("cpu"))
    (tmp_path / "alone").mkdir()
    size_job.measure(model, tmp_path / "alone")
    size_job.ranks_job.run(model, "none", "size", tmp_path / "one", 5)
    (tmp_path / "both").mkdir()
    jobs = [f"zero3:size:5:{tmp_path}/zero3", f"zero3:size:3:{tmp_path}/torn",
            f"zero3:size:5:{tmp_path}/torn", f"zero2:size:5:{tmp_path}/zero2"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "tests" / "distill" / "size_job.py"), str(tmp_path / "model.yaml"),
         str(tmp_path / "both"), *jobs],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    names = {k.split("/")[0] for k in tensors(tmp_path / "one")}
    assert names == {"student", "optimizer"}
    for name in ("zero3", "zero2"):
        agree(tmp_path / name, tmp_path / "one")
    assert metrics(tmp_path / "torn") == metrics(tmp_path / "zero3")
    ours, theirs = tensors(tmp_path / "torn"), tensors(tmp_path / "zero3")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    # What is measured is the same on both ranks, and as on one process.
    first, second = (json.loads((tmp_path / "both" / f"rank{r}.json").read_text()) for r in (0, 1))
    alone = json.loads((tmp_path / "alone" / "rank0.json").read_text())
    assert first == second and first["kept"] == alone["kept"]
    for mine, its in zip(first["rows"], alone["rows"], strict=True):
        for key in ("alone", "influence"):
            assert mine[key] == pytest.approx(its[key], rel=1e-5, abs=1e-7)
