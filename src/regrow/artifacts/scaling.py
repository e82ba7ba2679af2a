"""What a model of some size should lose, from three sizes of its family: the references that domains are balanced by.

loss(N) = a / N^b + c goes through three points exactly, so it is as fragile as they are (arXiv:2310.06694, 3.2).
What this gives up: a fit to more than three sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from regrow.errors import SettingsError

STEEPEST = 8.0  # exponents above it are refused


def reference_loss(sizes: Sequence[float], losses: Sequence[float], size: float) -> float:
    """The loss in nats of a model of `size` parameters, on the curve through three `sizes`, smallest first.

    Llama-2 of 7B, 13B and 70B parameters has 1.7520, 1.6680 and 1.4621 on CommonCrawl: 2.1401 for 373,867,520 of them.
    Raises `SettingsError` unless losses fall with size, each time more slowly on a logarithmic scale.
    """
    if len(sizes) != 3 or len(losses) != 3 or not 0 < sizes[0] < sizes[1] < sizes[2] or size <= 0:
        raise SettingsError(
            f"{len(losses)} losses of {len(sizes)} sizes {list(sizes)}, for a model of {size:g} parameters",
            "three sizes, the smallest first, with a loss each, and a size above 0",
            "name three models of the family",
        )
    falls = losses[0] - losses[1], losses[1] - losses[2]
    flattest = math.log(sizes[1] / sizes[0]) / math.log(sizes[2] / sizes[1])  # at the exponent 0
    if not min(falls) > 0 or not flattest < falls[0] / falls[1] < _ratio(sizes, STEEPEST):
        raise SettingsError(
            f"losses {list(losses)} at {list(sizes)} parameters, through which no a / N^b + c goes",
            "losses that fall with size, each time more slowly on a logarithmic scale",
            "measure them on more text, or give references by hand",
        )
    low, high = 0.0, STEEPEST
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _ratio(sizes, middle) < falls[0] / falls[1] else (low, middle)
    first, second, wanted = (math.exp(-high * math.log(n / sizes[0])) for n in (sizes[0], sizes[1], size))
    a = falls[0] / (first - second)
    return losses[0] + a * (wanted - first)


def _ratio(sizes: Sequence[float], exponent: float) -> float:
    """The first fall over the second at this exponent above 0; rises with it."""
    x = [math.exp(-exponent * math.log(n / sizes[0])) for n in sizes]
    return (x[0] - x[1]) / (x[1] - x[2])
