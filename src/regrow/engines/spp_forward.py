"""Three forwards of one SPP linear, equal in outputs and gradients: y = W x + b + s (A beta W) D(x).

W (m, n) is frozen and sparse; alpha (r, n) and beta (m,) are trained; row i uses row floor(i r / m) of alpha. What this
gives up: gradients of W itself; whoever tunes W needs no adapter.

form          products    kept for the backward pass    beside that
checkpointed  12 m n T    x, D(x)                       three matrices m x n, for a moment
lean           8 m n T    D(x), a stream of width m     nothing of size m x n
folded         6 m n T    x                             two matrices m x n, for a moment; no dropout
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from regrow.errors import SettingsError

FEW = 8  # tokens below which nothing is folded: building a matrix would cost more than using it


def check_rank(rank: int, outputs: Mapping[str, int]) -> None:
    """Raise `SettingsError` unless `rank` divides the outputs of every linear; `outputs` by name."""
    fits = [d for d in range(1, 4 * rank) if math.gcd(*outputs.values()) % d == 0]
    for name, rows in outputs.items():
        if rows % rank:
            raise SettingsError(
                f"SPP of rank {rank} on {name}, which has {rows} outputs",
                f"a rank that divides the outputs of every linear: {', '.join(map(str, fits))}",
                "choose one of them",
            )


def delta(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:  # (m, n)
    """s A beta W: what an adapter adds to the weight; zero where the weight is."""
    rows = weight.view(len(alpha), -1, weight.shape[1])  # (r, m / r, n)
    added: Tensor = scale * rows * alpha[:, None, :] * beta.view(len(alpha), -1, 1)
    return added.flatten(0, 1)


def choose(dropout: float, tokens: int) -> str:
    """The form that costs least: folded where it can be, lean under dropout and for a few tokens."""
    return "lean" if dropout or tokens < FEW else "folded"


def checkpointed(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, beta: Tensor, scale: float
) -> Tensor:
    """Builds the m x n product, and builds it again in the backward pass."""

    def residual(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        return F.linear(x, delta(weight, alpha, beta, scale))

    added: Tensor = checkpoint(residual, dropped, alpha, beta, use_reentrant=False)
    return F.linear(x, weight, bias) + added


def lean(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, beta: Tensor, scale: float
) -> Tensor:
    """One thin product for each run of rows; nothing of size m x n."""
    runs = zip(alpha, weight.chunk(len(alpha)), strict=True)
    added = scale * beta * torch.cat([F.linear(dropped * a, w) for a, w in runs], -1)
    return F.linear(x, weight, bias) + added


def folded(
    x: Tensor,
    dropped: Tensor,  # noqa: ARG001
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
) -> Tensor:
    """One product with the adapted weight, made on the way and not kept; there is no dropout."""
    return _Folded.apply(x, weight, bias, alpha, beta, scale)  # type: ignore[no-untyped-call,no-any-return]


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: Tensor, beta: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, alpha, beta)
        ctx.scale = scale
        return F.linear(x, weight + delta(weight, alpha, beta, scale).to(weight.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        (grad,) = grads  # (..., m), under autocast in another type than x and the weight
        back = push = None
        if ctx.needs_input_grad[0]:
            adapted = weight + delta(weight, alpha, beta, ctx.scale).to(weight.dtype)
            back = (grad @ adapted.to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            push = grad.flatten(0, -2).sum(0)  # (m,)
        outer = grad.flatten(0, -2).T @ x.flatten(0, -2).to(grad.dtype)  # (m, n)
        outer *= weight
        outer *= ctx.scale
        runs = outer.view(len(alpha), -1, outer.shape[1]).to(alpha.dtype)  # (r, m / r, n)
        ups = torch.einsum("kin,kn->ki", runs, alpha).flatten()  # (m,)
        downs = torch.einsum("kin,ki->kn", runs, beta.view(len(alpha), -1))  # (r, n)
        return back, None, push, downs, ups, None


Form = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]
FORMS: dict[str, Form] = {"checkpointed": checkpointed, "lean": lean, "folded": folded}
