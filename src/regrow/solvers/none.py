"""The weights that stay are left alone: magnitude pruning and Wanda as published.

What this gives up: everything the kept weights could make up for.
"""

from regrow.artifacts.linear import Linear, Sparse, solver


@solver(sees="nothing", mask="keeps", takes="weights", start="wanda", paper="-")
def none(task: Linear, start: Sparse) -> Sparse:  # noqa: ARG001
    """Kept weights stay as they are."""
    return start
