"""Many cuts of one model in memory: the intact tensors are kept, and put back after each cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from regrow.artifacts.plan import Plan
from regrow.engines.bind import Subject
from regrow.engines.checkpoint import round_to
from regrow.engines.hetero import build, holder
from regrow.engines.surgery import slice_model
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks


@contextmanager
def cut(subject: Subject, plan: Plan) -> Iterator[Any]:
    """The cut model, rounded as it would be stored; the intact one is whole again afterwards."""
    model = subject.model
    intact = {name: parameter.data for name, parameter in model.named_parameters()}
    found = holder(model.config, subject.anatomy, plan)
    try:
        with torch.no_grad():
            small = build(found.config, dict(slice_model(model, subject.anatomy, plan)))
            unshare(small, intact)
            round_to(small, subject.store)
        yield small
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = intact[name]


@contextmanager
def restoring(model: Any) -> Iterator[None]:
    """Whatever is written into the weights meanwhile, they are as before afterwards."""
    intact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(intact[name])


def unshare(small: Any, intact: dict[str, torch.Tensor]) -> None:
    """Tensors that were not cut are the intact ones themselves: copy them before they are rounded."""
    addresses = {tensor.data_ptr() for tensor in intact.values()}
    for parameter in small.parameters():
        if parameter.data_ptr() in addresses:
            parameter.data = parameter.data.clone()


def calibration(subject: Subject, *, tokens: int, block: int, seed: int, text: str = "demo") -> torch.Tensor:
    """(n, block) int64 from the calibration part."""
    return blocks(documents(text, "calibration"), subject.tokenizer, block=block, tokens=tokens, seed=seed)
