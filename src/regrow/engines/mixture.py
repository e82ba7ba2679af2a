"""How much of a training's text comes from each domain, and how that follows from what is still to be regained there.

After Sheared LLaMA's dynamic batch loading (arXiv:2310.06694): a domain whose held-out loss is further above its
reference is read more. Nothing here needs torch. What this gives up: weights within a domain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from regrow.errors import BrokenModel, SettingsError

ETA = 1.0  # how fast weights follow
SMOOTH = 1e-4  # the share that is dealt out evenly, so that no domain is lost


def normalised(weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def updated(weights: Sequence[float], excess: Sequence[float]) -> tuple[float, ...]:
    """Weights after one update; `excess` is each domain's held-out loss less its reference, in nats.

    w * exp(ETA * excess), normalised, and of that 1 - `SMOOTH`, the rest evenly. They add up to 1 and are above 0.
    """
    most = max(excess)  # taken off first, so that nothing overflows; what is normalised does not change
    grown = normalised([w * math.exp(ETA * (e - most)) for w, e in zip(weights, excess, strict=True)])
    return tuple((1 - SMOOTH) * weight + SMOOTH / len(grown) for weight in grown)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Domains, how much is read of each at first, and how that changes.

    `every`: optimiser steps between two updates; 0 = the weights stay. `references`: losses in nats to compare with.
    `signed`: what is below its reference loses weight (the paper's code); else it counts as equal (the paper's text).
    Raises `SettingsError` for weights that are none, or references that do not fit.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]  # need not add up to 1
    every: int = 0
    references: tuple[float, ...] = ()
    signed: bool = True

    def __post_init__(self) -> None:
        said = ", ".join(f"{name}: {weight:g}" for name, weight in zip(self.names, self.weights, strict=True))
        if not self.names or not all(0 < weight < math.inf for weight in self.weights):
            raise SettingsError(f"a mixture of {said or 'nothing'}", "weights above 0", "leave out what is not read")
        if self.every and len(self.names) < 2:
            raise SettingsError(
                f"weights that are balanced, of one source ({said})",
                "two sources or more",
                "name them in the mixture, or keep the weights fixed",
            )
        if len(self.references) not in (0, len(self.names)) or not all(map(math.isfinite, self.references)):
            raise SettingsError(
                f"references {list(self.references)} for {len(self.names)} domains",
                "one finite loss for each",
                "correct them, or have them measured",
            )

    def next(self, weights: Sequence[float], losses: Sequence[float]) -> tuple[float, ...]:
        """Weights after an update by held-out losses in nats. Raises `BrokenModel` when one is not finite."""
        if not all(map(math.isfinite, losses)):
            said = ", ".join(f"{name}: {loss:g}" for name, loss in zip(self.names, losses, strict=True))
            raise BrokenModel(f"held-out losses of {said}", "finite losses", "lower learning_rate or lengthen warmup")
        excess = [loss - reference for loss, reference in zip(losses, self.references, strict=True)]
        return updated(weights, excess if self.signed else [max(e, 0.0) for e in excess])


@dataclass(slots=True)
class Weights:
    """The weights of a run: those it began with, and after which steps they became others.

    A loader fetches the first sequences of a step while the step before is made, so what is found after step s holds
    from step s + 2 on, whatever has been fetched, and a run that goes on draws what the uninterrupted one drew.
    """

    mixture: Mixture
    updates: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)  # (steps done, weights), in order

    def due(self, done: int) -> bool:
        """Whether the weights are to be updated after so many steps."""
        return self.mixture.every > 0 and done % self.mixture.every == 0

    def update(self, done: int, losses: Sequence[float]) -> None:
        self.updates.append((done, self.mixture.next(self.newest(), losses)))

    def newest(self) -> tuple[float, ...]:
        return self.updates[-1][1] if self.updates else normalised(self.mixture.weights)

    def at(self, step: int) -> tuple[float, ...]:
        """The weights that sequences of step `step` (from 1) are drawn by."""
        past = (weights for done, weights in reversed(self.updates) if done + 2 <= step)
        return next(past, normalised(self.mixture.weights))

    def to_json(self) -> list[Any]:
        return [[done, list(weights)] for done, weights in self.updates]

    def restore(self, data: list[Any]) -> None:
        """As a checkpoint kept them."""
        self.updates = [(int(done), tuple(map(float, weights))) for done, weights in data]
