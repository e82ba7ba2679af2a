"""The usual ramp: as much more in every step.

What this gives up: time at the end, where each further cut costs most.
"""

from regrow.artifacts.ramp import ramp


@ramp(paper="arXiv:2402.09773 (NutePrune)")
def linear(done: float) -> float:
    """Evenly."""
    return done
