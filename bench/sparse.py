"""One-shot sparsity of SmolLM2: our methods beside plain loops of the published ones, on the same calibration tokens.

    python bench/sparse.py --text PATH/wiki.test.raw

8,192 calibration tokens (16 x 512) of demo text, three seeds; perplexity on the first 20,480 tokens of the text,
tokenised once as it is, blocks of 2048 that do not overlap. The text is used for this table only. Rows are kept, so it
can be stopped, and several processes may work on it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import plain
from cutting import calibration, restoring
from ledger import Ledger
from regrow.artifacts.pattern import Pattern
from regrow.engines.checkpoint import round_to
from regrow.engines.perplexity import block_losses
from regrow.engines.tokens import text_blocks
from regrow.engines.zeros import of_model
from regrow.settings import Sparsify
from regrow.stages import sparsify
from regrow.stages.load import load

TOKENS, BLOCK, SEEDS = 8192, 512, (0, 1, 2)
OURS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("magnitude", {"criterion": "magnitude"}),
    ("wanda", {"criterion": "wanda"}),
    ("sparsegpt", {"criterion": "sparsegpt"}),
    ("sparsegpt, both", {"criterion": "sparsegpt", "inputs": "both"}),
    ("sparsegpt + refit", {"criterion": "sparsegpt", "solver": ("update", "refit")}),
    ("mrp", {"criterion": "sparsegpt", "solver": ("mrp",)}),
    ("alps", {"criterion": "alps"}),
    ("alps, both", {"criterion": "alps", "inputs": "both"}),
    ("isc", {"criterion": "isc"}),
    ("dsnot", {"criterion": "dsnot"}),
)
SPREADS = ("owl", "hessian")  # how zeros are shared among layers, for SparseGPT
FIRST = ("magnitude", "wanda", "sparsegpt", "sparsegpt, both", "alps, both")
PATTERNS = ("50%", "2:4", "75%", "2:8")
STILL = ("magnitude",)  # reads no text: one seed is all
READ: dict[str, dict[str, Any]] = {  # other calibrations than the one above, for SparseGPT
    "2,048 tokens": {"tokens": 2048},
    "32,768 tokens": {"tokens": 32768},
    **{f"{domain} text": {"text": f"demo:{domain}"} for domain in ("coqa", "drop", "lambada", "squad")},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    text = parser.parse_args().text.read_text()
    ledger = Ledger(
        "sparse",
        __doc__ or "",
        model="demo",
        calibration={"text": "demo", "tokens": TOKENS, "block": BLOCK},
        evaluation={"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": 20480, "seqlen": 2048},
    )
    subject = load("demo")
    ids = text_blocks(text, subject.tokenizer, seqlen=2048, max_tokens=20480)

    def row(seed: int, pattern: str, settings: dict[str, Any] | str, **other: Any) -> dict[str, Any]:
        with restoring(subject.model):
            read = calibration(subject, **{"tokens": TOKENS, "block": BLOCK, "seed": seed, **other})
            began = time.perf_counter()
            if isinstance(settings, str):
                wanted = Pattern.parse(pattern)
                plain.run(subject.model, read, settings, float(wanted.zeros), wanted.keep, wanted.of)
                round_to(subject.model, subject.store)
            else:
                sparsify.apply(subject, Sparsify(pattern=pattern, **settings), read, seed=seed)
            seconds = time.perf_counter() - began
            found = of_model(subject.model, subject.anatomy)
            return {
                "perplexity": math.exp(block_losses(subject.model, ids).mean()),
                "seed": seed,
                "zeros": found.share,
                "groups": found.groups,
                "mask": found.mask_hash,
                "seconds": seconds,
            }

    def dense() -> dict[str, Any]:
        return {"perplexity": math.exp(block_losses(subject.model, ids).mean())}

    ledger.work([ledger.job(key, task) for key, task in [("dense", dense), *rows(row)]])


def rows(row: Any) -> list[tuple[str, Any]]:
    """In the order of their worth: what decides the question first."""
    found: dict[str, Any] = {}

    def add(names: tuple[str, ...], patterns: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        methods: dict[str, Any] = {name: settings for name, settings in OURS if name in names}
        methods |= {f"plain {name}": name for name in plain.METHODS if name in names}
        for seed, pattern, (name, settings) in product(seeds, patterns, methods.items()):
            if not (seed and name.endswith(STILL)):
                found.setdefault(f"{name} {pattern} seed {seed}", partial(row, seed, pattern, settings))

    every = tuple(name for name, _ in OURS)
    add(FIRST, PATTERNS[:2], SEEDS)
    add(FIRST, PATTERNS[2:], SEEDS[:1])
    for name, other in READ.items():
        found[f"sparsegpt, {name} 2:4 seed 0"] = partial(row, 0, "2:4", {"criterion": "sparsegpt"}, **other)
    for how, pattern in product(SPREADS, ("50%", "75%")):
        settings = {"criterion": "sparsegpt", "spread": how}
        found[f"sparsegpt, {how} {pattern} seed 0"] = partial(row, 0, pattern, settings)
    add(every, PATTERNS[:2], SEEDS)
    add(FIRST, PATTERNS[2:], SEEDS)
    return list(found.items())


if __name__ == "__main__":
    main()
