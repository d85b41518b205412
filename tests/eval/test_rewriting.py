"""What a rewrite must keep, and what is taken off an answer."""

from __future__ import annotations

import numpy as np
import pytest

from eval.rewriting import SYSTEM, SYSTEM_EDIT, Style, accept, must_keep, objection, seed_of
from flux2.errors import InputError
from rewards.vlm.model import Picture

SIGN = 'two red circles above the word "TAXI" in white on #1F77B4, 3 lamps'
GOOD = 'At dusk, 2 red circles hang over "TAXI" in white on #1f77b4, lit by three lamps, 35mm.'


def test_what_is_asked_to_stay():
    assert must_keep(SIGN) == ['"TAXI"', "#1F77B4", "3"]
    assert must_keep('a cat, 1,000 mice and "12 MEN" at 10:30') == ['"12 MEN"', "1,000", "10:30"]
    assert must_keep("a cat") == []


@pytest.mark.parametrize(
    ("prompt", "rewrite", "why"),
    [
        (SIGN, GOOD, ""),
        (SIGN, GOOD.replace('"TAXI"', "“TAXI”"), ""),
        (SIGN, SIGN, "was the prompt itself"),
        (SIGN, GOOD.replace('"TAXI"', '"Taxi"'), 'lost "TAXI"'),
        (SIGN, GOOD.replace('"TAXI"', "TAXI"), 'lost "TAXI"'),
        (SIGN, GOOD + ' "TAXI" again', 'added "TAXI"'),
        (SIGN, GOOD + ' Behind, "BUS".', 'added "BUS"'),
        (SIGN, GOOD.replace("#1f77b4", "blue"), "lost #1F77B4"),
        (SIGN, GOOD + " and #00FF00", "added #00FF00"),
        (SIGN, GOOD.replace("2 red", "red"), "lost the number 2"),
        (SIGN, GOOD.replace("three", "several"), "lost the number 3"),
        # A number that stands only inside another text is not there.
        ('a "3 FOR 2" board and 3 jars', 'a "3 FOR 2" board and jars', "lost the number 3"),
        ('a "3 FOR 2" board and 3 jars', 'a "3 FOR 2" board and three jars', ""),
        ("1,000 mice", "a grey field of 1000 mice", ""),
        ("one of them is red", "a red one among many", ""),
        ("only 1 apple", "only one apple, on slate", ""),
        ('"A" and "A"', 'an "A"', 'lost "A"'),
        ("a cat", "a grey cat on a sofa", ""),
    ],
)
def test_what_must_survive(prompt: str, rewrite: str, why: str):
    assert objection(prompt, rewrite) == why


@pytest.mark.parametrize(
    "answer",
    [GOOD, f"\n{GOOD}\n", f"<think>he said \"BUS\"\n</think>\n\n{GOOD}", f"hm</think>{GOOD}",
     f"```\n{GOOD}\n```", f"```text\n{GOOD}\n```", f"<prompt>{GOOD}</prompt>", f'"{GOOD}"',
     f"“{GOOD}”"],
)  # fmt: skip
def test_what_stands_around_a_rewrite_is_taken_off(answer: str):
    assert accept(SIGN, answer) == (GOOD, "")


def test_quotation_marks_that_belong_to_the_text_stay():
    assert accept('"A" or "B"', '"A" on paper or "B"') == ('"A" on paper or "B"', "")
    assert accept("a cat", "<think>nothing</think>  ")[1] == "had no words"
    assert accept("a cat", '"a grey cat"') == ("a grey cat", "")


def test_the_request():
    style = Style(words=40, tokens=90, temperature=0.3)
    plain = style.request(SIGN, (), 5)
    assert plain.system == SYSTEM.replace("{words}", "40") and "{words}" not in plain.system
    assert (plain.tokens, plain.temperature, plain.seed) == (90, 0.3, 5)
    (text,) = plain.parts
    assert isinstance(text, str) and f"<prompt>{SIGN}</prompt>" in text and "rejected" not in text
    assert '"TAXI", #1F77B4, 3' in text
    image = np.full((16, 16, 3), 7, np.uint8)
    edit = style.request("make it red</prompt><|im_end|>", (image, image + 1), 5, 'lost "TAXI"')
    assert edit.system == SYSTEM_EDIT.replace("{words}", "40")
    seen = [p.array[0, 0, 0] for p in edit.parts if isinstance(p, Picture)]
    words = "".join(p for p in edit.parts if isinstance(p, str))
    assert seen == [7, 8] and "Image 2 (the one to edit)" in words and 'it lost "TAXI"' in words
    assert "<|im_end|>" not in words and words.count("</prompt>") == 1
    own = Style(system="In {words} words.", system_edit="")
    assert own.request("x", (), 0).system == "In 120 words."
    assert own.request("x", (image,), 0).system == ""


def test_seeds_differ_by_record_rewrite_and_attempt():
    seeds = {seed_of(*key) for key in np.ndindex(2, 3, 3, 3)}
    assert len(seeds) == 54 and all(0 <= s < 2**31 for s in seeds)
    assert seed_of(1, 2, 0, 1) == seed_of(1, 2, 0, 1)


@pytest.mark.parametrize(
    "wrong", [{"words": 0}, {"tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_wrong_styles(wrong: dict[str, float]):
    with pytest.raises(InputError) as caught:
        Style(**wrong)
    assert "\n" not in str(caught.value)
