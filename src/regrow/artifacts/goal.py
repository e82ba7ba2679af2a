"""What a loss on logits is, and the decorator that registers one.

A loss sees a few tokens at a time, teacher and student side by side, and answers one number a token; who owns the head
adds them up, so no batch of logits is ever held whole. What this gives up: losses that compare tokens with each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrow.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Divergence:
    name: str
    paper: str
    about: str
    measure: Callable[..., torch.Tensor]  # (teacher (n, V) fp32, student (n, V) fp32, **options) -> (n,)
    options: dict[str, Any]


DIVERGENCES: Registry[Divergence] = Registry("loss", "regrow.losses")


def divergence(*, paper: str) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a pure function `(teacher, student, **options) -> (n,)` under its name, underscores as hyphens."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = function.__name__.replace("_", "-")
        if not function.__doc__:
            raise TypeError(f"loss {name!r} has no docstring: say in one line what it measures")
        options = {p.name: p.default for p in list(inspect.signature(function).parameters.values())[2:]}
        about = function.__doc__.strip().splitlines()[0]
        DIVERGENCES.add(name, Divergence(name, paper, about, function, options))
        return function

    return register
