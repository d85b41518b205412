"""The report in a browser: clicked, sorted, filtered, leafed through; it asks for nothing."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from eval.evaluation import Evaluation, write_image
from eval.records import Fingerprint, Results, Score
from eval.report.data import open_runs
from eval.report.numbers import Settings, numbers
from eval.report.page import pictures, render
from flux2.data.signs import SignWorld
from flux2.rng import keyed

HOSTILE = (
    '</script><script>document.title="owned"</script>',
    '<img src="https://example.invalid/x.png" onerror="document.title=1"> "quoted" \'too\' & more',
    "看板 “灯籠” 🦊 ‮reversed‬ Ω",
    "<b>long</b> " + "word " * 1000,
)
PROMPTS, NOISES = 40, 2
RUNS = {"control": 0.4, "tuned": 0.8, "</script><b>quick": 0.6}


@dataclass
class Seen:
    """The page, and what it did that nobody asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def make_runs(folder: Path) -> list[str]:
    """Three runs on the same signs, each with metrics.jsonl and two evaluations."""
    world = SignWorld("heldout", length=400, loose=0.0)
    draws = keyed(7, "browser").random((PROMPTS, NOISES, 3))
    signs = [world[p] for p in range(PROMPTS)]
    texts = {p: signs[p].prompt for p in range(PROMPTS)} | dict(enumerate(HOSTILE))
    items = []
    for number, (name, right) in enumerate(RUNS.items()):
        run = folder / f"run{number}"
        for step, share in ((0, 0.3), (50, right)):
            scores = []
            for p in range(PROMPTS):
                for k in range(NOISES):
                    exact = float(draws[p, k, 0] < share)
                    lost = number == 1 and p == 9 and k == 0 and step
                    scores += [
                        Score(p, k, "exact", math.nan if lost else exact, number > 0),
                        Score(p, k, "cer", (1 - exact) * float(draws[p, k, 1])),
                        Score(p, k, "diversity", float(draws[p, k, 2]) + 0.1 * number),
                    ]
            prints = {
                m: Fingerprint(m, f"{m}(1)", PROMPTS * NOISES, "p", "euler8:ab", 3.0)
                for m in ("exact", "cer", "diversity")
            }
            identity = {
                "name": name, "model": "nano", "stage": "eval", "solver": "euler", "steps": 8,
                "guidance": 3.0, "grid": "ab", "forwards": 16 >> number, "seconds": 0.5 / 2**number,
            }  # fmt: skip
            found = Evaluation(Results(tuple(scores), prints), texts, identity, {"exact": 0.95})

            def write(images: Path) -> None:
                for p in range(PROMPTS):
                    for k in range(NOISES):
                        pixels = signs[p].target
                        assert pixels is not None
                        write_image(images, p, k, pixels)

            run.mkdir(exist_ok=True)
            found.save(run / "evaluation" / f"step_{step:06d}", write)
        rows = [
            json.dumps({"step": s, "reward": s / 50 + 0.1 * number, "loss": 1.0, "time/step": 2.0})
            for s in range(50)
        ]
        (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        items.append(str(run))
    return items


@pytest.fixture(scope="module")
def report_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    settings = Settings(title=f"Signs {HOSTILE[0]}", margins={"cer": 0.02})
    entries = open_runs(make_runs(folder), None)
    found = numbers(entries, settings)
    path = folder / "report.html"
    path.write_text(render(found, *pictures(entries, found, settings)), encoding="utf-8")
    return path


@pytest.fixture
def seen(browser: Any, report_path: Path) -> Iterator[Seen]:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(20_000)
    out = Seen(page)
    page.on("console", lambda m: out.errors.append(m.text) if m.type != "log" else None)
    page.on("pageerror", lambda error: out.errors.append(str(error)))
    page.on("dialog", lambda dialog: out.errors.append("a dialog"))
    page.on("request", lambda r: out.requests.append(r.url))
    page.goto(report_path.as_uri())
    yield out
    assert out.errors == []
    own = [u for u in out.requests if u != report_path.as_uri() and not u.startswith("data:")]
    assert own == []
    page.close()


def metric_names(page: Page) -> list[str]:
    return page.eval_on_selector_all(
        "#metric-table tbody tr", "rows => rows.filter(r => !r.hidden).map(r => r.dataset.name)"
    )


def first_prompt(page: Page) -> str:
    return page.locator(".open-prompt").first.inner_text()


def test_the_table_is_sorted_by_clicks_and_filtered(seen: Seen) -> None:
    page = seen.page
    assert metric_names(page) == ["exact", "cer", "diversity"]
    head = page.locator("#metric-table thead th")
    head.nth(2).locator("button").click()
    assert metric_names(page) == ["exact", "diversity", "cer"]
    assert head.nth(2).get_attribute("aria-sort") == "descending"
    head.nth(2).locator("button").click()
    assert metric_names(page) == ["cer", "diversity", "exact"]
    page.select_option("#metric-key", "gain")
    assert metric_names(page)[0] == "cer" and metric_names(page)[-1] == "exact"
    head.nth(0).locator("button").click()
    assert metric_names(page) == ["cer", "diversity", "exact"]
    page.fill("#metric-filter", "BETTER exa")
    assert metric_names(page) == ["exact"]
    assert page.inner_text("#metric-count") == "1 of 3 metrics"
    assert page.locator(".forest svg").count() == 6


def test_the_axes_are_changed_and_the_front_follows(seen: Seen) -> None:
    page = seen.page
    assert page.input_value("#tradeoff-x") == "cost:forwards"
    names = list(RUNS)

    def front() -> set[str]:
        points = page.locator("#tradeoff circle")
        found = [points.nth(i) for i in range(points.count())]
        assert len(found) == 3
        on = [p for p in found if p.get_attribute("data-front") == "true"]
        return {str(p.get_attribute("data-name")) for p in on}

    assert front() == {names[1], names[2]}  # control costs more and is worse than both
    page.select_option("#tradeoff-x", "metric:diversity")
    assert front() == {names[1], names[2]}
    page.select_option("#tradeoff-y", "metric:cer")
    page.check("#tradeoff-log")
    assert "cer" in page.inner_text("#tradeoff") and "diversity" in page.inner_text("#tradeoff")
    page.select_option("#tradeoff-x", "cost:training_seconds")
    assert page.locator("#tradeoff .front").count() == 0  # all cost the same: one is best
    page.locator("#tradeoff circle").first.hover()
    assert "seconds of training: 100.0" in page.inner_text("#tip")


def test_curves_over_steps_and_seconds(seen: Seen) -> None:
    page = seen.page
    assert page.input_value("#training-metric") == "reward"
    assert page.locator("#training .line").count() == 3
    page.select_option("#training-metric", "loss")
    page.select_option("#training-x", "seconds")
    assert "seconds of training" in page.inner_text("#training")
    page.select_option("#held-metric", "cer")
    page.select_option("#held-x", "seconds")
    assert page.locator("#held .line").count() == 3
    box = page.locator("#held svg").bounding_box()
    assert box is not None
    page.locator("#held svg").hover(position={"x": box["width"] * 0.9, "y": box["height"] / 2})
    assert page.inner_text("#tip").startswith("seconds of training 100")


def test_pages_order_filter_and_views_of_the_samples(seen: Seen) -> None:
    page = seen.page
    count = page.locator(".page-count").first
    assert "page 1 of 4" in count.inner_text() and "40 of 40 prompts" in count.inner_text()
    before = first_prompt(page)
    page.locator("[data-turn='1']").first.click()
    assert "page 2 of 4" in count.inner_text() and first_prompt(page) != before
    page.keyboard.press("[")
    assert "page 1 of 4" in count.inner_text() and first_prompt(page) == before
    assert page.locator("[data-turn='-1']").first.is_disabled()
    page.select_option("#by-order", "prompt")
    assert first_prompt(page).startswith("</script><script>")
    page.select_option("#by-order", "loss")
    page.select_option("#by-from", "tuned")
    page.select_option("#by-to", "control")
    assert page.locator(".card .change").first.inner_text().startswith("▼ −")
    assert page.locator(".card").first.locator(".chip.bad").inner_text() == "failure"
    page.keyboard.press("/")
    page.keyboard.type("灯籠")
    assert page.locator(".open-prompt").count() == 1 and "1 of 40 prompts" in count.inner_text()
    page.fill("#sample-filter", "no such words")
    assert "no prompt has these words" in page.inner_text("#sample-list")
    page.fill("#sample-filter", "")
    page.select_option("#view", "list")
    assert page.locator("table.list tbody tr").count() == 40


def test_failures_come_first(seen: Seen) -> None:
    page = seen.page
    page.select_option("#view", "list")
    rows = page.eval_on_selector_all(
        "table.list tbody tr", "rows => rows.map(r => r.querySelector('.chip.bad') !== null)"
    )
    assert rows == sorted(rows, reverse=True) and 0 < sum(rows) < 40
    page.uncheck("#failures-first")
    changes = page.eval_on_selector_all(
        "table.list tbody tr",
        "rows => rows.map(r => [1, 2].map(k => parseFloat(r.cells[k].innerText)))",
    )
    sizes = [abs(b - a) for a, b in changes]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 1


def test_a_prompt_is_opened_and_leafed_through_by_keys(seen: Seen) -> None:
    page = seen.page
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = page.evaluate("document.activeElement.innerText")
    page.keyboard.press("Enter")
    dialog = page.locator("#detail")
    assert dialog.is_visible() and page.inner_text("#detail-title") == "Prompt 2 of 40"
    assert dialog.locator(".prompt-text").inner_text() == second
    images = dialog.locator("img")
    assert images.count() == 3 * NOISES
    images.first.wait_for()
    page.wait_for_function(
        "[...document.querySelectorAll('#detail img')].every(i => i.naturalWidth === 64)"
    )
    assert dialog.locator("tbody tr").count() == 3
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#detail-title") == "Prompt 3 of 40"
    dialog.get_by_label("scores of").select_option(index=1)
    dialog.get_by_label("previous prompt").click()
    assert page.inner_text("#detail-title") == "Prompt 2 of 40"
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.innerText") == second  # focus comes back


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_prompts_are_shown_as_text(seen: Seen, number: int) -> None:
    page = seen.page
    page.select_option("#by-order", "prompt")
    page.locator(f".open-prompt[data-prompt='{number}']").click()
    shown = page.locator("#detail .prompt-text").evaluate("e => e.textContent")
    assert shown == HOSTILE[number]
    assert page.title() == f"Signs {HOSTILE[0]}" and page.locator("#detail b").count() == 0
    assert page.locator("#detail img[onerror]").count() == 0


def test_a_script_in_the_page_would_not_run(browser: Any, report_path: Path) -> None:
    """The second wall: were a prompt's script to get in, the policy would not let it run."""
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda m: refused.append(m.text))
    text = report_path.read_text(encoding="utf-8")
    broken = text.replace("</main>", "<script>document.title = 'owned'</script></main>")
    path = report_path.with_name("broken.html")
    path.write_text(broken, encoding="utf-8")
    page.goto(path.as_uri())
    assert page.title() != "owned" and any("Content Security Policy" in m for m in refused)
    page.close()


def test_dark_light_narrow_and_printed(seen: Seen, tmp_path: Path) -> None:
    page = seen.page
    background = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    assert (dark, light) == ("rgb(20, 22, 26)", "rgb(255, 255, 255)")
    page.click("#theme")
    assert page.evaluate(background) == dark
    page.click("#theme")
    page.screenshot(path=tmp_path / "wide.png")
    page.set_viewport_size({"width": 420, "height": 800})
    over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert over <= 0  # wide tables scroll in themselves
    page.emulate_media(media="print")
    assert not page.locator("#sample-tools").is_visible()
    assert page.locator("#metric-table").is_visible()
    unnamed = page.eval_on_selector_all(
        "input, select", "all => all.filter(e => !e.labels.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


def test_one_run_alone_and_no_training(browser: Any, tmp_path: Path) -> None:
    path = Path(make_runs(tmp_path)[0])
    (path / "metrics.jsonl").unlink()
    shutil.rmtree(path / "evaluation" / "step_000000")
    entries = open_runs([f"only={path}"], None)
    alone = [replace(entries[0], evaluation=replace(entries[0].evaluation, ceilings={}))]
    found = numbers(alone, Settings())
    file = tmp_path / "one.html"
    file.write_text(render(found, *pictures(alone, found, Settings())), encoding="utf-8")
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    assert page.inner_text("h1") == "only" and page.locator(".card").count() == 12
    assert page.locator("#training-figure").count() == page.locator("#held-figure").count() == 0
    page.locator(".open-prompt").first.click()
    assert page.locator("#detail tbody tr").count() == 3
    assert errors == []
    page.close()


def test_the_scripts_parse() -> None:
    """Where no browser is, a syntax error is still found if node is."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    for name in ("charts.js", "report.js"):
        path = Path(__file__).parents[3] / "eval" / "report" / "templates" / name
        done = subprocess.run([node, "--check", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
