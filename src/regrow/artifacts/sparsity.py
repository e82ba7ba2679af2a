"""Where a checkpoint is zero: how many, in which groups, and a hash by which a pattern is known again.

What this gives up: the positions themselves; two checkpoints are compared by reading both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.artifacts.pattern import Pattern

SPARSE = 0.05  # from this share of zeros on a model counts as sparse
GROUPS = (4, 8, 16, 32)  # sizes of groups that are looked for, beside that of the pattern where one is known


def is_sparse(zeros: int, weights: int) -> bool:
    """Whether so many zeros are a matrix's pattern."""
    return SPARSE * weights <= zeros < weights


@dataclass(frozen=True, slots=True)
class Zeros:
    """One weight matrix, or the stack of an expert layer."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    most: Mapping[int, int]  # for each size of group that divides a row: the most weights any group has

    @property
    def weights(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def groups(self) -> str | None:
        """The tightest N:M that every group keeps, such as `2:4`; None when some group is full in every size."""
        found = [(kept / of, of, kept) for of, kept in self.most.items() if kept < of]
        if not found:
            return None
        _, of, kept = min(found)
        return f"{kept}:{of}"

    def keeps(self, kept: int, of: int) -> bool:
        """True when no group of `of` neighbours, a size that was looked for, has more than `kept` weights."""
        return self.most.get(of, of) <= kept

    def has(self, pattern: Pattern) -> bool:
        """Whether it is as sparse as the pattern asks, up to what is rounded down where rows compete apart."""
        if pattern.of:
            return self.keeps(pattern.keep, pattern.of)
        return self.zeros >= self.weights // self.shape[-1] * pattern.count(self.shape[-1])


@dataclass(frozen=True, slots=True)
class Sparsity:
    """The matrices inside the decoder layers, in order; routers, embeddings and the head are not among them."""

    matrices: tuple[Zeros, ...]
    mask_hash: str  # 16 hex digits over names and positions of the zeros

    @property
    def weights(self) -> int:
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def zeros(self) -> int:
        return sum(matrix.zeros for matrix in self.matrices)

    @property
    def share(self) -> float:
        return self.zeros / max(1, self.weights)

    @property
    def sparse(self) -> bool:
        """Whether any matrix is; one is enough to be lost. One that is nothing but zero was never trained."""
        return any(is_sparse(matrix.zeros, matrix.weights) for matrix in self.matrices)

    @property
    def groups(self) -> str | None:
        """The N:M that every matrix keeps; None when they differ or keep none."""
        found = {matrix.groups for matrix in self.matrices}
        return found.pop() if len(found) == 1 else None

    def bitmask_bytes(self, bytes_per_weight: int = 2) -> int:
        """What the matrices would weigh as their non-zero weights and one bit a position."""
        return (self.weights - self.zeros) * bytes_per_weight + self.weights // 8

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "zeros": self.zeros,
            "share": self.share,
            "groups": self.groups,
            "mask_hash": self.mask_hash,
            "matrices": {m.name: {"shape": list(m.shape), "zeros": m.zeros, "groups": m.groups} for m in self.matrices},
        }
