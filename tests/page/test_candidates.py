"""Shapes that were tried, on the page: all of them, with what speaks against one."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from regrow.page.candidates import candidates


def found(**changes: Any) -> dict[str, Any]:
    scored = [
        {"widths": {"neuron": 200}, "parameters": 900, "loss": 3.0, "latency_ms": 2.0},
        {"widths": {"neuron": 300}, "parameters": 999, "loss": 2.0, "latency_ms": 9.0, "slow": True},
        {"widths": {"neuron": 100}, "parameters": 800, "failed": "NaN"},
    ]
    usual = {"size": 9, "inside": 3, "scored": scored, "ranked": [], "tau": [], "tokens": 0, "end": "not trained"}
    return {**usual, "chosen": {"neuron": 200}, **changes}


def test_slow_and_broken_shapes_are_shown() -> None:
    shown = candidates(found())
    assert shown is not None
    assert shown.heads == ("", "neurons", "parameters", "ms a token", "loss as cut")
    assert [row.cells[3] for row in shown.rows] == ["2", "9, too slow", "–"]
    assert [row.cells[4] for row in shown.rows] == ["3", "2", "–"]
    assert [row.chosen for row in shown.rows] == [True, False, False]
    assert "3 of them were scored as cut, 1 of which are too slow" in shown.about


def test_how_many_fill_the_budget() -> None:
    """What no other exceeds, and what cannot be trained, are told apart from it; older records say neither."""
    shown = candidates(found(inside=7, unbeaten=5, unfit={"shapes": 2, "why": "rank"}))
    assert shown is not None
    first = "Of 9 shapes 7 fill the budget, and 2 of these cannot be trained as asked"
    assert shown.about.startswith(f"{first}; 5 are exceeded by no other; 3 of them were scored as cut")
    older = candidates(found())
    assert older is not None
    assert older.about.startswith("Of 9 shapes 3 fill the budget; 3 of them were scored")


def test_losses_of_those_that_were_trained() -> None:
    """A line from the loss as cut to the last one, and that at its end."""
    ranked = [{"widths": {"neuron": 200}, "losses": [{"tokens": 8, "loss": 2.5}, {"tokens": 16, "loss": 1.25}]}]
    shown = candidates(found(ranked=ranked, tokens=16))
    assert shown is not None
    assert shown.svg is not None
    tree = ElementTree.fromstring(shown.svg)
    assert "candidates: #1 against tokens" in shown.svg
    (line,) = (path.get("d") or "" for path in tree.iter("path") if path.get("class") == "line s0")
    points = [tuple(map(float, pair.split())) for pair in line[1:].split("L")]
    (left, top), middle, (right, floor) = points
    falls = top + (floor - top) * (3.0 - 2.5) / (3.0 - 1.25)
    assert middle == (pytest.approx((left + right) / 2), pytest.approx(falls, abs=0.1))
    assert [text.text for text in tree.iter("text") if text.get("class") == "label s0"] == ["#1 1.25"]


def test_an_order_that_is_none() -> None:
    losses = [{"tokens": n, "loss": 2.0} for n in (1, 2, 3)]
    ranked = [{"widths": {"neuron": 200}, "losses": losses}]
    shown = candidates(found(ranked=ranked, tau=[None, 0.5], tokens=6))
    assert shown is not None
    assert "to the next: none, 0.50" in shown.about
