"""KL from the student: it pays where it goes and the teacher would not, so it keeps to what it can do well.

What this gives up: what the teacher deems possible and the student never tries; worse for cut models than the forward
form in Minitron's tables.
"""

import torch

from regrow.artifacts.goal import divergence, kl


@divergence(paper="arXiv:2306.08543 (MiniLLM), arXiv:2407.14679 (Minitron, table 15)", positive=("temperature",))
def reverse_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(student || teacher) in nats, times the temperature squared."""
    ours = torch.log_softmax(student / temperature, -1)  # (n, V)
    return temperature**2 * kl(ours, torch.log_softmax(teacher / temperature, -1))  # (n,)
