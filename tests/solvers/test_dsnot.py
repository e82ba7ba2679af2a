"""DSnoT: swaps against a plain loop of the paper's, row by row, and what must hold of every one of them."""

from __future__ import annotations

import pytest
import torch
from problems import COLUMNS, ROWS, begin, inputs, problem, solve
from torch import Tensor

from regrow.artifacts.linear import Inputs, Linear, Sparse
from regrow.artifacts.pattern import Pattern


def means(task: Linear, gone: Tensor) -> Tensor:  # (rows,) mean output that is missing
    assert task.inputs is not None
    return (task.weight * task.inputs.sums * gone).sum(1)


def by_the_book(task: Linear, gone: Tensor, power: float = 1.0) -> Tensor:  # (m, n) bool
    """The paper's loop, one row and one swap at a time: Wanda's scores say what goes, in groups those of the start."""
    assert task.inputs is not None
    cycles, threshold = 50, 0.1
    found, share = gone.clone(), task.weight * task.inputs.sums
    worth, size = share / task.inputs.variance**power, task.pattern.of
    scores = task.scores if size else task.weight.abs() * task.inputs.squares.sqrt()
    for row, mask in enumerate(found):
        c, v, score = share[row].tolist(), worth[row].tolist(), scores[row].tolist()
        away = sorted(gone[row].nonzero().flatten().tolist(), key=lambda j: v[j])  # from either end
        kept = sorted((~gone[row]).nonzero().flatten().tolist(), key=lambda j: score[j])
        missing = float((share[row] * gone[row]).sum())
        for _ in range(cycles):
            if abs(missing) <= threshold or not away:
                break
            back = away.pop(-1 if missing > 0 else 0)
            if size:
                fits = [j for j in kept if j // size == back // size]
            else:
                fits = [j for j in kept if c[j] * missing < 0]
                if not fits:
                    break
            after = missing + c[fits[0]] - c[back] if fits else 0.0
            if size and (not fits or after * missing < 0 or abs(after) > abs(missing)):
                continue  # passed over, and never looked at again
            kept.remove(fits[0])
            mask[back], mask[fits[0]], missing = False, True, after
    return found


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["50%", "2:4", "2:8"])
def test_swaps_are_the_papers(pattern: str, criterion: str) -> None:
    task = problem(pattern, criterion)
    start = begin(task).gone
    expected = by_the_book(task, start)
    assert int((expected != start).sum()) > ROWS
    assert torch.equal(solve("dsnot", task).gone, expected)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_variance_may_count_less(power: float, pattern: str) -> None:
    task = problem(pattern, "wanda")
    start = begin(task).gone
    found = solve("dsnot", task, power=power).gone
    assert torch.equal(found, by_the_book(task, start, power))
    assert not torch.equal(found, solve("dsnot", task).gone)


@pytest.mark.parametrize("cycles", [0, 3, 50, 10_000])
def test_a_row_stops_when_it_is_near_or_at_its_limit_or_has_nothing_to_swap(cycles: int) -> None:
    task = problem("50%", "wanda", x=inputs(48))
    assert task.inputs is not None
    start, share = begin(task), task.weight * task.inputs.sums
    gone = solve("dsnot", task, start, cycles=cycles).gone
    missing = means(task, gone)
    near, swaps = missing.abs() <= 0.1, (gone & ~start.gone).sum(1)
    nothing_back = ~(start.gone & gone).any(1)
    nothing_out = ~(~start.gone & ~gone & (share * missing[:, None] < 0)).any(1)
    assert bool((swaps <= cycles).all())
    assert bool((near | (swaps == cycles) | nothing_back | nothing_out).all())
    assert bool(near.any()) is (cycles > 3)
    assert bool((~near & (swaps == cycles)).any()) is (cycles <= 3)
    if cycles > 50:
        assert torch.equal(gone, solve("dsnot", task, start, cycles=2 * cycles).gone)


def test_of_groups_every_swap_comes_nearer_without_passing() -> None:
    task = problem("2:4", "wanda")
    start = begin(task)
    before, first = means(task, start.gone), means(task, start.gone)
    for cycles in range(40):
        after = means(task, solve("dsnot", task, start, cycles=cycles).gone)
        assert bool((after.abs() <= before.abs() + 1e-12).all())
        assert bool((after * first >= 0).all())
        before = after
    assert before.abs().sum() < 0.5 * first.abs().sum()


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_swaps_keep_counts_and_weights_and_mend_the_mean(pattern: str) -> None:
    task = problem(pattern, "wanda")
    start = begin(task)
    found = solve("dsnot", task, start)
    assert torch.equal(found.gone.sum(1), start.gone.sum(1))
    assert torch.equal(found.weight, task.weight.masked_fill(found.gone, 0))
    assert not torch.equal(found.gone, start.gone)
    before, after = means(task, start.gone).abs(), means(task, found.gone).abs()
    assert after.mean() < 0.5 * before.mean()
    if task.pattern.of:
        assert bool((after <= before + 1e-12).all())


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_no_cycles_no_swaps(pattern: str) -> None:
    task = problem(pattern, "wanda")
    start = begin(task)
    assert torch.equal(solve("dsnot", task, start, cycles=0).gone, start.gone)
    assert torch.equal(solve("dsnot", task, start, threshold=1e9).gone, start.gone)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_inputs_without_a_mean_need_no_swaps(pattern: str) -> None:
    x = inputs() - inputs().mean(0)
    task = problem(pattern, "wanda", x=x)
    start = begin(task)
    assert torch.equal(solve("dsnot", task, start).gone, start.gone)


def test_one_swap_by_hand() -> None:
    """Missing mean 5 (weight 0): the pruned weight with the largest share returns; of the kept ones with a negative
    share the one of least score goes."""
    w = torch.tensor([[5.0, 1.0, -2.0, -9.0, 8.0, 7.0]], dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    gone = torch.tensor([[True, True, False, False, False, False]])
    task = Linear(w, Pattern.parse("33%"), "row", lambda w, _: w.abs(), inputs=Inputs(ones, ones, ones))
    found = solve("dsnot", task, Sparse(w.masked_fill(gone, 0), gone), cycles=1)
    assert found.gone.tolist() == [[False, True, True, False, False, False]]


def test_weights_that_add_nothing_by_hand() -> None:
    """Missing mean 5. Weight 1 returns for weight 3, which leaves -2; weight 0, which adds nothing, returns for weight
    2. Weight 4, which adds nothing either and scores least, could raise no mean and stays."""
    w = torch.tensor([[0.0, 5, 1, -2, 0, 8, 7]], dtype=torch.float64)
    ones = torch.ones(7, dtype=torch.float64)
    sums = ones.clone()
    sums[0] = 0
    gone = torch.arange(7)[None] < 2
    task = Linear(w, Pattern.parse("28%"), "row", lambda w, _: w.abs(), inputs=Inputs(ones, sums, ones))
    found = solve("dsnot", task, Sparse(w.masked_fill(gone, 0), gone))
    assert found.gone.tolist() == [[False, False, True, True, False, False, False]]


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_what_reads_nothing_does_not_return_first(pattern: str) -> None:
    """Its share is 0, and so is the variance of its input that it is divided by."""
    x = inputs()
    x[:, 3] = 0
    task = problem(pattern, "wanda", x=x)
    start = begin(task)
    found = solve("dsnot", task, start, cycles=1)
    assert bool(found.gone[:, 3].all())
    assert not torch.equal(found.gone, start.gone)


@pytest.mark.parametrize(("pattern", "columns", "value"), [("30%", [0, 1], 0.0), ("2:4", [23, 46, 63], 2.0)])
def test_counts_hold_for_inputs_that_never_change(pattern: str, columns: list[int], value: float) -> None:
    """So few may return that a row comes to the end of them, where shares are 0 or infinite for their variance."""
    x = inputs(64)
    x[:, columns] = value
    task = problem(pattern, "wanda", x=x)
    start = begin(task)
    found = solve("dsnot", task, start)
    size = task.pattern.of or 64
    assert torch.equal(found.gone.view(ROWS, -1, size).sum(2), start.gone.view(ROWS, -1, size).sum(2))


def test_of_equals_each_returns_once_by_hand() -> None:
    """Missing mean 5. Weight 2 returns for weight 3: -3. Weight 0 or 1, which add nothing, for weight 4: 1. The other
    of the two for weight 5: -5, and none is left."""
    w = torch.tensor([[0.0, 0, 5, -3, 4, -6, 7, 8]], dtype=torch.float64)
    ones = torch.ones(8, dtype=torch.float64)
    gone = torch.arange(8)[None] < 3
    task = Linear(w, Pattern.parse("37.5%"), "row", lambda w, _: w.abs(), inputs=Inputs(ones, ones, ones))
    found = solve("dsnot", task, Sparse(w.masked_fill(gone, 0), gone))
    assert found.gone.nonzero()[:, 1].tolist() == [3, 4, 5]


def test_what_is_kept_cannot_return_by_hand() -> None:
    """Missing mean 12. Weight 2 returns for weight 1: 1. Weight 3, whose input has no variance, would return for weight
    0 and turn the sign: it is passed over."""
    w = torch.tensor([[-10.0, 9, 20, -8]], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    variance = torch.tensor([1.0, 1, 1, 0], dtype=torch.float64)
    gone = torch.arange(4)[None] > 1
    task = Linear(w, Pattern.parse("2:4"), "row", lambda w, _: w.abs(), inputs=Inputs(ones, ones, variance))
    found = solve("dsnot", task, Sparse(w.masked_fill(gone, 0), gone))
    assert found.gone.nonzero()[:, 1].tolist() == [1, 3]


def test_a_row_that_runs_out_of_weights_stops() -> None:
    """No kept weight has a negative share: nothing can go, so nothing returns."""
    w = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    ones = torch.ones(8, dtype=torch.float64)
    task = Linear(w, Pattern.parse("50%"), "row", lambda w, _: w.abs(), inputs=Inputs(ones, ones, ones))
    start = begin(task)
    assert torch.equal(solve("dsnot", task, start).gone, start.gone)


def test_a_sparsegpt_start_is_no_prefix_of_columns() -> None:
    task = problem("50%", "sparsegpt")
    gone = solve("dsnot", task).gone
    assert 0.3 < float(gone[:, : COLUMNS // 2].double().mean()) < 0.7
