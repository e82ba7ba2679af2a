"""Gates that learn: a number between 0 and 1 that is often exactly 0 or 1 and still has a gradient (hard concrete).

One free scalar `a` a unit. A draw is a stretched and clipped logistic, so that the chance of not being 0 has a closed
form, which every size is computed from. Constants are those of NutePrune and Sheared LLaMA (arXiv:1712.01312).
What this gives up: gates that are fully open: at the upper limit of `a` two draws in a thousand are 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA = 2 / 3  # temperature
LOW, HIGH = -0.1, 1.1  # what a draw is stretched to before it is clipped to 0..1
EPSILON = 1e-6
LIMIT = math.log(100)  # `a` lies within
SHARPNESS = 0.8  # of the gates that stay
SHIFT = BETA * math.log(-HIGH / LOW)  # keep(a) = sigmoid(a + SHIFT)


def keep(a: Tensor) -> Tensor:
    """The chance that a gate is not 0, of the shape of `a`; 0.0471 to 0.9980 within the limits."""
    return torch.sigmoid(a + SHIFT).clamp(EPSILON, 1 - EPSILON)


def logit(chance: float) -> float:
    """The `a` that opens a gate with this chance at a dropout rate of `1 - chance`: ln(chance / (1 - chance))."""
    return math.log(chance / (1 - chance))


def draw(a: Tensor, noise: Tensor) -> Tensor:
    """Gates in 0..1 for `noise` in 0..1, both of one shape; the gradient by `a` is 0 where a gate is clipped."""
    u = EPSILON + (1 - 2 * EPSILON) * noise
    s = torch.sigmoid((u.log() - (1 - u).log() + a) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def soft(a: Tensor) -> Tensor:
    """What a gate that stays multiplies by: sigmoid(0.8 a / beta), of the shape of `a`; 0.9960 at the upper limit."""
    return torch.sigmoid(SHARPNESS * a / BETA)


def settled(a: Tensor) -> Tensor:
    """Gates without chance, (..., n) -> (..., n): in each row as many are 0 as are expected to be, the others soft.

    Ties go to the lower index.
    """
    values = soft(a)
    stay = keep(a).double().sum(-1).round().long()  # (...) half to even
    rank = a.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # (..., n)
    return torch.where(rank < stay[..., None], values, 0)
