"""The labelling page in a browser: keys, clicks, undo, two raters, a kill.

The pages are served by a process of their own, which loads Gradio once: Gradio leaves event loops
behind that this one would take for a fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page

from eval.label.answers import Answer, other, read_all
from eval.label.session import Item, schedule
from eval.label.source import read
from eval.label.stage import Board
from eval.label.verdict import Rules
from flux2.data.pairs import Pairs

pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[label]'")

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '</script><img src=x onerror="document.title=1"> ${document.title=2} {{prompt}} 看板'
COUNT = 6
WAIT = 60.0
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def make_pairs(folder: Path) -> Path:
    """The given winner of pair k is (40·k, 255, 0), the loser (40·k, 0, 255)."""
    folder.mkdir(parents=True)
    rows = []
    for k in range(COUNT):
        for side, colour in (("w", (40 * k, 255, 0)), ("l", (40 * k, 0, 255))):
            Image.new("RGB", (16, 16), colour).save(folder / f"{k}{side}.png")
        row = {"prompt": f"prompt {k}" if k else HOSTILE, "winner": f"{k}w.png"}
        row |= {"loser": f"{k}l.png"} | ({} if k else {"references": ["1w.png"]})
        rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return folder


HOST = """
import json, os, signal, sys
from pathlib import Path
from eval.label.answers import AnswerFile
from eval.label.page import gradio_modules, serve
from eval.label.session import Session, schedule
from eval.label.source import read
from eval.label.stage import Board
from eval.label.verdict import Rules

def page(given, home, rater, run):
    source, file = read(given), AnswerFile(Path(home), rater)
    session = Session(schedule(source.pairs, 0, rater, 0.0), file)
    Path(run).mkdir()
    (Path(run) / "pid").write_text(str(os.getpid()))
    serve(session, Board(source, Path(home), Rules()).standing, "127.0.0.1", 0, Path(run))
    (Path(run) / "closed").touch()

gradio_modules()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork() == 0:
        page(*json.loads(line))
        os._exit(0)
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Any]:
    """Gets lines of [pairs, labels, rater, folder], and forks a process with a page for each."""
    with subprocess.Popen(
        [sys.executable, "-c", HOST], cwd=ROOT, env=ENV, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip
        yield process.stdin
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class Served:
    """The page of one rater, until `close` (by its stop button)."""

    def __init__(self, browser: Any, host: Any, given: Path, rater: str, folder: Path) -> None:
        self.home, self.rater, self.folder = given / "labels", rater, folder
        self.items = schedule(read(str(given)).pairs, 0, rater, 0.0)
        print(json.dumps([str(given), str(self.home), rater, str(folder)]), file=host, flush=True)
        self.url = url_of(folder)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": 1200, "height": 800})
        self.page.set_default_timeout(WAIT * 1000)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type != "log" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.open()

    @property
    def answers(self) -> list[Answer]:
        """What is on the disk."""
        return read_all(self.home)[self.rater]

    @property
    def item(self) -> Item | None:
        """What is shown, if the page goes by the schedule."""
        done = {a.pair for a in self.answers}
        return next((item for item in self.items if item.pair.id not in done), None)

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector("#label[data-state='ready'], #label[data-state='over']")

    def act(self, key: str | None = None, click: str | None = None) -> None:
        """Presses a key or clicks, and waits for what comes next."""
        before = self.page.inner_text("#count")
        if key is not None:
            self.page.keyboard.press(key)
        else:
            self.page.click(str(click))
        self.page.wait_for_function(
            "before => document.querySelector('#count').innerText !== before && "
            "['ready', 'over'].includes(document.querySelector('#label').dataset.state)",
            arg=before,
        )

    def close(self) -> None:
        self.page.click("#end")
        assert self.page.inner_text("#end") == "really stop?"
        self.page.click("#end")
        wait_for(self.folder / "closed")
        assert not (self.folder / "address.json").exists()
        self.page.close()


def wait_for(file: Path) -> Path:
    end = time.monotonic() + WAIT
    while not file.is_file():
        assert time.monotonic() < end, f"no {file}"
        time.sleep(0.05)
    return file


def url_of(folder: Path) -> str:
    return json.loads(wait_for(folder / "address.json").read_text())["url"]


def shades(page: Page) -> list[list[int]]:
    """The colours of the two images as the browser drew them."""
    return page.eval_on_selector_all(
        "#pair img",
        """images => images.map(image => {
            const canvas = document.createElement("canvas");
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            return [...context.getImageData(8, 8, 1, 1).data].slice(0, 3);
        })""",
    )


def test_keys_clicks_undo_and_two_raters(browser: Any, host: Any, tmp_path: Path) -> None:
    given = make_pairs(tmp_path / "given")
    pairs = read(str(given)).pairs
    r1 = Served(browser, host, given, "r1", tmp_path / "a")
    page = r1.page
    assert page.title() == "Which is better?" and page.inner_text("#who") == "r1"
    assert page.inner_text("#count") == f"0 of {COUNT}" and page.is_disabled("#undo")
    prompt = page.locator("#prompt")
    ways = [{"key": "ArrowLeft"}, {"key": "2"}, {"click": "#right"}, {"key": "0"},
            {"click": "[data-choice='skip']"}, {"click": "[data-choice='left']"}]  # fmt: skip
    for number, way in enumerate(ways):
        item = r1.item
        assert item is not None
        assert prompt.evaluate("e => e.textContent") == item.pair.prompt
        k = pairs.index(item.pair)
        colours = {"a": [40 * k, 255, 0], "b": [40 * k, 0, 255]}
        assert shades(page) == [colours[item.left], colours[other(item.left)]]
        assert page.locator("#references img").count() == (k == 0)
        r1.act(**way)
        assert len(r1.answers) == number + 1  # on the disk when the next one stands
        if number == 2:  # back by two, and the same once more
            r1.act(key="Backspace")
            assert prompt.evaluate("e => e.textContent") == item.pair.prompt
            r1.act(key="u")
            assert page.inner_text("#count") == f"1 of {COUNT}" and len(r1.answers) == 1
            r1.act(key="ArrowRight")
            r1.act(key="2")
    said = r1.answers
    assert [a.choice for a in said] == ["left", "right", "right", "tie", "skip", "left"]
    assert all(0 <= a.seconds < WAIT for a in said)
    assert page.get_attribute("#label", "data-state") == "over"
    assert "All is answered" in page.inner_text("#message")
    assert page.title() == "Which is better?"  # no prompt has become a script

    r2 = Served(browser, host, given, "r2", tmp_path / "b")
    votes = {a.pair: a.vote for a in said}
    while (item := r2.item) is not None:  # who says the same of every image
        vote = votes[item.pair.id]
        keys = {None: "s", "tie": "t", item.left: "1", other(item.left): "2"}
        r2.act(key=keys[vote])
    r2.page.wait_for_selector("#standing tr:nth-child(3)")
    text = r2.page.inner_text("#standing")
    assert "r2" in text and "r1" in text and "Cohen's kappa\t1.00 on 5 pairs" in text
    assert {a.pair: a.left for a in r2.answers} != {a.pair: a.left for a in said}

    background = "getComputedStyle(document.querySelector('#label')).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    page.click("#theme")
    assert page.evaluate(background) == light != dark
    page.set_viewport_size({"width": 400, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    for one in (r1, r2):
        assert one.errors == []
        assert [u for u in one.requests if not u.startswith((one.url, "data:"))] == []
        one.close()


def test_held_keys_second_tabs_and_foreign_hosts(browser: Any, host: Any, tmp_path: Path) -> None:
    one = Served(browser, host, make_pairs(tmp_path / "given"), "r1", tmp_path / "run")
    page = one.page
    tab = browser.new_page()
    tab.goto(one.url)
    tab.wait_for_selector("#label[data-state='ready']")
    page.keyboard.press("Control+1")
    before = page.get_attribute("#label", "data-token")
    for _ in range(6):
        page.keyboard.down("ArrowLeft")  # what a held key repeats
    page.keyboard.up("ArrowLeft")
    page.wait_for_function("document.querySelector('#count').innerText.startsWith('1 ')")
    page.wait_for_timeout(200)
    assert [a.choice for a in one.answers] == ["left"]
    assert tab.get_attribute("#label", "data-token") == before
    tab.keyboard.press("2")  # of the pair that has its answer
    tab.wait_for_function("document.querySelector('#count').innerText.startsWith('1 ')")
    tab.wait_for_selector("#label[data-state='ready']")
    assert [a.choice for a in one.answers] == ["left"]
    assert tab.get_attribute("#label", "data-token") == page.get_attribute("#label", "data-token")
    tab.close()
    assert httpx.get(one.url).status_code == 200
    assert httpx.get(one.url, headers={"Host": "evil.example"}).status_code == 400
    for path in ("picture/0w.png", "picture/..%2fpairs.jsonl", "gradio_api/file=/etc/hostname"):
        assert httpx.get(f"{one.url}/{path}").status_code in (403, 404)
    assert one.errors == []
    one.close()


def test_a_killed_page_loses_nothing_and_goes_on(browser: Any, host: Any, tmp_path: Path) -> None:
    """Killed outright before an answer; the same rater goes on, and the pairs are there."""
    given = make_pairs(tmp_path / "given")
    one = Served(browser, host, given, "r1", tmp_path / "killed")
    for _ in range(3):
        one.act(key="1")
    os.kill(int((tmp_path / "killed/pid").read_text()), signal.SIGKILL)
    one.page.keyboard.press("2")
    one.page.wait_for_selector("#message:not([hidden])")
    assert "lost its program" in one.page.inner_text("#message")
    one.page.close()
    before = one.answers
    assert [a.choice for a in before] == ["left"] * 3
    again = Served(browser, host, given, "r1", tmp_path / "again")
    assert again.page.inner_text("#count") == f"3 of {COUNT}"
    for _ in range(3):
        again.act(key="1")
    again.close()
    source, after = read(str(given)), read_all(given / "labels")["r1"]
    assert after[:3] == before and {a.pair for a in after} == {p.id for p in source.pairs}
    summary = Board(source, given / "labels", Rules()).finish()
    data = Pairs(summary["pairs"], sizes=[[16, 16]])
    assert len(data) == summary["kept"] == COUNT
    won = {r.prompt: tuple(r.target[8, 8, 1:]) for r in (data[k] for k in range(COUNT))}
    lefts = {a.pair: a.left for a in after}
    assert won == {p.prompt: (255, 0) if lefts[p.id] == "a" else (0, 255) for p in source.pairs}


@pytest.mark.slow
def test_the_stage_ends_by_its_stop_button_and_training_reads_the_pairs(
    browser: Any, tmp_path: Path
) -> None:
    given, run = make_pairs(tmp_path / "given"), tmp_path / "run"
    command = [sys.executable, "run.py", "stage=label", f"pairs={given}", "rater=r1",
               "serve.port=0", "repeat=0", f"run.dir={run}"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, env=ENV) as process:
        page = browser.new_page()
        page.set_default_timeout(WAIT * 1000)
        page.goto(url_of(run))
        for number in range(3):
            page.wait_for_function(
                "n => document.querySelector('#count')?.innerText.startsWith(n + ' ') && "
                "document.querySelector('#label').dataset.state === 'ready'", arg=number
            )  # fmt: skip
            page.keyboard.press("1")
        page.wait_for_function("document.querySelector('#count').innerText.startsWith('3 ')")
        page.click("#end")
        page.click("#end")
        assert process.wait(WAIT) == 0
        page.close()
    summary = json.loads((run / "summary.json").read_text())
    assert (
        summary["kept"] == 3 and json.loads((run / "manifest.json").read_text())["status"] == "done"
    )
    for stage in ("dpo", "kto"):
        done = subprocess.run(
            [sys.executable, "run.py", f"stage={stage}", "data=pairs", "train.steps=1",
             f"data.dataset.path={summary['pairs']}", "data.batch_size=2", "evaluation=none",
             "launch.threads=1", f"run.dir={tmp_path / stage}"],
            cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_parses() -> None:
    """Where no browser is, a syntax error is still found if node is."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    path = ROOT / "eval" / "label" / "templates" / "label.js"
    wrapped = f"(async (element, server) => {{\n{path.read_text()}\n}})"
    done = subprocess.run([node, "--check", "-"], input=wrapped, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
