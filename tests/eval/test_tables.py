"""How evaluation writes numbers: alike in the tables of stage=eval, of a run and of a report."""

from __future__ import annotations

import math

import pytest

from eval.tables import effect, marked, number, probability, signed, span, table


@pytest.mark.parametrize("text", [number, signed, effect, probability])
def test_what_is_not_there_is_a_dash(text) -> None:
    assert text(None) == text(math.nan) == "-" and text(None, none="?") == "?"


def test_numbers() -> None:
    assert [number(x) for x in (0.5, 12.345, 1234.4)] == ["0.500", "12.35", "1234"]
    assert [signed(x) for x in (0.5, -0.25, 0.0)] == ["+0.500", "−0.250", "±0.000"]
    assert [effect(x) for x in (1.234, -math.inf)] == ["+1.23", "−∞"]
    assert [probability(p) for p in (0.0004, 0.04)] == ["< 0.001", "0.040"]


def test_intervals_and_marks() -> None:
    assert span(0.1, 0.2) == "0.100 to 0.200" and span(-1.0, 2.0, signed) == "−1.000 to +2.000"
    assert span(None, None) == span(math.nan, 1.0) == "-"
    assert marked("cer", True) == "cer *" and marked("cer", False) == "cer"
    assert table(["metric", "mean"], [[marked("cer", True), "1.0"]]) == "metric  mean\ncer *    1.0"
