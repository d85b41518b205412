"""Concept balancing: the shares that are asked for are those that are drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.optimize import minimize

from flux2.data.balance import Balanced, rake
from flux2.data.mixture import Mixture
from flux2.data.order import identity, law_of, report
from flux2.errors import InputError
from tests.flux2.data.toys import Told, drawn, numbered


def tagged(**counts: int) -> Told:
    """Records with one tag each."""
    return Told([{"tags": name} for name, n in counts.items() for _ in range(n)], sealed=True)


def share(data: Balanced, tag: str) -> float:
    law = law_of(data, 0)
    mine = [i for i in range(len(data)) if tag in data.describe(i).meta["tags"]]
    return float(law.weights[mine].sum() / law.weights.sum())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_rarity_of_single_tags_is_a_power_of_their_frequency(alpha):
    data = Balanced(tagged(cat=90, dog=9, yak=1), exponent=alpha)
    want = np.array([0.9, 0.09, 0.01]) ** (1 - alpha)
    got = [share(data, t) for t in ("cat", "dog", "yak")]
    assert got == pytest.approx(want / want.sum(), abs=1e-9)


def test_a_record_counts_as_its_rarest_tag_and_one_without_as_the_commonest():
    metas = [{"tags": ["cat"]}] * 8 + [{"tags": ["cat", "yak"]}, {}]
    law = law_of(Balanced(Told(metas), exponent=1.0), 0)
    assert law.weights[8] / law.weights[0] == pytest.approx(0.9 / 0.1)
    assert law.weights[9] == pytest.approx(law.weights[0])


def test_the_prior_is_exact_also_where_tags_come_together():
    rng = np.random.default_rng(0)
    metas = [
        {"tags": [t for t, p in (("a", 0.5), ("b", 0.1), ("c", 0.02)) if rng.random() < p]}
        for _ in range(2000)
    ]
    prior = {"a": 0.3, "b": 0.4, "c": 0.1}
    data = Balanced(Told(metas), prior=prior, exponent=0.5)
    assert {t: share(data, t) for t in prior} == pytest.approx(prior, abs=1e-8)


def test_raking_is_the_smallest_change_that_gives_the_shares():
    base = np.array([0.4, 0.3, 0.2, 0.1])
    a, b = np.array([0, 1]), np.array([1, 3])
    found = rake(base, {"a": (a, 0.3), "b": (b, 0.6)})
    constraints = [
        {"type": "eq", "fun": lambda w: w.sum() - 1},
        {"type": "eq", "fun": lambda w: w[a].sum() - 0.3},
        {"type": "eq", "fun": lambda w: w[b].sum() - 0.6},
    ]
    best = minimize(lambda w: float((w * np.log(w / base)).sum()), base, constraints=constraints,
                    bounds=[(1e-6, 1)] * 4, options={"ftol": 1e-14})  # fmt: skip
    assert found == pytest.approx(best.x, abs=1e-5)


def test_what_is_drawn_is_what_was_promised():
    data = Balanced(tagged(cat=80, dog=15, yak=5), prior={"yak": 0.4, "dog": 0.35})
    seen, total = Counter(), 10 * 10 * 10  # ten epochs of ten batches of ten
    for index, times in drawn(data, 10, 100).items():
        seen[data.describe(index).meta["tags"]] += times
    assert seen.total() == total
    for tag, want in (("yak", 0.4), ("dog", 0.35), ("cat", 0.25)):
        assert abs(seen[tag] / total - want) < 0.01
    per_record = drawn(data, 10, 100)
    assert all(abs(per_record[i] - 80) <= 10 for i in range(95, 100))  # 0.4 · 1000 / 5 each


def test_buckets_do_not_bend_the_shares():
    metas = [{"tags": "rare" if i % 50 == 0 else "common"} for i in range(500)]
    data = Balanced(Told(metas, (16, 32, 48)), prior={"rare": 0.5})
    seen = Counter()
    for index, times in drawn(data, 8, 630).items():
        seen[metas[index]["tags"]] += times
    assert abs(seen["rare"] / seen.total() - 0.5) < 0.02


def test_a_mixtures_shares_are_what_is_tilted():
    parts = {"x": {"dataset": tagged(cat=50, dog=50), "weight": 3},
             "y": {"dataset": tagged(cat=10), "weight": 1}}  # fmt: skip
    data = Balanced(Mixture(parts), exponent=0.0)
    assert share(data, "cat") == pytest.approx(0.75 / 2 + 0.25)
    tilted = law_of(Balanced(Mixture(parts), prior={"dog": 0.6}), 0).weights
    assert tilted[50:100].sum() == pytest.approx(0.6)
    # Within what has the tag, and what has not, proportions stay.
    assert tilted[:50].sum() / tilted[100:].sum() == pytest.approx(0.375 / 0.25)


def test_the_table_has_raw_target_and_achieved():
    lines = report(Balanced(tagged(cat=90, dog=10), prior={"dog": 0.5}))
    assert lines[0].split() == ["tags", "records", "raw", "target", "achieved"]
    assert lines[1].split() == ["dog", "10", "10.00%", "50.00%", "50.00%"]
    assert lines[2].split() == ["cat", "90", "90.00%", "-", "50.00%"]
    # 10 records at 1/20 and 90 at 1/180: 1 / (10/400 + 90/32400) of 100
    assert "5 times an epoch" in lines[3] and "36% of 100" in lines[3]
    many = Balanced(Told([{"tags": f"t{i}"} for i in range(30)]))
    assert report(many)[-2] == "and 10 rarer"


def test_records_and_their_identity_stay():
    world = numbered(4)
    data = Balanced(Told([{"tags": "a"}] * 4), exponent=1.0)
    assert data[2].id == 2 and data.bucket_of(2) == (16, 16, 0) and identity(data)
    assert identity(Balanced(Told([{"tags": "a"}] * 4))) == identity(data)
    with pytest.raises(InputError, match="no record has 'tags'"):
        Balanced(world)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"exponent": 1.5}, "exponent"),
        ({"exponent": float("nan")}, "exponent"),
        ({"prior": {"yak": 0.1}}, "no record has 'yak'; there are cat, dog"),
        ({"prior": {"dog": 0.0}}, "a filter"),
        ({"prior": {"dog": 1.2}}, "below 1"),
        ({"prior": {"cat": 0.7, "dog": 0.6}}, "no weights give"),
        ({"prior": {"cat": 0.7, "dog": 0.2}}, "no weights give"),  # every record has one of them
        ({"tags": "topics"}, "topics"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(InputError, match=why):
        Balanced(tagged(cat=9, dog=1), **settings)


def test_a_tag_that_all_records_have_cannot_be_rare():
    with pytest.raises(InputError, match="whatever the weights"):
        Balanced(tagged(cat=9), prior={"cat": 0.5})
