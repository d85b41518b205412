"""Filters: each condition keeps what it says, and what was lost is told."""

from __future__ import annotations

import pytest

from flux2.data.filters import Filtered
from flux2.data.mixture import Mixture
from flux2.data.order import describe, identity, law_of, report
from flux2.errors import InputError
from tests.flux2.data.toys import Notes, Told, drawn, numbered

METAS = [
    {"aesthetic": 4.0, "language": "en", "tags": ["cat", "night"], "quality": {"blur": 0.1}},
    {"aesthetic": 5, "language": "de", "tags": ["dog"], "quality": {"blur": 0.9}},
    {"aesthetic": 6.5, "language": "en", "tags": [], "safe": True},
    {"language": "en", "tags": ["cat"], "safe": 1, "prompt": "a sign that says TAXI"},
]


def kept(**conditions: object) -> list[int]:
    said = {name.replace("__", "."): c for name, c in conditions.items()}
    return Filtered(Told(METAS, sealed=True), said).kept.tolist()


def test_conditions():
    assert kept(aesthetic=">=5") == [1, 2]
    assert kept(aesthetic=">5") == [2]
    assert kept(aesthetic="<5") == [0]
    assert kept(aesthetic=" <= 5.0 ") == [0, 1]
    assert kept(aesthetic=[4, 6.5]) == [0, 2]
    assert kept(language="en") == [0, 2, 3]
    assert kept(language="!=en") == [1]
    assert kept(language=["de", "fr"]) == [1]
    assert kept(tags="cat") == [0, 3]
    assert kept(tags=["dog", "night"]) == [0, 1]
    assert kept(tags="!=cat") == [1, 2]
    assert kept(quality__blur="<0.5") == [0]
    assert kept(safe=True) == [2] and kept(safe=1) == [3]  # true is not 1
    assert kept(prompt="~says [A-Z]+") == [3]
    assert kept(language="en", aesthetic=">=4") == [0, 2]  # all of them


def test_facts_of_the_bucket_are_fields_too():
    data = Told(METAS, (16, 32), sealed=True)
    assert Filtered(data, {"height": ">16"}).kept.tolist() == [1, 3]
    assert Filtered(data, {"references": 0}).kept.tolist() == [0, 1, 2, 3]


def test_records_are_numbered_anew_and_keep_all_else():
    data = Filtered(Notes(METAS, (16, 32)), {"aesthetic": ">=5"})
    assert len(data) == 2 and [data[i].id for i in range(2)] == [0, 1]
    assert data[0].meta == METAS[1] and data[0].prompt == "note 1"
    assert [data.bucket_of(i)[0] for i in range(2)] == [32, 16]
    assert describe(data, 1).meta == METAS[2]
    for wrong in (-1, 2):
        with pytest.raises(IndexError):
            data[wrong]


def test_what_was_lost_is_told():
    lines = report(Filtered(Notes(METAS, broken=frozenset({0})),
                            {"aesthetic": ">=5", "language": "en"}))  # fmt: skip
    assert lines[1].split() == ["aesthetic", ">=5", "2", "1", "1"]
    assert lines[2].split() == ["language", "=", "en", "2", "1", "0"]
    assert lines[3].split() == ["all", "1", "2"]
    assert lines[4].startswith("1 of 4 records could not be read")


def test_nothing_left_is_refused_with_the_counts():
    with pytest.raises(InputError, match=r"no record of 4 .*aesthetic >=9 keeps 0.*cat keeps 2"):
        kept(aesthetic=">=9", tags="cat")
    with pytest.raises(InputError, match="no record"):
        kept(colour="red")  # a field that none has


@pytest.mark.parametrize(
    ("filter", "why"),
    [
        ({}, "empty"),
        ({"language": ">=5"}, "compares numbers.*'en'"),
        ({"safe": ">=0"}, "True"),
        ({"aesthetic": ">=good"}, "no number"),
        ({"language": "~["}, "regular expression"),
        ({"language": None}, "None"),
        ({"language": {"is": "en"}}, "a value, a list"),
    ],
)
def test_wrong_conditions_are_refused(filter, why):
    with pytest.raises(InputError, match=why):
        Filtered(Told(METAS), filter)


def test_a_mixtures_shares_go_with_what_is_kept():
    parts = {"a": {"dataset": Told(METAS), "weight": 3}, "b": {"dataset": Told(METAS), "weight": 1}}
    data = Filtered(Mixture(parts), {"aesthetic": ">=5"})
    assert law_of(data, 0).shares(4).tolist() == pytest.approx([3 / 8, 3 / 8, 1 / 8, 1 / 8])
    assert set(drawn(data, 4, 10)) == {0, 1, 2, 3}
    silent = {"a": {"dataset": Told(METAS), "weight": 0},
              "b": {"dataset": numbered(4), "weight": 1}}  # fmt: skip
    with pytest.raises(InputError, match="weight 0"):
        drawn(Filtered(Mixture(silent), {"aesthetic": ">=5"}), 2, 1)


def test_without_weights_every_record_comes_once_an_epoch():
    data = Filtered(Told(METAS), {"language": "en"})
    assert set(drawn(data, 1, 3).values()) == {1}


def test_identity_is_of_what_is_kept():
    data = Told(METAS)
    assert identity(Filtered(data, {"aesthetic": ">=5"})) == identity(
        Filtered(data, {"aesthetic": ">4.5"})
    )
    assert identity(Filtered(data, {"aesthetic": ">5"})) != identity(
        Filtered(data, {"aesthetic": ">=5"})
    )
