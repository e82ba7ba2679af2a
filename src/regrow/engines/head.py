"""The head of a model, and losses through it a few tokens at a time: logits of a batch are never held whole.

A piece's loss and its gradient are made together and the piece is forgotten, so memory grows with neither tokens nor
vocabulary. Results are those of the plain way, to rounding. What this gives up: a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils.parametrize import type_before_parametrizations

PROBE, CLOSE = 8, 1e-3  # tokens on which body and head must give the model's own loss, and how nearly
NUMBERS = 2**22  # logits that are held at a time, 16 MiB in fp32
MANY = 2**26  # the same on a GPU, whose kernels want more of them; a guess, never run there

Measure = Callable[[Tensor, slice], Tensor]
"""(logits (p, V) fp32, which of the tokens they are) -> (p,) one loss a token."""


@dataclass(frozen=True, slots=True)
class Head:
    """What turns states (n, C) into logits (n, V)."""

    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)
    shape: Callable[[Tensor], Tensor]  # scale and soft cap

    def first(self, rows: int) -> Head:
        """The head of the first `rows` tokens; what lies behind pads the vocabulary."""
        if rows == len(self.weight):
            return self
        return replace(self, weight=self.weight[:rows], bias=None if self.bias is None else self.bias[:rows])

    def logits(self, states: Tensor) -> Tensor:  # (n, V) fp32
        return self.shape(linear(states, self.weight, self.bias)).float()


def head_of(model: Any, root: Any = None) -> Head | None:
    """The head of a model; None when it is no plain linear.

    A sharded one (FSDP2) is gathered, by itself or with what `root`, the model in its wrappers, shards with it. It
    stays so until the backward pass, which brings its gradient to where the others go: take it after every forward.
    """
    module = model.get_output_embeddings()
    kind = type_before_parametrizations(module)  # AST puts masks on a sparse one
    if hasattr(kind, "unshard"):
        kind = kind.__bases__[-1]  # FSDP2 puts a class of its own before the linear's
    if kind is not nn.Linear:
        return None
    weight = module.weight
    if hasattr(weight, "full_tensor"):
        next(m for m in (module, root, model) if hasattr(m, "unshard")).unshard()
        weight = module.weight
    return Head(weight, module.bias, shaping(model.config))


def shaping(config: Any) -> Callable[[Tensor], Tensor]:
    """What some families do to logits: scale (Cohere), divide (Granite), soft cap (Gemma)."""
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def shape(logits: Tensor) -> Tensor:
        logits = logits * scale if scale else logits
        logits = logits / divisor if divisor else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return shape


def at_a_time(device: torch.device) -> int:
    """How many logits are held on it."""
    return NUMBERS if device.type == "cpu" else MANY


def mean_over_tokens(head: Head, states: Tensor, measure: Measure) -> Tensor:  # () fp32
    """Mean of `measure` over tokens, with gradients to `states` (n, C) and to the head's parameters; 0 of none."""
    count = len(states)
    return sum_over_tokens(head, states, measure, torch.full((count,), 1 / max(1, count), device=states.device))


def sum_over_tokens(head: Head, states: Tensor, measure: Measure, shares: Tensor) -> Tensor:  # () fp32
    """The sum of `measure` times `shares` (n,), which may lie below zero."""
    given = [states, head.weight, head.bias]
    if not torch.is_grad_enabled():  # else gradients would be made and thrown away
        given = [None if t is None else t.detach() for t in given]
    found: Tensor = _Pieces.apply(*given, head.shape, measure, shares)  # type: ignore[no-untyped-call]
    return found


def next_token(model: Any, head: Head, ids: Tensor) -> Tensor:  # () fp32
    """Mean cross-entropy of the next token in nats; `ids` (b, T) int64, no padding."""
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (b, T, C)
    targets = ids[:, 1:].flatten()  # (b * (T - 1),)
    return mean_over_tokens(
        head,
        states[:, :-1].flatten(0, 1),
        lambda logits, piece: cross_entropy(logits, targets[piece], reduction="none"),
    )


def final_states(model: Any, ids: Tensor) -> Tensor:  # (b, T, C)
    """What the head receives, by way of the model's own forward, so that wrappers of a distributed run see it.

    The model gives these states for its output: FSDP begins to prepare the backward pass when what a module gave gets a
    gradient, which the logits would not.
    """
    bare = model
    while not hasattr(bare, "get_decoder") and hasattr(bare, "module"):
        bare = bare.module
    found: list[Tensor] = []
    handles = (
        bare.get_decoder().register_forward_hook(lambda _, __, out: found.append(out.last_hidden_state)),
        bare.register_forward_hook(lambda *_: found[0], prepend=True),
    )
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


@contextmanager
def tied_weight(model: Any) -> Iterator[Tensor | None]:
    """The head's weight (V, C), where the embedding learns and is the same, for a forward pass within; else None.

    By itself autograd makes two gradients as large as it, the head's and the lookup's. Here the lookup's has only the
    rows that were read and comes first, so that they are added into the head's. A head with this weight must follow the
    pass: rows alone are no gradient that an optimiser takes. CUDA adds the rows of one token in no fixed order, so runs
    repeat to rounding only. Weights that are spread (FSDP2) keep their two, and so do other devices.
    """
    embedding, weight = model.get_input_embeddings(), getattr(model.get_output_embeddings(), "weight", None)
    if (
        not torch.is_grad_enabled()
        or not isinstance(embedding, nn.Embedding)
        or embedding.weight is not weight
        or not weight.requires_grad
        or not (weight.is_cpu or weight.is_cuda)
        or hasattr(weight, "full_tensor")
        or embedding.sparse
        or embedding.scale_grad_by_freq
    ):
        yield None
        return
    embedding.sparse = True
    try:
        yield _Early.apply(weight)  # type: ignore[no-untyped-call]
    finally:
        embedding.sparse = False


@torch.no_grad()
def trusted_head(model: Any, ids: Tensor) -> Head | None:
    """The head, when body and head give the model's own loss on a few tokens of `ids` (b, T); else None."""
    head, few = head_of(model), ids[:1, :PROBE]
    if head is None:
        return None
    own = model(input_ids=few, labels=few, use_cache=False).loss
    return head if bool((next_token(model, head, few) - own).abs() <= CLOSE * own.abs()) else None


class _Early(torch.autograd.Function):
    """A tensor as it is. On the way back what was made later goes first, so its gradient waits for theirs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:  # noqa: ARG004
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:  # noqa: ARG004
        return above[0]


class _Pieces(torch.autograd.Function):
    """Differentiable in its first three arguments."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: Callable[[Tensor], Tensor],
        measure: Measure,
        shares: Tensor,
    ) -> Tensor:
        given = (states, weight, bias)
        sums = [
            torch.zeros_like(t, dtype=torch.float32) if t is not None and need else None
            for t, need in zip(given, ctx.needs_input_grad[:3], strict=True)
        ]
        learns = any(held is not None for held in sums)
        total = torch.zeros((), device=states.device)
        step = max(1, at_a_time(states.device) // len(weight))
        for start in range(0, len(states), step):
            piece = slice(start, start + step)
            logits = linear(states[piece], weight, bias).requires_grad_(learns)  # (p, V)
            with torch.set_grad_enabled(learns):
                loss = (measure(shape(logits).float(), piece) * shares[piece]).sum()
            total += loss.detach()
            if learns:
                (slope,) = torch.autograd.grad(loss, [logits])  # (p, V)
                _add(sums, piece, slope, states[piece], weight)
        ctx.grads = [None if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, given, strict=True)]
        return total

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*(None if grad is None else grad.mul_(above[0]) for grad in grads), None, None, None)


def _add(sums: list[Tensor | None], piece: slice, slope: Tensor, states: Tensor, weight: Tensor) -> None:
    """What a piece's logits owe to states (p, C), weight (V, C) and bias, from the `slope` (p, V) of its loss."""
    to_states, to_weight, to_bias = sums
    if to_states is not None:
        to_states[piece] = slope @ weight
    if to_weight is not None:
        if slope.dtype == to_weight.dtype:
            to_weight.addmm_(slope.T, states)  # a gradient as large as the head is not made for every piece
        else:
            to_weight += slope.T @ states
    if to_bias is not None:
        to_bias += slope.sum(0)
