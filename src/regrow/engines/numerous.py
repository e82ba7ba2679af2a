"""Which teacher a student has now: one a little less sparse than itself while it is cut, then back towards the dense.

Teachers are what the student was (NutePrune, arXiv:2402.09773, 3.2). What this gives up: teachers of another size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from regrow.engines.banks import Record, Shelf

FADES = 0.9  # of the measured gap that a mean over past steps keeps in every step


@dataclass(frozen=True, slots=True)
class Course:
    """`spacing` in sparsity between two records, `lag` in records between student and teacher; towards `target`.

    By `gap` the teacher is instead one from whom the student is about so many nats away: nearer ones give way to
    denser ones. A `dense` course has no other than the dense teacher.
    """

    target: float
    spacing: float = 0.01
    lag: int = 10
    by: Literal["count", "gap", "dense"] = "count"
    gap: float = 0.1

    @property
    def levels(self) -> int:
        """How many records are to be made: one at each multiple of the spacing below the last."""
        return 0 if self.by == "dense" else max(0, int(self.target / self.spacing + 1e-9) - 1)


def climbing(records: int, lag: int) -> int | None:
    """The record that teaches while the sparsity rises; None: the dense model."""
    return records - lag if records >= lag else None


def returning(records: int, lag: int, whole: int, left: int) -> int | None:
    """The record that teaches when `left` of `whole` steps are left since the sparsity was reached; None: dense.

    They take turns of equal length, from the sparse end, as far as the lag allows; the dense one has what is left over.
    """
    turn = whole // (records + 1)
    place = left // turn - lag if turn else -1
    return None if place < 0 or not records else min(place, records - 1)


class Teachers(nn.Module):
    """Records, and what the choice among them hangs on; all of it is part of a checkpoint."""

    reached: Tensor  # () int64, steps that were left when the sparsity was reached; -1 before
    place: Tensor  # () int64, the record that teaches by gap; -1: dense
    apart: Tensor  # () fp32, mean distance from the teacher over past steps; -1 before the first

    def __init__(self, course: Course, shelf: Shelf) -> None:
        super().__init__()
        self.course, self.shelf = course, shelf
        self.register_buffer("reached", torch.tensor(-1))
        self.register_buffer("place", torch.tensor(-1))
        self.register_buffer("apart", torch.tensor(-1.0))

    def now(self, left: int) -> int | None:
        """The index of the record that teaches with `left` steps to go, this one counted; None: the dense model."""
        course, records = self.course, len(self.shelf)
        if course.by == "dense":
            return None
        if course.by == "gap":
            place = min(int(self.place), records - 1)
            return place if place >= 0 else None
        if int(self.reached) < 0:
            return climbing(records, course.lag)
        return returning(records, course.lag, int(self.reached), left)

    def due(self, sparsity: float) -> bool:
        """Whether the student as it is becomes a teacher."""
        made = len(self.shelf)
        return int(self.reached) < 0 and made < self.course.levels and sparsity >= (made + 1) * self.course.spacing

    def see(self, sparsity: float, left: int, write: Callable[[], Record]) -> None:
        """After a pass of a student that is so sparse, with `left` steps to go."""
        if self.due(sparsity):
            self.shelf.add(write())
        complete = len(self.shelf) >= self.course.levels
        if int(self.reached) < 0 and complete and sparsity >= self.course.target:
            self.reached.fill_(left)

    def measure(self, apart: float) -> None:
        """How far the student was from its teacher in a step, in nats: too near, and a denser one is next; too far, and
        a sparser one, where there is one."""
        if self.course.by != "gap" or not math.isfinite(apart):
            return
        old = float(self.apart)
        mean = apart if old < 0 else FADES * old + (1 - FADES) * apart
        self.apart.fill_(mean)
        step = 1 if mean > self.course.gap else -1
        self.place.fill_(max(-1, min(int(self.place) + step, len(self.shelf) - 1)))
