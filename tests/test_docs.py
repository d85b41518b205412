"""What the documents say to type: every command composes, every link and picture is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

import run
from tests.test_conf import composed

ROOT = Path(run.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Every `python run.py …` of a page's code blocks and code spans, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"python run\.py ([^\n`#]*)", joined)


def overrides(command: str) -> list[str] | None:
    """What is composed, of a sweep its first job; None where a person or a shell has to fill
    something in, and where a run says what its configuration is."""
    told = re.sub(r"=<[^>]+>", "=told", command)
    if re.search(r"[<…$]|--help|resume=(?!auto)", told):
        return None
    words = shlex.split(re.sub(r"-m |--cfg job", "", told))
    parsed = OverridesParser.create().parse_overrides(words)
    first = [
        f"{o.input_line.split('=', 1)[0]}={next(iter(o.sweep_string_iterator()))}"
        if o.is_sweep_override() else o.input_line
        for o in parsed
    ]  # fmt: skip
    return list(run.planned(first))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_compose(page: Path):
    for command in commands(page.read_text()):
        wanted = overrides(command)
        if wanted is not None:
            try:
                composed(*wanted)
            except Exception as error:
                pytest.fail(f"{page.name}: {command}: {error}")


def test_most_commands_are_tried():
    """The pattern finds them, and few are left to the reader."""
    told = [overrides(c) for page in PAGES for c in commands(page.read_text())]
    assert len(told) > 130 and sum(t is None for t in told) < len(told) / 5


def test_the_readmes_own_lines_draw_a_sign(monkeypatch: pytest.MonkeyPatch):
    """As they stand there, by diffusers alone."""
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    said: dict[str, Any] = {}
    torch.manual_seed(0)  # the lines name no generator
    exec(code, said)
    image = np.asarray(said["image"])
    assert image.shape == (64, 64, 3)
    # Flat grounds and letters on them: neither noise nor one colour.
    assert image.std() > 30 and np.abs(np.diff(image.astype(int), axis=1)).mean() < 20


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [to for to in links if "://" not in to and not (page.parent / to).exists()]
    assert missing == []
