"""Chooses the defaults on held-out demo text, before any evaluation text is read.

Asked: which criterion, which spread, how many calibration tokens in which block, and whether `across` should divide
scores by the layer's mean. One number each: perplexity of SmolLM2 at 80 %, without recovery, on 8,192 held-out tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cutting import calibration, cut
from ledger import Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.scores import Scores
from regrow.engines.perplexity import block_losses
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

TOKENS, BLOCK = 8192, 512
CRITERIA = ("random", "magnitude", "activation", "taylor", "taylor-vectorize", "taylor-second", "taylor-mix")


def main() -> None:
    ledger = Ledger(
        "defaults", __doc__ or "", model="demo", keep="80%", text="demo held out", tokens=TOKENS, block=BLOCK
    )
    subject = load("demo")
    heldout = blocks(documents("demo", "heldout"), subject.tokenizer, block=BLOCK, tokens=TOKENS, seed=0)
    held: dict[Any, Scores] = {}

    def scores(criterion: str, tokens: int, block: int) -> Scores:
        key = (criterion, tokens, block)
        if key not in held:
            chosen = choose(criterion, ("neuron", "group"), {}, {})
            text = calibration(subject, tokens=tokens, block=block, seed=0)
            held[key] = score(subject, chosen, text, seed=0)
        return held[key]

    def perplexity(found: Scores | tuple[str, int, int], spread: str, axes: tuple[Any, ...]) -> dict[str, Any]:
        found = found if isinstance(found, Scores) else scores(*found)
        plan = make_plan(subject.anatomy, found, Wish(budget=Budget.parse("80%"), axes=axes, spread=spread))
        with cut(subject, plan) as small:
            return {"perplexity": math.exp(block_losses(small, heldout).mean()), "shape": str(plan.shape())}

    ledger.row("dense", lambda: {"perplexity": math.exp(block_losses(subject.model, heldout).mean())})
    for criterion in CRITERIA:
        for axes in (("neuron",), ("neuron", "group")):
            for spread in ("uniform", "ends", "across"):
                key = f"{criterion} {'+'.join(axes)} {spread} 4096x128"
                ledger.row(key, partial(perplexity, (criterion, 4096, 128), spread, axes))
    for criterion in ("activation", "taylor"):
        for tokens, block in ((1024, 128), (16384, 128), (4096, 512)):
            key = f"{criterion} neuron uniform {tokens}x{block}"
            ledger.row(key, partial(perplexity, (criterion, tokens, block), "uniform", ("neuron",)))
    for criterion in ("activation", "taylor", "taylor-second"):
        found = scores(criterion, 4096, 128)
        flipped = {
            unit: {**row, "comparable": not row["comparable"]} for unit, row in found.made_by["criteria"].items()
        }
        other = replace(found, made_by={**found.made_by, "criteria": flipped})
        ledger.row(f"{criterion} neuron across, scale flipped", partial(perplexity, other, "across", ("neuron",)))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
