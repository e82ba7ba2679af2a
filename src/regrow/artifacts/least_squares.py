"""Least squares of a linear's outputs on fewer of its inputs: on masks of single weights, and on whole inputs.

What this gives up: on masks, the exact optimum; conjugate gradients stop after a few steps, which the damping of the
Gram matrix makes enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrow.artifacts.linear import Sparse
from regrow.errors import BrokenModel

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


PULLS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""How strongly weights are held where they were, in means of the Gram matrix's diagonal."""


def onto(
    weight: torch.Tensor,  # (m, n)
    gram: torch.Tensor,  # (n, n) sum of x x^T
    kept: torch.Tensor,  # (n,) bool
    pull: float,
) -> torch.Tensor:  # (m, n)
    """The weights on `kept` inputs alone whose outputs are nearest to those of `weight` on all; 0 elsewhere.

    (W G[:, S] + p W[:, S]) (G[S, S] + p)^-1: the more they are pulled back, the more they stay what they were. Raises
    `BrokenModel` when the matrix is not positive definite.
    """
    import torch

    places = kept.nonzero().squeeze(1)
    damped = gram[places][:, places]
    damped.diagonal().add_(pull)
    root, bad = torch.linalg.cholesky_ex(damped)
    if int(bad):
        raise BrokenModel(
            f"a Gram matrix of inputs that is singular even with a damping of {pull:g}",
            "finite, varied inputs",
            "calibrate on more or other text, or damp more",
        )
    found = torch.zeros_like(weight)
    found[:, places] = torch.cholesky_solve((weight @ gram[:, places] + pull * weight[:, places]).T, root).T
    return found


def onto_by_halves(
    weight: torch.Tensor, halves: Sequence[torch.Tensor], kept: torch.Tensor, share: float | None
) -> tuple[torch.Tensor, float]:
    """As `onto`, of two `halves` of the text together, and the pull as a share of the mean diagonal.

    Without a `share` it is the one whose weights, fitted on either half, do best on the other; infinite where none does
    better than leaving them as they were.
    """
    whole, plain = halves[0] + halves[1], weight * kept
    mean = float(whole.diagonal().mean())
    if not mean:  # nothing comes in
        return plain, math.inf

    def error(pull: float) -> float:
        fits = (onto(weight, mine, kept, pull * mean) for mine in halves)
        return sum(_size(fit - weight, other) for fit, other in zip(fits, reversed(halves), strict=True))

    if share is None:
        errors = {pull: error(pull) for pull in PULLS} | {math.inf: _size(plain - weight, whole)}
        share = min(errors, key=lambda pull: errors[pull])
    return (plain if share == math.inf else onto(weight, whole, kept, share * mean)), share


def _size(weight: torch.Tensor, gram: torch.Tensor) -> float:
    """|W X|^2."""
    return float(((weight @ gram) * weight).sum())


def _over(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """above / below, 0 where a row has nothing left to gain."""
    import torch

    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)
