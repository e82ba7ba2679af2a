"""Batched conjugate gradients: least squares on fixed masks, all rows of a linear at once.

What this gives up: the exact optimum; it stops after a few steps, which the damping of the Gram matrix makes enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regrow.artifacts.linear import Sparse

if TYPE_CHECKING:
    import torch


def conjugate_gradients(
    target: torch.Tensor, start: Sparse, gram: torch.Tensor, *, steps: int, tolerance: float
) -> Sparse:
    """Minimise tr((W - T) G (W - T)^T) over the kept entries of W; rows (m, n) are independent problems."""
    kept = ~start.gone  # (m, n)
    scale = 1 / gram.diagonal()  # (n,) Jacobi
    weight = start.weight.clone()
    residual = ((target - weight) @ gram) * kept  # (m, n) minus half the gradient
    first = residual.norm()
    direction = preconditioned = residual * scale
    power = (residual * preconditioned).sum(1, keepdim=True)  # (m, 1)
    for _ in range(steps):
        if residual.norm() <= tolerance * first:
            break
        image = (direction @ gram) * kept
        length = _over(power, (direction * image).sum(1, keepdim=True))  # (m, 1)
        weight = weight + length * direction
        residual = residual - length * image
        preconditioned = residual * scale
        before, power = power, (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + _over(power, before) * direction
    return Sparse(weight, start.gone)


def _over(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """above / below, 0 where a row has nothing left to gain."""
    import torch

    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)
