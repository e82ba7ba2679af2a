"""One ranking over all layers, so that layers that matter less lose more.

What this gives up: a layer may be cut to the bone when its scores are low for another reason than not mattering.
"""

import torch

from regrow.artifacts.ask import Ask, spread


@spread(paper="arXiv:2305.11627 (LLM-Pruner, global)")
def across(ask: Ask) -> list[int]:
    """The best units of all layers stay; scores without a common scale are divided by their layer's mean first."""
    scores = ask.scores.double()  # (layers, units)
    if not ask.comparable:
        scores = scores / scores.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    ranked = scores.sort(dim=1, descending=True).values
    ranked[:, : ask.least] = torch.inf
    chosen = ranked.flatten().argsort(descending=True, stable=True)[: ask.total]
    return torch.bincount(chosen // ask.units, minlength=ask.layers).tolist()
