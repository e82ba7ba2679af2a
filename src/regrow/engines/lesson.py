"""How far a student is from a teacher that lives in the same weights: in what they predict, and in states inside.

States are compared over channels that live, since the others are 0 in the student by its gates alone.
What this gives up: students of another depth or width than their teachers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regrow.artifacts.goal import Divergence, Likeness
from regrow.engines.distil import Pass, bare, counting, predictions, read, targets
from regrow.engines.match import Match, listening

FINAL = 1  # the place of the last block, whose state is compared as the head receives it


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a student lowers: `logits` (above 0) times the divergence of a token, `hidden` times the sum over `places`
    of the mean over tokens of a likeness, `text` times the next token. Place n is the n-th block from the end."""

    divergence: Divergence
    likeness: Likeness
    options: Mapping[str, Any] = field(default_factory=dict)
    logits: float = 51.2
    hidden: float = 0.9
    places: tuple[int, ...] = ()
    text: float = 0.0

    def __str__(self) -> str:
        how = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        states = f"{self.hidden:g} {self.likeness.name} at {', '.join(map(str, self.places))}"
        return f"{self.logits:g} {self.divergence.name}{how} + {states} + {self.text:g} next token"

    @property
    def match(self) -> Match:
        """What is listened to beside the last states."""
        return Match(self.likeness, tuple(place for place in self.places if place != FINAL and self.hidden))


def run(lesson: Lesson, model: Any, ids: Tensor, mask: Tensor | None, who: str) -> Pass:
    """A forward pass over `ids` (b, T); states are (n, C), where `mask` (b, T - 1) says that they count."""
    with listening(bare(model), lesson.match) as heard:
        states, head = read(model, ids, who)  # (b, T, C)
    return Pass(counting(states, mask), head, {place: counting(state, mask) for place, state in heard.items()})


def apart(
    lesson: Lesson, told: Pass, own: Pass, batch: Mapping[str, Tensor], channel: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the lesson lowers, () fp32, and its parts, each as it is before it is weighed.

    `channel` (C,) are the student's gates; None where all are open.
    """

    def measure(logits: Tensor, piece: slice) -> Tensor:  # (p,)
        with torch.no_grad():
            expected = told.head.logits(told.states[piece])
        return lesson.logits * lesson.divergence.measure(expected, logits, **lesson.options)

    loss, parts = predictions(own.head, own.states, targets(batch), measure, lesson.text)
    parts["divergence"] = parts["divergence"] / lesson.logits
    if lesson.hidden and lesson.places:
        states = _states(lesson, told, own, channel)
        parts["states"] = states.detach()
        loss = loss + lesson.hidden * states
    return loss, parts


def _states(lesson: Lesson, told: Pass, own: Pass, channel: Tensor | None) -> Tensor:  # () fp32
    live = None if channel is None else channel.detach() != 0  # (C,)
    pairs = [(told.heard[place], mine) for place, mine in own.heard.items()]
    if FINAL in lesson.places:
        pairs.append((told.states, own.states))
    total = own.states.new_zeros((), dtype=torch.float32)
    for theirs, mine in pairs:
        if live is not None:
            theirs, mine = theirs[:, live], mine[:, live]
        total = total + lesson.likeness.measure(theirs.float(), mine.float()).mean()
    return total
