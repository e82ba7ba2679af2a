"""Gradients of the loss for scoring: the mean over sequences and, when asked, the mean of their squares.

Only some of the layers ask for gradients at a time when squares are needed too, so the peak stays near twice the
model; scores of a tensor are taken and its gradient dropped. What this gives up: time (one extra pass a part).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from regrow.artifacts.shape import Anatomy
from regrow.artifacts.shape import Tensor as Spec
from regrow.engines.room import give_back
from regrow.engines.walk import Progress
from regrow.errors import BrokenModel

PARTS_WITH_SQUARES = 3  # weights 1 + gradients 1/3 + squares 1/3 of the model

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
            means, held = _accumulate(model, part, blocks, squares, progress, (done, len(parts) * len(blocks)))
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
    for index, ids in enumerate(torch.split(blocks, 1), 1):
        ids = ids.to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
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


def _add(sums: dict[str, Tensor], name: str, value: Tensor, count: int) -> None:
    if name in sums:
        sums[name].add_(value, alpha=1 / count)
    else:
        sums[name] = value.div_(count)
