"""Peak memory of one-shot sparsity and of an SPP step on SmolLM2, beyond the loaded model, each in its own process.

Sparsity of the first blocks, which is where every other has its peak too: beside what `regrow estimate` states, asked
within 15 %. A training step over the decoder blocks with 1,024
tokens: SPP in its lean form must not take more than plain LoRA of the same rank.

glibc keeps freed blocks below 32 MB for later. Matrices of models worth pruning are larger and go back at once, those
of SmolLM2 are not; so the processes here have all blocks above 64 KB given back.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from functools import partial
from typing import Any

from ledger import Ledger
from memory import child_of, libraries

PUBLISHED = "published lean"  # as spp_speed names it, which loads what a child may not have loaded yet

TOKENS, BLOCK, LAYERS, RANK = 8192, 512, 2, 16
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "wanda": {"criterion": "wanda"},
    "sparsegpt": {"criterion": "sparsegpt"},
    "sparsegpt + refit": {"criterion": "sparsegpt", "solver": ("update", "refit")},
    "mrp": {"criterion": "mrp"},
    "alps": {"criterion": "alps"},
    "alps, both": {"criterion": "alps", "inputs": "both"},
    "dsnot": {"criterion": "dsnot"},
}
PATTERNS = ("50%", "2:4")
ADAPTERS = {"lora": "", "spp lean": "lean", "spp published lean": PUBLISHED}
ADAPTERS |= {"spp folded": "folded", "spp checkpointed": "checkpointed"}


def main() -> None:
    if len(sys.argv) > 1:
        kind, name, *rest = sys.argv[1:]
        print(json.dumps(step(name) if kind == "step" else sparse(name, rest[0])))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    ledger = Ledger("sparse_memory", __doc__ or "", model="demo", tokens=TOKENS, block=BLOCK, layers=LAYERS, rank=RANK)
    for name in ADAPTERS:
        ledger.row(f"step: {name}", partial(child_of, __file__, "step", name))
    for pattern in PATTERNS:
        for name in METHODS:
            ledger.row(f"{name} {pattern}", partial(child_of, __file__, "sparse", name, pattern))


def sparse(name: str, pattern: str) -> dict[str, Any]:
    libraries()
    from cutting import calibration
    from regrow.artifacts.pattern import Pattern
    from regrow.engines import clock, products
    from regrow.engines.clock import PeakMemory
    from regrow.engines.sparsify import sparsify
    from regrow.settings import Sparsify
    from regrow.sparse_costs import sparse_bytes
    from regrow.stages.load import load
    from regrow.stages.sparsify import choose

    subject = load("demo")
    model: Any = subject.model
    method = choose(Sparsify(**METHODS[name]))
    blocks = calibration(subject, tokens=TOKENS, block=BLOCK, seed=0)
    model.model.layers = model.model.layers[:LAYERS]
    few = [Pattern.parse(pattern)] * LAYERS
    clock.POLL_SECONDS = 0.001  # the peak of a matrix this small lasts for milliseconds
    with products.faster():
        sparsify(copy.deepcopy(model), subject.anatomy, blocks[:1], method, few)  # libraries make kernels at first use
        with PeakMemory() as memory:
            sparsify(model, subject.anatomy, blocks, method, few)
    stated = sparse_bytes(subject.anatomy, method, few[0], tokens=TOKENS, block=BLOCK)
    return {"bytes": memory.bytes, "stated": stated, "ratio": memory.bytes / stated, "how": memory.how}


def step(name: str) -> dict[str, Any]:
    """Forward and backward through the decoder blocks, adapters on every linear."""
    libraries()
    from regrow.engines import products
    from regrow.engines.clock import PeakMemory
    from spp_speed import adapted, pass_through

    model, stream, calls = adapted(ADAPTERS[name] and "spp", ADAPTERS[name], RANK)
    with products.faster():
        pass_through(model, stream[:1], calls)
        with PeakMemory() as memory:
            pass_through(model, stream, calls)
    return {"bytes": memory.bytes, "how": memory.how}


if __name__ == "__main__":
    main()
