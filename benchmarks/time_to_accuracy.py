"""Seconds of training to a held-out OCR accuracy: python benchmarks/time_to_accuracy.py

The default recipe (stage=nft) against Flow-GRPO as published (experiment=methods/flow-grpo: all
steps noisy, guidance in rollout and update), each with three learning rates, on one thread. The
accuracy is tesseract's exact match on held-out words: not the reader that the reward uses. Time is
that of training steps alone. Flow-GRPO runs for --factor times what the default needed at its best
rate; where it does not get there, the ratio is more than that.

Runs that are done are kept in --runs and not done again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METRIC = "tesseract_ocr_exact"


def train(run: Path, recipe: str, rate: float, seconds: float, every: int) -> None:
    """Trains for so many seconds, evaluated before and every so many steps."""
    subprocess.run(
        [sys.executable, str(ROOT / "run.py"), recipe, "evaluation=methods",
         "evaluation.before=true", "evaluation.prompts=150", "evaluation.noises=1",
         "~evaluation.metrics.kl", "~evaluation.metrics.diversity", f"evaluation.every={every}",
         "engine.autocast=bf16", "launch.threads=1", "resume=auto", f"run.dir={run}",
         f"optim.optimizer.lr={rate}", "optim.decay=constant", "train.steps=100000",
         "train.save_every=0", "train.export=false", f"train.budget={seconds}"],
        check=True, cwd=ROOT,
    )  # fmt: skip


def reached(run: Path, target: float) -> tuple[float | None, float]:
    """Seconds of training to the first evaluation that is at the target (None: never), and the
    best accuracy seen."""
    from eval.report.data import held_out, open_runs

    rows = held_out(open_runs([str(run)], None)[0])[METRIC]
    seen = list(zip(rows["seconds"], rows["value"], strict=True))
    first = next((s for s, v in seen if s is not None and v is not None and v >= target), None)
    return first, max(v for _, v in seen if v is not None)


def main() -> None:
    """Trains what is missing, prints a line a run and the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--factor", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=360.0, help="of the default recipe")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 4e-4, 8e-4])
    parser.add_argument("--plain-rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs" / "time_to_accuracy")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    def best(name: str, recipe: str, rates: list[float], seconds: float) -> float | None:
        times = []
        for rate in rates:
            run = args.runs / f"{name}-{rate:g}"
            train(run, recipe, rate, seconds, every=4)
            first, top = reached(run, args.target)
            told = "not reached" if first is None else f"{first:.0f} s"
            print(
                f"{name}, lr {rate:g}: {METRIC} {args.target:g} {told}; best {top:.3f}", flush=True
            )
            times += [first] if first is not None else []
        return min(times, default=None)

    ours = best("default", "stage=nft", args.rates, args.seconds)
    if ours is None:
        sys.exit(f"the default recipe did not reach {args.target:g} in {args.seconds:g} s")
    limit = args.factor * ours
    plain = best("flow-grpo", "experiment=methods/flow-grpo", args.plain_rates, limit)
    ratio = f"more than {args.factor:g}" if plain is None else f"{plain / ours:.1f}"
    print(f"Flow-GRPO takes {ratio} times as long as the default recipe ({ours:.0f} s)")


if __name__ == "__main__":
    main()
