"""How zeros are shared among decoder layers: what a spread measures of a layer, and what it makes of that.

What this gives up: sharing inside a layer; its linears all get the same share.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from regrow.artifacts.pattern import Pattern
from regrow.registry import Registry

if TYPE_CHECKING:
    import torch

LEAST = Fraction(1, 100)  # of zeros, where a spread would leave a layer dense, and of weights, where it would empty one
SUMS = 2**12  # sums that are followed at most when whole numbers are sought


@dataclass(frozen=True, slots=True)
class ZeroSpread:
    name: str
    sees: Literal["nothing", "inputs", "trace"]  # Wanda's scores, or the trace of the loss's Hessian
    paper: str
    about: str
    measure: Callable[[Callable[[], Iterable[torch.Tensor]]], float]
    """Of the scores of a layer, which come matrix by matrix, as often as they are asked for: one number. Unused of
    traces, which are numbers."""
    offsets: Callable[[Sequence[float]], list[float]]  # numbers of all layers -> -1 (fewest zeros) .. 1
    band: float  # the most that a layer's share departs from the whole's, for a percentage
    groups: float  # the same in weights of a group, for N:M


ZERO_SPREADS: Registry[ZeroSpread] = Registry("spread of zeros", "regrow.spreads")


def share(pattern: Pattern, measures: Sequence[float], weights: Sequence[int], spread: ZeroSpread) -> list[Pattern]:
    """A pattern for each layer by what was measured of it, so that all together have the zeros that `pattern` says.

    The total is over `weights`, so layers of different sizes count as what they are. It is exact for a percentage;
    groups keep whole numbers, and it is as near as rounding each layer down or up can bring it. No layer is left
    dense or empty, unless that was asked. A layer without weights has no say and gets `pattern`.
    """
    filled = [i for i, weight in enumerate(weights) if weight]
    if not filled:
        return [pattern] * len(weights)
    sizes = [weights[i] for i in filled]
    offsets = spread.offsets([measures[i] for i in filled])
    if pattern.of:
        wishes = [Fraction(spread.groups * o).limit_denominator(10**6) for o in offsets]
        level = levelled(wishes, sizes, Fraction(pattern.of - pattern.keep), Fraction(1), Fraction(pattern.of - 1))
        found = [Pattern.groups(pattern.of - zeros, pattern.of) for zeros in rounded(level, sizes)]
    else:
        wishes = [Fraction(spread.band * o).limit_denominator(10**6) for o in offsets]
        low, high = min(LEAST, pattern.zeros), max(1 - LEAST, pattern.zeros)
        found = [Pattern(zeros) for zeros in levelled(wishes, sizes, pattern.zeros, low, high)]
    by_layer = dict(zip(filled, found, strict=True))
    return [by_layer.get(i, pattern) for i in range(len(weights))]


def levelled(
    wishes: Sequence[Fraction], weights: Sequence[int], mean: Fraction, low: Fraction, high: Fraction
) -> list[Fraction]:
    """The wishes moved by one amount and bounded, so that their mean over `weights` is `mean`, which is within bounds.

    What a bounded layer cannot take is shared among those that still have room. Exact: the sum is linear between two
    amounts at which a layer meets a bound.
    """

    if low == high:
        return [mean] * len(wishes)

    def moved(by: Fraction) -> list[Fraction]:
        return [min(max(wish + by, low), high) for wish in wishes]

    def total(by: Fraction) -> Fraction:
        return sum((w * x for w, x in zip(weights, moved(by), strict=True)), Fraction(0))

    wanted = sum(weights) * mean
    edges = sorted({bound - wish for wish in wishes for bound in (low, high)})
    right = min(bisect_right(edges, wanted, key=total), len(edges) - 1)
    a, b = edges[right - 1], edges[right]
    return moved(a + (b - a) * (wanted - total(a)) / (total(b) - total(a)))


def rounded(wishes: Sequence[Fraction], weights: Sequence[int]) -> list[int]:
    """Each wish rounded down or up, so that the sum over `weights` stays as near as can be, and then the wishes too.

    Every sum that can be reached is followed; of sums that differ by less than one of `SUMS` parts of all weights, one.
    """
    wanted = sum((w * x for w, x in zip(weights, wishes, strict=True)), Fraction(0))
    grain = max(1, sum(weights) // SUMS)
    reached: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, ())}  # what rounding moved, sum, numbers
    for wish, weight in zip(wishes, weights, strict=True):
        longer: dict[int, tuple[float, int, tuple[int, ...]]] = {}
        for number in {math.floor(wish), math.ceil(wish)}:
            change = float(weight * abs(number - wish))
            for moved, total, numbers in reached.values():
                one = (moved + change, total + weight * number, (*numbers, number))
                where = one[1] // grain
                longer[where] = min(one, longer.get(where, one))
        reached = longer
    return list(min(reached.values(), key=lambda one: (abs(one[1] - wanted), one))[2])
