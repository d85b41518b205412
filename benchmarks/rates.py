"""The learning-rate search of the table of methods: python benchmarks/rates.py [method …]

Every method alike: a rate to begin with, half and double of it, the steps of its recipe
(experiments/methods), seed 0, judged by tesseract's exact match on 60 held-out signs of another
draw than the table's. Runs that are done are kept in --runs and not done again; two at a time on
two cores: give each of two commands some of the methods.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "experiments" / "methods"
METRIC = "tesseract_ocr_exact"
FACTORS = (0.5, 1.0, 2.0)
MIDDLE = {
    "control": 1e-4, "sft": 1e-4, "dpo": 1e-4, "flow-grpo": 2e-4, "fast": 2e-4, "mixgrpo": 2e-4,
    "cps": 2e-4, "guard": 2e-4, "nft": 4e-4, "awm": 4e-4, "direct": 2e-4,
}  # fmt: skip


def steps_of(method: str) -> int:
    """Of the recipe."""
    return int(yaml.safe_load((RECIPES / f"{method}.yaml").read_text())["train"]["steps"])


def accuracy(method: str, rate: float, steps: int, run: Path) -> float:
    """Trains, if it was not yet, and says what the result reads like."""
    if not (run / "summary.json").exists():
        subprocess.run(
            [sys.executable, str(ROOT / "run.py"), f"experiment=methods/{method}",
             f"optim.optimizer.lr={rate}", f"train.steps={steps}", "evaluation.dataset.seed=78",
             "evaluation.prompts=60", "evaluation.noises=1", "evaluation.images=false",
             "~evaluation.metrics.kl", "~evaluation.metrics.diversity", "~evaluation.metrics.ocr",
             "evaluation.headline=[]", f"run.dir={run}"],
            check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return json.loads((run / "summary.json").read_text())["after"][METRIC]


def main() -> None:
    """Prints a line a method: its rates, what each reached, the best."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("methods", nargs="*", default=[*MIDDLE], choices=[*MIDDLE])
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "rates")
    args = parser.parse_args()
    for method in args.methods:
        rate, steps = MIDDLE[method], steps_of(method)
        found = {
            f * rate: accuracy(method, f * rate, steps, args.runs / f"{method}-{f * rate:g}")
            for f in FACTORS
        }
        told = ", ".join(f"{r:g}: {v:.3f}" for r, v in found.items())
        print(f"{method}: {told}; best {max(found, key=lambda r: found[r]):g}", flush=True)


if __name__ == "__main__":
    main()
