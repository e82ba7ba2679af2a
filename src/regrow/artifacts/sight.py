"""What a criterion may look at, and the decorator that turns a pure function into a criterion.

A criterion sees one tensor (or one stream of activations) of one kind of unit at a time and answers one number a
unit; the walk adds the tensors up. That is why gradients of a whole model never have to be held together with
their squares. What this gives up: criteria that must see two tensors of a unit at once.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from regrow.artifacts.family import UNITS, Unit
from regrow.registry import Registry

if TYPE_CHECKING:
    import torch

Sees = Literal["nothing", "weight", "grad", "fisher", "flow", "angles", "removal", "task"]
"""nothing: the number of units; weight; grad: weight and the mean gradient; fisher: those and the mean square of the
gradient of each sequence; flow: activations where the unit acts, reduced over each sequence; angles, removal, task:
whole layers only."""

Reduction = Literal["mean", "l2", "var"]


@dataclass(frozen=True, slots=True)
class Moments:
    """What is left of a stream once each sequence is reduced to one number a channel: sums over sequences."""

    total: torch.Tensor  # (units, width) fp64, sum over sequences
    squares: torch.Tensor  # (units, width) fp64, sum of squares
    sequences: int

    def reduce(self, how: Reduction) -> torch.Tensor:
        """One number a channel: (units, width). `l2` is sqrt(sum of squares), as in Minitron, not a mean."""
        if how == "l2":
            return self.squares.sqrt()
        mean = self.total / self.sequences
        if how == "mean":
            return mean
        return (self.squares / self.sequences - mean.square()).clamp_min(0)


@dataclass(frozen=True, slots=True)
class Sight:
    """One tensor as a criterion sees it: units first, then the unit's channels, then the rest of the row."""

    unit: Unit
    units: int
    seed: int = 0  # differs from tensor to tensor, equal for equal runs
    weight: torch.Tensor | None = None  # (units, width, rest)
    grad: torch.Tensor | None = None  # (units, width, rest) mean over sequences
    fisher: torch.Tensor | None = None  # (units, width, rest) mean over sequences of the squared gradient
    flow: Mapping[str, Moments] | None = None  # by how a sequence was reduced: mean of |x|, l2 or var
    angles: torch.Tensor | None = None  # (L+1, L+1) mean cosine between the streams entering layers i and j
    removal: torch.Tensor | None = None  # (L,) loss without layer i, minus the loss with all
    runs: Mapping[str, torch.Tensor] | None = None  # by task, (2, L, L+1): without layers i..j-1, items wrong; bits


@dataclass(frozen=True, slots=True)
class Criterion:
    """A scoring function with what it needs. Higher scores stay."""

    name: str
    sees: Sees
    units: tuple[Unit, ...]
    paper: str
    about: str  # first line of the docstring
    score: Callable[..., torch.Tensor]  # (Sight, **options) -> (units,), or (L, L+1) for runs of layers
    options: dict[str, Any]  # keyword arguments of the function and their defaults
    comparable: bool  # scores of different layers share one scale
    layers_by: str  # the criterion that scores layers when this one does not
    code: str  # 16 hex digits of the file it stands in: scores of another version are other scores


CRITERIA: Registry[Criterion] = Registry("criterion", "regrow.criteria")


def criterion(
    *,
    sees: Sees,
    paper: str,
    units: tuple[Unit, ...] = UNITS,
    comparable: bool = False,
    layers_by: str = "block-influence",
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a pure function `(Sight, **options) -> (units,)` under its name, underscores as hyphens."""

    unknown = {sees} - set(get_args(Sees)) | set(units) - set(UNITS)
    if unknown:
        raise TypeError(f"a criterion cannot see or score {sorted(unknown)}: {get_args(Sees)}, {UNITS}")
    if sees in ("angles", "removal", "task") and tuple(units) != ("layer",):
        raise TypeError(f"{sees} are of whole layers: say units=('layer',)")
    if sees == "flow" and "layer" in units:
        raise TypeError("nothing flows at one place for a whole layer: leave 'layer' out of units, or see angles")

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = function.__name__.replace("_", "-")
        if not function.__doc__:
            raise TypeError(f"criterion {name!r} has no docstring: say in one line what it measures")
        parameters = list(inspect.signature(function).parameters.values())[1:]
        for parameter in parameters:
            if inspect.Parameter.empty in (parameter.default, parameter.annotation):
                raise TypeError(
                    f"criterion {name!r}: option {parameter.name!r} needs a default, so that it can be left out, "
                    "and a type, so that it can be checked"
                )
        options = {parameter.name: parameter.default for parameter in parameters}
        if sees == "flow" and options.get("sequence") not in get_args(Reduction):
            raise TypeError(
                f"criterion {name!r} sees flow: give it an option 'sequence: Reduction = \"mean\"', which says how a "
                "sequence is reduced before it is shown"
            )
        if sees == "task" and not {"task", "limit"} <= set(options):
            raise TypeError(
                f"criterion {name!r} sees a task: give it options 'task: str' and 'limit: int', which say what is asked"
            )
        about = function.__doc__.strip().splitlines()[0]
        code = _code(function)
        CRITERIA.add(name, Criterion(name, sees, units, paper, about, function, options, comparable, layers_by, code))
        return function

    return register


def _code(function: Callable[..., torch.Tensor]) -> str:
    path = Path(function.__code__.co_filename)
    text = path.read_bytes() if path.is_file() else function.__code__.co_code
    return hashlib.sha256(text).hexdigest()[:16]
