"""Keeps the zeros of a sparse model where they are while it is trained, and proves afterwards that they are.

What this gives up: one byte a weight, for the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regrow.artifacts.shape import Anatomy
from regrow.artifacts.sparsity import is_sparse
from regrow.engines.zeros import left
from regrow.errors import IdentityError

Masks = Mapping[str, Tensor]  # by name of the weight, True where it is zero


def masks_of(model: Any, anatomy: Anatomy) -> Masks | None:
    """Where the weights whose zeros count are zero; None for a model of which no matrix is sparse."""
    weights = {name: weight.detach() for name, weight in left(model, anatomy).items()}
    if not any(is_sparse(int((weight == 0).sum()), weight.numel()) for weight in weights.values()):
        return None
    return {name: weight == 0 for name, weight in weights.items()}


@contextmanager
def held(model: Any, masks: Masks | None) -> Iterator[None]:
    """While open, gradients of masked weights are zero, so that no optimiser moves them."""
    handles = []
    parameters = dict(model.named_parameters())
    try:
        for name, mask in (masks or {}).items():
            if parameters[name].requires_grad:

                def still(weight: Tensor, mask: Tensor = mask) -> None:
                    assert weight.grad is not None
                    weight.grad.masked_fill_(mask.to(weight.device), 0)

                handles.append(parameters[name].register_post_accumulate_grad_hook(still))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def lost(model: Any, masks: Masks) -> dict[str, int]:
    """Zeros that are none any more, by name of the weight."""
    parameters = dict(model.named_parameters())
    counts = {
        name: int((parameters[name][mask.to(parameters[name].device)] != 0).sum()) for name, mask in masks.items()
    }
    return {name: count for name, count in counts.items() if count}


@torch.no_grad()
def put_back(model: Any, masks: Masks) -> None:
    """Zero every masked weight, with a plain +0."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(mask.to(parameters[name].device), 0)


def check_kept(model: Any, masks: Masks) -> None:
    """Raise `IdentityError` when a zero was lost."""
    gone = lost(model, masks)
    if gone:
        name, count = next(iter(gone.items()))
        raise IdentityError(
            f"{sum(gone.values()):,} zeros were filled, {count:,} of them in {name}",
            "every zero of the sparse model, where it was",
            "nothing was written; please report it",
        )
