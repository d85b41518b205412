"""Topping up: what is found is what BM25 ranks first, and stands behind the data as its own."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from flux2.data.mixture import Mixture
from flux2.data.order import describe, identity, law_of, report
from flux2.data.record import UnreadableRecord
from flux2.data.retrieval import ToppedUp, scorer, words
from flux2.errors import InputError
from tests.flux2.data.toys import Notes, Told, drawn

DATA = [{"prompt": f"a cat on sofa {i}", "tags": ["cat"]} for i in range(20)] + [
    {"prompt": "a yak in the snow", "tags": ["yak", "snow"]}
]
POOL = [
    {"prompt": "a dog in a park"},
    {"prompt": "a yak"},
    {"prompt": "A YAK in the snow!", "tags": ["winter"]},  # the dataset has it
    {"prompt": "the long road to a mountain village with one yak at its side", "tags": "road"},
    {"prompt": "snow on a roof"},
    {"prompt": "two yaks"},
]


def topped(**settings: object) -> ToppedUp:
    return ToppedUp(Notes(DATA), Notes(POOL), **{"below": 0.1, **settings})


def bm25(texts: list[list[str]], query: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """The formula, a text and a word at a time."""
    mean, out = sum(map(len, texts)) / len(texts), []
    for text in texts:
        score, tf = 0.0, Counter(text)
        for word in query:
            df = sum(word in t for t in texts)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            score += idf * tf[word] / (tf[word] + k1 * (1 - b + b * len(text) / mean))
        out.append(score)
    return out


def test_scores_are_bm25s():
    texts = [words(str(m["prompt"])) for m in POOL]
    for query in ("yak", "snow yak", "nothing of it", "a", ""):
        assert scorer(texts)(words(query)) == pytest.approx(bm25(texts, words(query)), abs=1e-6)


def test_words():
    assert words("A Yak's road, 24/7!") == ["a", "yak", "s", "road", "24", "7"]
    assert words("红色 Taxi 出口") == ["红", "色", "taxi", "出", "口"]


def test_rare_tags_are_topped_up_and_stand_behind():
    data = topped(count=2)
    found = [data[i] for i in range(len(DATA), len(data))]
    # snow finds its one; yak the two shortest but what is there already; the plural is another word
    assert [r.prompt for r in found] == [POOL[1]["prompt"], POOL[3]["prompt"], POOL[4]["prompt"]]
    assert [r.id for r in found] == [21, 22, 23]
    assert [r.meta["retrieved"] for r in found] == [("yak",), ("yak",), ("snow",)]
    assert found[1].meta["tags"] == ("road", "yak")
    assert data[20].meta["tags"] == ["yak", "snow"] and "retrieved" not in data[20].meta
    assert describe(data, 22).meta == found[1].meta
    with pytest.raises(IndexError):
        data[24]


def test_prompts_may_be_what_is_asked():
    data = topped(by="prompts", concepts=["yak"], count=3)
    texts = [words(str(m["prompt"])) for m in POOL]
    scores = np.array(bm25(texts, words("a yak in the snow")))
    scores[2] = 0
    best = sorted(np.argsort(-scores)[:3].tolist())
    assert [data[21 + k].prompt for k in range(3)] == [POOL[k]["prompt"] for k in best]


def test_least_and_count_bound_what_comes():
    every = topped(concepts=["yak"])
    assert len(every) == 23
    score = scorer([words(str(m["prompt"])) for m in POOL])(["yak"])
    assert len(topped(concepts=["yak"], least=float(score[1]))) == 22
    assert len(topped(concepts=["yak"], count=1)) == 22


def test_equal_scores_are_taken_in_the_pools_order():
    pool = Told([{"prompt": f"yak number{i}"} for i in range(50)])
    data = ToppedUp(Told(DATA), pool, count=7, concepts=["yak"])
    assert [data.describe(21 + k).prompt for k in range(7)] == [f"yak number{k}" for k in range(7)]


def test_no_image_is_read_to_search():
    data = ToppedUp(Told(DATA, sealed=True), Told(POOL, (32,), sealed=True), below=0.1)
    assert data.bucket_of(20) == (16, 16, 0) and data.bucket_of(21) == (32, 32, 0)


def test_unreadable_records_of_the_pool_are_not_found():
    pool = Notes(POOL, broken=frozenset({1}))
    data = ToppedUp(Notes(DATA), pool, below=0.1, concepts=["yak"])
    assert [data[i].prompt for i in range(21, len(data))] == [POOL[3]["prompt"]]
    late = ToppedUp(Notes(DATA), Told(POOL, broken=frozenset({1})), concepts=["yak"])
    with pytest.raises(UnreadableRecord):
        late[21]


def test_its_law_is_the_datas():
    assert law_of(topped(), 0).weights is None
    assert set(drawn(topped(count=1, concepts=["yak"]), 1, 22).values()) == {1}
    parts = {"a": {"dataset": Told(DATA), "weight": 1}, "b": {"dataset": Told(DATA), "weight": 3}}
    law = law_of(ToppedUp(Mixture(parts), Told(POOL), concepts=["yak"]), 0)
    assert law.weights[42:] == pytest.approx([law.weights[:42].mean()] * 2)
    assert law.parts.tolist() == [0] * 21 + [1] * 21 + [2] * 2


def test_it_tells_what_came():
    lines = report(topped())
    assert lines[1].split() == ["snow", "1", "1"]
    assert lines[2].split() == ["yak", "1", "2"]
    assert lines[3].split() == ["all", "21", "3"]
    assert identity(topped()) != identity(topped(count=1))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"by": "image"}, "tag or prompts"),
        ({"count": 0}, "count"),
        ({"below": 0.0}, "below"),
        ({"below": 0.01}, "no tag of 'tags' is rarer"),
        ({"tags": "topics"}, "topics"),
        ({"concepts": ["zebra"]}, "nothing for zebra"),
        ({"concepts": ["yak"], "least": 99.0}, "lower"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(InputError, match=why):
        topped(**settings)
