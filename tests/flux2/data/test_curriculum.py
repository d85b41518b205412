"""The curriculum: who is admitted when, and what is kept of what came before."""

from __future__ import annotations

from collections import Counter

import pytest

from flux2.data.complexity import LEVELS, count_words, level_of, scripts
from flux2.data.curriculum import Curriculum
from flux2.data.mixture import Mixture
from flux2.data.order import identity, report
from flux2.data.record import Record
from flux2.data.sampler import IndexSampler
from flux2.errors import InputError
from tests.flux2.data.toys import Told

SENTENCE = "the quick brown fox jumps over the lazy dog "


@pytest.mark.parametrize(
    ("meta", "level"),
    [
        ({}, "none"),
        ({"text": ()}, "none"),
        ({"text": ("  ",)}, "none"),
        ({"text": ("TAXI",)}, "word"),
        ({"text": "TAXI"}, "word"),
        ({"text": ("出口",)}, "word"),
        ({"text": ("NO EXIT",)}, "phrase"),
        ({"text": ("禁止进入",)}, "phrase"),
        ({"text": ("OPEN", "24 HOURS")}, "lines"),
        ({"text": ("OPEN\n24 HOURS",)}, "lines"),
        ({"text": ("CAFE 咖啡",)}, "mixed-scripts"),
        ({"text": ("Кафе", "CAFE")}, "mixed-scripts"),
        ({"text": ("ラーメン屋",)}, "phrase"),  # kana and ideographs are one way of writing
        ({"text": ("TAXI 24/7",)}, "phrase"),  # digits and signs are no script
        ({"text": ("TAXI",), "text_height": 0.03}, "small-type"),
        ({"text": ("TAXI",), "text_height": 0.06}, "word"),
        ({"text": ("A", "B", "C"), "text_box": (0, 0.5, 1, 0.62)}, "small-type"),
        ({"text": ("A", "B"), "text_box": (0, 0.5, 1, 0.62)}, "lines"),
        ({"text": (SENTENCE * 3,)}, "paragraph"),
        ({"text": (SENTENCE * 3,), "text_height": 0.01}, "paragraph"),
        ({"text": (SENTENCE, SENTENCE, "12 May", "Hall 7")}, "poster"),
        ({"text": ("JAZZ", "12 May", "Hall 7", "Free")}, "lines"),
        ({"text": ("TAXI",), "complexity": "poster"}, "poster"),
        ({"text": ("TAXI",), "complexity": 2}, "phrase"),
    ],
)
def test_levels(meta, level):
    assert level_of(Record(0, "p", meta=meta)) == level


@pytest.mark.parametrize("said", ["hard", 8, -1, True, 1.0])
def test_a_wrong_level_is_refused(said):
    with pytest.raises(InputError, match="complexity"):
        level_of(Record(0, "p", meta={"complexity": said}))


def test_words_and_scripts():
    texts = ("", "a b", "出口", "禁止进入!", "iPhone 手机壳")
    assert [count_words(t) for t in texts] == [0, 2, 1, 2, 3]
    assert scripts("\uff21\uff22c") == {"LATIN"}  # full-width letters
    assert scripts("日本のカメラ") == {"CJK"}
    assert scripts("αβ ab") == {"GREEK", "LATIN"}


def levels(**counts: int) -> Told:
    return Told([{"complexity": name.replace("_", "-")} for name, n in counts.items()
                 for _ in range(n)], sealed=True)  # fmt: skip


def shares(data: Curriculum, first: int, steps: int, batch: int = 20) -> dict[str, float]:
    sampler, seen = IndexSampler(data, batch, seed=0), Counter()
    for step in range(first, first + steps):
        seen.update(level_of(data.describe(i)) for i in sampler(step))
    return {name: n / seen.total() for name, n in seen.items()}


STAGES = ({"from": 0, "levels": ["none", "word"]}, {"from": 50, "levels": ["phrase"]},
          {"from": 100, "levels": {"word": 0.1, "poster": 0.9}})  # fmt: skip


def test_levels_are_admitted_by_the_step_and_earlier_ones_kept():
    data = Curriculum(levels(none=30, word=90, phrase=40, poster=10), STAGES, keep=0.2)
    assert shares(data, 0, 50) == pytest.approx({"none": 0.25, "word": 0.75}, abs=0.01)
    assert shares(data, 50, 50) == pytest.approx(
        {"none": 0.05, "word": 0.15, "phrase": 0.8}, abs=0.01
    )
    assert shares(data, 100, 50) == pytest.approx({"word": 0.1, "poster": 0.9}, abs=0.01)
    assert shares(data, 10**6, 50) == pytest.approx({"word": 0.1, "poster": 0.9}, abs=0.01)
    assert [data.stage_of(s) for s in (0, 49, 50, 99, 100)] == [0, 0, 1, 1, 2]


def test_nothing_is_kept_where_it_is_not_asked_for():
    data = Curriculum(levels(none=30, word=90, phrase=40, poster=10), STAGES, keep=0.0)
    assert set(shares(data, 50, 50)) == {"phrase"}


def test_the_step_is_the_whole_state():
    def sampler() -> IndexSampler:
        data = Curriculum(levels(none=30, word=9, phrase=40, poster=10), STAGES)
        return IndexSampler(data, 4, seed=3)

    forwards = sampler()
    want = [forwards(step) for step in range(130)]
    assert [sampler()(step) for step in (0, 49, 50, 51, 77, 100, 129)] == [
        want[step] for step in (0, 49, 50, 51, 77, 100, 129)
    ]


def test_stages_may_begin_at_parts_of_the_run():
    stages = [{"from": 0.0, "levels": ["none"]}, {"from": 0.25, "levels": ["word"]}]
    data = Curriculum(levels(none=3, word=3), stages, total=80)
    assert [data.stage_of(s) for s in (19, 20)] == [0, 1]


def test_levels_may_be_any_fields():
    stages = [{"from": 0, "levels": [1]}, {"from": 5, "levels": [2, 3]}]
    data = Curriculum(Told([{"count": 1 + i % 3} for i in range(30)]), stages, by="count", keep=0.5)
    first = IndexSampler(data, 4, seed=0)
    assert {i % 3 for s in range(5) for i in first(s)} == {0}
    late = Counter(i % 3 for s in range(5, 105) for i in first(s))
    assert [late[k] / 400 for k in range(3)] == pytest.approx([0.5, 0.25, 0.25], abs=0.01)


def test_a_mixtures_shares_hold_within_a_level():
    parts = {"a": {"dataset": levels(word=10, poster=90), "weight": 1},
             "b": {"dataset": levels(word=50), "weight": 1}}  # fmt: skip
    data = Curriculum(Mixture(parts), [{"from": 0, "levels": ["word"]}])
    weights = data.law(0).shares(150)
    # a's words are a tenth of its half, b's all of its half
    assert weights[:10].sum() == pytest.approx(1 / 11) and weights[10:100].sum() == 0


def test_it_tells_its_stages():
    data = Curriculum(levels(none=30, word=90, phrase=40, poster=10), STAGES)
    lines = report(data)
    assert lines[0].split() == [
        "complexity", "records", "from", "0", "from", "50", "from", "100",
    ]  # fmt: skip
    assert lines[1].split() == ["none", "30", "25.0%", "5.0%", "-"]
    assert lines[4].split() == ["poster", "10", "-", "-", "90.0%"]
    assert identity(data) == identity(levels(none=30, word=90, phrase=40, poster=10))


@pytest.mark.parametrize(
    ("stages", "settings", "why"),
    [
        ([], {}, "empty"),
        ([{"levels": ["word"]}], {}, "1. is not"),
        ([{"from": 0, "levels": ["word"], "until": 3}], {}, "1. is not"),
        ([{"from": 5, "levels": ["word"]}], {}, "begin at 0"),
        ([{"from": 0, "levels": ["word"]}, {"from": 0, "levels": ["none"]}], {}, "after the last"),
        ([{"from": "soon", "levels": ["word"]}], {}, "neither a step"),
        ([{"from": 0, "levels": ["word"]}, {"from": 0.5, "levels": ["none"]}], {}, "total"),
        ([{"from": 0, "levels": ["wrod"]}], {}, f"choose from {LEVELS[0]}"),
        ([{"from": 0, "levels": ["poster"]}], {}, "no record is of level poster: .*word × 2"),
        ([{"from": 0, "levels": {"word": 0.5}}], {}, "sum to 1"),
        ([{"from": 0, "levels": {"word": 0.5, "poster": 0.5}}], {}, "level poster"),
        ([{"from": 0, "levels": ["word"]}], {"keep": 1.0}, "keep"),
        ([{"from": 0, "levels": [3]}], {"by": "complexity"}, "choose from none, word"),
    ],
)
def test_wrong_stages_are_refused(stages, settings, why):
    with pytest.raises(InputError, match=why):
        Curriculum(levels(none=1, word=2), stages, **settings)
