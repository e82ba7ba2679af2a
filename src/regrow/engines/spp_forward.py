"""Three forwards of one SPP linear, equal but for rounding: y = W x + b + s (A beta W) D(x).

W (m, n) is frozen and sparse; alpha (r, n) and beta (m,) are trained; row i uses row floor(i r / m) of alpha. What this
gives up: gradients of W itself; whoever tunes W needs no adapter.

form          products    kept for the backward pass    beside that
checkpointed  12 m n T    x, D(x)                       three matrices m x n, for a moment
lean           8 m n T    D(x)                          m n / r, for a moment; with dropout 10 m n T
folded         6 m n T    x                             two matrices m x n, for a moment; no dropout

The published lean form keeps a stream of width m beside D(x). Of a 16-bit weight the folded form makes what a merge
would, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from regrow.engines.room import memory_of
from regrow.errors import SettingsError

FEW = 8  # tokens below which nothing is folded: building a matrix would cost more than using it
ROOM = 1 / 64  # of the device's memory: the most that the folded form's matrices may take


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


def delta(weight: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:  # (..., m, n)
    """s A beta W in alpha's type: what an adapter adds to the weight; zero where the weight is.

    Of a stack of weights (..., m, n) every one has an alpha (..., r, n) and a beta (..., m).
    """
    *stack, _, columns = weight.shape
    rank = alpha.shape[-2]
    rows = weight.to(alpha.dtype).view(*stack, rank, -1, columns)  # (..., r, m / r, n)
    added: Tensor = scale * rows * alpha[..., None, :] * beta.view(*stack, rank, -1, 1)
    return added.flatten(-3, -2)


def choose(dropout: float, tokens: int, weight: Tensor) -> str:
    """The form that costs least: folded, but lean under dropout, for a few tokens, and where a matrix is large.

    What is large hangs on the device, not on what is free at the moment, so that equal runs take equal forms.
    """
    matrices = 2 * 4 * weight.numel()  # bytes, fp32
    return "lean" if dropout or tokens < FEW or matrices > ROOM * memory_of(weight.device) else "folded"


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
    """One thin product for each run of rows; nothing larger than a run's weights, and nothing of width m is kept."""
    return _made(x, None if dropped is x else dropped, weight, bias, alpha, beta, (scale, True))


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
    return _made(x, None, weight, bias, alpha, beta, (scale, False))


def _made(*given: Any) -> Tensor:
    return _Adapted.apply(*given)  # type: ignore[no-untyped-call,no-any-return]


class _Adapted(torch.autograd.Function):
    """Outputs without a graph, and gradients run by run or of all rows at once: `how` is (scale, run by run).

    `dropped` is None without dropout.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        alpha: Tensor,
        beta: Tensor,
        how: tuple[float, bool],
    ) -> Tensor:
        read = x if dropped is None else dropped
        ctx.save_for_backward(read, weight, alpha, beta)
        ctx.whole, (ctx.scale, apart) = dropped is None, how
        ctx.parts = len(alpha) if apart else 1
        if not apart:
            whole: Tensor = F.linear(x, (weight + delta(weight, alpha, beta, ctx.scale)).to(weight.dtype), bias)
            return whole
        runs = zip(alpha, weight.chunk(len(alpha)), strict=True)
        added = torch.cat([F.linear(read * a, w) for a, w in runs], -1)  # (..., m)
        plain = F.linear(x, weight, bias)
        y: Tensor = plain + (ctx.scale * beta * added).to(plain.dtype)  # factors are wider under autocast
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read, weight, alpha, beta = ctx.saved_tensors  # read (..., n): x, or what dropout left of it
        (grad,) = grads  # (..., m), under autocast in another type than x and the weight
        back = torch.zeros_like(read) if ctx.needs_input_grad[0] else None
        through = torch.zeros_like(read) if ctx.needs_input_grad[1] else None  # what was dropped
        downs, ups = torch.empty_like(alpha), torch.empty_like(beta)  # (r, n), (m,)
        rows = read.reshape(-1, read.shape[-1]).to(grad.dtype)  # (T, n)
        trained = zip(alpha.chunk(ctx.parts), beta.chunk(ctx.parts), strict=True)
        grown = zip(downs.chunk(ctx.parts), ups.chunk(ctx.parts), strict=True)
        pushed = zip(grad.chunk(ctx.parts, -1), weight.chunk(ctx.parts), strict=True)
        for (g, w), (a, b), (down, up) in zip(pushed, trained, grown, strict=True):
            added = delta(w, a, b, ctx.scale)
            if back is not None:
                back += g @ (w + added if ctx.whole else w).to(g.dtype)
            if through is not None:
                through += g @ added.to(g.dtype)
            outer = (g.reshape(-1, g.shape[-1]).T @ rows).to(a.dtype)  # (m / parts, n)
            outer *= w
            outer *= ctx.scale
            runs = outer.view(len(a), -1, outer.shape[1])
            up.copy_(torch.einsum("kin,kn->ki", runs, a).flatten())
            down.copy_(torch.einsum("kin,ki->kn", runs, b.view(len(a), -1)))
        push = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None  # (m,)
        return back, through, None, push, downs, ups, None


Form = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]
FORMS: dict[str, Form] = {"checkpointed": checkpointed, "lean": lean, "folded": folded}
