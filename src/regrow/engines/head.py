"""The head of a model, and losses through it a few tokens at a time: logits of a batch are never held whole.

A piece's loss and its gradient are made together and the piece is forgotten, so memory grows with neither tokens nor
vocabulary. Results are those of the plain way to rounding. What this gives up: a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from regrow.errors import UnsupportedModel

NUMBERS = 2**24  # logits that are held at a time


@dataclass(frozen=True, slots=True)
class Head:
    """What turns states (n, C) into logits (n, V)."""

    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    shape: Callable[[Tensor], Tensor]  # scales and soft caps

    def logits(self, states: Tensor) -> Tensor:  # (n, V) fp32
        return self.shape(linear(states, self.weight, self.bias)).float()


def head_of(model: Any) -> Head:
    """Raises `UnsupportedModel` for a head that is no linear."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        raise UnsupportedModel(
            f"a head of type {type(module).__name__}", "a linear from states to logits", "leave the teacher out"
        )
    return Head(module.weight, module.bias, shaping(model.config))


def shaping(config: Any) -> Callable[[Tensor], Tensor]:
    """What some families do to logits: scale (Cohere), divide (Granite), soft cap (Gemma)."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def shape(logits: Tensor) -> Tensor:
        logits = logits * scale if scale else logits
        logits = logits / divisor if divisor else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return shape


def mean_over_tokens(
    head: Head,
    states: Tensor,
    measure: Callable[[Tensor, slice], Tensor],
    valid: Tensor | None = None,
) -> Tensor:  # () fp32
    """Mean of `measure(logits (p, V) fp32, which tokens)` -> (p,) over tokens, with gradients to states and head.

    `states` (n, C) are what the head receives; of tokens that are not `valid` (n,) bool nothing is counted.
    """
    weights = torch.ones(len(states), device=states.device) if valid is None else valid.float()  # (n,)
    weights = weights / weights.sum().clamp_min(1)
    return _Pieces.apply(states, head.weight, head.bias, head.shape, measure, weights)  # type: ignore[no-untyped-call,no-any-return]


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: Callable[[Tensor], Tensor],
        measure: Callable[[Tensor, slice], Tensor],
        weights: Tensor,
    ) -> Tensor:
        wanted = [need and tensor is not None for need, tensor in zip(ctx.needs_input_grad, (states, weight, bias))]
        leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip((states, weight, bias), wanted)]
        sums = [torch.zeros_like(leaf, dtype=torch.float32) if w else None for leaf, w in zip(leaves, wanted)]
        total = torch.zeros((), device=states.device)
        step = max(1, NUMBERS // len(weight))
        for start in range(0, len(states), step):
            piece = slice(start, min(start + step, len(states)))
            with torch.enable_grad():
                part = leaves[0][piece].detach().requires_grad_(wanted[0])
                logits = shape(linear(part, leaves[1], leaves[2])).float()
                loss = (measure(logits, piece) * weights[piece]).sum()
            total += loss.detach()
            inputs = [t for t, w in zip((part, leaves[1], leaves[2]), wanted) if w]
            if inputs:
                grads = iter(torch.autograd.grad(loss, inputs))
                if wanted[0]:
                    sums[0][piece] = next(grads)
                for i in (1, 2):
                    if wanted[i]:
                        sums[i] += next(grads)
        ctx.grads = [None if s is None else s.to(t.dtype) for s, t in zip(sums, (states, weight, bias))]
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if grad is None else grad * above[0] for grad in ctx.grads), None, None, None)
