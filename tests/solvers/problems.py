"""One linear to make sparse, in fp64 so that rounding decides nothing, and what its answers are measured by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regrow.artifacts.curvature import Curvature
from regrow.artifacts.linear import SOLVERS, Inputs, Linear, Lowest, Sparse
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA
from regrow.engines.sparsify import task_of

NAMES = SOLVERS.names()
ROWS, COLUMNS = 24, 160  # a whole block and a part of one


def inputs(columns: int = COLUMNS, tokens: int = 900, seed: int = 0) -> Tensor:  # (tokens, columns) fp64, correlated
    source = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=source, dtype=torch.float64) / columns**0.5
    scale = torch.rand(columns, generator=source, dtype=torch.float64) + 0.2
    return (
        torch.randn(tokens, columns, generator=source, dtype=torch.float64) @ (mix + torch.eye(columns)) * scale + 0.2
    )


def weights(rows: int = ROWS, columns: int = COLUMNS, seed: int = 9) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    pattern: str,
    criterion: str = "sparsegpt",
    x: Tensor | None = None,
    w: Tensor | None = None,
    empty: Tensor | None = None,
) -> Linear:
    x = inputs() if x is None else x
    w = weights(columns=x.shape[1]) if w is None else w
    seen = Inputs(x.square().sum(0) / 4, x.sum(0) / 4, x.var(0, correction=0))
    return task_of(w, seen, Curvature(x.T @ x), WEIGHT_CRITERIA.get(criterion), Pattern.parse(pattern), empty)


def begin(task: Linear) -> Sparse:
    return Lowest(task)


def solve(name: str, task: Linear, start: Sparse | None = None, **options: Any) -> Sparse:
    return SOLVERS.get(name).solve(task, begin(task) if start is None else start, **options)


def error(task: Linear, found: Tensor) -> Tensor:  # (rows,) with the damped Gram matrix
    assert task.curvature is not None
    gap = found - task.weight
    return (gap @ task.curvature.gram * gap).sum(1)


def least_squares(task: Linear, gone: Tensor) -> Tensor:
    """Row by row: the kept weights that solve their normal equations."""
    assert task.curvature is not None
    gram, found = task.curvature.gram, torch.zeros_like(task.weight)
    for row, mask in enumerate(gone):
        kept = ~mask
        found[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ task.weight[row])
    return found
