"""From left to right: what a removed weight did is made up for by the inputs after it (SparseGPT, MRP).

Columns go in blocks, blocks in halves down to small runs, and what a run does to a row is one product with a small
triangular matrix out of a table, so there is no step a column. What this gives up: inputs before a removed weight never
help; `refit` lets them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import torch

from regrow.artifacts.linear import Linear, Sparse, solver
from regrow.artifacts.mask import BLOCK, lowest_of_groups, lowest_of_rows
from regrow.artifacts.pattern import Pattern

RUN = 4  # columns taken together where the mask is known
TABLE = 256  # subsets of a group that are prepared in advance, at most
ROWS = 64  # rows whose joint removals are solved together

Chosen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weights (m, b), gone (m, b), errors (m, b)


@solver(sees="gram", mask="rescores", takes="mask", start="sparsegpt", paper="arXiv:2301.00774 (SparseGPT)")
def update(task: Linear, start: Sparse, hold: bool = False) -> Sparse:
    """SparseGPT: weights go one after the other, each made up for by the inputs after it."""
    return _sweep(task, start, joint=False, hold=hold)


@solver(sees="gram", mask="tries", takes="mask", start="sparsegpt", paper="arXiv:2410.15567 (MRP)")
def mrp(task: Linear, start: Sparse, hold: bool = False) -> Sparse:
    """The weights of a block go at once; of N:M groups every subset is tried before (unless `hold`)."""
    return _sweep(task, start, joint=True, hold=hold)


def _sweep(task: Linear, start: Sparse, *, joint: bool, hold: bool) -> Sparse:
    """`hold` keeps the mask of `start`; else it is chosen on the way when the criterion adapts or subsets are tried."""
    assert task.curvature is not None
    factor, pattern = task.curvature.factor, task.pattern  # (n, n) upper
    weight = task.weight.clone()
    rows, columns = weight.shape
    width = pattern.of * max(1, BLOCK // pattern.of) if pattern.of else BLOCK
    rescore = task.score if task.adapts and not hold else None
    tries = pattern.of > 0 and joint and not hold and math.comb(pattern.of, pattern.keep) <= TABLE
    chooses = rescore is not None or tries
    gone = torch.zeros_like(weight, dtype=torch.bool) if chooses else start.gone.clone()  # (m, n)
    empty = torch.zeros_like(gone) if task.empty is None else task.empty  # (m, n)
    for a in range(0, columns, width):
        b = min(a + width, columns)
        here, own = slice(a, b), factor[a:b, a:b]
        part = weight[:, here].clone()
        if pattern.of and chooses:
            score = None if rescore is None else (lambda w, at, a=a: rescore(w, slice(a + at, a + at + w.shape[1])))
            whole = part.clone()
            dead = task.curvature.dead[here]
            part, gone[:, here], error = _by_groups(part, own, pattern, score, empty[:, here], dead if joint else None)
            if joint:  # the masks of the block are known now: remove them together, which is better still
                part, error = _at_once(whole, gone[:, here], own)
        else:
            if rescore is not None:
                count = pattern.count(rows * b) - pattern.count(rows * a)
                gone[:, here] = lowest_of_rows(rescore(part, here).reshape(1, -1), count).view_as(part)
                gone[:, here] |= empty[:, here]
            part, error = (_at_once if joint else _in_turn)(part, gone[:, here], own)
        weight[:, here] = part
        weight[:, b:].addmm_(error, factor[here, b:], alpha=-1)
    return Sparse(weight, gone)


def _in_turn(part: torch.Tensor, gone: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (m, b) of one block without `gone`, one column after the other; errors (m, b) in units of U's rows."""
    (rows, width), pad = part.shape, -part.shape[1] % RUN
    below = torch.nn.functional.pad(own.T, (0, pad, 0, pad))  # (b', b') U^T, b' a multiple of RUN
    moved = torch.nn.functional.pad(part.T, (0, 0, 0, pad)).contiguous()  # (b', m): the rows of a step lie together
    error = torch.empty_like(moved)
    runs = [slice(i, i + RUN) for i in range(0, len(below), RUN)]
    powers = 1 << torch.arange(RUN, dtype=torch.int32, device=gone.device)
    sets = torch.arange(2**RUN, device=gone.device)[:, None] & powers > 0  # (2^RUN, RUN) bit j stands for column j
    corners = torch.stack([below[run, run] for run in runs])  # (r, RUN, RUN)
    table = _turns(sets, corners.mT).flatten(2).mT.contiguous()  # (r, RUN * RUN, 2^RUN)
    bits = torch.nn.functional.pad(gone.T, (0, 0, 0, pad)).contiguous().view(-1, RUN, rows)  # (r, RUN, m)
    which = (bits * powers[:, None]).sum(1, dtype=torch.int32)  # (r, m)

    def solve(first: int, last: int) -> None:
        """Errors of the runs from `first` to before `last`: of one, or of the left half and of what it moves."""
        if last - first == 1:
            turn = table[first].index_select(1, which[first]).view(RUN, RUN, rows)
            torch.sum(moved[runs[first], None] * turn, 0, out=error[runs[first]])
            return
        middle = (first + last) // 2
        left, right = slice(first * RUN, middle * RUN), slice(middle * RUN, last * RUN)
        solve(first, middle)
        moved[right].addmm_(below[right, left], error[left], alpha=-1)
        solve(middle, last)

    solve(0, len(runs))
    moved.view(-1, RUN, rows).baddbmm_(corners, error.view(-1, RUN, rows), alpha=-1)  # what a run does to itself
    return moved.mul_(~bits.flatten(0, 1))[:width].T, error[:width].T


def _turns(sets: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:  # (S, c) bool, (r, c, c) -> (r, S, c, c)
    """T with e = w T for each set of columns that may be gone, and each block of U.

    Errors e_j = (w_j - sum_{i<j} e_i U_ij) / U_jj where gone, else 0, by forward substitution.
    """
    runs, width, _ = blocks.shape
    unit = torch.eye(width, dtype=blocks.dtype, device=blocks.device)
    columns = unit[:, None, None].repeat(1, runs, len(sets), 1)  # (c, r, S, c)
    for j in range(width):
        for i in range(j):
            columns[j].addcmul_(columns[i], blocks[:, i, j, None, None], value=-1)
        columns[j].mul_(torch.where(sets[:, j, None], 1 / blocks[:, j, j, None, None], 0))
    return columns.movedim(0, -1).contiguous()


def _at_once(part: torch.Tensor, gone: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (m, b) of one block without `gone`, all removed together: errors x U^T with x [H^-1]_PP = w_P."""
    inverse = own.T @ own  # (b, b) of the inverse Hessian of what is left
    eye = torch.eye(len(own), dtype=own.dtype, device=own.device)
    found = []
    for w, g in zip(torch.split(part, ROWS), torch.split(gone, ROWS), strict=True):
        matrix = torch.where(g[:, :, None] & g[:, None, :], inverse, eye)  # (rows, b, b)
        found.append(torch.linalg.solve(matrix, (w * g).unsqueeze(-1)).squeeze(-1))
    error = torch.cat(found) @ own.T
    return (part - error @ own).masked_fill(gone, 0), error


def _by_groups(
    part: torch.Tensor,
    own: torch.Tensor,
    pattern: Pattern,
    score: Callable[[torch.Tensor, int], torch.Tensor] | None,
    empty: torch.Tensor,  # (m, b) bool
    dead: torch.Tensor | None,  # (b,) bool: weigh the exact joint loss of every subset, in which these count nothing
) -> Chosen:
    """N:M with the mask chosen on the way, group by group: by scores, or by the exact joint loss of every subset of
    those that take as much of what is empty as they can."""
    size, out, joint = pattern.of, pattern.of - pattern.keep, dead is not None
    starts = range(0, part.shape[1], size)
    gone, error = torch.zeros_like(part, dtype=torch.bool), torch.zeros_like(part)
    blocks = torch.stack([own[a : a + size, a : a + size] for a in starts])  # (g, M, M)
    if math.comb(size, out) > TABLE:
        assert score is not None
        for g, a in enumerate(starts):
            here = slice(a, a + size)
            gone[:, here] = lowest_of_groups(score(part[:, here], a), pattern) | empty[:, here]
            part[:, here], error[:, here] = (_at_once if joint else _in_turn)(part[:, here], gone[:, here], blocks[g])
            part[:, a + size :] -= error[:, here] @ own[here, a + size :]
        return part, gone, error
    subsets = torch.zeros(math.comb(size, out), size, dtype=torch.bool, device=part.device)  # (S, M)
    for row, subset in zip(subsets, combinations(range(size), out), strict=True):
        row[list(subset)] = True
    costs, turns = _tables(subsets, blocks, joint)  # (g, M, S * M) each
    every = torch.arange(len(part), device=part.device)
    for g, a in enumerate(starts):
        here = slice(a, a + size)
        w = part[:, here]  # (m, M)
        if dead is not None:
            alive = w.masked_fill(dead[here], 0)
            cost = ((alive @ costs[g]).view(len(w), -1, size) * alive[:, None]).sum(-1)  # (m, S)
        else:
            assert score is not None
            lowest = lowest_of_groups(score(w, a), pattern)  # counted, not summed: sums of equals differ by rounding
            cost = -(lowest.to(w) @ subsets.to(w).T)
        taken = empty[:, here].to(w) @ subsets.to(w).T  # (m, S)
        cost = cost.masked_fill(taken < taken.amax(1, keepdim=True), torch.inf)
        pick = cost.argmin(1)  # of equals the first, whose columns are lower
        error[:, here] = (w @ turns[g]).view(len(w), -1, size)[every, pick]
        gone[:, here] = subsets[pick] | empty[:, here]
        more = (gone[:, here] > subsets[pick]).any(1)  # (m,) rows that lose more than a subset: it was empty before
        if bool(more.any()):
            error[more, here] = (_at_once if joint else _in_turn)(w[more], gone[more, here], blocks[g])[1]
        part[:, a:] -= error[:, here] @ own[here, a:]
    return part.masked_fill(gone, 0), gone, error


def _tables(subsets: torch.Tensor, blocks: torch.Tensor, joint: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For every group and subset: the matrix of the joint loss, and that of the errors; (g, M, S * M) each."""

    def flat(table: torch.Tensor) -> torch.Tensor:  # (g, S, M, M) -> (g, M, S * M)
        return table.transpose(1, 2).flatten(2)

    if not joint:
        turns = flat(_turns(subsets, blocks))
        return turns, turns
    both = subsets[:, :, None] & subsets[:, None, :]  # (S, M, M)
    inverse = (blocks.transpose(1, 2) @ blocks)[:, None]  # (g, 1, M, M)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    loss = torch.linalg.inv(torch.where(both, inverse, eye)) * both  # (g, S, M, M)
    return flat(loss), flat(loss @ blocks.transpose(1, 2)[:, None])
