"""Seconds of training to a held-out OCR accuracy: python benchmarks/time_to_accuracy.py [recipe …]

The two default recipes, where a reward has a gradient (stage=direct) and where it has none
(stage=nft), against Flow-GRPO as published (all steps noisy, guidance in rollout and update), as
experiment=methods/<recipe> has them: each at the best rate of the same search
(benchmarks/rates.py), here held constant, on one thread. The accuracy is tesseract's exact match on
150 held-out words: not the reader that a reward uses. Time is that of training steps alone, to the
first evaluation at the target.

Runs that are done are kept in --runs and not done again; two at a time on two cores: give each of
two commands some of the recipes, and then all of them to one.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METRIC = "tesseract_ocr_exact"


@dataclass(frozen=True)
class Recipe:
    """Of experiment=methods/<its name>: the steps between evaluations, and the steps of a run."""

    every: int
    steps: int


PLAIN = "flow-grpo"
RECIPES = {
    "anchored": Recipe(15, 90),  # stage=direct
    "nft": Recipe(4, 40),
    PLAIN: Recipe(4, 24),
}


def train(run: Path, name: str, seed: int) -> None:
    """Trains, evaluated every so many steps."""
    recipe = RECIPES[name]
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), f"experiment=methods/{name}", f"seed={seed}",
         "evaluation.prompts=150", "evaluation.noises=1", "evaluation.images=false",
         "~evaluation.metrics.kl", "~evaluation.metrics.diversity", "~evaluation.metrics.ocr",
         "evaluation.headline=[]", f"evaluation.every={recipe.every}", f"run.dir={run}",
         "optim.decay=constant", f"train.steps={recipe.steps}"],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def reached(run: Path, target: float) -> tuple[float | None, float, float]:
    """Seconds of training to the first evaluation that is at the target (None: never), the run's
    seconds, and the best accuracy seen."""
    from eval.report.data import held_out, open_runs

    rows = held_out(open_runs([str(run)], None)[0])[METRIC]
    seen = list(zip(rows["seconds"], rows["value"], strict=True))
    first = next((s for s, v in seen if s is not None and v is not None and v >= target), None)
    return first, max(s or 0.0 for s, _ in seen), max(v for _, v in seen if v is not None)


def times(name: str, runs: Path, seeds: list[int], target: float) -> list[float]:
    """Of each seed, all its seconds where it did not get there; prints a line each."""
    out = []
    for seed in seeds:
        run = runs / f"{name}-{seed}"
        if not (run / "summary.json").exists():
            train(run, name, seed)
        first, whole, top = reached(run, target)
        told = f"not in {whole:.0f} s" if first is None else f"{first:.0f} s"
        print(f"{name}, seed {seed}: {METRIC} {target:g} {told}; best {top:.3f}", flush=True)
        out.append(whole if first is None else first)
    return out


def main() -> None:
    """Trains what is missing, prints a line a run and the ratios of mean times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", default=[*RECIPES], choices=[*RECIPES])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.65,
                        help="the middle of the base's .43 and the ceiling's .87")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "time_to_accuracy")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    found = {
        name: statistics.mean(times(name, args.runs, args.seeds, args.target))
        for name in args.recipes
    }
    for name, seconds in found.items():
        if name != PLAIN and PLAIN in found:
            print(f"{PLAIN} takes {found[PLAIN] / seconds:.1f} times as long as {name}")
    print("a run that did not get there counts with all its seconds")


if __name__ == "__main__":
    main()
