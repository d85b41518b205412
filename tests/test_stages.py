"""Every stage, through run.py, on the shipped nano model and with settings that take seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "launch.threads=1", "sampler.steps=3", "evaluation.prompts=4", "evaluation.shown=2",
    "~evaluation.metrics.tesseract", "train.save_every=1", "data.batch_size=2",
)  # fmt: skip
RL = (*TINY, "method.group=4", "reward.workers=1", "evaluation.metrics.ocr.metric.workers=0")


def run(*arguments: str, code: int = 0) -> str:
    """run.py with these arguments; its output. The exit code must be `code`."""
    done = subprocess.run(
        [sys.executable, "run.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            ("grpo", "method.window.count=1", "method.window.skip=0"), marks=pytest.mark.slow
        ),
        pytest.param(("nft",), marks=pytest.mark.slow),
        ("nft", "adapter=lora"),
    ],
    ids=["grpo", "nft", "nft-lora"],
)
def test_online_stage_runs_resumes_and_exports(stage: tuple[str, ...], tmp_path: Path) -> None:
    """Interrupted after one of two steps and resumed, a run logs what an uninterrupted one logs."""
    name, *extra = stage
    common = (f"stage={name}", *RL, *extra)
    whole, half = tmp_path / "whole", tmp_path / "half"
    out = run(*common, "train.steps=2", f"run.dir={whole}")
    assert "before" in out and "ceiling" in out
    run(*common, "train.steps=1", f"run.dir={half}")
    run(f"resume={half}", "train.steps=2")
    assert lines(half) == lines(whole)
    summary = json.loads((whole / "summary.json").read_text())
    assert {"before", "after", "control"} <= set(summary)
    assert 0 <= summary["before"]["ocr_exact"] <= 1
    assert json.loads((whole / "manifest.json").read_text())["status"] == "done"
    Image.open(summary["pictures"]["before_after"]).verify()
    out = run("stage=eval", "evaluation=signs", *TINY[:5], f"init_from={whole}",
              f"run.dir={tmp_path / 'eval'}")  # fmt: skip
    scored = json.loads((tmp_path / "eval" / "summary.json").read_text())["metrics"]
    # The checkpoint that eval reads and the policy that training evaluated are the same weights.
    assert scored["ocr_ned"]["mean"] == pytest.approx(summary["after"]["ocr_ned"], abs=1e-6)


def test_sample_writes_images_and_prompts(tmp_path: Path) -> None:
    run("stage=sample", *TINY[:2], "count=2", f"run.dir={tmp_path / 's'}",
        "prompts=['a red circle at the top, \"TAXI\" in white on blue']")  # fmt: skip
    notes = (tmp_path / "s" / "samples" / "samples.jsonl").read_text().splitlines()
    assert len(notes) == 2 and "TAXI" in json.loads(notes[0])["prompt"]
    one, two = (Image.open(tmp_path / "s" / "samples" / json.loads(n)["file"]) for n in notes)
    assert one.size == (64, 64) and one.tobytes() != two.tobytes()


def test_pretrain_from_a_fresh_autoencoder(tmp_path: Path) -> None:
    """The recipe's two stages, shortened: the second opens what the first exported."""
    run("stage=autoencoder", "train.steps=2", "train.statistics_batches=2", "launch.threads=1",
        f"run.dir={tmp_path / 'ae'}")  # fmt: skip
    run("stage=pretrain", "train.steps=1", "data.batch_size=4", "data.dataset.length=32",
        f"data.cache={tmp_path / 'cache'}", f"model.vae={tmp_path / 'ae' / 'export' / 'vae'}",
        "launch.threads=1", f"run.dir={tmp_path / 'base'}")  # fmt: skip
    run("stage=sft", *TINY, "train.steps=1", f"model.path={tmp_path / 'base' / 'export'}",
        "heldout=none", "evaluation.metrics.ocr.metric.workers=0",
        f"run.dir={tmp_path / 'sft'}")  # fmt: skip
    index = json.loads((tmp_path / "sft" / "export" / "model_index.json").read_text())
    assert index["_class_name"] == "Flux2KleinPipeline" and index["is_distilled"] is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("method.group=1",), "group"),
        (("model.path=/nowhere",), "/nowhere"),
        (("init_from=/nowhere",), "/nowhere"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_wrong_input_is_one_line_and_exit_2(
    arguments: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    out = run("stage=grpo", f"run.dir={tmp_path / 'run'}", *arguments, code=2)
    errors = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and says.lower() in errors[0].lower()
    assert "Traceback" not in out
