"""Gradients of the loss for scoring: the mean over sequences and, when asked, the mean of their squares.

Only some of the layers ask for gradients at a time when squares are needed too, so the peak stays near twice the
model; scores of a tensor are taken and its gradient dropped. Layers whose activations would not fit a fixed share of
the model run again in the backward pass. What this gives up: time (an extra pass a part, and those layers twice).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regrow.artifacts.shape import Anatomy
from regrow.artifacts.shape import Tensor as Spec
from regrow.engines.head import next_token, trusted_head
from regrow.engines.room import give_back
from regrow.engines.walk import Progress
from regrow.errors import BrokenModel

PARTS_WITH_SQUARES = 3  # weights 1 + gradients 1/3 + squares 1/3 of the model
ACTIVATIONS = 0.25  # of the model's bytes that activations kept for the backward pass may take
OVERHEAD = 1.25  # kept activations, relative to the inputs and outputs of all linears

Visit = Callable[[Spec, Tensor, Tensor, Tensor | None], None]
"""(tensor, weight, mean gradient, mean squared gradient), all of one shape, fp32 on the weight's device"""


def gradients(
    model: nn.Module,
    anatomy: Anatomy,
    blocks: Tensor,
    visit: Visit,
    *,
    wanted: Callable[[Spec], bool],
    squares: bool,
    progress: Progress | None = None,
) -> None:
    """Call `visit` once for every wanted tensor. Loss: mean over `blocks` (n, T) of the mean next-token loss.

    Raises `BrokenModel` naming the tensor when a gradient is not finite.
    """
    specs = [spec for spec in anatomy.tensors if wanted(spec)]
    parts = list(_parts(specs, anatomy.sizes["L"], PARTS_WITH_SQUARES if squares else 1))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for number, part in enumerate(parts):
            done = number * len(blocks)
            means, held = _accumulate(model, anatomy, part, blocks, squares, progress, (done, len(parts) * len(blocks)))
            for spec in part:
                parameter = model.get_parameter(spec.name)
                grad = means.pop(spec.name, parameter.grad)
                parameter.grad = None
                grad = torch.zeros_like(parameter) if grad is None else grad
                if not bool(grad.isfinite().all()):
                    raise BrokenModel(
                        f"the gradient of {spec.name} is not finite",
                        "finite gradients on the calibration text",
                        "compute in fp32 (--dtype fp32), or use a criterion without gradients such as activation",
                    )
                visit(spec, parameter.detach().float(), grad.float(), held.pop(spec.name, None))
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(flags[name])


def _parts(specs: Sequence[Spec], layers: int, parts: int) -> Iterator[list[Spec]]:
    """Tensors by depth, in `parts` runs of layers; those outside the layers come with the first."""
    edges = [round(layers * i / parts) for i in range(parts + 1)]
    for low, high in pairwise(edges):
        part = [s for s in specs if (low <= s.layer < high if s.layer is not None else low == 0)]
        if part:
            yield part


def _accumulate(
    model: nn.Module,
    anatomy: Anatomy,
    part: Sequence[Spec],
    blocks: Tensor,
    squares: bool,
    progress: Progress | None,
    at: tuple[int, int],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean gradients and mean squares by name, fp32; without `squares` the means stay in `.grad` and both are empty."""
    names = {spec.name for spec in part}
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name in names)
    means: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    head = trusted_head(model, blocks[:1].to(device))
    again = layers_run_again(anatomy, blocks.shape[1])
    for index, ids in enumerate(torch.split(blocks, 1), 1):
        ids = ids.to(device)
        with _recomputed(model, anatomy, again):
            loss = next_token(model, head, ids) if head else model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        if squares:
            for name in names:
                parameter = model.get_parameter(name)
                if parameter.grad is not None:
                    _add(held, name, parameter.grad.float().square(), len(blocks))
                    _add(means, name, parameter.grad.float(), len(blocks))
                    parameter.grad = None
        give_back()
        if progress is not None:
            progress(at[0] + index, at[1])
    for name in names:
        parameter = model.get_parameter(name)
        if parameter.grad is not None:
            parameter.grad /= len(blocks)
    return means, held


def layers_run_again(anatomy: Anatomy, tokens: int) -> int:
    """How many layers must run twice, so that the activations of the others keep to `ACTIVATIONS` of the model."""
    sizes = [sum(t.shape) for t in anatomy.tensors if t.layer is not None and t.matrix]
    layers = anatomy.sizes["L"]
    each = OVERHEAD * tokens * sum(sizes) / layers  # numbers that a layer keeps
    room = ACTIVATIONS * sum(math.prod(t.shape) for t in anatomy.tensors)
    return max(0, layers - int(room / each))


@contextmanager
def _recomputed(model: nn.Module, anatomy: Anatomy, count: int) -> Iterator[None]:
    """The first `count` layers keep their input alone and run again when gradients pass through them."""
    layers = list(model.get_submodule(anatomy.family.layers).children())[:count]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for layer in layers:
            del layer.forward


def _add(sums: dict[str, Tensor], name: str, value: Tensor, count: int) -> None:
    if name in sums:
        sums[name].add_(value, alpha=1 / count)
    else:
        sums[name] = value.div_(count)
