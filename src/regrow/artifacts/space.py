"""Shapes that a search may choose among: the same widths in every layer, so that a stock class holds them.

A `Widths` names what a layer keeps of each unit (of heads: in each group), how many layers stay, how many channels.
What this gives up: layers of different widths, and units that are ranked by anything but their scores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from regrow.artifacts.budget import Budget
from regrow.artifacts.family import UNITS, Unit
from regrow.artifacts.shape import Anatomy, LayerShape, Shape
from regrow.errors import BudgetError, SettingsError

Widths = Mapping[Unit, int]

DEEPEST, NARROWEST = 0.2, 0.4  # share of the layers, and of other units, that may go unless told otherwise
VALUES = 32  # of one axis, at most, unless they are named
STEPS: dict[Unit, int] = {"neuron": 32, "channel": 64}  # values lie so far apart, or a multiple of it


@dataclass(frozen=True, slots=True)
class Space:
    """The values of each axis; those not named stay whole."""

    choices: Mapping[Unit, tuple[int, ...]]

    @property
    def size(self) -> int:
        return math.prod(map(len, self.choices.values()))

    def grid(self) -> Iterator[dict[Unit, int]]:
        """Every combination."""
        return (dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values()))


def full(anatomy: Anatomy) -> dict[Unit, int]:
    """The widths of the intact model."""
    sizes = anatomy.sizes
    return {"layer": sizes["L"], "group": sizes["K"], "head": sizes["G"], "neuron": sizes["F"], "channel": sizes["C"]}


def space_of(
    anatomy: Anatomy, axes: Sequence[Unit], named: Mapping[Unit, Sequence[int]], divisors: Mapping[Unit, int]
) -> Space:
    """The values in `named`, and of the other axes those that a cut may reach without going too far in one.

    Raises `SettingsError` for an axis that is not to be cut and for a value that the model does not have.
    """
    whole = full(anatomy)
    for unit, values in named.items():
        if unit not in axes:
            raise SettingsError(f"choices of {unit}s, which are not among the axes", ", ".join(axes), f"add {unit}")
        if not values or not all(1 <= value <= whole[unit] for value in values):
            raise SettingsError(
                f"choices {list(values)} of {unit}s",
                f"numbers from 1 to {whole[unit]}, as the model has",
                "correct them",
            )
    return Space({unit: _values(whole[unit], unit, named, divisors) for unit in UNITS if unit in axes})


def _values(
    most: int, unit: Unit, named: Mapping[Unit, Sequence[int]], divisors: Mapping[Unit, int]
) -> tuple[int, ...]:
    if unit in named:
        return tuple(sorted(set(named[unit]), reverse=True))
    step = divisors.get(unit, STEPS.get(unit, 1))
    least = most * (1 - (DEEPEST if unit == "layer" else NARROWEST))
    step *= max(1, math.ceil((most - least) / step / VALUES))
    return (most, *(value for value in range((most - 1) // step * step, 0, -step) if value >= least))


def check_widths(anatomy: Anatomy, widths: Widths) -> None:
    """Raise `SettingsError` for a width that the model does not have."""
    whole = full(anatomy)
    for unit, count in widths.items():
        if not 1 <= count <= whole[unit]:
            what = f"{unit}s a group" if unit == "head" else f"{unit}s"
            raise SettingsError(
                f"shape {unit}={count} of a model with {whole[unit]} {what}", f"1 to {whole[unit]}", "name fewer"
            )


def shape_of(anatomy: Anatomy, widths: Widths) -> Shape:
    """What is left of the model."""
    kept = {**full(anatomy), **widths}
    return Shape(kept["channel"], (LayerShape(kept["group"], kept["head"], kept["neuron"]),) * kept["layer"])


def totals_of(anatomy: Anatomy, widths: Widths) -> dict[Unit, int]:
    """The same over all layers that stay, as the planner counts."""
    layers = widths.get("layer", anatomy.sizes["L"])
    return {unit: count if unit in ("layer", "channel") else count * layers for unit, count in widths.items()}


def inside(anatomy: Anatomy, space: Space, budgets: Sequence[Budget], band: float) -> list[dict[Unit, int]]:
    """Points of the grid within every budget, at most `band` below the first: the largest first.

    Raises `BudgetError` naming what comes nearest.
    """
    targets = [budget.target(anatomy) for budget in budgets]
    counted: list[tuple[int, dict[Unit, int]]] = []
    over: list[tuple[float, list[int]]] = []  # how far beyond the budgets, and the counts
    for widths in space.grid():
        shape = shape_of(anatomy, widths)
        counts = [budget.count(anatomy, shape) for budget in budgets]
        if all(count <= target for count, target in zip(counts, targets, strict=True)):
            counted.append((counts[0], widths))
        else:
            over.append((max(n / max(target, 1) for n, target in zip(counts, targets, strict=True)), counts))
    if not counted:
        nearest = min(over)[1]
        raise BudgetError(
            " and ".join(f"budget {b.text} ({t:,} {_words(b)})" for b, t in zip(budgets, targets, strict=True))
            + f": none of {space.size:,} shapes is inside",
            "the nearest has " + " and ".join(f"{n:,} {_words(b)}" for n, b in zip(nearest, budgets, strict=True)),
            "ask for more, or name more axes or smaller search.choices",
        )
    counted.sort(key=lambda found: -found[0])
    best = counted[0][0]
    if best < (1 - band) * targets[0]:
        what = f"{targets[0]:,} {_words(budgets[0])}"
        raise BudgetError(
            f"budget {budgets[0].text}: no shape lies within {100 * band:g} % below {what}",
            f"the nearest below has {best:,}",
            f"widen search.band to {math.ceil(100 * (1 - best / targets[0])) / 100:g}, or name finer search.choices",
        )
    return [widths for count, widths in counted if count >= (1 - band) * targets[0]]


def _words(budget: Budget) -> str:
    return budget.measure.replace("_", " ")


def unbeaten(points: Sequence[Widths]) -> list[Widths]:
    """Without those that another point exceeds in one axis and falls below in none."""
    rows = [tuple(point.values()) for point in points]

    def beaten(row: tuple[int, ...]) -> bool:
        return any(other != row and all(a >= b for a, b in zip(other, row, strict=True)) for other in rows)

    return [point for point, row in zip(points, rows, strict=True) if not beaten(row)]


def drawn(points: Sequence[Widths], most: int, seed: int) -> list[Widths]:
    """`most` of them by lot, in their order; all where there are no more."""
    if len(points) <= most:
        return list(points)
    return [points[i] for i in sorted(random.Random(seed).sample(range(len(points)), most))]


def said(widths: Widths) -> str:
    """`layer=28,neuron=1280`"""
    return ",".join(f"{unit}={count}" for unit, count in widths.items())
