"""Mask and weights together: the layer's least squares under a sparsity constraint, by ADMM (ALPS).

The Gram matrix is scaled to a unit diagonal and decomposed once; the penalty grows while the mask still changes, then
conjugate gradients finish on the mask that was found. What this gives up: speed; the decomposition costs some ten n^3.
"""

import torch

from regrow.artifacts.least_squares import conjugate_gradients
from regrow.artifacts.linear import Linear, Sparse, solver

EVERY = 3  # steps between two looks at the mask
EARLY, SETTLED = 30, 3e-4  # after so many steps, stop when no more than this share of the mask moved
LARGEST = 1e6  # penalty
SMALL = 0.005
GROWTH = ((0.1, 1.3), (SMALL, 1.2), (0.0, 1.1))  # (share of the mask that moved more than, penalty grows by)


@solver(
    sees="gram",
    mask="chooses",
    takes="weights",
    start="wanda",
    paper="arXiv:2406.07831 (ALPS)",
    positive=("penalty",),
)
def alps(
    task: Linear, start: Sparse, steps: int = 300, penalty: float = 0.1, polish: int = 10, hold: bool = False
) -> Sparse:
    """ADMM on mask and weights at once, then conjugate gradients; `hold` keeps the mask and leaves the second part."""
    assert task.curvature is not None
    found = start if hold else _admm(task, steps, penalty)
    return conjugate_gradients(task.weight, found, task.curvature.gram, steps=polish, tolerance=1e-4)


def _admm(task: Linear, steps: int, penalty: float) -> Sparse:
    """What it holds is gone when conjugate gradients begin."""
    assert task.curvature is not None
    scale, values, vectors = task.curvature.spectrum  # (n,), (n,), (n, n)
    target = task.weight * scale  # (m, n)
    pull = ((target @ vectors) * values) @ vectors.T  # target times the scaled Gram matrix
    split, dual, grown = target, torch.zeros_like(target), False
    alive = ~task.curvature.dead
    gone = before = task.lowest(split.abs() * alive, "matrix")
    for step in range(1, steps + 1):
        weight = ((pull - dual).add_(penalty * split) @ vectors).div_(values + penalty) @ vectors.T
        aim = (dual / penalty).add_(weight)
        gone = task.lowest(aim.abs() * alive, "matrix")
        split = aim.masked_fill_(gone, 0)
        dual += (weight - split).mul_(penalty)
        if step % EVERY:
            continue
        moved = float((gone != before).sum() / (~gone).sum().clamp_min(1))
        before = gone
        if (step > EARLY and moved < SETTLED) or (moved == 0 and grown):
            break
        if moved <= SMALL and not grown:  # it began too stiff
            penalty, split, dual = penalty / 5, target, torch.zeros_like(target)
        else:
            grown = True
            penalty = min(LARGEST, penalty * next(growth for share, growth in GROWTH if moved > share))
    return Sparse((split / scale).masked_fill(gone, 0), gone)
