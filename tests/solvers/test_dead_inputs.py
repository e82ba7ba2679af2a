"""Weights of an input that was always zero never mattered: they go before all others, whoever chooses the mask."""

from __future__ import annotations

import pytest
import torch

from regrow.artifacts.curvature import Curvature
from regrow.artifacts.linear import SOLVERS, Inputs, Linear, Lowest
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA
from regrow.engines.sparsify import task_of

DEAD = [1, 2, 17, 30]


def problem(pattern: str, scale: float, criterion: str = "sparsegpt") -> Linear:
    """Live inputs so small that a weight of a dead one looks large beside them."""
    source = torch.Generator().manual_seed(0)
    x = scale * torch.randn(512, 32, generator=source, dtype=torch.float64)
    x[:, DEAD] = 0
    w = torch.randn(24, 32, generator=source, dtype=torch.float64)
    seen = Inputs(x.square().sum(0), x.sum(0), x.var(0, correction=0))
    return task_of(w, seen, Curvature(x.T @ x), WEIGHT_CRITERIA.get(criterion), Pattern.parse(pattern))


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("name", ["update", "mrp", "alps", "refit"])
@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_they_go_first(name: str, pattern: str, criterion: str, scale: float) -> None:
    task = problem(pattern, scale, criterion)
    found = SOLVERS.get(name).solve(task, Lowest(task))
    assert bool(found.gone[:, DEAD].all())


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("share", ["10%", "30%", "50%"])
def test_they_do_not_return(share: str, power: float) -> None:
    """DSnoT, once what is of use has returned."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(200, 128, generator=source, dtype=torch.float64) + 0.5
    x[:, DEAD] = 0
    w = torch.randn(64, 128, generator=source, dtype=torch.float64)
    seen = Inputs(x.square().sum(0), x.sum(0), x.var(0, correction=0))
    task = task_of(w, seen, None, WEIGHT_CRITERIA.get("wanda"), Pattern.parse(share))
    found = SOLVERS.get("dsnot").solve(task, Lowest(task), power=power)
    assert bool(found.gone[:, DEAD].all())
    assert torch.equal(found.gone.sum(1), Lowest(task).gone.sum(1))


def test_constant_inputs_are_no_place_to_stop_counting() -> None:
    """DSnoT: their variance is 0, so they would explain everything; every row keeps its count all the same."""
    for seed in range(60):
        source = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 24, generator=source).repeat(40, 1)
        w = torch.randn(8, 24, generator=source)
        seen = Inputs(x.square().sum(0), x.sum(0), torch.zeros(24))
        task = task_of(w, seen, None, WEIGHT_CRITERIA.get("wanda"), Pattern.parse("50%"))
        found = SOLVERS.get("dsnot").solve(task, Lowest(task), threshold=0.0)
        assert found.gone.sum(1).tolist() == [12] * 8, seed
