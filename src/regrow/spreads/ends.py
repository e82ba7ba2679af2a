"""The first and last of the layers that stay keep all their units; the rest share the cut equally.

What this gives up: whether a layer goes as a whole is decided by its score alone; and when the budget is below what the
protected layers weigh, nothing is protected (the report says so).
"""

from regrow.artifacts.ask import Ask, spread


@spread(paper="arXiv:2305.11627 (LLM-Pruner keeps the first 4 and last 2 of 32 layers)")
def ends(ask: Ask) -> list[int]:
    """First 1/8 and last 1/16 of the layers keep everything, as far as the total allows; the others share equally."""
    first, last = max(1, round(ask.layers / 8)), max(1, round(ask.layers / 16))
    protected = {*range(min(first, ask.layers)), *range(max(ask.layers - last, 0), ask.layers)}
    inner = [layer for layer in range(ask.layers) if layer not in protected]
    left = ask.total - ask.units * len(protected)
    if left < ask.least * len(inner):
        protected, inner, left = set(), list(range(ask.layers)), ask.total
    counts = [ask.units] * ask.layers
    if inner:
        each, rest = divmod(left, len(inner))
        following = ask.scores.sort(dim=1, descending=True).values[:, min(each, ask.units - 1)]  # (layers,)
        lucky = sorted(inner, key=lambda layer: -float(following[layer]))[:rest]
        for layer in inner:
            counts[layer] = each + (layer in lucky)
    return counts
