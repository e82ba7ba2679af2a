"""How many zeros each decoder layer gets: the same, by outliers (OWL), or by the curvature of the loss.

What this gives up: rounds; a layer is measured on the dense model, before any other has lost a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from regrow.artifacts.share import ZERO_SPREADS, ZeroSpread

OUTLIER = 5.0  # a score so many times the mean is an outlier


def outliers(scores: Callable[[], Iterable[torch.Tensor]]) -> float:
    """Percentage of a layer's scores above OUTLIER times their mean; gone through twice, a matrix at a time."""
    total, count = 0.0, 0
    for part in scores():
        total, count = total + float(part.sum()), count + part.numel()
    return 100 * sum(int((part > OUTLIER * total / count).sum()) for part in scores()) / count


def by_outliers(found: Sequence[float]) -> list[float]:
    """More outliers, fewer zeros; the two ends lie one apart on either side."""
    low, high = min(found), max(found)
    return [0.0 if high == low else 1 - 2 * (x - low) / (high - low) for x in found]


def by_rank(found: Sequence[float]) -> list[float]:
    """The flattest layer gets most zeros, the most curved fewest, the others evenly between."""
    order = sorted(range(len(found)), key=lambda i: found[i])
    last = max(1, len(found) - 1)
    return [1 - 2 * order.index(i) / last for i in range(len(found))] if len(found) > 1 else [0.0]


for spread in (
    ZeroSpread(
        name="uniform",
        sees="nothing",
        paper="-",
        about="The same share in every layer.",
        measure=lambda _: 0.0,
        offsets=lambda found: [0.0] * len(found),
        band=0.0,
        groups=0.0,
    ),
    ZeroSpread(
        name="owl",
        sees="inputs",
        paper="arXiv:2310.05175 (OWL)",
        about="Fewer zeros where Wanda's scores have more outliers.",
        measure=outliers,
        offsets=by_outliers,
        band=0.08,
        groups=1.0,
    ),
    ZeroSpread(
        name="hessian",
        sees="trace",
        paper="arXiv:2310.09499 (mixed sparsity)",
        about="Fewer zeros where the loss is curved more, by the trace of its Hessian.",
        measure=lambda _: 0.0,
        offsets=by_rank,
        band=0.05,
        groups=1.0,
    ),
):
    ZERO_SPREADS.add(spread.name, spread)
