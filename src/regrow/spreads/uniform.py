"""The same share in every layer.

What this gives up: that layers differ.
"""

from regrow.artifacts.ask import Ask, spread


@spread(paper="arXiv:2305.11627 (LLM-Pruner, block-wise)")
def uniform(ask: Ask) -> list[int]:
    """Every layer keeps the same number; what is left over goes to the layers whose next unit scores highest."""
    each, rest = divmod(ask.total, ask.layers)
    counts = [each] * ask.layers
    if rest:
        best = ask.scores.sort(dim=1, descending=True).values[:, each]  # (layers,) the first unit that would go
        for layer in best.argsort(descending=True, stable=True)[:rest].tolist():
            counts[layer] += 1
    return counts
