"""Does a cut model gain what its FLOPs promise? SmolLM2 at 80 % and 50 %, uniform and differing widths, beside dense.

Widths are multiples of 32 neurons. Gain = dense time / cut time - 1; promised = dense FLOPs / cut FLOPs - 1 at the
same length. Decoding is reported beside it, with a model cut to almost nothing as the fixed overhead.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from cutting import cut
from ledger import Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import flops_per_token
from regrow.engines.bind import Subject
from regrow.engines.clock import run_lap
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

PROMPT, DECODE, REPEATS, DECODED = 512, 24, 21, 5  # the first laps decode too
AXES: tuple[Unit, ...] = ("neuron", "group")


def main() -> None:
    ledger = Ledger("latency", __doc__ or "", model="demo", prompt=PROMPT, decode=DECODE, repeats=REPEATS)
    subject = load("demo")
    dice = score(subject, choose("random", AXES, {}, {}), None, seed=0)
    for keep in ("80%", "50%"):
        for name, settings in (
            ("uniform", {"uniform": True}),
            ("differing", {"spread": "across", "divisors": {"neuron": 32}}),
        ):
            plan = make_plan(subject.anatomy, dice, Wish(budget=Budget.parse(keep), axes=AXES, **settings))
            ledger.row(f"{keep} {name}", partial(compare, subject, plan))
    least = Wish(budget=Budget.parse("decoder=1%"), axes=AXES, uniform=True)
    nothing = smallest(subject, dice, least)
    ledger.row("almost nothing left", partial(compare, subject, nothing))


def smallest(subject: Subject, scores: Any, wish: Wish) -> Plan:
    """One group and 32 neurons in every layer."""
    least = 32 * 3 * subject.anatomy.sizes["C"] + 2 * (1 + subject.anatomy.sizes["G"]) * 64 * subject.anatomy.sizes["C"]
    budget = Budget.parse(f"decoder={least * subject.anatomy.sizes['L']}")
    return make_plan(subject.anatomy, scores, Wish(budget=budget, axes=wish.axes, uniform=True))


def compare(subject: Subject, plan: Plan) -> dict[str, Any]:
    """Times of dense and cut, measured in turns."""
    anatomy = subject.anatomy
    ids = torch.randint(0, anatomy.sizes["V"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    dense_copy = {name: parameter.data for name, parameter in subject.model.named_parameters()}
    prompt: list[tuple[float, float]] = []
    decode: list[tuple[float, float]] = []
    with cut(subject, plan) as small:
        for name, parameter in subject.model.named_parameters():
            parameter.data = dense_copy[name]
        for lap in range(REPEATS + 1):
            steps = DECODE if lap <= DECODED else 1
            sides = [subject.model, small][:: 1 if lap % 2 else -1]  # neither always comes first
            dense, less = [run_lap(model, ids, steps) for model in sides][:: 1 if lap % 2 else -1]
            if lap:
                prompt.append((dense.prompt_seconds, less.prompt_seconds))
            if 0 < lap <= DECODED:
                decode.append((dense.decode_seconds / DECODE, less.decode_seconds / DECODE))
    flops = [flops_per_token(anatomy, shape, PROMPT // 2) for shape in (anatomy.dense, plan.shape())]
    head = 2 * anatomy.sizes["V"] * anatomy.sizes["C"]  # only the last position of a prompt needs logits
    promised = (flops[0] - head) / (flops[1] - head) - 1
    gains = [dense / less - 1 for dense, less in prompt]
    low, middle, high = statistics.quantiles(gains, n=4)
    return {
        "shape": str(plan.shape()),
        "promised_gain": promised,
        "prompt_gain": middle,
        "prompt_gain_quartiles": [low, high],
        "share_of_promise": middle / promised,
        "prompt_ms": [round(1000 * statistics.median(side), 2) for side in zip(*prompt, strict=True)],
        "decode_ms_per_token": [round(1000 * statistics.median(side), 2) for side in zip(*decode, strict=True)],
        "decode_gain": statistics.median([dense / less - 1 for dense, less in decode]),
    }


if __name__ == "__main__":
    main()
