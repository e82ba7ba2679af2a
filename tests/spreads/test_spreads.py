"""One battery over every registered spread: sums, bounds, permutations; then what is special about each."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from regrow.artifacts.ask import SPREADS, Ask, Spread

NAMES = SPREADS.names()
EVERY = pytest.mark.parametrize("spread", [SPREADS.get(n) for n in NAMES], ids=NAMES)


def test_head_count() -> None:
    assert NAMES == ["across", "ends", "uniform"]


def scores(layers: int, units: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.rand(layers, units, generator=source) * (0.1 + torch.rand(layers, 1, generator=source))


@EVERY
def test_it_says_what_it_is(spread: Spread) -> None:
    assert spread.about.endswith(".")
    assert len(spread.about) <= 120
    assert spread.paper


@EVERY
def test_counts_meet_the_total_within_bounds(spread: Spread) -> None:
    source = random.Random(0)
    for seed in range(300):
        layers, units = source.randint(1, 12), source.randint(1, 20)
        least = source.randint(1, units)
        total = source.randint(least * layers, units * layers)
        ask = Ask(total, scores(layers, units, seed), least, comparable=bool(seed % 2))
        counts = spread.share(ask)
        assert len(counts) == layers
        assert sum(counts) == total
        assert min(counts) >= least
        assert max(counts) <= units
        assert all(isinstance(count, int) for count in counts)
        assert spread.share(ask) == counts


@EVERY
def test_everything_and_the_least(spread: Spread) -> None:
    table = scores(8, 5, 1)
    assert spread.share(Ask(40, table)) == [5] * 8
    assert spread.share(Ask(16, table, least=2)) == [2] * 8


@EVERY
def test_scores_are_left_alone(spread: Spread) -> None:
    table = scores(6, 5, 2)
    before = table.clone()
    spread.share(Ask(17, table))
    assert torch.equal(table, before)


@pytest.mark.parametrize("name", ["uniform", "across"])
def test_permuting_layers_permutes_counts(name: str) -> None:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for total in (7, 13, 23, 29):
        table = scores(6, 5, total)
        counts = SPREADS.get(name).share(Ask(total, table))
        moved = SPREADS.get(name).share(Ask(total, table[order]))
        assert moved == [counts[i] for i in order.tolist()]


def test_permuting_units_changes_nothing() -> None:
    table = scores(6, 5, 3)
    for name in NAMES:
        share = SPREADS.get(name).share
        assert share(Ask(17, table[:, [3, 1, 0, 4, 2]])) == share(Ask(17, table))


def test_uniform_differs_by_one_unit_at_most_and_favours_the_better_next_unit() -> None:
    table = torch.tensor([[9.0, 1.0, 0.0], [9.0, 3.0, 0.0], [9.0, 2.0, 0.0]])
    assert SPREADS.get("uniform").share(Ask(5, table)) == [1, 2, 2]


def test_across_keeps_the_best_of_all_layers() -> None:
    table = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, 0.5], [9.0, 0.1, 0.1]])
    assert SPREADS.get("across").share(Ask(5, table, comparable=True)) == [3, 1, 1]
    assert SPREADS.get("across").share(Ask(6, table, comparable=True)) == [3, 2, 1]


def test_across_ranks_when_layers_share_a_scale() -> None:
    """Counts are those of the threshold that keeps `total` units, once every layer has its least."""
    table = scores(7, 9, 5)
    total = 45
    counts = SPREADS.get("across").share(Ask(total, table, comparable=True))
    threshold = table.flatten().sort(descending=True).values[total - 1]
    assert min(counts) >= 1
    assert int((table >= threshold).sum(1).min()) >= 1
    assert counts == (table >= threshold).sum(1).tolist()


def test_across_without_a_common_scale_ignores_a_layer_s_size() -> None:
    table = scores(4, 6, 6)
    loud = table.clone()
    loud[2] *= 1000
    quiet, louder = (SPREADS.get("across").share(Ask(14, t)) for t in (table, loud))
    assert quiet == louder
    assert SPREADS.get("across").share(Ask(14, loud, comparable=True))[2] == 6


def test_across_with_nothing_to_tell_layers_apart() -> None:
    assert sum(SPREADS.get("across").share(Ask(7, torch.zeros(4, 3)))) == 7


def test_ends_protects_the_first_four_and_last_two_of_32() -> None:
    counts = SPREADS.get("ends").share(Ask(32 * 8 - 52, scores(32, 8, 7)))
    assert counts[:4] == [8] * 4
    assert counts[-2:] == [8] * 2
    assert set(counts[4:-2]) == {6}


def test_ends_protects_nothing_when_it_cannot() -> None:
    table = scores(6, 8, 8)
    assert SPREADS.get("ends").share(Ask(18, table)) == [3] * 6
    few = SPREADS.get("ends").share(Ask(20, table))
    assert few[0] == few[-1] == 8
    assert few[1:-1] == [1] * 4
