"""A training step of SPP over SmolLM2's decoder blocks, 1,024 tokens, beside the frozen model's; runs take turns.

Frozen: forward and the gradient of the input, 4 m n T operations a linear. The folded form does 6, so 1.5 of it at
best, and at most 1.65 is asked; the published lean form does 8, and folded is asked to be at least 1.2 times faster.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import plain
from cutting import calibration
from ledger import Ledger, spread
from regrow.engines import spp_forward
from regrow.engines.adapters import add_adapters, layer_linears
from regrow.engines.removal import layer_arguments, run_layer
from regrow.engines.spp import SppConfig
from regrow.stages.load import load

BLOCK, SEQUENCES, RANK, REPEATS = 512, 2, 16, 7
PUBLISHED = "published lean"
FORMS = ("folded", "lean", PUBLISHED, "checkpointed")
spp_forward.FORMS[PUBLISHED] = plain.lean


def main() -> None:
    ledger = Ledger("spp_speed", __doc__ or "", model="demo", block=BLOCK, sequences=SEQUENCES, rank=RANK)
    models = {"frozen": adapted("none", "", RANK), "lora": adapted("", "", RANK)}
    models |= {form: adapted("spp", form, RANK) for form in FORMS}

    def once() -> dict[str, Any]:
        seconds = {}
        for name, one in models.items():
            began = time.perf_counter()
            pass_through(*one)
            seconds[name] = time.perf_counter() - began
        pairs = (*((form, "frozen") for form in (*FORMS, "lora")), (PUBLISHED, "folded"))
        return {"seconds": seconds, **{f"{name} / {base}": seconds[name] / seconds[base] for name, base in pairs}}

    for one in models.values():
        pass_through(*one)
    turns = [ledger.row(f"turn {i}", once) for i in range(REPEATS)]
    names = [name for name in turns[0] if "/" in name]
    ledger.row("summary", lambda: {name: spread([turn[name] for turn in turns]) for name in names})


def adapted(kind: str, form: str, rank: int) -> tuple[Any, torch.Tensor, list[Any]]:
    """The model with adapters (spp, none, else lora), none of their factors zero; the stream (b, T, d); the calls."""
    from peft import get_peft_model

    subject = load("demo")
    model: Any = subject.model
    blocks = calibration(subject, tokens=BLOCK * SEQUENCES, block=BLOCK, seed=0)
    names = layer_linears(model)
    with torch.no_grad():
        stream, calls = layer_arguments(model, list(model.model.layers), blocks)
    if kind == "spp":
        model = get_peft_model(model, SppConfig(r=rank, spp_alpha=2 * rank, target_modules=names, form=form))
    elif kind != "none":
        model = add_adapters(model, "lora", rank=rank, alpha=2 * rank, dropout=0.0)
    else:
        model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model, stream, calls


def pass_through(model: Any, stream: torch.Tensor, calls: list[Any]) -> None:
    """Forward through every block, and backward to the stream and to the adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    start = stream.detach().clone().requires_grad_(True)
    end = start
    for layer, call in zip(base.model.layers, calls, strict=True):
        end = run_layer(layer, end, *call)
    torch.autograd.backward(end.square().mean())
    for parameter in model.parameters():
        parameter.grad = None


if __name__ == "__main__":
    main()
