"""What refitting wins behind a cut of SmolLM2 to 80 % of the decoder weights, before any training.

    python bench/refit.py --text PATH/wiki.test.raw

First, on held-out demo text: how many tokens are read, and how much damping; the defaults were chosen here. Then, with
the defaults, on the evaluation text: criteria and axes as in `bench/criteria.py`, ends kept whole, three calibration
seeds. Several processes may work on it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

from criteria import AXES, BLOCK, SEEDS, scores
from cutting import calibration, cut, restoring
from ledger import Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.engines.bind import Subject
from regrow.engines.perplexity import block_losses
from regrow.engines.refit import refit
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks, text_blocks
from regrow.settings import Refit
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan

CRITERIA = ("activation", "taylor-second")
TRIED = [
    *((tokens, None) for tokens in (2048, 4096, 8192, 16384, 32768)),
    *((tokens, damping) for tokens in (4096, 16384) for damping in (0.03, 0.1, 0.3)),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    text = parser.parse_args().text.read_text()
    usual = Refit()
    ledger = Ledger(
        "refit",
        __doc__ or "",
        model="demo",
        keep="80%",
        block=BLOCK,
        defaults=usual.model_dump(),
        evaluation={"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": 20480, "seqlen": 2048},
    )
    subject = load("demo")
    heldout = blocks(documents("demo", "heldout"), subject.tokenizer, block=512, tokens=8192, seed=0)
    ids = text_blocks(text, subject.tokenizer, seqlen=2048, max_tokens=20480)
    job = ledger.job
    ledger.work(
        [
            job(
                "dense",
                lambda: {"perplexity": measured(subject.model, ids), "heldout": measured(subject.model, heldout)},
            ),
            *(
                job(f"held out {count} damped {damping or 'found'}", partial(tried, subject, heldout, count, damping))
                for count, damping in TRIED
            ),
            *(
                job(
                    f"{criterion} {'+'.join(axes)} seed {seed}",
                    partial(one, subject, ids, criterion, axes, seed, usual),
                )
                for seed in SEEDS
                for criterion in CRITERIA
                for axes in AXES
            ),
        ]
    )


def tried(subject: Subject, heldout: Any, tokens: int, damping: float | None) -> dict[str, Any]:
    """Perplexity of the default cut on held-out demo text."""
    return fitted(subject, heldout, ("taylor-second", ("neuron",), 0), Refit(tokens=tokens, damping=damping))


def one(subject: Subject, ids: Any, criterion: str, axes: tuple[Unit, ...], seed: int, asked: Refit) -> dict[str, Any]:
    return fitted(subject, ids, (criterion, axes, seed), asked)


def fitted(subject: Subject, ids: Any, way: tuple[str, tuple[Unit, ...], int], asked: Refit) -> dict[str, Any]:
    """Perplexity as cut, and as cut behind a refit; mean relative errors of the outputs that were fitted."""
    criterion, axes, seed = way
    wish = Wish(budget=Budget.parse("80%"), axes=axes, spread="ends")
    plan = make_plan(subject.anatomy, scores(subject, criterion, seed), wish)
    with cut(subject, plan) as small:
        before = measured(small, ids)
    text = calibration(subject, tokens=asked.tokens, block=BLOCK, seed=seed)
    with restoring(subject.model):
        found = refit(subject.model, subject.anatomy, plan, text, damping=asked.damping)
        with cut(subject, plan) as small:
            after = measured(small, ids)
    errors = [sum(getattr(x, when) for x in found) / len(found) for when in ("before", "after")]
    chosen = [x.damping if math.isfinite(x.damping) else "as it was" for x in found]
    return {"as_cut": before, "refitted": after, "errors": errors, "damping": chosen, "seed": seed}


def measured(model: Any, ids: Any) -> float:
    """Perplexity."""
    return math.exp(block_losses(model, ids).mean())


if __name__ == "__main__":
    main()
