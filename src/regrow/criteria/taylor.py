"""What the loss would change by if a unit went, to first or second order (LLM-Pruner, section 3.2).

w weight, g mean gradient of the next-token loss, F mean over sequences of the squared gradient (diagonal Fisher).
Scores are in units of the loss, so layers can be compared. What this gives up: interactions between units.
"""

import torch

from regrow.artifacts.sight import Sight, criterion

PAPER = "arXiv:2305.11627 (LLM-Pruner)"


@criterion(sees="grad", paper=PAPER + " param_first", comparable=True)
def taylor(sight: Sight) -> torch.Tensor:
    """Sum of |w g| over the unit's weights (param_first)."""
    assert sight.weight is not None  # (units, width, rest)
    assert sight.grad is not None  # (units, width, rest)
    return (sight.weight * sight.grad).abs().sum((1, 2))  # (units,)


@criterion(sees="grad", paper=PAPER + " vectorize", comparable=True)
def taylor_vectorize(sight: Sight) -> torch.Tensor:
    """Sum over the unit's channels of |sum over the row of w g|: the derivative of the loss by the channel's gate."""
    assert sight.weight is not None
    assert sight.grad is not None
    return (sight.weight * sight.grad).sum(2).abs().sum(1)  # (units,)


@criterion(sees="fisher", paper=PAPER + " param_second", comparable=True)
def taylor_second(sight: Sight) -> torch.Tensor:
    """Sum of w F w over the unit's weights (param_second)."""
    assert sight.weight is not None
    assert sight.fisher is not None
    return (sight.weight.square() * sight.fisher).sum((1, 2))  # (units,)


@criterion(sees="fisher", paper=PAPER + " param_mix", comparable=True)
def taylor_mix(sight: Sight) -> torch.Tensor:
    """Sum of |w g - w F w / 2| over the unit's weights (param_mix)."""
    assert sight.weight is not None
    assert sight.grad is not None
    assert sight.fisher is not None
    first = sight.weight * sight.grad
    second = sight.weight.square() * sight.fisher
    return (first - second / 2).abs().sum((1, 2))  # (units,)
