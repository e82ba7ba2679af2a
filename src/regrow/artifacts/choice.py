"""Which units stay, by their scores, and which kept query head takes in one that goes.

What this gives up: heads of different groups are never merged, and none takes in more than one at a time, so that at
most half of them can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrow.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor


def best(scores: Tensor, keep: int) -> tuple[int, ...]:
    """Ascending indices of the `keep` highest of `scores` (units,); ties go to the lower index."""
    return tuple(sorted(_ranked(scores)[:keep]))


def _ranked(scores: Tensor) -> list[int]:
    """Indices of `scores` (units,), the best first."""
    found: list[int] = scores.argsort(descending=True, stable=True).tolist()
    return found


def keep_layers(scores: Tensor, keep: int, protect: tuple[int, int] = (0, 0)) -> list[int]:
    """Layers that stay, by their scores (L,), or around the cheapest run of the right length when given (L, L+1).

    The first and the last `protect` stay in any case; `keep` is no fewer.
    """
    count, (first, last) = len(scores), protect
    if scores.dim() == 1:
        inner = best(scores[first : count - last], keep - first - last)
        return [*range(first), *(first + i for i in inner), *range(count - last, count)]
    length = count - keep
    if not known(scores, keep):
        raise ValueError(f"runs of {length} layers were not scored")
    begins = range(first, count - last - length + 1)
    start = min(begins, key=lambda begin: float(scores[begin, begin + length])) if length else 0
    return [i for i in range(count) if not start <= i < start + length]


def known(scores: Tensor, keep: int) -> bool:
    """Whether layer scores say what goes when `keep` stay; a criterion may have looked at runs of some lengths only."""
    return scores.dim() == 1 or keep == len(scores) or bool(scores[0, len(scores) - keep].isfinite())


def in_steps(table: Tensor, divisor: int) -> Tensor:
    """(layers, units) -> (layers, units // divisor): the score of each run of `divisor` units, best first."""
    if divisor == 1:
        return table
    whole = table.shape[1] // divisor * divisor
    ranked = table.sort(dim=1, descending=True).values[:, :whole]
    return ranked.view(len(table), -1, divisor).sum(2)


def head_slots(table: Tensor, groups: int) -> Tensor:
    """(L, H) -> (L, G): what a layer loses with its n-th best query head of every group, best first."""
    per_group = table.view(len(table), groups, -1)  # (L, K, G)
    return per_group.sort(dim=2, descending=True).values.sum(1)


def heads_in(scores: Tensor, groups: Sequence[int], keep: int) -> tuple[int, ...]:
    """The best `keep` query heads of each of `groups`, as indices over the layer. `scores`: (K, G)."""
    size = scores.shape[1]
    return tuple(g * size + h for g in groups for h in best(scores[g], keep))


def merges_in(scores: Tensor, groups: Sequence[int], keep: int) -> tuple[tuple[int, int], ...]:
    """(kept, gone) of each of `groups`, as indices over the layer. `scores`: (K, G). Raises as `merges` does."""
    size = scores.shape[1]
    return tuple((g * size + a, g * size + b) for g in groups for a, b in merges(scores[g], keep))


def merges(scores: Tensor, keep: int) -> tuple[tuple[int, int], ...]:
    """(kept, gone) when the best K = `keep` of L heads stay: the i-th best takes in the (2K-i+1)-th, 2K-L < i <= K.

    `scores`: (L,). 8 heads of which 6 stay: the 5th takes in the 8th, the 6th the 7th (arXiv:2407.14679, 2.3, whose
    range begins one too low). Raises `SettingsError` when fewer stay than go.
    """
    heads = len(scores)
    if 2 * keep < heads:
        raise SettingsError(
            f"merge_heads where {keep} of {heads} heads stay",
            f"at least {-(-heads // 2)}: each that goes is merged into one that stays",
            "keep more heads, as with --split, --uniform or a larger --keep, or leave merge_heads out",
        )
    ranked = _ranked(scores)
    return tuple((ranked[i - 1], ranked[2 * keep - i]) for i in range(2 * keep - heads + 1, keep + 1))
