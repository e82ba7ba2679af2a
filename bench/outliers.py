"""Why chance is so uneven, and where first-order Taylor falls: a few units carry most of what a cut can lose.

    python bench/outliers.py --text PATH/wiki.test.raw

Same model, text and calibration as `bench/criteria.py`; nothing is chosen by it. Three questions, all at 80 % of the
decoder weights: what random cuts lose when the few neurons that score highest are kept (others go in their place); what
each group of the first layer costs when it alone is cut; what the runs in which Taylor lost to chance lose when the
dearest of those groups is kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from criteria import BLOCK, SEEDS, TOKENS, scores
from cutting import cut
from ledger import Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.engines.bind import Subject
from regrow.engines.perplexity import block_losses
from regrow.engines.tokens import text_blocks
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan

KEPT = (8, 64)  # neurons of 46,080
LOST = (
    ("taylor", "across", 1),
    ("taylor-vectorize", "uniform", 1),
    ("taylor-vectorize", "across", 1),
)  # criterion, spread, seed of the rows of `bench/criteria.py` above 200 with neurons and groups


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    text = parser.parse_args().text.read_text()
    ledger = Ledger("outliers", __doc__ or "", model="demo", keep="80%", calibration={"tokens": TOKENS, "block": BLOCK})
    subject = load("demo")
    ids = text_blocks(text, subject.tokenizer, seqlen=2048, max_tokens=20480)

    def measure(plan: Plan) -> dict[str, Any]:
        with cut(subject, plan) as small:
            return {"perplexity": math.exp(block_losses(small, ids).mean()), "shape": str(plan.shape())}

    groups = range(subject.anatomy.sizes["K"])
    for group in groups:
        ledger.row(f"layer 0 without group {group}", partial(measure, without(subject, group)))
    dearest = max(groups, key=lambda group: ledger.data["rows"][f"layer 0 without group {group}"]["perplexity"])
    for criterion in ("taylor", "taylor-vectorize", "taylor-second"):
        name = f"score of layer 0 group {dearest} by {criterion}"
        ledger.row(name, partial(standing, subject, criterion, dearest))
    for criterion, spread, seed in LOST:
        found = keep(scores(subject, criterion, seed), "group", [dearest])
        plan = cut_to(subject, found, ("neuron", "group"), spread)
        ledger.row(
            f"{criterion} neuron+group {spread} seed {seed}, layer 0 group {dearest} kept", partial(measure, plan)
        )
    for seed in SEEDS:
        best = scores(subject, "taylor-second", 0).table["neuron"].flatten().argsort(descending=True)
        for count in KEPT:
            found = keep(scores(subject, "random", seed), "neuron", best[:count].tolist())
            plan = cut_to(subject, found, ("neuron",), "ends")
            ledger.row(f"random neuron ends seed {seed}, {count} neurons kept", partial(measure, plan))


def standing(subject: Subject, criterion: str, group: int) -> dict[str, Any]:
    """How many groups of the model score less than this one of the first layer; a number for each seed."""
    tables = [scores(subject, criterion, seed).table["group"] for seed in SEEDS]  # (layers, groups)
    return {"below": [int((table < table[0, group]).sum()) for table in tables], "of": tables[0].numel()}


def without(subject: Subject, group: int) -> Plan:
    """Everything but one group of the first layer."""
    plan = Plan.everything(subject.anatomy)
    first, each = plan.layers[0], subject.anatomy.sizes["G"]
    smaller = replace(
        first,
        groups=tuple(g for g in first.groups if g != group),
        heads=tuple(h for h in first.heads if h // each != group),
    )
    return replace(plan, layers=(smaller, *plan.layers[1:]))


def keep(found: Scores, unit: Unit, places: list[int]) -> Scores:
    """The same scores with some units, as places in the flattened table, above all others."""
    table: Mapping[Unit, torch.Tensor] = found.table
    raised = table[unit].clone().flatten()
    raised[places] = 2 * raised.max()
    return replace(found, table={**table, unit: raised.view_as(table[unit])})


def cut_to(subject: Subject, found: Scores, axes: tuple[Unit, ...], spread: str) -> Plan:
    return make_plan(subject.anatomy, found, Wish(budget=Budget.parse("80%"), axes=axes, spread=spread))


if __name__ == "__main__":
    main()
