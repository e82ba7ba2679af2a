"""What zeros in one shot cost, from shapes alone: peak memory beyond the model, and operations beyond its passes.

What this gives up: how far solvers go; those that stop early are reckoned with a typical number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrow.artifacts.pattern import Pattern
from regrow.artifacts.shape import Anatomy
from regrow.engines.inputs import named
from regrow.engines.sparsify import Method
from regrow.engines.zeros import prunable


@dataclass(frozen=True, slots=True)
class Work:
    """What is done to a linear of m outputs and n inputs: memory at the peak, and operations."""

    grams: float = 0.0  # copies of its Gram matrix (n, n)
    weights: float = 0.0  # copies of its weights (m, n)
    products: float = 0.0  # operations in m n^2
    cubes: float = 0.0  # operations in n^3, once for all linears that read the same


MASK = {False: Work(weights=7.4), True: Work(weights=5.7)}  # chosen within groups of N:M, or not
FACTOR = Work(grams=5.0, products=1.0, cubes=2 / 3)  # of a damped Gram matrix, and the error of the outputs
WORK = {
    "update": (Work(products=1.0),),
    "mrp": (Work(products=1.0),),
    "refit": (Work(grams=3.0, weights=14.0, products=40.0),),  # twenty steps
    "alps": (  # eigenvectors, then forty steps of two products each, ten to polish
        Work(grams=6.4, weights=1.5, cubes=9.0),
        Work(grams=3.0, weights=11.0, products=180.0),
    ),
    "dsnot": (Work(weights=20.0),),
}
"""Of solvers, as far as it is more; memory measured (bench/sparse_memory.py), operations counted."""


@dataclass(frozen=True, slots=True)
class Site:
    """Linears of a layer that read the same, or as many experts that do so each for itself."""

    experts: int
    channels: int  # n
    widest: int  # outputs of the largest of them
    outputs: int  # of all of them; of one expert


def sparse_bytes(
    anatomy: Anatomy, method: Method, pattern: Pattern, *, tokens: int, block: int, leave: Sequence[str] = ()
) -> int:
    """Peak of one-shot sparsity beyond the model, in fp32; of what is in `leave` nothing is read.

    That is the stream of all tokens (two with inputs of both models), and beside it either one sequence on its way
    through a block with the block's statistics, or the linears at work with the statistics of those that wait.
    """
    sizes = anatomy.sizes
    gram, reads = method.reads_gram, method.sees != "nothing"
    both = method.mends
    needs = [replace(MASK[pattern.of > 0], grams=3.0 * gram), *_work(method)]
    peaks = []
    for sites in {tuple(found) for found in sites_of(anatomy, also=method.also, leave=leave)}:
        squares = [(1 + both) * gram * site.experts * site.channels**2 for site in sites]
        passing = block * (6 * sizes["C"] + 4 * sizes["F"]) + sum(squares) if reads else 0
        working = [
            sum(squares[i + 1 :])
            + (site.experts - 1) * squares[i] / site.experts
            + both * (site.channels**2 + 2 * site.widest * site.channels)
            + max(work.grams * site.channels**2 + work.weights * site.widest * site.channels for work in needs)
            for i, site in enumerate(sites)
        ]
        peaks.append(max(passing, *working))
    streams = (1 + both) * tokens * sizes["C"] if reads else 0
    return round(4 * (streams + max(peaks)))


def sparse_flops(anatomy: Anatomy, method: Method, *, tokens: int, leave: Sequence[str] = ()) -> float:
    """Operations beyond the model's passes: Gram matrices (half of each, by symmetry), factors and solvers."""
    if not method.reads_gram:
        return 0.0
    works = _work(method)
    products, cubes = (sum(getattr(work, kind) for work in works) for kind in ("products", "cubes"))
    total = 0.0
    for site in (site for sites in sites_of(anatomy, also=method.also, leave=leave) for site in sites):
        n = site.channels
        read = tokens * (anatomy.sizes["A"] if site.experts > 1 else 1)
        total += (1 + 2 * method.mends) * read * n * n
        total += site.experts * (cubes * n**3 + products * site.outputs * n * n)
    return total


def sites_of(anatomy: Anatomy, *, also: Sequence[str] = (), leave: Sequence[str] = ()) -> list[list[Site]]:
    """Sites of the linears that may become sparse, in turn: of each layer, and of each matrix outside of layers."""
    layers: dict[int | str, dict[tuple[str | None, bool], Site]] = {}
    usual = set(prunable(anatomy))
    for tensor in anatomy.tensors:
        name = tensor.name.removesuffix(".weight")
        if not tensor.matrix or named(name, leave) or not (tensor.name in usual or named(name, also)):
            continue
        last = False
        if tensor.branch is not None:
            branch = anatomy.family.attention if tensor.branch == "attention" else anatomy.family.mlp
            last = name.rpartition(".")[2] == branch.site.rpartition(".")[2]
        *experts, outputs, channels = tensor.shape
        layer = layers.setdefault(name if tensor.layer is None else tensor.layer, {})
        known = layer.get((tensor.branch, last), Site(1, 1, 1, 0))
        layer[tensor.branch, last] = Site(
            max(known.experts, math.prod(experts)),
            max(known.channels, channels),
            max(known.widest, outputs),
            known.outputs + outputs,
        )
    return [list(layer.values()) for layer in layers.values()]


def _work(method: Method) -> list[Work]:
    solving = [work for solver, _ in method.solvers for work in WORK.get(solver.name, ())]
    return [FACTOR, *solving] if method.reads_gram else solving
