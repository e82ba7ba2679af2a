"""What a model lowers while its gates learn: its distance from a teacher or the text's loss, and what its size costs.

Student and teachers share one copy of the weights: of each pass the gates and adapters say whose it is. In every pass
the gates are drawn anew; chance hangs on the seed and on how many sequences were seen.
What this gives up: torch.compile; weights that are spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.ramp import Ramp
from regrow.artifacts.shape import Anatomy
from regrow.engines import processes
from regrow.engines.banks import Bank, Record
from regrow.engines.chance import stream
from regrow.engines.distil import Pass, bare
from regrow.engines.learnable import Aim, LearnedGates, Values, kept_by, opened, show
from regrow.engines.lesson import Lesson, apart, run
from regrow.engines.numerous import Teachers
from regrow.engines.objective import Answer, Objective
from regrow.engines.packed import learnt
from regrow.engines.text_loss import text_loss

Told = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Pace:
    """`steps` of `batch` sequences; in the first `warm` the sparsity that is asked for rises; from step `anneal` on the
    units that stay are fixed and their gates go evenly to 1."""

    steps: int
    batch: int
    ramp: Ramp
    warm: int
    anneal: int  # `steps` = never
    seed: int = 0  # of what is drawn

    def risen(self, step: int) -> float:
        """Share of the sparsity that is asked for in step `step` (from 0)."""
        return self.ramp.at(min(1.0, step / self.warm)) if self.warm else 1.0

    def __str__(self) -> str:
        return f"{self.steps} steps of {self.batch}, {self.ramp.name} over {self.warm}, annealed from {self.anneal}"


@dataclass(frozen=True, slots=True)
class Rates:
    """Of gates and multipliers. `follow`: they rise and fall as that of the weights does."""

    gates: float = 0.1
    multipliers: float = 0.1
    follow: bool = False
    betas: tuple[float, float] = (0.9, 0.999)


class Learning(nn.Module):
    """The loss (model, batch) of the training loop, of a model that runs under `gated(..., self.live)`.

    Without a lesson it lowers the text's next token. Where held-out text is measured, it is that of the settled gates.
    `whole` says how sparse the model is; `settle` makes the plan that gates are annealed to. From arXiv:2402.09773
    (with teachers) and arXiv:2310.06694 (without).
    """

    seen: Tensor  # () int64, sequences of all processes

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        gates: LearnedGates,
        whole: Aim,
        pace: Pace,
        *,
        taught: tuple[Lesson, Teachers] | None = None,
        settle: Callable[[], Plan] | None = None,
    ) -> None:
        super().__init__()
        self.anatomy, self.whole, self.pace, self.settle = anatomy, whole, pace, settle
        self.gates, self.bank, self.text = gates, Bank(model), text_loss(bare(model))
        self.lesson: Lesson | None = taught[0] if taught else None
        self.teachers: Teachers | None = taught[1] if taught else None
        self.live = opened(anatomy, gates.settled())
        self.plan: Plan | None = None  # what the gates were settled to, once they are
        self.hardened = 0.0  # how far those that stay are on their way to 1
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.by_pass = True  # chance is of a pass
        self.shown = ("sparsity", *(("teacher",) if taught else ()))
        course = "" if self.teachers is None else f"{self.lesson}, {self.teachers.course}, "
        aims = ", ".join(f"{aim.share:g} of {aim.name}" for aim in gates.aims)
        self.__name__ = f"gates: {aims}, {course}{pace}, seed {pace.seed}"

    def objective(self, rates: Rates) -> Objective:
        usual = {"betas": rates.betas, "constant": not rates.follow}
        apart = (
            {"params": list(self.gates.a.values()), "lr": rates.gates, **usual},
            {"params": [self.gates.multipliers], "lr": rates.multipliers, "maximize": True, **usual},
        )
        return Objective(self, beside=self, apart=apart)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Answer:
        if not torch.is_grad_enabled():
            show(self.live, self.settled())
            return self.text(model, batch)
        ids, seen = batch["input_ids"], int(self.seen)
        self.seen += len(ids) * processes.count()
        step = seen // self.pace.batch
        if step < self.pace.anneal:
            first = seen % self.pace.batch == 0
            values, penalty, told = self._drawn(step, stream(self.pace.seed, seen, ids.device), first=first)
        else:
            values, penalty, told = self._annealed(step)
        if self.teachers is None:
            show(self.live, values)
            answer = self.text(model, batch)
        else:
            answer = self._taught(self.teachers, model, batch, values, self.pace.steps - step)
        loss, parts = answer if isinstance(answer, tuple) else (answer, {})
        if self.teachers is not None:
            self._remember(self.teachers, float(told["sparsity"]), parts, self.pace.steps - step)
        return loss + penalty, {**parts, **told}

    def _drawn(self, step: int, source: torch.Generator, *, first: bool) -> tuple[Values, Tensor, Told]:
        """Gates of a pass, and what their size costs; `first` of its step."""
        self.gates.clamp()
        chances, risen = self.gates.chances(), self.pace.risen(step)
        if first:
            self.gates.let_go(chances, risen)
        penalty, told = self.gates.penalty(chances, risen)
        with torch.no_grad():
            sparsity = self.whole.lost(chances).float()
        asked = torch.full_like(sparsity, risen * self.whole.share)
        return self.gates.drawn(source), penalty, {"sparsity": sparsity, "asked": asked, **told}

    def _annealed(self, step: int) -> tuple[Values, Tensor, Told]:
        """Gates of what stays, on their way to 1; they do not learn any more."""
        self.gates.requires_grad_(False)
        if self.plan is None:
            assert self.settle is not None
            self.gates.clamp()
            self.plan = self.settle()
        done = (step + 1 - self.pace.anneal) / (self.pace.steps - self.pace.anneal)
        sparsity = torch.tensor(self.whole.share)
        self.hardened = done
        return self.kept(self.plan, done), torch.zeros(()), {"sparsity": sparsity, "asked": sparsity}

    @torch.no_grad()
    def settled(self) -> Values:
        """Gates without chance, as they are now."""
        self.gates.clamp()
        return self.gates.settled() if self.plan is None else self.kept(self.plan, self.hardened)

    def kept(self, plan: Plan, hardened: float = 0.0) -> Values:
        """Gates of what `plan` keeps: soft (0) to 1 (1), and 0 elsewhere."""
        units: list[Unit] = list(self.gates.chances())
        soft, one = self.gates.soft(), torch.ones(())
        kept = kept_by(self.anatomy, plan, units)
        return {
            unit: stays.to(soft[unit]) * soft[unit].lerp(one.to(soft[unit]), hardened) for unit, stays in kept.items()
        }

    def _taught(
        self, teachers: Teachers, model: nn.Module, batch: Mapping[str, Tensor], values: Values, left: int
    ) -> Answer:
        assert self.lesson is not None
        ids, mask = batch["input_ids"], learnt(batch)  # (b, T), (b, T - 1)
        place = teachers.now(left)
        told = self._told(bare(model), ids, mask, None if place is None else teachers.shelf[place])
        show(self.live, values)
        own = run(self.lesson, model, ids, mask, "student")
        loss, parts = apart(self.lesson, told, own, batch, values.get("channel"))
        sparse = 0.0 if place is None else (place + 1) * teachers.course.spacing
        return loss, {**parts, "teacher": sparse}

    def _told(self, model: Any, ids: Tensor, mask: Tensor | None, teacher: Record | None) -> Pass:
        """What a teacher says, None: the dense model; the student is what it was afterwards."""
        assert self.lesson is not None
        gates = None if teacher is None else {unit: value.to(ids.device) for unit, value in teacher.gates.items()}
        mode = model.training
        show(self.live, gates)
        try:
            with torch.no_grad(), self.bank.speaking(None if teacher is None else teacher.adapters):
                return run(self.lesson, model.eval(), ids, mask, "teacher")
        finally:
            model.train(mode)

    def _remember(self, teachers: Teachers, sparsity: float, parts: Mapping[str, Any], left: int) -> None:
        """What the student is now may teach later."""
        teachers.see(sparsity, left, self._record)
        if teachers.course.by == "gap":
            teachers.measure(float(processes.mean(parts["divergence"])))

    def _record(self) -> Record:
        gates = {unit: value.cpu() for unit, value in self.gates.settled().items()}
        return Record(gates, self.bank.written())
