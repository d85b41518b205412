"""The house's own rules, held by its tools: style, types, and imports that point one way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flux2", "posttrain", "distill", "rewards", "eval")


def tool(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a tool of the environment that runs the tests."""
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    assert path is not None, f"{name} is not installed: pip install -e '.[dev]'"
    # pyright would otherwise ask the network for its newest version.
    env = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"}
    return subprocess.run([path, *arguments], cwd=cwd, env=env, text=True, capture_output=True)


def test_ruff():
    done = tool("ruff", "check", "--output-format", "concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright():
    done = tool("pyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_point_one_way():
    done = tool("lint-imports", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("flux2/flow.py", "import flux2.samplers", "in layers"),
        ("flux2/engine.py", "import flux2.loop", "in layers"),
        ("flux2/alone.py", "", "in layers"),
        ("flux2/model.py", "import flux2.data.loader", "Within data"),
        ("flux2/train.py", "import rewards.ocr", "The core"),
        ("rewards/ocr.py", "import posttrain.grpo", "strangers"),
        ("rewards/ocr.py", "import eval.suite", "Evaluation"),
        ("posttrain/grpo.py", "import posttrain.sft", "never import each other"),
        ("posttrain/new.py", "import flux2.engine", "the maths of the core"),
        ("distill/new.py", "import flux2.roles", "the maths of the core"),
        ("posttrain/sft.py", "import diffusers", "no library"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str, broken: str):
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as out:
        out.write(f"\n{line}\n")
    done = tool("lint-imports", "--no-cache", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [x for x in done.stdout.splitlines() if " BROKEN" in x]
    assert any(broken in x for x in found), done.stdout
