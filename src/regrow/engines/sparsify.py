"""Block after block: read the inputs, choose what goes, let a solver mend what stays; zeros are written in place.

Inside a block statistics come from dense weights; between blocks inputs have passed the pruned ones, as in Wanda and
SparseGPT, or the dense ones in one pass. Memory beyond the model: one block's statistics and one buffer of the stream.
What this gives up: errors that only show behind a later block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regrow.artifacts.curvature import Curvature
from regrow.artifacts.linear import Inputs, Linear, Lowest, Solver, Sparse
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.weight_sight import WeightCriterion, WeightSight
from regrow.engines.inputs import Matrix, Observer, Reading, matrices, named, outside
from regrow.engines.readings import Readings
from regrow.engines.removal import enter, run_layer
from regrow.engines.room import give_back
from regrow.engines.walk import check_finite
from regrow.errors import BrokenModel

Progress = Callable[[int, int], None]  # (blocks done, blocks in all)


@dataclass(frozen=True, slots=True)
class Method:
    """What decides and what mends."""

    criterion: WeightCriterion
    solvers: tuple[tuple[Solver, Mapping[str, Any]], ...]  # in turn, each with its options
    damping: float = 0.01  # of the mean of the Gram matrix's diagonal
    inputs: Literal["pruned", "dense", "both"] = "pruned"
    """What a block reads: what the pruned blocks before it give, what the dense model gives, or what the pruned ones
    give with the dense model's outputs as the target."""
    mend: float = 0.25  # with both: how far the target goes from the dense weights (0) to the dense outputs (1)
    keep_zeros: bool = False  # what is zero before stays zero
    also: tuple[str, ...] = ()  # ends of names of routers, the head or the embedding, which stay dense else

    @property
    def mends(self) -> bool:
        """Whether the dense model's stream is run beside: a target is only found with a Gram matrix."""
        return self.inputs == "both" and self.reads_gram

    @property
    def reads_gram(self) -> bool:
        """Whether Gram matrices are made."""
        return self.sees in ("gram", "all")

    @property
    def sees(self) -> str:
        """What the parts ask for together: nothing, inputs, moments, gram, or all (the last two)."""
        asked = {self.criterion.sees, *(solver.sees for solver, _ in self.solvers)}
        if {"gram", "moments"} <= asked:
            return "all"
        for most in ("gram", "moments"):
            if most in asked:
                return most
        return "inputs" if asked & {"inputs", "routed"} else "nothing"


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of one matrix."""

    name: str
    layer: int
    weights: int
    zeros: int
    pattern: str
    error: float | None  # of the outputs, relative: |(W' - W) X|^2 / |W X|^2; None without a Gram matrix
    note: str = ""
    scarce: tuple[int, int] | None = None  # tokens and inputs of its Gram matrix, when there were fewer tokens


@torch.no_grad()
def sparsify(
    model: Any,
    anatomy: Anatomy,
    blocks: Tensor | None,  # (n, T) int64; None when nothing is read
    method: Method,
    patterns: Sequence[Pattern],  # one a layer, and one more for what lies outside them
    *,
    leave: Sequence[str] = (),
    kept: Readings | None = None,
    progress: Progress | None = None,
) -> list[Pruned]:
    """Make `model` sparse in place and say what became of every matrix that is not in `leave` (ends of names).

    `kept` holds readings of the dense inputs, which are used, or will hold them.

    Raises `SettingsError` for a pattern that does not divide, `BrokenModel` when an input is not finite.
    """
    layers = list(model.get_submodule(anatomy.family.layers).children())
    chosen = [
        [m for m in matrices(layer, f"{anatomy.family.layers}.{i}", method.also) if not named(m.name, leave)]
        for i, layer in enumerate(layers)
    ]
    beyond = outside(model, anatomy.family, method.also)
    for pattern, found in zip(patterns, [*chosen, *([beyond] if beyond else [])], strict=False):
        for matrix in found:
            pattern.check(matrix.name, matrix.weight.shape[1])
    done: list[Pruned] = []
    routed = method.criterion.sees == "routed"
    read = blocks is not None and method.sees != "nothing"
    ready = kept if read and kept is not None and kept.holds(method.sees, routed) else None
    stream, calls = (None, []) if blocks is None or not read or ready else enter(model, layers, blocks)
    dense = stream.clone() if stream is not None and method.mends else None
    for i, layer in enumerate(layers):
        readings = {} if ready is None else ready.load(i, method.sees, routed, model.device)
        if stream is not None:
            sites = None if kept is not None else [matrix.site for matrix in chosen[i]]
            with Observer(layer, method.sees, routed, sites) as observer:
                _read(layer, stream, dense, calls[i], observer, keep=method.inputs == "dense")
            readings = observer.readings
            if kept is not None:
                kept.save(i, method.sees, routed, readings)
        sequences = 1 if blocks is None else len(blocks)
        give_back()
        for reading, together in _by_reading(chosen[i], readings):
            done += _prune_together(together, i, reading, method, patterns[i], sequences)
        if stream is not None and method.inputs != "dense" and (beyond or i + 1 < len(layers)):
            for k in range(len(stream)):
                stream[k : k + 1] = run_layer(layer, stream[k : k + 1], *calls[i])
        if progress is not None:
            progress(i + 1, len(layers))
    for matrix in beyond:
        reading = _read_last(model, anatomy, matrix, stream, method)
        done += _prune_together(
            [matrix], len(layers), reading, method, patterns[-1], 1 if blocks is None else len(blocks)
        )
    return done


@torch.no_grad()
def layer_values(
    model: Any,
    anatomy: Anatomy,
    blocks: Tensor,
    measure: Callable[[Callable[[], Iterable[Tensor]]], float],
    *,
    leave: Sequence[str] = (),
    kept: Readings | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """`measure` of the scores |w| |x| of each layer of the dense model, in one pass; 0 of a layer without any.

    Readings that were `kept` spare the pass.
    """
    layers = list(model.get_submodule(anatomy.family.layers).children())
    ready = kept if kept is not None and kept.holds("inputs", False) else None
    stream, calls = (None, []) if ready else enter(model, layers, blocks)
    found = []
    for i, layer in enumerate(layers):
        readings = {} if ready is None else ready.load(i, "inputs", False, model.device)
        if stream is not None:
            with Observer(layer, "inputs") as observer:
                _read(layer, stream, None, calls[i], observer, keep=True)
            readings = observer.readings
        seen = [
            (matrix.weight, readings[matrix.site].inputs(len(blocks)).squares.sqrt())
            for matrix in matrices(layer, f"{anatomy.family.layers}.{i}")
            if matrix.site in readings and readings[matrix.site].tokens and not named(matrix.name, leave)
        ]
        found.append(measure(partial(_scores, seen)) if seen else 0.0)
        if progress is not None:
            progress(i + 1, len(layers))
    return found


def _scores(seen: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Wanda's, of weights (m, n) and the norms (n,) of what they meet."""
    return (weight.abs().float() * norm for weight, norm in seen)


def _read(layer: nn.Module, stream: Tensor, dense: Tensor | None, call: Any, observer: Observer, *, keep: bool) -> None:
    """Run a block over the stream (n, T, d), one sequence at a time; with `keep` the outputs replace it.

    The `dense` stream, if there is one, runs before it and moves on to the next block.
    """
    for i in range(len(stream)):
        if dense is not None:
            with observer.remembering():
                dense[i : i + 1] = run_layer(layer, dense[i : i + 1], *call)
        output = run_layer(layer, stream[i : i + 1], *call)
        if keep:
            stream[i : i + 1] = output


def _read_last(model: Any, anatomy: Anatomy, matrix: Matrix, stream: Tensor | None, method: Method) -> Reading | None:
    """What the head reads of the `stream` (n, T, d) behind the last block; nothing of an embedding."""
    if stream is None or matrix.site != anatomy.family.head:
        return None
    norm = model.get_submodule(anatomy.family.final_norm)
    reading = Reading(matrix.weight.shape[1], method.sees, stream.device)
    for sequence in stream:
        reading.add(norm(sequence))
    return reading


def _by_reading(found: Sequence[Matrix], readings: dict[str, Reading]) -> Iterator[tuple[Reading | None, list[Matrix]]]:
    """Matrices that share a reading, with it; a reading is let go before the next is worked on."""
    groups: dict[int, list[Matrix]] = {}
    for matrix in found:
        groups.setdefault(id(readings.get(matrix.site)), []).append(matrix)
    for together in groups.values():
        reading = readings.get(together[0].site)
        for matrix in together:
            readings.pop(matrix.site, None)
        yield reading, together


def _prune_together(
    found: list[Matrix], layer: int, reading: Reading | None, method: Method, pattern: Pattern, sequences: int
) -> list[Pruned]:
    """Matrices of one reading; its curvature is made once and is gone afterwards."""
    curvature = None
    if reading is not None and reading.products is not None:
        curvature = Curvature(reading.take_gram(), method.damping)
    return [_prune(matrix, layer, reading, curvature, method, pattern, sequences) for matrix in found]


def _prune(
    matrix: Matrix,
    layer: int,
    found: Reading | None,
    curvature: Curvature | None,
    method: Method,
    pattern: Pattern,
    sequences: int,
) -> Pruned:
    weight = matrix.weight
    needs = method.sees != "nothing"
    if needs and (found is None or not found.tokens):
        return Pruned(matrix.name, layer, weight.numel(), int((weight == 0).sum()), str(pattern), None, "saw no token")
    inputs = None
    if found is not None:
        inputs = found.inputs(sequences)
        check_finite(f"inputs of {matrix.name}", inputs.squares)
    target = weight.float()
    if curvature is not None and found is not None and found.cross is not None:
        target = curvature.target(target, found.cross, method.mend)
    empty = weight == 0 if method.keep_zeros else None
    task = task_of(target, inputs, curvature, method.criterion, pattern, empty)
    answer: Sparse = Lowest(task)
    for solver, options in method.solvers:
        answer = solver.solve(task, answer, **options)
    error = None if curvature is None else _error(task.weight, answer.weight, curvature)
    if curvature is not None and not bool(answer.weight.isfinite().all()):
        raise BrokenModel(
            f"{', '.join(solver.name for solver, _ in method.solvers)} found no finite weights for {matrix.name}",
            "options near their defaults, and inputs that are not all the same",
            "leave the solver's options out, raise damping, or give more calibration text",
        )
    weight.copy_(answer.weight)
    gone = answer.gone if empty is None else answer.gone | empty
    weight.mul_(~gone).add_(0.0)  # never -0; filling would branch at every entry
    note = "" if curvature is None or not curvature.raised else f"damping raised to {curvature.raised:g}"
    zeros = int((answer.weight == 0).sum())  # before rounding to the type of `weight`, which may make more
    scarce = None
    if curvature is not None and found is not None and found.tokens < weight.shape[1]:
        scarce = found.tokens, weight.shape[1]
    return Pruned(matrix.name, layer, weight.numel(), zeros, str(pattern), error, note, scarce)


def task_of(
    weight: Tensor,
    inputs: Inputs | None,
    curvature: Curvature | None,
    criterion: WeightCriterion,
    pattern: Pattern,
    empty: Tensor | None = None,  # (m, n) bool
) -> Linear:
    """The problem of one matrix (m, n) fp32. Dead inputs score nothing, so their weights go first; what is `empty`
    goes before."""

    def score(part: Tensor, columns: slice) -> Tensor:
        curved: dict[str, Tensor] = {}
        if curvature is not None and criterion.sees == "gram":
            curved = {
                "pivot": curvature.factor.diagonal()[columns],
                "diagonal": curvature.gram.diagonal()[columns],
                "inverse_diagonal": curvature.inverse_diagonal[columns],
            }
        norm = None if inputs is None else inputs.squares.sqrt()[columns]
        scores = criterion.score(WeightSight(weight=part, norm=norm, **curved))
        if curvature is not None:
            scores = scores.masked_fill(curvature.dead[columns], 0)
        return scores if empty is None else scores.masked_fill(empty[:, columns], -1)

    return Linear(weight, pattern, criterion.within, score, criterion.adapts, inputs, curvature, empty)


def _error(dense: Tensor, sparse: Tensor, curvature: Curvature) -> float:
    """|(W' - W) X|^2 / |W X|^2 on the calibration text."""
    whole = curvature.size(dense)
    return curvature.size(sparse - dense) / whole if whole else 0.0
