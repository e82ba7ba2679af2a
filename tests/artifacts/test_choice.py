"""Which units stay, and which heads are merged, by hand."""

from __future__ import annotations

import pytest
import torch

from regrow.artifacts.choice import best, head_slots, heads_in, in_steps, keep_layers, known, merges, merges_in
from regrow.errors import SettingsError


def test_the_best_in_their_order() -> None:
    assert best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2) == (1, 3)
    assert best(torch.tensor([1.0, 1.0, 1.0]), 2) == (0, 1)


def test_eight_heads_become_six() -> None:
    """The paper's example: (5, 8) and (6, 7), counted from the best."""
    scores = torch.arange(8.0, 0, -1)
    assert merges(scores, 6) == ((4, 7), (5, 6))
    assert merges(scores.flip(0), 6) == ((3, 0), (2, 1))


def test_pairs_for_every_number_of_heads() -> None:
    """Nothing when nothing goes; each head that goes once, into as many that stay; fewer than half are refused."""
    for heads in range(1, 10):
        scores = torch.randn(heads, generator=torch.Generator().manual_seed(heads))
        assert merges(scores, heads) == ()
        for keep in range(1, heads + 1):
            if 2 * keep < heads:
                with pytest.raises(SettingsError, match=rf"{keep} of {heads} heads stay\n.*at least {-(-heads // 2)}"):
                    merges(scores, keep)
                continue
            into, gone = ({pair[side] for pair in merges(scores, keep)} for side in (0, 1))
            stays = set(best(scores, keep))
            assert into <= stays
            assert gone == set(range(heads)) - stays
            assert len(into) == len(gone) == heads - keep


def test_groups_apart() -> None:
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0], [9.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]])  # (K, G)
    assert heads_in(scores, (0, 2), 2) == (0, 2, 10, 11)
    assert merges_in(scores, (0, 2), 2) == ((0, 1), (2, 3), (11, 8), (10, 9))
    assert merges_in(scores, (2,), 3) == ((9, 8),)


def test_slots_and_steps() -> None:
    table = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    assert head_slots(table, 2).tolist() == [[4 + 3, 1 + 2]]
    assert in_steps(table, 2).tolist() == [[4 + 3, 2 + 1]]
    assert in_steps(table, 3).tolist() == [[4 + 3 + 2]]


def test_the_cheapest_run_goes() -> None:
    costs = torch.full((4, 5), 9.0)
    costs[1, 3] = 1.0
    assert keep_layers(costs, 2) == [0, 3]
    assert keep_layers(costs, 4) == [0, 1, 2, 3]


def test_runs_that_nobody_looked_at() -> None:
    costs = torch.full((4, 5), torch.nan)
    costs[0, 2], costs[1, 3], costs[2, 4] = torch.tensor([3.0, 2.0, 1.0])
    assert keep_layers(costs, 2) == [0, 1]
    assert [known(costs, keep) for keep in (1, 2, 3, 4)] == [False, True, False, True]
    assert known(torch.ones(4), 1)
    with pytest.raises(ValueError, match="runs of 1 layers were not scored"):
        keep_layers(costs, 3)
