"""How weights of domains follow from losses: by hand, and what must hold of every update."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from regrow.engines.mixture import SMOOTH, Mixture, Weights, normalised, updated
from regrow.errors import BrokenModel, SettingsError

NAMES = ("a", "b", "c")


def mixture(**changes: Any) -> Mixture:
    usual: dict[str, Any] = {"names": NAMES, "weights": (2, 1, 1), "every": 5, "references": (1.0, 2.0, 3.0)}
    return Mixture(**{**usual, **changes})


def test_by_hand() -> None:
    """1/2, 1/4, 1/4 and excesses of ln 2, 0, ln 4 make 1, 1/4, 1: of 9/4 in all."""
    found = updated((0.5, 0.25, 0.25), (math.log(2), 0.0, math.log(4)))
    expected = [(1 - SMOOTH) * share + SMOOTH / 3 for share in (4 / 9, 1 / 9, 4 / 9)]
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[0] == pytest.approx(0.444433333, abs=1e-9)


@pytest.mark.parametrize("excess", [(0.1, -3.0, 2.0), (800.0, -800.0, 0.0), (1e4, 1e4, 1e4), (-1e4, -1e4, -2e4)])
def test_weights_are_above_zero_and_add_up_to_one(excess: tuple[float, ...]) -> None:
    weights = (0.98, 0.01, 0.01)
    for _ in range(200):
        weights = updated(weights, excess)
        assert min(weights) >= SMOOTH / 3 * 0.999
        assert math.fsum(weights) == pytest.approx(1, abs=1e-12)


def test_equal_excess_leaves_the_weights_but_for_smoothing() -> None:
    before = normalised((5, 3, 2))
    for excess in (-2.0, 0.0, 7.0):
        after = updated(before, (excess,) * 3)
        assert after == pytest.approx([(1 - SMOOTH) * w + SMOOTH / 3 for w in before], rel=1e-12)


def test_what_is_further_from_its_reference_gains() -> None:
    before = normalised((1, 1, 1))
    after = updated(before, (0.3, 0.1, 0.2))
    assert after[0] > after[2] > after[1]
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_below_the_reference() -> None:
    """Signed, the domain that is below loses to the one that has just arrived; else both are equal."""
    losses = (0.5, 2.0, 3.5)  # half below, there, half above
    signed, positive = (mixture(signed=s).next(normalised((1, 1, 1)), losses) for s in (True, False))
    assert signed[0] < signed[1] < signed[2]
    assert positive[0] == positive[1] < positive[2]


def test_an_update_holds_from_the_step_after_the_next() -> None:
    weights = Weights(mixture())
    assert [weights.due(done) for done in (4, 5, 6, 10)] == [False, True, False, True]
    first = weights.newest()
    assert first == (0.5, 0.25, 0.25)
    weights.update(5, (1.0, 2.0, 4.0))
    second = weights.newest()
    weights.update(10, (1.0, 3.0, 3.0))
    found = [weights.at(step) for step in (1, 5, 6, 7, 11, 12, 99)]
    assert found == [first, first, first, second, second, weights.newest(), weights.newest()]


def test_a_restart_restores_the_weights() -> None:
    weights, again = Weights(mixture()), Weights(mixture())
    weights.update(5, (1.1, 2.2, 3.3))
    again.update(5, (9.0, 2.0, 3.0))
    again.restore(json.loads(json.dumps(weights.to_json())))
    assert again == weights
    for each in (weights, again):
        each.update(10, (1.3, 2.1, 3.0))
    assert again.newest() == weights.newest(), "to the last bit"


def test_fixed_weights_are_never_due() -> None:
    assert not Weights(mixture(every=0, references=())).due(0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": (1, -1, 1)}, "a: 1, b: -1, c: 1"),
        ({"weights": (1, 0, 1)}, "weights above 0"),
        ({"weights": (1, math.nan, 1)}, "weights above 0"),
        ({"names": (), "weights": ()}, "a mixture of nothing"),
        ({"names": ("a",), "weights": (1,)}, "of one source"),
        ({"references": (1.0,)}, "for 3 domains"),
        ({"references": (1.0, math.inf, 1.0)}, "one finite loss for each"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        mixture(**changes)


def test_losses_that_are_none() -> None:
    with pytest.raises(BrokenModel, match="b: nan"):
        mixture().next((0.5, 0.25, 0.25), (1.0, math.nan, 2.0))
