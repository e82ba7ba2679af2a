"""The Gram matrix of a linear's inputs, damped, and what solvers derive from it, each once.

Linears that read the same input share one. What this gives up: the outputs' side of the curvature; every row of a
linear is a least-squares problem of its own with the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, cast

from regrow.errors import BrokenModel

if TYPE_CHECKING:
    import torch

STRIPE = 192  # columns of a product with the Gram matrix that are taken together
RUN = 96  # columns whose root is found by a Cholesky factorisation and a substitution
STEPS = 8  # dampings that are tried, each tenfold the one before, until giving up
DROWNED = 4  # roundings of the largest eigenvalue, below which the least one is not known
LEAST = 1e-8  # what is raised where no damping was asked


@dataclass
class Curvature:
    """`raw` (n, n) fp32 sum of x x^T over tokens; symmetric. Anything proportional to it gives the same results."""

    raw: torch.Tensor
    damping: float = 0.01  # of the mean of the diagonal
    raised: float = field(default=0.0, init=False)  # the damping that was needed, when more than asked

    @cached_property
    def dead(self) -> torch.Tensor:
        """(n,) bool: inputs that were never anything but zero; their weights never mattered."""
        dead: torch.Tensor = self.raw.diagonal() == 0
        return dead

    @cached_property
    def gram(self) -> torch.Tensor:
        """(n, n) fp32 with damping on the diagonal; dead inputs count as the others do in the mean."""
        return self._damped(self.damping)

    def _damped(self, damping: float) -> torch.Tensor:
        gram = self.raw.clone()
        diagonal = gram.diagonal()
        alive = diagonal[~self.dead]
        diagonal[self.dead] = alive.mean() if len(alive) else 1
        diagonal += damping * diagonal.mean()
        return gram

    @cached_property
    def factor(self) -> torch.Tensor:
        """(n, n) fp32 upper triangular U with U^T U = gram^-1 (SparseGPT 3.2).

        When the damped matrix is not positive definite in fp32 the damping is raised tenfold, stepwise, and `gram`
        follows; `raised` says how far. Raises `BrokenModel` when nothing helps.
        """
        import torch

        for _ in range(STEPS):
            found = torch.zeros_like(self.gram)
            if not int(inverse_root(self.gram, found)):
                return found
            self._raise()
        raise BrokenModel(
            f"the inputs' Gram matrix is singular even with a damping of {self.raised / 10:g}",
            "finite, varied inputs",
            "calibrate on more or other text",
        )

    def _raise(self) -> None:
        self.raised = 10 * (self.raised or self.damping or LEAST)
        self.gram = self._damped(self.raised)

    @cached_property
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Root of the diagonal (n,), then eigenvalues (n,) and eigenvectors (n, n) of the matrix scaled by it; fp32.

        The damping is raised, as in `factor`, while the least eigenvalue is less than what rounding makes of it.
        """
        import torch

        for _ in range(STEPS):
            root = self.gram.diagonal().sqrt()
            values, vectors = torch.linalg.eigh(self.gram / root / root[:, None])
            if float(values[0]) >= DROWNED * torch.finfo(values.dtype).eps * float(values[-1]):
                break
            self._raise()
        return root, values.clamp_min(0), vectors

    @cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        """(n,) diagonal of gram^-1."""
        return self.factor.square().sum(0)

    def size(self, weight: torch.Tensor) -> float:
        """|W X|^2 = tr(W G W^T) of weights (m, n) on the undamped inputs; by symmetry, half of the product."""
        total = 0.0
        for a in range(0, weight.shape[1], STRIPE):
            b = a + STRIPE
            here = weight[:, a:b]
            product = (here @ self.raw[a:b, a:b]).addmm_(weight[:, b:], self.raw[b:, a:b], alpha=2)  # (m, STRIPE)
            total += float((product * here).sum())
        return total

    def target(self, weight: torch.Tensor, cross: torch.Tensor, mend: float) -> torch.Tensor:  # (m, n)
        """The dense weight for these inputs whose outputs are nearest to those of `weight` on others.

        The others lie `mend` of the way from these (0) to the dense model's (1); `cross` (n, n) is the sum of
        x_dense x^T. With the damping on both sides, 0 and equal inputs give `weight` back.
        """
        factor = self.factor
        pull = mend * (weight @ (cross - self.raw))
        return weight + pull @ factor.T @ factor


def inverse_root(gram: torch.Tensor, found: torch.Tensor) -> torch.Tensor:  # (n, n), (n, n) -> () int32
    """Fill `found`, zeros, with the upper triangular U with U^T U = gram^-1; more than 0 when `gram` is not positive.

    By halves down to `RUN`, from the last columns on: products are faster than a factorisation and a substitution.
    """
    import torch

    half = len(gram) // 2
    if len(gram) <= RUN:
        lower, bad = torch.linalg.cholesky_ex(gram.flip(0, 1))  # bad () int32
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        found.copy_(torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True))
        return cast(torch.Tensor, bad)
    first, last = found[:half, :half], found[half:, half:]
    bad = inverse_root(gram[half:, half:], last)
    edge = gram[:half, half:] @ last.T  # (n / 2, n / 2) of the root itself
    bad = bad + inverse_root(torch.addmm(gram[:half, :half], edge, edge.T, alpha=-1), first)
    found[:half, half:] = (first @ edge @ last).neg_()
    return bad
