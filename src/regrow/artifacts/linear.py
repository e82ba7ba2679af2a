"""What a solver is given, one linear at a time, and what it returns; and the decorator that registers one.

Solvers chain: the first starts from what the criterion gives, each other from the mask that the one before left, and
some from its weights too. What this gives up: errors of one linear that another could make up for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from regrow.artifacts.mask import Within, lowest
from regrow.artifacts.pattern import Pattern
from regrow.registry import Registry

if TYPE_CHECKING:
    import torch

    from regrow.artifacts.curvature import Curvature


@dataclass(frozen=True, slots=True)
class Inputs:
    """One linear's inputs on the calibration text, per input channel; sums over tokens, means over sequences."""

    squares: torch.Tensor  # (n,) fp32 mean over sequences of the sum over tokens of x squared
    sums: torch.Tensor  # (n,) fp32 mean over sequences of the sum over tokens of x
    variance: torch.Tensor  # (n,) fp32 over all tokens


@dataclass(frozen=True)
class Linear:
    """The problem: outputs near those of `weight` on these inputs, with zeros in this pattern."""

    weight: torch.Tensor  # (m, n) fp32, what the outputs should be near to
    pattern: Pattern
    within: Within  # who competes for a percentage
    score: Callable[[torch.Tensor, slice], torch.Tensor]  # (m, c) weights and which columns they are -> (m, c)
    adapts: bool = False  # scores of weights that have moved mean something
    inputs: Inputs | None = None
    curvature: Curvature | None = None
    empty: torch.Tensor | None = None  # (m, n) bool: zero before and for good, and counted among those that go

    @cached_property
    def scores(self) -> torch.Tensor:  # (m, n)
        """Of `weight` as it is."""
        return self.score(self.weight, slice(None))

    def lowest(self, scores: torch.Tensor, within: Within) -> torch.Tensor:  # (m, n) -> (m, n) bool
        """What goes by `scores`, 0 or more: all that is empty, then the lowest until the pattern has its zeros."""
        if self.empty is None:
            return lowest(scores, self.pattern, within)
        return lowest(scores.masked_fill(self.empty, -1), self.pattern, within) | self.empty


@dataclass(frozen=True)
class Sparse:
    """An answer: `weight` is exactly zero where `gone`."""

    weight: torch.Tensor  # (m, n) fp32
    gone: torch.Tensor  # (m, n) bool


class Lowest(Sparse):
    """What the criterion alone gives, where every chain of solvers starts; made when it is first looked at."""

    task: Linear

    def __init__(self, task: Linear) -> None:
        object.__setattr__(self, "task", task)

    @cached_property
    def gone(self) -> torch.Tensor:
        return self.task.lowest(self.task.scores, self.task.within)

    @cached_property
    def weight(self) -> torch.Tensor:
        return self.task.weight.masked_fill(self.gone, 0)


Mask = Literal["keeps", "moves", "chooses", "rescores", "tries"]
"""What a solver does to the mask it is given. `chooses` makes one of its own, `rescores` does when the criterion means
something on weights that have moved, `tries` then and for N:M; none of the three when its option `hold` is set."""
Takes = Literal["mask", "weights"]
"""What a solver takes from the one before it: its mask alone, when weights are found anew, or its weights too."""


@dataclass(frozen=True, slots=True)
class Solver:
    name: str
    sees: str  # nothing, inputs, moments or gram
    mask: Mask
    takes: Takes
    start: str  # the criterion whose mask it starts from when none is named
    within: Within | None  # who competes in the mask it starts from; else the criterion says
    paper: str
    about: str
    solve: Callable[..., Sparse]  # (Linear, Sparse, **options)
    options: dict[str, Any]
    positive: tuple[str, ...] = ()  # options that must be more than 0

    def moves(self, options: Mapping[str, Any], *, adapts: bool, groups: bool) -> bool:
        """Whether the mask it leaves may be another than it was given; `adapts` is the criterion's, `groups` N:M's."""
        own = {"chooses": True, "rescores": adapts, "tries": adapts or groups}.get(self.mask, False)
        return self.mask == "moves" or (own and not options.get("hold"))


SOLVERS: Registry[Solver] = Registry("solver", "regrow.solvers")


def solver(
    *,
    sees: str,
    mask: Mask = "keeps",
    takes: Takes = "weights",
    start: str,
    within: Within | None = None,
    paper: str,
    positive: tuple[str, ...] = (),
) -> Callable[[Callable[..., Sparse]], Callable[..., Sparse]]:
    """Register a pure function `(Linear, Sparse, **options) -> Sparse` under its name."""

    def register(function: Callable[..., Sparse]) -> Callable[..., Sparse]:
        name = function.__name__.replace("_", "-")
        if not function.__doc__:
            raise TypeError(f"solver {name!r} has no docstring: say in one line what it does")
        options = {p.name: p.default for p in list(inspect.signature(function).parameters.values())[2:]}
        about = function.__doc__.strip().splitlines()[0]
        found = Solver(name, sees, mask, takes, start, within, paper, about, function, options, positive)
        SOLVERS.add(name, found)
        return function

    return register
