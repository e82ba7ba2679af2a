"""The squared distance between two states, a channel on average.

What this gives up: balance; a few channels of great size decide.
"""

import torch

from regrow.artifacts.goal import likeness


@likeness(paper="arXiv:2402.09773 (NutePrune, section 3.3)")
def mse(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean over channels of the squared difference."""
    return (teacher - student).square().mean(-1)  # (n,)
