"""Every criterion x spread x axes on SmolLM2 at 80 % of the decoder weights, no recovery, three calibration seeds.

    python bench/criteria.py --text PATH/wiki.test.raw [--share 1/2]

First 20,480 tokens of the text, tokenised once as it is, blocks of 2048 that do not overlap. The text is used for this
table only; defaults were chosen by `bench/defaults.py` on held-out demo text. Rows are kept, so it can be stopped, and
`--share i/n` measures every n-th pair of seed and criterion, for n processes of one thread each.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

from cutting import calibration, cut
from ledger import Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.scores import Scores
from regrow.cache import cache_dir
from regrow.engines.bind import Subject
from regrow.engines.perplexity import block_losses
from regrow.engines.tokens import text_blocks
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

CRITERIA = ("random", "activation", "taylor", "taylor-vectorize", "taylor-second", "taylor-mix", "magnitude")
STILL = ("magnitude",)  # reads no text and draws no numbers: one seed is all
SPREADS = ("uniform", "ends", "across")
AXES: tuple[tuple[Unit, ...], ...] = (("neuron",), ("neuron", "group"))
SEEDS = (0, 1, 2)
TOKENS, BLOCK = 4096, 128  # calibration


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--share", default="1/1")
    asked = parser.parse_args()
    text = asked.text.read_text()
    mine, shares = map(int, asked.share.split("/"))
    ledger = Ledger(
        "criteria",
        __doc__ or "",
        model="demo",
        keep="80%",
        calibration={"text": "demo", "tokens": TOKENS, "block": BLOCK},
        evaluation={"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": 20480, "seqlen": 2048},
    )
    subject = load("demo")
    ids = text_blocks(text, subject.tokenizer, seqlen=2048, max_tokens=20480)
    ledger.row("dense", lambda: {"perplexity": math.exp(block_losses(subject.model, ids).mean())})
    pairs = [(seed, criterion) for seed in SEEDS for criterion in CRITERIA if not (criterion in STILL and seed)]
    for seed, criterion in pairs[mine - 1 :: shares]:
        for axes in AXES:
            for spread in SPREADS:
                key = f"{criterion} {'+'.join(axes)} {spread} seed {seed}"
                ledger.row(key, partial(one, subject, ids, criterion, axes, spread, seed))


def one(subject: Subject, ids: Any, criterion: str, axes: tuple[Unit, ...], spread: str, seed: int) -> dict[str, Any]:
    """Perplexity of one cut."""
    found = scores(subject, criterion, seed)
    wish = Wish(budget=Budget.parse("80%"), axes=axes, spread=spread)
    plan = make_plan(subject.anatomy, found, wish)
    with cut(subject, plan) as small:
        loss = float(block_losses(small, ids).mean())
    kept = wish.budget.count(subject.anatomy, plan.shape())
    return {"perplexity": math.exp(loss), "seed": seed, "decoder_weights": kept, "shape": str(plan.shape())}


def scores(subject: Subject, criterion: str, seed: int) -> Scores:
    """Scores of neurons and groups, kept on disk between sittings."""
    name = f"{criterion}-{seed}-{TOKENS}x{BLOCK}-{subject.source['fingerprint']}.safetensors"
    path = cache_dir("bench-scores") / name
    if not path.exists():
        text = calibration(subject, tokens=TOKENS, block=BLOCK, seed=seed)
        score(subject, choose(criterion, ("neuron", "group"), {}, {}), text, seed=seed).save(path)
    return Scores.load(path)


if __name__ == "__main__":
    main()
