"""Patterns and masks: what a user writes, exact counts, and who is lowest."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from regrow.artifacts.mask import Within, lowest, lowest_of_counts, lowest_of_groups, lowest_of_rows, smallest
from regrow.artifacts.pattern import Pattern
from regrow.errors import SettingsError

WITHIN: tuple[Within, ...] = ("row", "matrix", "block")


@pytest.mark.parametrize(
    ("text", "shown", "zeros"),
    [
        ("50%", "50 % zeros", Fraction(1, 2)),
        (" 62.5 % ", "62.5 % zeros", Fraction(5, 8)),
        ("0%", "0 % zeros", Fraction(0)),
        ("2:4", "50 % zeros (2 of 4 kept)", Fraction(1, 2)),
        ("2:8", "75 % zeros (2 of 8 kept)", Fraction(3, 4)),
        ("1 : 3", "66.6667 % zeros (1 of 3 kept)", Fraction(2, 3)),
    ],
)
def test_a_percentage_counts_zeros_and_groups_count_what_is_kept(text: str, shown: str, zeros: Fraction) -> None:
    pattern = Pattern.parse(text)
    assert str(pattern) == shown
    assert pattern.zeros == zeros
    assert Pattern.parse(pattern.written) == pattern


@pytest.mark.parametrize("text", ["", "half", "50", "100%", "120%", "-5%", "4:4", "5:4", "0:4", "2:4:8", "2/4", "nan%"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="percentage of zeros"):
        Pattern.parse(text)


def test_a_group_must_divide_a_row() -> None:
    Pattern.parse("2:4").check("down_proj", 8)
    Pattern.parse("50%").check("down_proj", 7)
    with pytest.raises(SettingsError, match="2:4 on down_proj, whose rows have 6 weights"):
        Pattern.parse("2:4").check("down_proj", 6)


def test_counts_are_exact_where_floats_are_not() -> None:
    assert Pattern.parse("29%").count(100) == 29  # 0.29 * 100 is 28.999999999999996
    assert Pattern.parse("57%").count(100) == 57


def test_what_does_not_divide_is_rounded_down() -> None:
    assert Pattern.parse("70.5%").count(300) == 211
    assert Pattern.parse("33%").count(10) == 3
    scores = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    assert lowest(scores, Pattern.parse("33%"), "row").sum(1).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("within", WITHIN)
@pytest.mark.parametrize("text", ["0%", "1%", "33%", "50%", "70.5%", "99%"])
def test_a_percentage_is_met_exactly(within: Within, text: str) -> None:
    pattern, scores = Pattern.parse(text), torch.rand(13, 300, generator=torch.Generator().manual_seed(0))
    gone = lowest(scores, pattern, within)
    if within == "row":
        assert set(gone.sum(1).tolist()) == {pattern.count(300)}
    else:
        assert int(gone.sum()) == pattern.count(13 * 300)
    if within == "block":
        for begin, end in ((0, 128), (128, 256), (256, 300)):
            expected = pattern.count(13 * end) - pattern.count(13 * begin)
            assert int(gone[:, begin:end].sum()) == expected


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "2:8", "3:5", "1:20"])
def test_groups_are_exact_and_hold_the_highest(text: str) -> None:
    pattern = Pattern.parse(text)
    scores = torch.rand(7, 120, generator=torch.Generator().manual_seed(1))
    gone = lowest(scores, pattern, "matrix")  # groups compete among themselves, whatever is said
    groups, kept = gone.view(7, -1, pattern.of), scores.view(7, -1, pattern.of)
    assert bool((groups.sum(2) == pattern.of - pattern.keep).all())
    assert bool((kept.masked_fill(groups, 2).amin(2) >= kept.masked_fill(~groups, -1).amax(2)).all())


def test_by_hand() -> None:
    scores = torch.tensor([[4.0, 1, 3, 2], [8, 7, 6, 5]])
    row = [[False, True, False, True], [False, False, True, True]]
    assert lowest(scores, Pattern.parse("50%"), "row").tolist() == row
    assert lowest(scores, Pattern.parse("50%"), "matrix").tolist() == [[True] * 4, [False] * 4]
    assert lowest(scores, Pattern.parse("2:4"), "row").tolist() == row
    pairs = [[False, True, False, True], [False, True, False, True]]
    assert lowest(scores, Pattern.parse("1:2"), "row").tolist() == pairs


@pytest.mark.parametrize("text", ["50%", "2:4", "4:8"])
def test_ties_go_to_the_lower_column(text: str) -> None:
    pattern = Pattern.parse(text)
    gone = lowest(torch.ones(3, 8), pattern, "row")
    if pattern.of:
        assert gone.view(3, -1, pattern.of)[..., : pattern.of // 2].all()
    else:
        assert gone[:, :4].all()
    assert int(gone.sum()) == 12
    if not pattern.of:
        assert torch.equal(lowest(torch.ones(3, 8), pattern, "matrix"), (torch.arange(24) < 12).view(3, 8))
        upper = (torch.arange(2) == 0)[:, None].expand(2, 256)  # of each run of 128 columns the first row
        assert torch.equal(lowest(torch.ones(2, 256), pattern, "block"), upper)
    uneven = torch.tensor([[5.0, 1, 1, 1, 0, 9, 1, 1]])
    assert lowest_of_rows(uneven, 3).tolist() == [[False, True, True, False, True, False, False, False]]


def test_counts_of_their_own_for_each_row() -> None:
    """As many as a row's count says; of equals the lower column goes."""
    scores = torch.tensor([[3.0, 1, 2, 1], [1, 1, 1, 1], [4, 3, 2, 1], [4, 3, 2, 1]])
    gone = lowest_of_counts(scores, torch.tensor([1, 2, 0, 4]))
    assert gone.int().tolist() == [[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    scores = torch.randint(0, 9, (5, 32), generator=torch.Generator().manual_seed(5)).float()
    assert torch.equal(lowest_of_counts(scores, torch.full((5,), 13)), lowest_of_rows(scores, 13))


def test_a_group_of_many_is_ranked_as_by_sorting() -> None:
    pattern = Pattern.groups(100, 300)  # ranks do not fit a byte
    scores = torch.randint(0, 50, (4, 600), generator=torch.Generator().manual_seed(2)).float()
    order = scores.view(4, 2, 300).argsort(dim=2, stable=True)[..., :200]
    expected = torch.zeros(4, 2, 300, dtype=torch.bool).scatter_(2, order, True).view(4, 600)
    assert torch.equal(lowest_of_groups(scores, pattern), expected)


def test_columns_that_move_together_move_the_mask() -> None:
    """Of rows; groups and blocks hang on the order of the columns."""
    scores = torch.rand(6, 256, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(256, generator=torch.Generator().manual_seed(4))
    for text, within, moves in (("50%", "row", True), ("50%", "block", False), ("2:4", "row", False)):
        pattern = Pattern.parse(text)
        same = torch.equal(lowest(scores[:, order], pattern, within), lowest(scores, pattern, within)[:, order])
        assert same is moves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_smallest_by_selection_is_the_smallest_by_a_sort(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size = 5000
    for row in (torch.rand(size), torch.randint(0, 5, (size,)).float(), torch.ones(size), torch.full((size,), -0.0)):
        scores = torch.stack([row, row.flip(0), row.roll(7)]).to(dtype)[:, : size - 1]  # rows that do not lie together
        before = scores.clone()
        for k in (1, size // 3, size // 2, size - 1):
            assert torch.equal(smallest(scores, k), scores.sort(1).values[:, k - 1 : k])
        assert torch.equal(scores, before)


def test_scores_that_are_no_numbers_are_the_largest() -> None:
    scores = torch.tensor([[float("nan"), 2.0, 1.0, float("inf")]])
    assert smallest(scores, 2).item() == 2
    assert lowest_of_rows(scores, 2).tolist() == [[False, True, True, False]]
