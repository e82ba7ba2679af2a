"""Numbers keep the digits that mean something, and no others."""

from __future__ import annotations

import math

import pytest

from regrow.page.numbers import human_bytes, number, percent, quantity, short, times, unit_label
from regrow.page.record import duration, lines, stage_times


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (134515008, "134,515,008"),
        (1234.56, "1,235"),
        (17.2034, "17.20"),
        (0.84134, "0.8413"),
        (0.00012345, "0.0001234"),
        (0.0000123, "1.23e-05"),
        (-3.5, "−3.500"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "stderr", "text"),
    [
        (17.203, "perplexity", 0.112, "17.20 ± 0.11"),
        (17.203, "perplexity", None, "17.20"),
        (17.203, "perplexity", 0.0, "17.20"),
        (1241.8, "ms", 9.4, "1,241.8 ± 9.4"),
        (12418.0, "ms", 120.0, "12,418 ± 120"),
        (0.4307, "accuracy", 0.0049, "43.1 ± 0.5 %"),
        (0.25, "share", None, "25.0 %"),
        (611319808, "bytes", 1.2e6, "611.3 ± 1.2 MB"),
        (23040, "bytes per token", None, "23.04 KB"),
        (999, "B", None, "999 B"),
        (1e-9, "x", 1e-10, "1e-09 ± 1e-10"),
        (math.nan, "x", 1.0, "not a number"),
    ],
)
def test_quantity(value: float, unit: str, stderr: float | None, text: str) -> None:
    assert quantity(value, unit, stderr) == text


def test_what_the_unit_still_says() -> None:
    units = ["bytes", "bytes per token", "bytes/token", "B", "accuracy", "ms", "bits/byte", "Billions"]
    assert [unit_label(u) for u in units] == ["", "per token", "per token", "", "", "ms", "bits/byte", "Billions"]


def test_shares_ratios_and_counts() -> None:
    assert (percent(0.9604), percent(None), percent(math.inf)) == ("96.0 %", "–", "–")
    assert (times(1.1012), times(None)) == ("×1.10", "–")
    assert (short(134515008), short(1.236e9), short(7)) == ("134.5M", "1.236B", "7")
    assert (human_bytes(269060552), human_bytes(12)) == ("269.1 MB", "12 B")


def test_records_become_lines() -> None:
    record = {"a": {"b": 1, "c": [1.5, None]}, "bos": True, "tokens": 335872, "seed": 335872, "lr": 3e-5, "t": 24.32}
    assert dict(lines(record)) == {
        "a.b": "1",
        "a.c": "1.500, none",
        "bos": "yes",
        "tokens": "335,872",
        "seed": "335872",
        "lr": "3e-05",
        "t": "24.32",
    }


def test_stage_times() -> None:
    assert [duration(s) for s in (0.4, 59.9, 214.7, 9412)] == ["0.400 s", "59.9 s", "3 min 35 s", "2 h 36 min"]
    load, score = stage_times({"load": 2.0, "score": {"seconds": 8.0, "tokens": 10000}})
    assert (load.share, load.lines) == (0.25, ())
    assert (score.share, score.lines) == (1.0, (("tokens", "10,000"),))
