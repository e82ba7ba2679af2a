"""Peak memory of one-shot sparsity and of an SPP step on SmolLM2, beyond the loaded model, each in its own process.

Sparsity of the first blocks, which is where every other has its peak too: beside what `regrow estimate` states, asked
within 15 %; once more of a random layer of eight experts, whose Gram matrices all wait in memory. A training step over
the decoder blocks with 1,024 tokens: SPP in its lean form must not take more than plain LoRA of the same rank.

glibc keeps freed blocks below 32 MB for later. Matrices of models worth pruning are larger and go back at once, those
of SmolLM2 are not; so the processes here have all blocks above 64 KB given back.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
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
    "sparsegpt, both": {"criterion": "sparsegpt", "inputs": "both"},
    "sparsegpt + refit": {"criterion": "sparsegpt", "solver": ("update", "refit")},
    "mrp": {"criterion": "mrp"},
    "alps": {"criterion": "alps"},
    "alps, both": {"criterion": "alps", "inputs": "both"},
    "dsnot": {"criterion": "dsnot"},
}
PATTERNS = ("50%", "2:4")
ROUTED = ("wanda", "sparsegpt", "mrp", "alps")  # of experts, at 2:4
ADAPTERS = {"lora": "", "spp lean": "lean", "spp published lean": PUBLISHED}
ADAPTERS |= {"spp folded": "folded", "spp checkpointed": "checkpointed"}


def main() -> None:
    if len(sys.argv) > 1:
        kind, name, *rest = sys.argv[1:]
        kinds: dict[str, Callable[..., dict[str, Any]]] = {"step": step, "sparse": sparse, "experts": experts}
        print(json.dumps(kinds[kind](name, *rest)))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    ledger = Ledger("sparse_memory", __doc__ or "", model="demo", tokens=TOKENS, block=BLOCK, layers=LAYERS, rank=RANK)
    for name in ADAPTERS:
        ledger.row(f"step: {name}", partial(child_of, __file__, "step", name))
    for pattern in PATTERNS:
        for name in METHODS:
            ledger.row(f"{name} {pattern}", partial(child_of, __file__, "sparse", name, pattern))

    for name in ROUTED:
        ledger.row(f"experts: {name} 2:4", partial(child_of, __file__, "experts", name))


def sparse(name: str, pattern: str) -> dict[str, Any]:
    libraries()
    from cutting import calibration
    from regrow.stages.load import load

    subject = load("demo")
    model: Any = subject.model
    blocks = calibration(subject, tokens=TOKENS, block=BLOCK, seed=0)
    model.model.layers = model.model.layers[:LAYERS]
    return peak(model, subject.anatomy, blocks, name, pattern)


def experts(name: str) -> dict[str, Any]:
    """One layer, random: eight experts of 1,536 neurons, of which a token meets two."""
    libraries()
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    from regrow.engines.bind import bind

    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = MixtralConfig(**shape, num_local_experts=8, num_hidden_layers=1, vocab_size=256)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    blocks = torch.randint(3, config.vocab_size, (TOKENS // BLOCK, BLOCK))
    return peak(model, bind(config, model), blocks, name, "2:4")


def peak(model: Any, anatomy: Any, blocks: Any, name: str, pattern: str) -> dict[str, Any]:
    from regrow.artifacts.pattern import Pattern
    from regrow.engines import clock, products
    from regrow.engines.clock import PeakMemory
    from regrow.engines.sparsify import sparsify
    from regrow.settings import Sparsify
    from regrow.sparse_costs import sparse_bytes
    from regrow.stages.sparsify import choose

    method = choose(Sparsify(**METHODS[name]))
    few = [Pattern.parse(pattern)] * len(model.model.layers)
    clock.POLL_SECONDS = 0.001  # the peak of a matrix this small lasts for milliseconds
    with products.faster():
        # libraries make kernels at first use, of experts for every number of tokens
        sparsify(copy.deepcopy(model), anatomy, blocks if "A" in anatomy.sizes else blocks[:1], method, few)
        with PeakMemory() as memory:
            sparsify(model, anatomy, blocks, method, few)
    stated = sparse_bytes(anatomy, method, few[0], tokens=TOKENS, block=BLOCK)
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
