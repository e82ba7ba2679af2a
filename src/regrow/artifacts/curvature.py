"""The Gram matrix of a linear's inputs, damped, and what solvers derive from it, each once.

Linears that read the same input share one. What this gives up: the outputs' side of the curvature; every row of a
linear is a least-squares problem of its own with the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from regrow.errors import BrokenModel

if TYPE_CHECKING:
    import torch

STRIPE = 192  # columns of a product with the Gram matrix that are taken together
RUN = 96  # columns of a triangular matrix that are inverted by substitution
STEPS = 6  # times the damping is raised, tenfold each, before giving up


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
        """(n, n) fp32 with damping on the diagonal; dead inputs count as one."""
        return self._damped(self.damping)

    def _damped(self, damping: float) -> torch.Tensor:
        gram = self.raw.clone()
        diagonal = gram.diagonal()
        diagonal[self.dead] = 1
        diagonal += damping * diagonal.mean()
        return gram

    @cached_property
    def factor(self) -> torch.Tensor:
        """(n, n) fp32 upper triangular U with U^T U = gram^-1 (SparseGPT 3.2): one Cholesky and one inversion.

        When the damped matrix is not positive definite in fp32 the damping is raised tenfold, stepwise, and `gram`
        follows; `raised` says how far. Raises `BrokenModel` when nothing helps.
        """
        import torch

        damping = self.damping or 1e-4
        for step in range(STEPS):
            if step:
                damping = self.raised = 10 * damping
                self.gram = self._damped(damping)
            lower, bad = torch.linalg.cholesky_ex(self.gram.flip(0, 1))
            if not int(bad):
                return invert(lower.flip(0, 1))
        raise BrokenModel(
            f"the inputs' Gram matrix is singular even with a damping of {damping:g}",
            "finite, varied inputs",
            "calibrate on more or other text",
        )

    @cached_property
    def spectrum(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Root of the diagonal (n,), then eigenvalues (n,) and eigenvectors (n, n) of the matrix scaled by it; fp32."""
        import torch

        root = self.gram.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(self.gram / root / root[:, None])
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


def invert(upper: torch.Tensor) -> torch.Tensor:
    """An upper triangular matrix (n, n), in place, by halves down to `RUN`: products are faster than substitution."""
    import torch

    half = len(upper) // 2
    if len(upper) <= RUN:
        eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        return upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
    corner = upper[:half, half:]
    corner.copy_(invert(upper[:half, :half]) @ corner @ invert(upper[half:, half:])).neg_()
    return upper
