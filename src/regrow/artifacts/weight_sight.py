"""What a criterion of single weights may look at, and the decorator that turns a pure function into one.

One that adapts must work on any run of columns: solvers that go through a linear from left to right ask it again on
what is left. What this gives up: criteria that compare linears; that is a spread's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from regrow.artifacts.mask import Within
from regrow.registry import Registry

if TYPE_CHECKING:
    import torch

WeightSees = Literal["nothing", "inputs", "routed", "gram"]
"""nothing: the weights; inputs: the size of each input; routed: the same, weighted by the router where there is one;
gram: all products of inputs."""


@dataclass(frozen=True, slots=True)
class WeightSight:
    """A linear, or some of its columns. Inputs are those of the calibration text."""

    weight: torch.Tensor  # (m, n) fp32
    norm: torch.Tensor | None = None  # (n,) root of the mean over sequences of the sum over tokens of x squared
    pivot: torch.Tensor | None = None  # (n,) diagonal of the factor U, U^T U the inverse of the damped Gram matrix
    diagonal: torch.Tensor | None = None  # (n,) of the damped Gram matrix
    inverse_diagonal: torch.Tensor | None = None  # (n,) of its inverse


@dataclass(frozen=True, slots=True)
class WeightCriterion:
    name: str
    sees: WeightSees
    within: Within  # who competes for a percentage
    solver: str  # what the published method does with the mask
    adapts: bool  # the published method scores again on weights that were moved
    paper: str
    about: str  # first line of the docstring
    score: Callable[[WeightSight], torch.Tensor]  # (m, n), higher stays


WEIGHT_CRITERIA: Registry[WeightCriterion] = Registry("weight criterion", "regrow.criteria")


def weight_criterion(
    *, sees: WeightSees, paper: str, within: Within = "row", solver: str = "none", adapts: bool = False
) -> Callable[[Callable[[WeightSight], torch.Tensor]], Callable[[WeightSight], torch.Tensor]]:
    """Register a pure function `WeightSight -> (m, n)` under its name, `weight_` off and underscores as hyphens."""
    if sees not in get_args(WeightSees):
        raise TypeError(f"a criterion of weights cannot see {sees!r}: {get_args(WeightSees)}")

    def register(function: Callable[[WeightSight], torch.Tensor]) -> Callable[[WeightSight], torch.Tensor]:
        name = function.__name__.removeprefix("weight_").replace("_", "-")
        if not function.__doc__:
            raise TypeError(f"weight criterion {name!r} has no docstring: say in one line what it measures")
        about = function.__doc__.strip().splitlines()[0]
        WEIGHT_CRITERIA.add(name, WeightCriterion(name, sees, within, solver, adapts, paper, about, function))
        return function

    return register
