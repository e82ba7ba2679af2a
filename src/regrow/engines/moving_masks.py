"""Moves the zeros of a sparse model about while all its weights train (AST, arXiv:2407.20584, without SLoRB).

The model computes without its masked weights, but the gradient of what it computes with reaches all: a masked weight
lives on unseen, and when every tenth step chooses the zeros anew by size, it may be seen again. A decay pulls unseen
weights to zero, so that few flicker. Its coefficient rises evenly over the first quarter of the steps, as in the paper,
and it joins the gradient after clipping, where both moments of AdamW see it. (The published code inverts an integer
mask bit by bit and so pushes both kinds of weights away from zero; meant, and done here, is 1 - mask.)

Zeros of N:M stay in their group. All others stay in their row, which keeps the count of every matrix exact and starves
no output. The last step moves none: what it leaves has been trained with its zeros. What this gives up: zeros that move
from one output to another; what masked weights were in the dense model, they begin at 0; one more copy of the matrices
in a pass; zeros of tied weights, which stay; weights that are sharded over devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from regrow.artifacts.mask import lowest_of_counts
from regrow.artifacts.sparsity import SPARSE
from regrow.engines.masks import Masks, held
from regrow.errors import IdentityError, SettingsError

EVERY = 10  # steps between two choices of the zeros
DECAY = 6e-5  # of masked weights, at its height
RISE = 0.25  # share of the steps after which it is there
WIDEST = 32  # largest groups that are looked for
TYPICAL = 0.6  # share of a pattern's groups that keep as many as the fullest, at least; of half a group it is a half


def needed(empty: Masks | None) -> Masks:
    """Raises `SettingsError` for a model that is not sparse."""
    if empty is None:
        raise SettingsError(
            "recovery by ast of a model that is not sparse: there are no zeros to move",
            f"a model with at least {100 * SPARSE:g} % zeros",
            "make it sparse with `regrow sparsify`, or use another recover.method, such as full or lora",
        )
    return empty


def width(empty: Tensor) -> int:
    """How many neighbours share their zeros: M where (..., n) bool shows a pattern N:M, else the whole row, n."""
    row = empty.shape[-1]
    for of in (m for m in range(2, WIDEST + 1) if row % m == 0):
        kept = (~empty).reshape(-1, of).sum(1)  # (groups,)
        most = kept.max()
        if most < of and float((kept == most).float().mean()) >= TYPICAL:
            return of
    return row


class _Seen(torch.autograd.Function):
    """The weight with +0 where it is masked; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, empty: Tensor) -> Tensor:  # noqa: ARG004
        return weight.masked_fill(empty, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class Mask(nn.Module):
    """A parametrization of one weight (..., n). The mask is a buffer, so a checkpoint holds it."""

    empty: Tensor  # (..., n) bool, True where the model sees zero

    def __init__(self, empty: Tensor) -> None:
        super().__init__()
        self.width = width(empty)
        self.register_buffer("empty", empty.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return cast(Tensor, _Seen.apply(weight, self.empty))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def pull(self, weight: Tensor, decay: float) -> None:
        """Let the gradient lead masked entries to zero."""
        assert weight.grad is not None
        weight.grad.add_(weight * self.empty, alpha=decay)

    @torch.no_grad()
    def move(self, weight: Tensor) -> None:
        """Mask the smallest entries of every group, as many as were."""
        sizes = weight.abs().reshape(-1, self.width)  # (groups, width)
        self.empty.copy_(lowest_of_counts(sizes, _counts(self.empty, self.width)).view_as(self.empty))


@contextmanager
def moving(model: Any, empty: Masks, steps: int, *, decay: float = DECAY, every: int = EVERY) -> Iterator[None]:
    """While open, AdamW moves the zeros `empty` of `model` in a run of `steps`; then they are plain +0 where they lie.

    Zeros of a weight that several modules share, a tied embedding, are held where they are.
    The steps are those that the optimiser has counted, which come back with a checkpoint as the masks do.
    """
    parameters = dict(model.named_parameters())
    readers: dict[int, list[tuple[Any, str]]] = {}  # of each weight, by its id
    for module in model.modules():
        for part, weight in module.named_parameters(recurse=False):
            readers.setdefault(id(weight), []).append((module, part))
    alone = {name: readers[id(parameters[name])][0] for name in empty if len(readers[id(parameters[name])]) == 1}
    places = [(*alone[name], Mask(mask)) for name, mask in empty.items() if name in alone and bool(mask.any())]
    for module, part, mask in places:
        register_parametrization(module, part, mask)
    found = [(module.parametrizations[part].original, mask) for module, part, mask in places]

    def done(optimizer: Optimizer) -> int:
        """0 in the first step, and for optimisers of other models."""
        return int(optimizer.state.get(found[0][0], {"step": 0})["step"]) if found else 0

    def before(optimizer: Optimizer, *_: Any) -> None:
        height = decay * min(1.0, done(optimizer) / (RISE * steps))
        if height:
            for weight, mask in found:
                mask.pull(weight, height)

    def after(optimizer: Optimizer, *_: Any) -> None:
        count = done(optimizer)
        if 0 < count < steps and count % every == 0:
            for weight, mask in found:
                mask.move(weight)

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        with held(model, {name: mask for name, mask in empty.items() if name not in alone}):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, part, _ in places:
            remove_parametrizations(module, part)


def check_counts(model: Any, empty: Masks) -> None:
    """Raise `IdentityError` when a group, or a row of a matrix without groups, has fewer zeros than it had."""
    parameters = dict(model.named_parameters())
    for name, mask in empty.items():
        run = width(mask)
        fewer = _counts(parameters[name].detach().cpu() == 0, run) < _counts(mask.cpu(), run)
        if bool(fewer.any()):
            raise IdentityError(
                f"{int(fewer.sum()):,} runs of {run} weights in {name} have fewer zeros than before the training",
                "as many zeros as in the sparse model, in every group or row",
                "nothing was written; please report it",
            )


def _counts(empty: Tensor, run: int) -> Tensor:  # (..., n) bool -> (groups,) int64
    return empty.reshape(-1, run).sum(1)
