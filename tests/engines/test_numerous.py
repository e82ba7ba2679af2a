"""Who teaches when: the published walks, hand-worked short ones, records at their levels, the choice by distance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regrow.engines.banks import Record, Shelf
from regrow.engines.numerous import Course, Teachers, climbing, returning


def record(value: float) -> Record:
    return Record({"neuron": torch.full((2, 3), value)}, torch.full((4,), value))


def teachers(target: float = 0.05, **changes: object) -> Teachers:
    return Teachers(Course(target, **changes), Shelf())  # type: ignore[arg-type]


@pytest.mark.parametrize(("target", "levels"), [(0.5, 49), (0.25, 24), (0.2, 19), (0.29, 28), (0.01, 0), (0.005, 0)])
def test_how_many_records(target: float, levels: int) -> None:
    assert Course(target).levels == levels
    assert Course(target, by="dense").levels == 0


@pytest.mark.parametrize(
    ("target", "first", "each", "dense"),
    [(0.5, 0.41, 140, 1399), (0.25, 0.16, 280, 0.4), (0.2, 0.11, 350, 0.5)],
)
def test_the_published_walk_back(target: float, first: float, each: int, dense: float) -> None:
    """7000 steps are left when the sparsity is reached (P6, table 1.4)."""
    count = Course(target).levels
    walk = [returning(count, 10, 7000, left) for left in range(7000, 0, -1)]
    assert walk[0] is not None
    assert (walk[0] + 1) * 0.01 == pytest.approx(first)
    seen = [place for place in walk if place is not None]
    assert seen == sorted(seen, reverse=True)
    assert [seen.count(place) for place in set(seen)][1:-1] == [each] * (len(set(seen)) - 2)
    alone = walk.count(None)
    assert alone == dense if isinstance(dense, int) else alone / 7000 == pytest.approx(dense, abs=1e-3)
    assert walk[-alone:] == [None] * alone


@pytest.mark.parametrize("target", [0.1, 0.05])
def test_little_sparsity_has_the_dense_teacher_alone(target: float) -> None:
    count = Course(target).levels
    walk = [returning(count, 10, 7000, left) for left in range(7000, 0, -1)]
    assert set(walk[1:]) == {None}  # a first step may be another's


@pytest.mark.parametrize("whole", [0, 1, 3, 49, 50])
def test_no_division_by_nothing(whole: int) -> None:
    for left in range(whole + 1):
        found = returning(49, 10, whole, left)
        assert found is None or 0 <= found < 49


def test_climbing_by_hand() -> None:
    assert [climbing(n, 2) for n in range(5)] == [None, None, 0, 1, 2]


def test_records_are_made_at_their_levels() -> None:
    """At 0.05 there are four; a pass makes one, also where it jumps over several."""
    here = teachers()
    made = []
    for passed, sparsity in enumerate((0.0, 0.009, 0.01, 0.035, 0.035, 0.035, 0.04, 0.049, 0.06, 0.07)):
        here.see(sparsity, 10 - passed, lambda: record(1.0))
        made.append(len(here.shelf))
    assert made == [0, 0, 1, 2, 3, 3, 4, 4, 4, 4]
    assert int(here.reached) == 2  # the ninth pass, with two to go


def test_climb_and_return() -> None:
    here = teachers(lag=1)
    who = []
    for step in range(20):
        who.append(here.now(20 - step))
        here.see(0.01 * step, 20 - step, lambda: record(1.0))
    assert int(here.reached) == 15  # at sparsity 0.05
    assert who[:6] == [None, None, 0, 1, 2, 3]
    turn = 15 // 5
    assert who[6:] == [None if (p := left // turn - 1) < 0 else min(p, 3) for left in range(14, 0, -1)]


def test_a_dense_course_makes_no_records() -> None:
    here = teachers(by="dense")
    for step in range(20):
        assert here.now(20 - step) is None
        here.see(0.01 * step, 20 - step, lambda: record(1.0))
    assert len(here.shelf) == 0
    assert int(here.reached) == 15


def test_by_distance() -> None:
    """A student that is far away is given a nearer teacher; one that is near a denser one, the dense one in the end."""
    here = teachers(target=0.2, by="gap", gap=0.5)
    for _ in range(3):
        here.shelf.add(record(1.0))
    assert here.now(9) is None
    for expected in (0, 1, 2, 2):
        here.measure(2.0)
        assert here.now(9) == expected
    for _ in range(30):
        here.measure(0.0)
    assert here.now(9) is None
    here.measure(0.4)
    assert here.now(9) is None


@pytest.mark.parametrize("on_disk", [False, True])
def test_records_come_back(tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path / "records" if on_disk else None
    here = Teachers(Course(0.2), Shelf(folder))
    for value in (1.0, 2.0):
        here.shelf.add(record(value))
    here.reached.fill_(7)
    state = {name: value.clone() for name, value in here.state_dict().items()}
    assert (len(state) > 4) is not on_disk  # files hold them
    here.shelf.add(record(3.0))
    again = Teachers(Course(0.2), Shelf(folder))
    again.load_state_dict(state)
    assert len(again.shelf) == 2
    assert int(again.reached) == 7
    for index, value in enumerate((1.0, 2.0)):
        assert torch.equal(again.shelf[index].adapters, record(value).adapters)
        assert torch.equal(again.shelf[index].gates["neuron"], record(value).gates["neuron"])
    again.shelf.add(record(9.0))  # in place of the one that came after the state
    assert float(again.shelf[2].adapters[0]) == 9.0
