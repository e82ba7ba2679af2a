"""The published loops of Wanda and SparseGPT, and SPP's lean forward, written plainly, to be compared with.

One linear at a time, statistics for each, one Python step a column: what `regrow sparsify` must match and beat. Not
part of the package; nothing here is tuned. N:M counts kept weights, as everywhere in regrow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regrow.engines.removal import layer_arguments, run_layer

BLOCK, DAMPING = 128, 0.01


class Statistics:
    """What the published code gathers for one linear."""

    def __init__(self, linear: nn.Linear, hessian: bool) -> None:
        n = linear.in_features
        self.sequences = 0
        self.squares = torch.zeros(n, dtype=torch.float64)  # wider than published: any order gives the same sum
        self.hessian = torch.zeros(n, n) if hessian else None

    def add(self, x: Tensor) -> None:
        """(1, T, n)"""
        flat = x.reshape(-1, x.shape[-1]).float()
        old, new = self.sequences, self.sequences + x.shape[0]
        self.squares = self.squares * (old / new) + flat.square().sum(0, dtype=torch.float64) / new
        if self.hessian is not None:
            self.hessian *= old / new
            scaled = (2 / new) ** 0.5 * flat
            self.hessian.addmm_(scaled.T, scaled)
        self.sequences = new


def magnitude(weight: Tensor, _: Statistics | None, share: float, keep: int, of: int) -> Tensor:
    """Zeroes everything up to the whole matrix's threshold, ties and all, or the smallest of every group."""
    scores = weight.abs()
    if of:
        return weight.masked_fill(groups(scores, keep, of), 0)
    edge = scores.flatten().sort().values[int(scores.numel() * share)]
    return weight.masked_fill(scores <= edge, 0)


def wanda(weight: Tensor, seen: Statistics | None, share: float, keep: int, of: int) -> Tensor:
    """|w| |x|, within each row."""
    assert seen is not None
    scores = weight.abs() * seen.squares.float().sqrt()
    if of:
        return weight.masked_fill(groups(scores, keep, of), 0)
    gone = torch.zeros_like(scores, dtype=torch.bool)
    order = scores.sort(dim=1, stable=True).indices[:, : int(scores.shape[1] * share)]
    return weight.masked_fill(gone.scatter_(1, order, True), 0)


def groups(scores: Tensor, keep: int, of: int) -> Tensor:
    gone = torch.zeros_like(scores, dtype=torch.bool)
    for a in range(0, scores.shape[1], of):
        order = scores[:, a : a + of].sort(dim=1, stable=True).indices[:, : of - keep]
        gone.scatter_(1, a + order, True)
    return gone


def sparsegpt(weight: Tensor, seen: Statistics | None, share: float, keep: int, of: int) -> Tensor:
    """Column after column, each error made up for by the columns after it.

    Where the published code sorts a block for its threshold and makes a matrix for each update, this selects and adds
    in place: the same results, sooner.
    """
    assert seen is not None
    assert seen.hessian is not None
    weight, hessian = weight.clone(), seen.hessian.clone()
    rows, columns = weight.shape
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(columns, dtype=weight.dtype)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for a in range(0, columns, BLOCK):
        b = min(a + BLOCK, columns)
        part, own = weight[:, a:b].clone(), inverse[a:b, a:b]
        result, errors = torch.zeros_like(part), torch.zeros_like(part)
        gone = torch.zeros_like(part, dtype=torch.bool)
        if not of:
            scores = (part / own.diagonal()).square()
            count = int(share * rows * b) - int(share * rows * a)
            gone = scores <= scores.flatten().kthvalue(count).values
        for j in range(b - a):
            if of and j % of == 0:
                scores = (part[:, j : j + of] / own.diagonal()[j : j + of]).square()
                gone.scatter_(1, j + scores.sort(dim=1, stable=True).indices[:, : of - keep], True)
            column = part[:, j].clone()
            result[:, j] = column.masked_fill(gone[:, j], 0)
            error = (column - result[:, j]) / own[j, j]
            part[:, j:].addr_(error, own[j, j:], alpha=-1)
            errors[:, j] = error
        weight[:, a:b] = result
        weight[:, b:] -= errors @ inverse[a:b, b:]
    return weight


def lean(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, beta: Tensor, scale: float
) -> Tensor:
    """SPP's memory-lean forward, left to autograd: 8 m n T operations, and a stream of width m is kept."""
    runs = zip(alpha, weight.chunk(len(alpha)), strict=True)
    added = scale * beta * torch.cat([nn.functional.linear(dropped * a, w) for a, w in runs], -1)
    return nn.functional.linear(x, weight, bias) + added


Prune = Callable[[Tensor, Statistics | None, float, int, int], Tensor]
METHODS: dict[str, Prune] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}


@torch.no_grad()
def run(model: Any, blocks: Tensor, method: str, share: float, keep: int = 0, of: int = 0) -> None:
    """The published walk: dense inside a block, pruned between blocks, every linear with statistics of its own."""
    layers = list(model.model.layers)
    calls: list[Any] = []
    streams = []
    for ids in torch.split(blocks, 1):
        first, calls = layer_arguments(model, layers, ids)
        streams.append(first)
    for layer, call in zip(layers, calls, strict=True):
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        seen = {m: Statistics(m, method == "sparsegpt") for m in linears}
        handles = [m.register_forward_hook(lambda m, x, _, seen=seen: seen[m].add(x[0])) for m in linears]
        for stream in streams:
            run_layer(layer, stream, *call)
        for handle in handles:
            handle.remove()
        for m in linears:
            m.weight.copy_(METHODS[method](m.weight, seen[m], share, keep, of))
        streams = [run_layer(layer, stream, *call) for stream in streams]
