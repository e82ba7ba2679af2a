"""How zeros are shared among decoder layers: what a spread measures of a layer, and what it makes of that.

What this gives up: sharing inside a layer; its linears all get the same share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from regrow.artifacts.pattern import Pattern
from regrow.registry import Registry

if TYPE_CHECKING:
    import torch

LEAST = Fraction(1, 100)  # of zeros, where a spread would leave a layer dense


@dataclass(frozen=True, slots=True)
class ZeroSpread:
    name: str
    sees: Literal["nothing", "inputs", "trace"]  # Wanda's scores, or the trace of the loss's Hessian
    paper: str
    about: str
    measure: Callable[[torch.Tensor], float]  # scores (n,) of a layer's weights, or the trace () -> one number
    offsets: Callable[[Sequence[float]], list[float]]  # numbers of all layers -> -1 (fewest zeros) .. 1
    band: float  # the most that a layer's share departs from the whole's, for a percentage
    groups: float  # the same in weights of a group, for N:M


ZERO_SPREADS: Registry[ZeroSpread] = Registry("spread of zeros", "regrow.spreads")


def share(pattern: Pattern, offsets: Sequence[float], weights: Sequence[int], spread: ZeroSpread) -> list[Pattern]:
    """A pattern for each layer, so that all together have the zeros that `pattern` says.

    The mean is over weights, so layers of different sizes count as what they are. Groups keep whole numbers: offsets
    are rounded so that the sum stays (largest remainders).
    """
    total = sum(weights)
    centred = [o - sum(w * x for w, x in zip(weights, offsets, strict=True)) / total for o in offsets]
    if not pattern.of:
        each = (pattern.zeros + Fraction(spread.band * o).limit_denominator(10**6) for o in centred)
        return [pattern.with_zeros(min(max(zeros, LEAST), 1 - LEAST)) for zeros in each]
    wanted = [pattern.of - pattern.keep + spread.groups * o for o in centred]
    whole = [int(w // 1) for w in wanted]
    missing = round(sum(wanted)) - sum(whole)
    for i in sorted(range(len(wanted)), key=lambda i: whole[i] - wanted[i])[:missing]:
        whole[i] += 1
    return [Pattern.groups(min(pattern.of, max(1, pattern.of - z)), pattern.of) if z else pattern for z in whole]
