"""Choices of one-shot sparsity, made on held-out demo text: how far to mend, and how much to damp.

SparseGPT and ALPS on SmolLM2, 8,192 calibration tokens (16 x 512), two seeds; perplexity on 8,192 tokens of the
held-out part of the demo text, blocks of 512. The evaluation text is not looked at. `mend 0` reads pruned inputs, as
published.

    python bench/sparse_defaults.py [--share 1/2]
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

from cutting import calibration, restoring
from ledger import Ledger
from regrow.engines.perplexity import block_losses
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.settings import Sparsify
from regrow.stages import sparsify
from regrow.stages.load import load

TOKENS, BLOCK, SEEDS, PATTERNS = 8192, 512, (0, 1), ("50%", "2:4")
MENDS = (0.06, 0.12, 0.25)
DAMPINGS = (0.001, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", default="1/1")
    mine, shares = map(int, parser.parse_args().share.split("/"))
    ledger = Ledger("sparse_defaults", __doc__ or "", model="demo", tokens=TOKENS, block=BLOCK)
    subject = load("demo")
    heldout = blocks(documents("demo", "heldout"), subject.tokenizer, block=BLOCK, tokens=TOKENS, seed=0)

    def perplexity() -> float:
        return math.exp(block_losses(subject.model, heldout).mean())

    def row(seed: int, settings: Sparsify) -> dict[str, Any]:
        with restoring(subject.model):
            text = calibration(subject, tokens=TOKENS, block=BLOCK, seed=seed)
            sparsify.apply(subject, settings, text, seed=seed)
            return {"perplexity": perplexity(), "seed": seed}

    ledger.row("dense", lambda: {"perplexity": perplexity()})
    tried: dict[str, dict[str, Any]] = {"mend 0": {}}
    tried |= {f"mend {mend:g}": {"inputs": "both", "mend": mend} for mend in MENDS}
    tried |= {f"alps, mend {mend:g}": {"criterion": "alps", "inputs": "both", "mend": mend} for mend in MENDS[1:]}
    tried |= {f"damping {damping:g}": {"damping": damping} for damping in DAMPINGS}
    rows = [
        (f"{name} {pattern} seed {seed}", partial(row, seed, Sparsify(pattern=pattern, **settings)))
        for seed in SEEDS
        for pattern in PATTERNS
        for name, settings in tried.items()
    ]
    for key, task in rows[mine - 1 :: shares]:
        ledger.row(key, task)


if __name__ == "__main__":
    main()
