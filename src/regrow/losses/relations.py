"""How tokens relate to each other in the teacher's queries, keys or values: widths and numbers of heads may differ.

What this gives up: what lies outside attention; and memory, since every pair of tokens has a number.
"""

import math

import torch

from regrow.artifacts.goal import kl, likeness


@likeness(paper="arXiv:2012.15828 (MiniLMv2)", of="attention", positive=("heads",))
def relations(teacher: torch.Tensor, student: torch.Tensor, heads: int = 1) -> torch.Tensor:
    """KL(teacher || student) of softmax(x x^T / sqrt(d)) in nats, mean over relation heads; each token looks back."""
    theirs, ours = (_related(x, heads) for x in (teacher, student))  # (b, heads, T, T)
    return kl(theirs, ours).mean(1)  # (b, T)


def _related(x: torch.Tensor, heads: int) -> torch.Tensor:  # (b, T, C) -> (b, heads, T, T) log chances
    """Whatever heads a model has: its channels are cut anew into `heads`."""
    parts = x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)  # (b, heads, T, d)
    scores = parts @ parts.mT / math.sqrt(parts.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return torch.log_softmax(scores.masked_fill(later, -math.inf), -1)
