"""A distillation step of SmolLM2 at 80 % from SmolLM2, 1,024 tokens, beside its parts measured alone; runs take turns.

The parts: the teacher's forward, and the student's forward and backward on whole logits and the text's next token. A
step (logits by forward KL in pieces, and what else is named) is asked to take at most 1.10 of their sum, optimiser left
out. `whole` is the same loss on whole logits of both models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import kl_div

from cutting import calibration, cut
from ledger import Ledger, spread, timed
from regrow.artifacts.budget import Budget
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.artifacts.plan import Plan
from regrow.engines import products
from regrow.engines.bind import Subject
from regrow.engines.distil import FromTeacher
from regrow.engines.match import Match, Matcher
from regrow.engines.objective import next_token
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

BLOCK, SEQUENCES, REPEATS = 256, 4, 7
STATES = (0, 4)


def main() -> None:
    ledger = Ledger("distil_speed", __doc__ or "", model="demo", keep="80%", block=BLOCK, sequences=SEQUENCES)
    teacher, subject = load("demo").model, load("demo")
    ids = calibration(subject, tokens=BLOCK * SEQUENCES, block=BLOCK, seed=0)
    with products.faster(), cut(subject, narrow(subject)) as student:
        student.train()
        forward_kl = DIVERGENCES.get("forward-kl")
        match = Match(LIKENESSES.get("cosine"), STATES)
        losses: dict[str, Callable[..., Any]] = {
            "pieces": FromTeacher(teacher, forward_kl),
            "pieces, text too": FromTeacher(teacher, forward_kl, text=1.0),
            "pieces, states too": FromTeacher(teacher, forward_kl, matcher=Matcher(match, student, teacher)),
            "whole": partial(whole, teacher),
        }
        goals = {name: partial(loss, student, {"input_ids": ids}) for name, loss in losses.items()}
        parts: dict[str, Callable[[], Any]] = {
            "teacher": lambda: alone(teacher, ids),
            "student": lambda: learn(student, lambda: next_token(student, {"input_ids": ids})),
        }

        def once() -> dict[str, Any]:
            seconds = {name: timed(part) for name, part in parts.items()}
            seconds |= {name: timed(partial(learn, student, goal)) for name, goal in goals.items()}
            both = sum(seconds[name] for name in parts)
            return {"seconds": seconds, **{f"{name} / parts": seconds[name] / both for name in goals}}

        once()
        turns = [ledger.row(f"turn {i}", once) for i in range(REPEATS)]
    names = [name for name in turns[0] if "/" in name]
    ledger.row("summary", lambda: {name: spread([turn[name] for turn in turns]) for name in names})


def narrow(subject: Subject) -> Plan:
    """Fewer neurons, the same number in every layer; which of them makes no difference here."""
    wish = Wish(budget=Budget.parse("80%"), axes=("neuron",), uniform=True)
    return make_plan(subject.anatomy, score(subject, choose("magnitude", wish.axes, {}, {}), None, seed=0), wish)


def alone(teacher: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        teacher(input_ids=ids, use_cache=False)


def learn(student: Any, goal: Callable[[], Any]) -> None:
    """Forward and backward."""
    found = goal()
    (found[0] if isinstance(found, tuple) else found).backward()
    student.zero_grad(set_to_none=True)


def whole(teacher: Any, student: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean KL over all positions, with both models' logits in memory."""
    ids = batch["input_ids"]
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    ours = student(input_ids=ids, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    return kl_div(ours, theirs, reduction="batchmean", log_target=True)


if __name__ == "__main__":
    main()
