"""The lowest scores under a pattern: which weights go. Masks are boolean, True goes.

Counts are exact and ties go to the lower column, so equal scores give equal masks on every machine. What this gives
up: scores of different linears are never compared; how zeros are shared among linears is decided before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from regrow.artifacts.pattern import Pattern

if TYPE_CHECKING:
    import torch

Within = Literal["row", "matrix", "block"]
"""Who competes for a percentage: the weights of one output, all of a linear, or all rows of 128 neighbouring inputs."""

BLOCK = 128


def lowest(scores: torch.Tensor, pattern: Pattern, within: Within) -> torch.Tensor:  # (m, n) -> (m, n) bool
    """The entries of `scores` (m, n) that go. Groups of N:M compete among themselves, whatever `within` says."""
    import torch

    rows, columns = scores.shape
    if pattern.of:
        return lowest_of_groups(scores, pattern)
    if within == "row":
        return lowest_of_rows(scores, pattern.count(columns))
    if within == "matrix":
        return lowest_of_rows(scores.reshape(1, -1), pattern.count(rows * columns)).view(rows, columns)
    parts, done = [], 0
    for part in torch.split(scores, BLOCK, 1):
        begin, done = done, done + part.numel()
        count = pattern.count(done) - pattern.count(begin)  # adds up to the count of the whole
        parts.append(lowest_of_rows(part.reshape(1, -1), count).view_as(part))
    return torch.cat(parts, 1)


def lowest_of_rows(scores: torch.Tensor, count: int) -> torch.Tensor:  # (m, n) -> (m, n) bool
    """The `count` lowest of each row."""
    import torch

    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    edge = smallest(scores, count)
    gone = scores <= edge
    if int(gone.sum()) > count * len(scores):  # ties at the edge: the lower columns go
        below, level = scores < edge, scores == edge
        gone = below | (level & (level.cumsum(1) <= count - below.sum(1, keepdim=True)))
    return gone


def smallest(scores: torch.Tensor, k: int) -> torch.Tensor:  # (m, n) -> (m, 1)
    """The k-th smallest of each row, from 1. On a CPU numpy selects ten times as fast as torch."""
    import numpy
    import torch

    if scores.is_cpu and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(numpy.partition(scores.numpy(), k - 1, axis=1)[:, k - 1 : k].copy())
    return scores.kthvalue(k, dim=1, keepdim=True).values


def lowest_of_counts(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:  # (m, n), (m,) -> (m, n) bool
    """The lowest of each row, as many as `counts` says."""
    import torch

    order = scores.sort(dim=1, stable=True).indices  # (m, n)
    first = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]  # (m, n)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, first)


def lowest_of_groups(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:  # (m, n) -> (m, n) bool
    """The `of - keep` lowest of every `of` neighbours, by counting who is lower: no sort."""
    import torch

    groups = scores.reshape(len(scores), -1, pattern.of)  # (m, n / M, M)
    rank = torch.zeros_like(groups, dtype=torch.uint8 if pattern.of < 256 else torch.int32)
    for i in range(pattern.of):
        other = groups[..., i : i + 1]  # (m, n / M, 1)
        rank[..., : i + 1] += other < groups[..., : i + 1]
        rank[..., i + 1 :] += other <= groups[..., i + 1 :]  # of equals, the lower column goes first
    return (rank < pattern.of - pattern.keep).flatten(1)
