"""What a loss between a teacher and a student is, and the decorators that register one.

A loss sees a few tokens at a time, teacher and student side by side, and answers one number a token; who owns the head
adds them up, so no batch of logits is ever held whole. What this gives up: losses that compare tokens with each other,
but for those on attention, which see a sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrow.artifacts.options import check_values
from regrow.errors import UnknownName
from regrow.registry import Registry

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Measured:
    """A pure function (teacher, student, **options) -> one number a token, and what is known of it."""

    name: str
    paper: str
    about: str
    measure: Callable[..., torch.Tensor]
    options: dict[str, Any]
    positive: tuple[str, ...] = ()  # options that must be more than 0
    shares: tuple[str, ...] = ()  # options from 0 to 1

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise `UnknownName` or `SettingsError` for options that it does not have, or not with that value."""
        for name in given:
            if name not in self.options:
                raise UnknownName("option", name, self.options, f"name one that loss {self.name!r} has")
        check_values(f"loss {self.name!r}", self.options, given, positive=self.positive, shares=self.shares)


@dataclass(frozen=True, slots=True)
class Divergence(Measured):
    """Of logits: (teacher (n, V) fp32, student (n, V) fp32) -> (n,)."""


@dataclass(frozen=True, slots=True)
class Likeness(Measured):
    """Of states inside two models: (teacher (n, C) fp32, student (n, C) fp32) -> (n,).

    `of` attention: of queries, keys or values, (b, T, C) and (b, T, c) fp32 -> (b, T); widths may differ.
    """

    of: str = "states"


DIVERGENCES: Registry[Divergence] = Registry("loss", "regrow.losses")
LIKENESSES: Registry[Likeness] = Registry("loss of states", "regrow.losses")

Measure = Callable[..., "torch.Tensor"]


def divergence(
    *, paper: str, positive: tuple[str, ...] = (), shares: tuple[str, ...] = ()
) -> Callable[[Measure], Measure]:
    """Register a pure function `(teacher, student, **options) -> (n,)` under its name, underscores as hyphens."""

    def register(function: Measure) -> Measure:
        found = Divergence(*_read(function, paper), positive, shares)
        DIVERGENCES.add(found.name, found)
        return function

    return register


def likeness(*, paper: str, of: str = "states", positive: tuple[str, ...] = ()) -> Callable[[Measure], Measure]:
    """The same for what a `Likeness` compares."""

    def register(function: Measure) -> Measure:
        found = Likeness(*_read(function, paper), positive, of=of)
        LIKENESSES.add(found.name, found)
        return function

    return register


def _read(function: Measure, paper: str) -> tuple[str, str, str, Measure, dict[str, Any]]:
    name = function.__name__.replace("_", "-")
    if not function.__doc__:
        raise TypeError(f"loss {name!r} has no docstring: say in one line what it measures")
    options = {p.name: p.default for p in list(inspect.signature(function).parameters.values())[2:]}
    return name, paper, function.__doc__.strip().splitlines()[0], function, options


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats over the last dimension, of log chances; what `p` rules out costs nothing."""
    chances = p.exp()
    return (chances * (p - q).masked_fill(chances == 0, 0)).sum(-1)
