"""What a spread is asked: share `total` kept units among layers; and the decorator that registers one.

What this gives up: a spread shares one kind of unit at a time, blind to what the others keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regrow.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Ask:
    """`scores` holds one number a unit, higher stays; rows are the layers that are left, in order."""

    total: int  # units to keep over all layers
    scores: torch.Tensor  # (layers, units) fp32
    least: int = 1  # no layer keeps fewer
    comparable: bool = False  # scores of different layers share one scale

    @property
    def layers(self) -> int:
        return int(self.scores.shape[0])

    @property
    def units(self) -> int:
        return int(self.scores.shape[1])


@dataclass(frozen=True, slots=True)
class Spread:
    name: str
    about: str
    paper: str
    share: Callable[[Ask], list[int]]  # units kept in each layer; sums to `total`


SPREADS: Registry[Spread] = Registry("spread", "regrow.spreads")


def spread(*, paper: str) -> Callable[[Callable[[Ask], list[int]]], Callable[[Ask], list[int]]]:
    """Register a pure function `Ask -> counts` under its name."""

    def register(function: Callable[[Ask], list[int]]) -> Callable[[Ask], list[int]]:
        name = function.__name__.replace("_", "-")
        if not function.__doc__:
            raise TypeError(f"spread {name!r} has no docstring: say in one line how it shares")
        SPREADS.add(name, Spread(name, function.__doc__.strip().splitlines()[0], paper, function))
        return function

    return register
