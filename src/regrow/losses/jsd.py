"""Generalised Jensen-Shannon divergence: both predictions against their mixture, between the two KLs.

At beta 0 and 1, where the formula itself goes to 0, it is the KL that it tends to after division by beta or 1 - beta.
What this gives up: scale; at small beta it is a small number, and wants a higher rate.
"""

import math

import torch

from regrow.artifacts.goal import divergence, kl


@divergence(paper="arXiv:2306.13649 (GKD)", positive=("temperature",), shares=("beta",))
def jsd(teacher: torch.Tensor, student: torch.Tensor, beta: float = 0.5, temperature: float = 1.0) -> torch.Tensor:
    """beta KL(teacher || M) + (1 - beta) KL(student || M), M their mixture; in nats, times the temperature squared."""
    theirs, ours = (torch.log_softmax(logits / temperature, -1) for logits in (teacher, student))  # (n, V)
    if beta in (0, 1):
        return temperature**2 * (kl(ours, theirs) if beta else kl(theirs, ours))
    least = torch.finfo(ours.dtype).min / 4  # of -inf twice, logaddexp has no derivative
    theirs, ours = theirs.clamp_min(least), ours.clamp_min(least)
    mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))  # (n, V)
    return temperature**2 * (beta * kl(theirs, mixture) + (1 - beta) * kl(ours, mixture))  # (n,)
