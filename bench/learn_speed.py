"""A step of gates that learn on SmolLM2 beside the same passes on the bare model with LoRA; runs take turns.

Two sequences of 128 tokens, LoRA on queries and values. `plain` is what must be done in any case: the dense model's
forward, the student's forward and backward by forward KL in pieces, and the optimiser of LoRA. `step` has gates on
groups, neurons and channels, states of every block compared, a teacher in the same weights, and the optimisers of gates
and multipliers too; it is asked to take at most 1.12 of `plain`. `gates` are draws, chances, the size, its gradient and
the optimiser of gates alone, asked to take under 2 % of a step. Memory: peaks of processes of their own, in which three
steps are trained, with the bytes of the hidden states that are compared.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from cutting import calibration
from ledger import Ledger, spread, timed
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.artifacts.plan import Plan
from regrow.artifacts.ramp import RAMPS
from regrow.engines import products
from regrow.engines.adapters import add_adapters
from regrow.engines.banks import Bank, Shelf
from regrow.engines.chance import stream
from regrow.engines.clock import PeakMemory
from regrow.engines.distil import FromTeacher
from regrow.engines.gates import gated
from regrow.engines.learnable import LearnedGates, of_weights
from regrow.engines.learning import Learning, Pace, Rates
from regrow.engines.lesson import Lesson
from regrow.engines.numerous import Course, Teachers
from regrow.engines.objective import Objective
from regrow.engines.train import train
from regrow.engines.train_settings import TrainSettings
from regrow.stages.load import load

BLOCK, SEQUENCES, REPEATS, TURNS = 128, 2, 9, 5
MEMORY = (128, 512)  # tokens in a block, where memory is measured


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(peak(sys.argv[1], int(sys.argv[2]))))
        return
    ledger = Ledger("learn_speed", __doc__ or "", model="demo", block=BLOCK, sequences=SEQUENCES)
    speed(ledger)
    for block in MEMORY:
        names = [(what, turn) for turn in range(TURNS) for what in ("plain", "step")]
        rows = [ledger.row(f"{what} of {block} turn {turn}", partial(apart, what, block)) for what, turn in names]
        plain, step = (statistics.median(row["peak_bytes"] for row in rows[first::2]) for first in (0, 1))
        states = 4 * 2 * 31 * SEQUENCES * block * 576  # of both, fp32: 30 blocks and the last norm
        ledger.row(
            f"memory of {block}",
            lambda plain=plain, step=step, states=states: {  # type: ignore[misc]
                "plain": plain, "step": step, "states": states, "ratio": (step - states) / plain
            },
        )  # fmt: skip


def speed(ledger: Ledger) -> None:
    with products.faster():
        plain, ids = Side("plain"), calibration(load("demo"), tokens=BLOCK * SEQUENCES, block=BLOCK, seed=0)
        side = Side("step")
        gates = side.gates

        def small() -> None:
            """What gates cost beside the passes."""
            assert gates is not None
            gates.clamp()
            chances = gates.chances()
            penalty, _ = gates.penalty(chances, 0.5)
            drawn = gates.drawn(stream(0, 1, ids.device))
            total: Tensor = penalty + sum(value.sum() * 0 for value in drawn.values())
            total.backward()  # type: ignore[no-untyped-call]
            side.also.step()
            gates.zero_grad()

        def once() -> dict[str, Any]:
            seconds = {"plain": timed(partial(plain.step, ids)), "step": timed(partial(side.step, ids))}
            seconds["gates"] = timed(small)
            return {
                "seconds": seconds,
                "step / plain": seconds["step"] / seconds["plain"],
                "gates / step": seconds["gates"] / seconds["step"],
            }

        with gated(side.base, side.anatomy, side.goal.live):
            once()
            turns = [ledger.row(f"turn {i}", once) for i in range(REPEATS)]
    names = [name for name in turns[0] if "/" in name]
    ledger.row("summary", lambda: {name: spread([turn[name] for turn in turns]) for name in names})


class Side:
    """A model with LoRA, what it lowers, and its optimisers."""

    def __init__(self, what: str) -> None:
        subject = load("demo")
        self.base, self.anatomy = subject.model, subject.anatomy
        self.model = add_adapters(self.base, "lora", rank=8, alpha=8, dropout=0, targets=("q_proj", "v_proj"))
        self.gates: LearnedGates | None = None
        self.goal: Any
        if what == "plain":
            bank = Bank(self.model)
            self.goal = Itself(self.model, bank)
        else:
            self.goal = goal = learning(self.model, subject.anatomy)
            self.gates = goal.gates
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.own = torch.optim.AdamW(weights, lr=1e-5, fused=True)
        if self.gates is not None:
            groups: list[dict[str, Any]] = [
                {"params": list(self.gates.a.values())},
                {"params": [self.gates.multipliers], "maximize": True},
            ]
            self.also = torch.optim.AdamW(groups, lr=1e-3, fused=True)

    def step(self, ids: Tensor) -> None:
        self.model.train()
        found = self.goal(self.model, {"input_ids": ids})
        (found[0] if isinstance(found, tuple) else found).backward()
        self.own.step()
        self.own.zero_grad()
        if self.gates is not None:
            self.also.step()
            self.also.zero_grad()


class Itself(FromTeacher):
    """Forward KL from the same weights without their adapters."""

    def __init__(self, model: Any, bank: Bank) -> None:
        super().__init__(model.get_base_model(), DIVERGENCES.get("forward-kl"))
        self.bank = bank

    def run(self, model: Any, ids: Tensor, mask: Tensor | None, who: str) -> Any:
        if who == "student":
            return super().run(model, ids, mask, who)
        with self.bank.speaking(None):
            return super().run(model, ids, mask, who)


def learning(model: Any, anatomy: Any) -> Learning:
    whole = of_weights(anatomy, 0.2)
    gates = LearnedGates(anatomy, ("group", "neuron", "channel"), [whole], seed=0)
    places = tuple(range(1, anatomy.sizes["L"] + 1))
    lesson = Lesson(DIVERGENCES.get("forward-kl"), LIKENESSES.get("mse"), {"temperature": 2 / 3}, places=places)
    pace = Pace(10**6, SEQUENCES, RAMPS.get("linear"), 10**5, 10**6)
    return Learning(
        model,
        anatomy,
        gates,
        whole,
        pace,
        taught=(lesson, Teachers(Course(0.2), Shelf())),
        settle=lambda: Plan.everything(anatomy),
    )


def apart(what: str, block: int) -> dict[str, Any]:
    """In a process of its own."""
    command = [sys.executable, __file__, what, str(block)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak(what: str, block: int) -> dict[str, Any]:
    """Bytes at the peak of three steps of a training, beyond those of an idle process."""
    with TemporaryDirectory() as folder, PeakMemory() as memory, products.faster():
        side = Side(what)
        ids = calibration(load("demo"), tokens=3 * block * SEQUENCES, block=block, seed=0)
        settings = TrainSettings(tokens=3 * block * SEQUENCES, batch=SEQUENCES, micro_batch=SEQUENCES, save_every=10**6)
        if what == "plain":
            objective: Callable[..., Any] | Objective = side.goal
            train(side.model, ids, settings, folder=Path(folder), loss=objective)
        else:
            with gated(side.base, side.anatomy, side.goal.live):
                train(side.model, ids, settings, folder=Path(folder), loss=side.goal.objective(Rates()))
    return {"peak_bytes": memory.bytes, "how": memory.how}


if __name__ == "__main__":
    main()
