"""One battery over every registered solver, and what the papers say must hold of each."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from problems import COLUMNS, NAMES, ROWS, begin, error, inputs, least_squares, problem, solve, weights
from torch import Tensor

from regrow.artifacts.curvature import RUN, Curvature, inverse_root
from regrow.artifacts.linear import Inputs, Linear, Sparse
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA
from regrow.engines.sparsify import task_of
from regrow.errors import BrokenModel
from regrow.solvers import sequential

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import plain

PATTERNS = ["50%", "2:4", "2:8", "75%"]
ODD = ["33.3%", "3:5", "1:20", "7:16"]  # the last has more subsets than a table holds


def test_head_count() -> None:
    assert NAMES == ["alps", "dsnot", "mrp", "none", "refit", "update"]


@pytest.mark.parametrize("pattern", [*PATTERNS, *ODD])
@pytest.mark.parametrize("name", NAMES)
def test_the_pattern_is_exact_and_nothing_is_written_into(name: str, pattern: str) -> None:
    task = problem(pattern)
    start, dense = begin(task), task.weight.clone()
    before = start.weight.clone(), start.gone.clone()
    found = solve(name, task, start)
    assert torch.equal(found.weight == 0, found.gone)
    assert int(found.gone.sum()) == task.pattern.count(ROWS * COLUMNS)
    if task.pattern.of:
        groups = found.gone.view(ROWS, -1, task.pattern.of).sum(2)
        assert bool((groups == task.pattern.of - task.pattern.keep).all())
    assert bool(found.weight.isfinite().all())
    assert torch.equal(task.weight, dense)
    assert torch.equal(start.weight, before[0])
    assert torch.equal(start.gone, before[1])
    again = solve(name, task, start)
    assert torch.equal(again.weight, found.weight)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    task = problem("0%")
    found = solve(name, task)
    assert not found.gone.any()
    assert torch.allclose(found.weight, task.weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_keeps_the_weights_of_dead_inputs_too(name: str) -> None:
    """SparseGPT's code zeroes them whatever is asked."""
    x = inputs()
    x[:, 3] = 0
    task = problem("0%", x=x)
    found = solve(name, task)
    assert torch.allclose(found.weight, task.weight, rtol=0, atol=1e-12 if name == "alps" else 0)


@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA.names())
@pytest.mark.parametrize("name", NAMES)
def test_any_criterion_goes_with_any_solver(name: str, criterion: str) -> None:
    for pattern in ("50%", "2:4"):
        task = problem(pattern, criterion)
        start = begin(task)
        found = solve(name, task, start)
        assert int(found.gone.sum()) == ROWS * COLUMNS // 2
        assert pattern == "50%" or bool((found.gone.view(ROWS, -1, 4).sum(2) == 2).all())
        assert torch.equal(found.weight == 0, found.gone)
        assert bool(found.weight.isfinite().all())
        if name not in ("none", "dsnot"):  # the others mend the outputs
            assert error(task, found.weight).sum() < error(task, start.weight).sum()


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", NAMES)
def test_an_input_that_never_changes(name: str, criterion: str) -> None:
    """Always 1: its variance is 0, and others read from it."""
    x = inputs()
    x[:, 3] = 1
    for pattern in ("50%", "2:4"):
        found = solve(name, problem(pattern, criterion, x=x))
        assert bool(found.weight.isfinite().all())
        assert torch.equal(found.weight == 0, found.gone)
        assert int(found.gone.sum()) == ROWS * COLUMNS // 2
        assert pattern == "50%" or bool((found.gone.view(ROWS, -1, 4).sum(2) == 2).all())


@pytest.mark.parametrize(
    ("criterion", "name", "pattern", "moves"),
    [
        ("wanda", "none", "50%", True),
        ("wanda", "update", "50%", True),
        ("sparsegpt", "update", "50%", False),
        ("wanda", "none", "2:4", False),
        ("wanda", "update", "2:4", False),
        ("sparsegpt", "update", "2:4", False),
    ],
)
def test_inputs_that_change_places_move_wandas_mask_alone(criterion: str, name: str, pattern: str, moves: bool) -> None:
    """SparseGPT goes from left to right, and groups are neighbours."""
    x, w = inputs(), weights()
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(6))
    found = solve(name, problem(pattern, criterion, x=x, w=w)).gone
    other = solve(name, problem(pattern, criterion, x=x[:, order], w=w[:, order])).gone
    assert torch.equal(found[:, order], other) is moves


@pytest.mark.parametrize("pattern", PATTERNS)
def test_who_is_better_on_one_mask(pattern: str) -> None:
    """Least squares <= refit <= SparseGPT's update <= nothing, in total; least squares in every row."""
    task = problem(pattern)
    start = solve("update", task)
    held = Sparse(task.weight.masked_fill(start.gone, 0), start.gone)
    best = error(task, least_squares(task, start.gone))
    refit = error(task, solve("refit", task, start, steps=60, tolerance=1e-9).weight)
    update, none = error(task, start.weight), error(task, held.weight)
    assert bool((best <= refit * (1 + 1e-9)).all())
    assert float(refit.sum()) == pytest.approx(float(best.sum()), rel=1e-3)
    assert best.sum() < 0.95 * update.sum() < 0.95 * none.sum()
    assert error(task, solve("alps", task).weight).sum() < best.sum()  # its mask is better


@pytest.mark.parametrize("name", ["update", "mrp"])
def test_a_prefix_is_least_squares(name: str) -> None:
    task = problem("50%")
    gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    for row in range(ROWS):
        gone[row, : int(6.5 * row)] = True  # up to 149: into the second block
    start = Sparse(task.weight.masked_fill(gone, 0), gone)
    found = solve(name, task, start, hold=True)
    assert torch.allclose(found.weight, least_squares(task, gone), atol=1e-9)
    suffix = gone.flip(1)
    start = Sparse(task.weight.masked_fill(suffix, 0), suffix)
    if name == "update":
        assert torch.allclose(solve(name, task, start, hold=True).weight, start.weight, atol=1e-12)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_a_block_removed_at_once_is_least_squares(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequential, "ROWS", 8)  # more rows than are solved together
    task = problem(pattern, x=inputs(96))  # a single block
    found = solve("mrp", task)
    assert torch.allclose(found.weight, least_squares(task, found.gone), atol=1e-8)
    assert not torch.allclose(solve("update", task, hold=True).weight, least_squares(task, begin(task).gone), atol=1e-2)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_update_is_the_published_loop(pattern: str) -> None:
    """The same masks and weights as one Python step a column, in fp64."""
    x = inputs()
    task = problem(pattern, x=x)
    seen = plain.Statistics(torch.nn.Linear(COLUMNS, ROWS), hessian=True)
    seen.hessian = 2 * (x.T @ x)
    asked = task.pattern
    expected = plain.sparsegpt(task.weight, seen, float(asked.zeros), asked.keep, asked.of)
    found = solve("update", task)
    assert torch.equal(found.weight == 0, expected == 0)
    assert torch.allclose(found.weight, expected, atol=1e-10)


@pytest.mark.parametrize("name", ["update", "mrp"])
def test_with_a_given_mask_blocks_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem("50%", "wanda")
    found = solve(name, task)
    monkeypatch.setattr(sequential, "BLOCK", 32)
    monkeypatch.setattr(sequential, "RUN", 2)
    narrow = solve(name, task)
    same = torch.allclose(found.weight, narrow.weight, atol=1e-9)
    assert same is (name == "update")  # what goes at once is a block


@pytest.mark.parametrize(("pattern", "same"), [("2:4", True), ("2:8", True), ("50%", False)])
def test_chosen_on_the_way_blocks_matter_for_percentages_alone(
    pattern: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = problem(pattern)
    found = solve("update", task)
    monkeypatch.setattr(sequential, "BLOCK", 32)
    narrow = solve("update", task)
    assert torch.equal(narrow.gone, found.gone) is same
    assert torch.allclose(narrow.weight, found.weight, atol=1e-9) is same


@pytest.mark.parametrize("name", ["update", "mrp", "refit", "alps"])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_the_scale_of_the_inputs_does_not_matter(name: str, pattern: str) -> None:
    """With dead inputs too, whose weights are made up for by nobody."""
    x = inputs()
    x[:, [3, 50, 120]] = 0
    found = solve(name, problem(pattern, x=x))
    other = solve(name, problem(pattern, x=x / 64))
    assert torch.equal(found.gone, other.gone)
    assert torch.allclose(found.weight, other.weight, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dsnot"])
def test_inputs_that_do_not_hang_together_leave_kept_weights_alone(name: str) -> None:
    x = torch.diag(torch.rand(COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5)
    task = problem("50%", x=x)
    found = solve(name, task)
    assert torch.allclose(found.weight, task.weight.masked_fill(found.gone, 0), atol=1e-9)


def test_sparsegpts_score_on_such_inputs_is_wandas_squared() -> None:
    """Without damping, which raises every diagonal entry by the same."""
    x = torch.diag(torch.rand(COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5)
    squares, pattern = x.square().sum(0), Pattern.parse("50%")
    seen = Inputs(squares, x.sum(0), x.var(0, correction=0))
    ours, wandas = (
        task_of(weights(), seen, Curvature(x.T @ x, damping=0.0), WEIGHT_CRITERIA.get(name), pattern).scores
        for name in ("sparsegpt", "wanda")
    )
    assert torch.allclose(ours, wandas.square(), rtol=1e-12)
    assert not torch.allclose(problem("50%").scores, problem("50%", "wanda").scores.square(), rtol=0.1)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["update", "mrp"])
def test_the_same_inputs_twice_change_nothing(name: str, pattern: str) -> None:
    """SparseGPT's Hessian is a mean: how much text there is does not matter. Planted: a damping that does not grow."""
    x = inputs()
    x[:, [3, 50, 120]] = 0
    once, twice = (solve(name, problem(pattern, x=t)) for t in (x, torch.cat([x, x])))
    assert torch.equal(once.gone, twice.gone)
    assert torch.allclose(once.weight, twice.weight, rtol=1e-9, atol=1e-12)
    halved = Curvature(2 * x.T @ x, damping=0.005)  # as if the damping did not grow with the text
    task = task_of(weights(), None, halved, WEIGHT_CRITERIA.get("sparsegpt"), Pattern.parse(pattern))
    assert not torch.allclose(once.weight, solve(name, task).weight, rtol=1e-9, atol=1e-12)


def test_the_sum_of_squared_errors_is_the_damped_loss() -> None:
    """SparseGPT 3.2: errors e in units of U, with |e|^2 the loss of each row."""
    x = inputs(96)
    task = problem("50%", "wanda", x=x)
    assert task.curvature is not None
    start = begin(task)
    _, found = sequential._in_turn(task.weight.clone(), start.gone, task.curvature.factor)
    assert torch.allclose(found.square().sum(1), error(task, solve("update", task).weight), rtol=1e-10)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_over_several_blocks_too(pattern: str) -> None:
    """What is left of W - W' in units of U is an error where a weight went, and nothing where one is kept."""
    task = problem(pattern, "wanda")
    assert task.curvature is not None
    found = solve("update", task)
    errors = (task.weight - found.weight) @ torch.linalg.inv(task.curvature.factor)
    assert float(errors[~found.gone].abs().max()) < 1e-10
    assert float(errors[found.gone].abs().max()) > 0.1
    assert torch.allclose(errors.square().sum(1), error(task, found.weight), rtol=1e-10)


def joint_loss(task: Linear, gone: Tensor) -> Tensor:  # (rows,)
    """w_P (H^-1_PP)^-1 w_P: what removing a row's weights together costs."""
    assert task.curvature is not None
    inverse = torch.linalg.inv(task.curvature.gram)
    return torch.stack(
        [
            w[mask] @ torch.linalg.solve(inverse[mask][:, mask], w[mask])
            for w, mask in zip(task.weight, gone, strict=True)
        ]
    )


def test_the_joint_loss_is_that_of_least_squares() -> None:
    task = problem("50%", x=inputs(96))
    gone = torch.rand(ROWS, 96, generator=torch.Generator().manual_seed(2)) < 0.4
    assert torch.allclose(joint_loss(task, gone), error(task, least_squares(task, gone)), rtol=1e-9)


@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda"])
@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_every_subset_is_tried(pattern: str, criterion: str) -> None:
    """In the first group, where nothing has moved yet, no subset costs less; scores of single weights miss the best."""
    x = inputs()
    x[:, 1:8] += x[:, :7]  # neighbours that can stand in for each other
    task = problem(pattern, criterion, x=x)
    tried, first = solve("mrp", task), begin(task)
    size, out = task.pattern.of, task.pattern.of - task.pattern.keep
    costs, subsets = [], list(combinations(range(size), out))
    for subset in subsets:
        gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        gone[:, list(subset)] = True
        costs.append(joint_loss(task, gone))
    table = torch.stack(costs, 1)  # (rows, subsets)
    chosen = [tuple(mask[:size].nonzero().flatten().tolist()) for mask in tried.gone]
    assert chosen == [subsets[best] for best in table.argmin(1).tolist()]
    assert not torch.equal(tried.gone[:, :size], first.gone[:, :size])
    assert not torch.equal(tried.gone[:, :size], solve("update", task).gone[:, :size])
    assert error(task, tried.weight).sum() < error(task, solve("mrp", task, hold=True).weight).sum()


@pytest.mark.parametrize("pattern", ["2:4", "2:8"])
def test_of_groups_that_do_not_hang_together_every_one_loses_least(pattern: str) -> None:
    size = Pattern.parse(pattern).of
    x = torch.block_diag(*(inputs(size, tokens=40, seed=g) for g in range(COLUMNS // size)))
    task = problem(pattern, x=x)
    tried, greedy = solve("mrp", task).gone, solve("update", task).gone
    for a in range(0, COLUMNS, size):
        costs, subsets = [], list(combinations(range(a, a + size), size - task.pattern.keep))
        for subset in subsets:
            gone = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
            gone[:, list(subset)] = True
            costs.append(joint_loss(task, gone))
        best = [subsets[i] for i in torch.stack(costs, 1).argmin(1).tolist()]
        assert [tuple(row[a : a + size].nonzero().flatten().add(a).tolist()) for row in tried] == best
    assert bool((joint_loss(task, tried) <= joint_loss(task, greedy) * (1 + 1e-9)).all())
    assert not torch.equal(tried, greedy)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8"])
def test_ties_in_groups_chosen_on_the_way_go_to_the_lower_column(pattern: str) -> None:
    """Weights of 8 bits on inputs that do not hang together: many equal scores."""
    task = problem(pattern, x=torch.eye(COLUMNS, dtype=torch.float64), w=weights(200).bfloat16().double())
    assert torch.equal(solve("update", task).gone, begin(task).gone)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_wanda_does_not_care_how_an_input_is_scaled(pattern: str) -> None:
    x, w, scale = inputs(), weights(), torch.ones(COLUMNS, dtype=torch.float64)
    scale[5], scale[77] = 64, 1 / 32
    found = begin(problem(pattern, "wanda", x=x, w=w)).gone
    assert torch.equal(found, begin(problem(pattern, "wanda", x=x * scale, w=w / scale)).gone)
    assert not torch.equal(found, begin(problem(pattern, "wanda", x=x, w=w / scale)).gone)


def test_a_group_with_too_many_subsets_is_chosen_by_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    task = problem("2:8")
    for name in ("update", "mrp"):
        with_table = solve(name, task)
        with monkeypatch.context() as patch:
            patch.setattr(sequential, "TABLE", 1)
            without = solve(name, task)
        if name == "update":
            assert torch.equal(with_table.gone, without.gone)
            assert torch.allclose(with_table.weight, without.weight, atol=1e-9)
        assert bool((without.gone.view(ROWS, -1, 8).sum(2) == 6).all())


def test_holding_a_mask_keeps_it() -> None:
    task = problem("2:4")
    start = begin(task)
    for name in ("update", "mrp", "alps"):
        assert torch.equal(solve(name, task, start, hold=True).gone, start.gone)
        assert not torch.equal(solve(name, task, start).gone, start.gone)


# ---- what was zero before


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["50%", "2:4", "2:8"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_empty_is_counted(name: str, pattern: str, criterion: str, filled: bool) -> None:
    """A tenth is zero before: it stays, and no more go than were asked, but where a group has more of them. Targets may
    be other than zero there, as with `--inputs both`."""
    empty = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) < 0.1
    task = problem(pattern, criterion, w=weights() if filled else weights().masked_fill(empty, 0), empty=empty)
    found = solve(name, task)
    assert bool(found.gone[empty].all())
    assert torch.equal(found.weight == 0, found.gone)
    if not task.pattern.of:
        assert int(found.gone.sum()) == ROWS * COLUMNS // 2
        return
    least = task.pattern.of - task.pattern.keep
    there = empty.view(ROWS, -1, task.pattern.of).sum(2).clamp_min(least)
    assert pattern != "2:4" or bool((there > least).any())
    assert torch.equal(found.gone.view(ROWS, -1, task.pattern.of).sum(2), there)


@pytest.mark.parametrize("name", NAMES)
def test_more_zeros_than_are_asked_stay_as_they_are(name: str) -> None:
    empty = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) < 0.7
    found = solve(name, problem("20%", "wanda", w=weights().masked_fill(empty, 0), empty=empty))
    assert torch.equal(found.gone, empty)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "2:8", "8:16"])
@pytest.mark.parametrize("name", ["update", "mrp"])
def test_a_mask_chosen_on_the_way_is_solved_as_one_that_was_given(
    name: str, pattern: str, criterion: str, share: float
) -> None:
    """What was zero before and has moved since goes with its error, also beyond what the pattern takes."""
    empty = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(4)) < share
    task = problem(pattern, criterion, w=weights().masked_fill(empty, 0), empty=empty)
    found = solve(name, task)
    held = solve(name, task, Sparse(task.weight.masked_fill(found.gone, 0), found.gone), hold=True)
    assert torch.equal(held.gone, found.gone)
    assert torch.allclose(held.weight, found.weight, atol=1e-9)


def test_an_empty_weight_goes_first_however_high_its_score() -> None:
    """By hand: of four the second is empty; the lowest of the others goes with it."""
    empty = torch.tensor([[False, True, False, False]])
    task = Linear(torch.ones(1, 4), Pattern.parse("2:4"), "row", lambda w, _: torch.zeros_like(w), empty=empty)
    assert task.lowest(torch.tensor([[3.0, 9.0, 2.0, 4.0]]), "row").tolist() == [[False, True, True, False]]


# ---- curvature


def test_a_root_is_found_by_halves() -> None:
    torch.manual_seed(0)
    gram = torch.cov(torch.randn(301, 900, dtype=torch.float64))
    assert len(gram) > 2 * RUN, "two levels of halves"
    found = torch.zeros_like(gram)
    assert int(inverse_root(gram, found)) == 0
    assert torch.allclose(found @ gram @ found.T, torch.eye(301, dtype=torch.float64), atol=1e-12)
    assert torch.equal(found, found.triu())


@pytest.mark.parametrize("at", [0, 150, 300])
def test_a_root_of_what_is_not_positive_is_told(at: int) -> None:
    gram = torch.eye(301)
    gram[at, at] = -1
    assert int(inverse_root(gram, torch.zeros_like(gram))) > 0


def test_the_factor_and_what_follows_from_it() -> None:
    curvature = Curvature(inputs().T @ inputs())
    factor, inverse = curvature.factor, torch.linalg.inv(curvature.gram)
    assert torch.allclose(factor.T @ factor, inverse, atol=1e-12)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(curvature.inverse_diagonal, inverse.diagonal())
    tail = torch.linalg.inv(curvature.gram[7:, 7:])
    assert factor[7, 7].item() ** 2 == pytest.approx(tail[0, 0].item())
    root, values, vectors = curvature.spectrum
    assert torch.allclose((vectors * values) @ vectors.T * root * root[:, None], curvature.gram, atol=1e-9)
    assert curvature.raised == 0


@pytest.mark.parametrize("columns", [5, 192, 400])
def test_the_size_of_outputs_is_that_of_the_outputs(columns: int) -> None:
    """By a half of the matrix, in stripes of 192 columns."""
    x, w = inputs(columns, tokens=60), weights(columns=columns)
    assert Curvature(x.T @ x).size(w) == pytest.approx(float((w @ x.T).square().sum()), rel=1e-12)


def test_dead_inputs_are_found_and_their_weights_go_first() -> None:
    x = inputs()
    x[:, 3] = 0
    task = problem("50%", x=x)
    assert task.curvature is not None
    assert task.curvature.dead.nonzero().flatten().tolist() == [3]
    assert bool((task.scores[:, 3] == 0).all())
    for name in ("none", "update", "mrp"):
        assert bool(solve(name, task).gone[:, 3].all())
    assert bool(solve("update", problem("2:4", x=x)).weight.isfinite().all())


def test_a_singular_matrix_raises_the_damping_stepwise_and_says_so() -> None:
    x = torch.ones(10, 12)
    curvature = Curvature(x.T @ x, damping=0.0)
    assert bool(curvature.factor.isfinite().all())
    assert 1e-8 < curvature.raised < 1e-5
    assert torch.equal(curvature.gram.diagonal(), curvature.raw.diagonal() * (1 + curvature.raised))
    with pytest.raises(BrokenModel, match="singular even with a damping"):
        _ = Curvature(-torch.eye(4), damping=0.01).factor


def test_a_damping_of_nothing_is_raised_no_further_than_a_small_one() -> None:
    x = torch.ones(10, 12)
    nothing, little = Curvature(x.T @ x, damping=0.0), Curvature(x.T @ x, damping=1e-8)
    assert torch.equal(nothing.factor, little.factor)
    assert nothing.raised == little.raised


def test_eigenvalues_that_drown_in_rounding_raise_the_damping() -> None:
    """ALPS on inputs with one strong common mean: what fp32 makes of the small eigenvalues is noise."""
    source = torch.Generator().manual_seed(0)
    x = 3 + 0.01 * torch.randn(400, 96, generator=source)
    drowned, well = (Curvature(x.T @ x, damping=d) for d in (1e-8, 0.01))
    assert float(drowned.spectrum[1][0]) > 1e-6 * float(drowned.spectrum[1][-1]) / 2
    assert drowned.raised > 1e-8
    assert torch.allclose(drowned.gram.diagonal() / drowned.raw.diagonal() - 1, torch.tensor(drowned.raised), atol=1e-6)
    assert float(well.spectrum[1][0]) > 0
    assert well.raised == 0


def test_equal_inputs_give_the_weight_back_as_its_own_target() -> None:
    x, w = inputs(), weights()
    curvature = Curvature(x.T @ x)
    assert torch.allclose(curvature.target(w, x.T @ x, 1.0), w, atol=1e-9)


def test_the_target_is_what_comes_nearest_to_the_dense_outputs() -> None:
    x, w = inputs(), weights()
    dense = x + 0.3 * inputs(seed=5)
    curvature = Curvature(x.T @ x, damping=1e-13)
    expected = torch.linalg.lstsq(x, dense @ w.T).solution.T
    assert torch.allclose(curvature.target(w, dense.T @ x, 1.0), expected, atol=1e-5)
    assert torch.equal(curvature.target(w, dense.T @ x, 0.0), w)
    assert torch.allclose(curvature.target(w, dense.T @ x, 0.25), w + (expected - w) / 4, atol=1e-5)
