"""KL from the teacher: the student pays wherever the teacher would have gone (Minitron's choice, temperature 1).

What this gives up: mode seeking; a small student spreads itself over all that the teacher deems likely.
"""

import torch

from regrow.artifacts.goal import divergence, kl


@divergence(paper="arXiv:2407.14679 (Minitron, table 15)", positive=("temperature",))
def forward_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) in nats, times the temperature squared."""
    theirs = torch.log_softmax(teacher / temperature, -1)  # (n, V)
    return temperature**2 * kl(theirs, torch.log_softmax(student / temperature, -1))  # (n,)
