"""Size of the weights: free, needs no text, and often no better than chance for whole units.

What this gives up: whether anything ever flows through those weights.
"""

import torch

from regrow.artifacts.sight import Sight, criterion


@criterion(sees="weight", paper="arXiv:2305.11627 (LLM-Pruner, l1 and l2)")
def magnitude(sight: Sight, power: int = 2) -> torch.Tensor:
    """Sum of |w|^power over the unit's weights."""
    assert sight.weight is not None  # (units, width, rest)
    return sight.weight.abs().pow(power).sum((1, 2))  # (units,)
