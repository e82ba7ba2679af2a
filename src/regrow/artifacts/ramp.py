"""How a sparsity that is to be reached rises; the decorator that registers a ramp, and the registry.

What this gives up: ramps that hang on how the training goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from regrow.registry import Registry

Rise = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Ramp:
    name: str
    about: str
    paper: str
    at: Rise  # share of the warm-up that is done, 0 to 1 -> share of the sparsity that is asked for


RAMPS: Registry[Ramp] = Registry("ramp", "regrow.schedules")


def ramp(*, paper: str) -> Callable[[Rise], Rise]:
    """Register a function from 0 to 1 onto 0 to 1 under its name."""

    def register(function: Rise) -> Rise:
        name = function.__name__.replace("_", "-")
        if not function.__doc__:
            raise TypeError(f"ramp {name!r} has no docstring: say in one line how it rises")
        RAMPS.add(name, Ramp(name, function.__doc__.strip().splitlines()[0], paper, function))
        return function

    return register
