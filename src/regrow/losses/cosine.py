"""The angle between two states, whatever their lengths (Minitron's choice for states).

What this gives up: how large states are, which the norm before the next block throws away too.
"""

import torch

from regrow.artifacts.goal import likeness


@likeness(paper="arXiv:2407.14679 (Minitron, section 3.2)")
def cosine(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """1 - cos of the angle between the two states."""
    return 1 - torch.cosine_similarity(teacher, student, -1)  # (n,)
