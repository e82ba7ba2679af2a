"""Least squares on a given mask: the best weights for these zeros, all rows at once by conjugate gradients.

What this gives up: the exact optimum; it stops after a few steps, which the damping makes enough.
"""

from regrow.artifacts.least_squares import conjugate_gradients
from regrow.artifacts.linear import Linear, Sparse, solver


@solver(sees="gram", mask="keeps", takes="weights", start="sparsegpt", paper="arXiv:2406.07831 (ALPS, its last step)")
def refit(task: Linear, start: Sparse, steps: int = 20, tolerance: float = 1e-4) -> Sparse:
    """Kept weights go towards the least-squares optimum on the mask as it is, from where they are."""
    assert task.curvature is not None
    return conjugate_gradients(task.weight, start, task.curvature.gram, steps=steps, tolerance=tolerance)
