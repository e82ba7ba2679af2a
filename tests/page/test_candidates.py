"""Shapes that were tried, on the page: all of them, with what speaks against one."""

from __future__ import annotations

from typing import Any

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


def test_an_order_that_is_none() -> None:
    losses = [{"tokens": n, "loss": 2.0} for n in (1, 2, 3)]
    ranked = [{"widths": {"neuron": 200}, "losses": losses}]
    shown = candidates(found(ranked=ranked, tau=[None, 0.5], tokens=6))
    assert shown is not None
    assert "to the next: none, 0.50" in shown.about
