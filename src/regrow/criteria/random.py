"""Chance as a criterion: the floor that every other one must beat.

What this gives up: everything but the seed.
"""

import torch

from regrow.artifacts.sight import Sight, criterion


@criterion(sees="nothing", paper="-", comparable=True)
def random(sight: Sight) -> torch.Tensor:
    """Uniform noise from the run's seed."""
    return torch.rand(sight.units, generator=torch.Generator().manual_seed(sight.seed))  # (units,)
