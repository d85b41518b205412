"""Captions of several lengths: each kind as often as it weighs, and none that a record lacks."""

from __future__ import annotations

from collections import Counter

import pytest

from flux2.data.captions import captions_of, check_weights, pick_caption
from flux2.data.record import Record
from flux2.errors import InputError
from flux2.rng import keyed

ALL = {"long": "a long one", "short": "one", "tags": ["red", "circle"], "user": "pls a circle"}


def record(**captions: object) -> Record:
    return Record(7, "the prompt", meta={"captions": captions, "text": "TAXI"})


def test_each_kind_comes_as_often_as_it_weighs():
    weights = {"long": 1.0, "short": 2.0, "tags": 0.0, "user": 1.0}
    u = (i / 1000 for i in range(1000))
    seen = Counter(pick_caption(record(**ALL), weights, x).meta["caption"] for x in u)
    assert seen == {"long": 250, "short": 500, "user": 250}


def test_the_caption_becomes_the_prompt_and_nothing_else_changes():
    before = record(**ALL)
    after = pick_caption(before, {"tags": 1.0}, 0.3)
    assert after.prompt == "red, circle" and after.id == 7
    assert after.meta == {**before.meta, "caption": "tags"} and "caption" not in before.meta


def test_what_a_record_lacks_leaves_its_weight_to_the_others():
    weights = {"long": 9.0, "short": 1.0, "prompt": 1.0}
    some, u = record(short="s", long=" "), (i / 1000 for i in range(1000))
    kinds = Counter(pick_caption(some, weights, x).meta["caption"] for x in u)
    assert kinds == {"short": 500, "prompt": 500}


@pytest.mark.parametrize("bare", [record(), Record(7, "the prompt"), record(user="u")])
def test_a_record_without_any_keeps_its_prompt(bare):
    after = pick_caption(bare, {"long": 1.0}, 0.99)
    assert (after.prompt, after.meta["caption"]) == ("the prompt", "prompt")


def test_rounding_never_falls_off_the_end():
    weights = dict.fromkeys(ALL, 0.1)  # sums to less than 1 in binary
    assert pick_caption(record(**ALL), weights, 1 - 2**-53).meta["caption"] == "user"


def test_a_keyed_draw_chooses_alike_whatever_the_meta_order():
    u = float(keyed(3, "caption", 5, 11).random())
    mixed = record(**dict(reversed(ALL.items())))
    weights = {"long": 1.0, "short": 1.0, "user": 1.0}
    assert pick_caption(mixed, weights, u).prompt == pick_caption(record(**ALL), weights, u).prompt


def test_wrong_weights_and_captions_are_refused():
    for wrong in ({}, {"long": 0.0}, {"long": -1.0}, {"long": float("nan")}):
        with pytest.raises(InputError, match=r"data\.captions") as caught:
            check_weights(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="record 7"):
        captions_of(record(long=3))
    with pytest.raises(InputError, match="record 7"):
        captions_of(Record(7, "p", meta={"captions": ["a"]}))
