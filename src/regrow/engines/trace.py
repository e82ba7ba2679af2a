"""The trace of the loss's Hessian, layer by layer, by random probes (Hutchinson): how curved the loss is in a layer.

Two backward passes a probe, the second through the first. What this gives up: exactness, and the fast attention
kernels, which have no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from regrow.artifacts.shape import Anatomy
from regrow.engines.inputs import named
from regrow.engines.zeros import prunable
from regrow.errors import BrokenModel

Progress = Callable[[int, int], None]


def traces(
    model: Any,
    anatomy: Anatomy,
    blocks: Tensor,
    *,
    leave: Sequence[str] = (),
    probes: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Estimated trace for each layer over its weight matrices but for those in `leave` (ends of names).

    A probe takes one block of `blocks` (n, T), in turn. Raises `BrokenModel` when a trace is not finite.
    """
    parameters = dict(model.named_parameters())
    layer = {tensor.name: tensor.layer for tensor in anatomy.tensors}
    names = [name for name in prunable(anatomy) if not named(name.removesuffix(".weight"), leave)]
    weights = [parameters[name] for name in names]
    wanted = [weight.requires_grad for weight in weights]
    found = [0.0] * anatomy.sizes["L"]
    source = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for probe in range(probes):
            ids = blocks[probe % len(blocks)][None].to(model.device)
            with sdpa_kernel(SDPBackend.MATH):
                logits = model(input_ids=ids, use_cache=False).logits
                loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
                first = torch.autograd.grad(loss, weights, create_graph=True)
                signs = [(torch.randint(2, w.shape, generator=source) * 2 - 1).to(w) for w in weights]
                second = torch.autograd.grad(first, weights, signs)
            for name, sign, image in zip(names, signs, second, strict=True):
                found[int(layer[name] or 0)] += float((sign * image).sum()) / probes
            if progress is not None:
                progress(probe + 1, probes)
    finally:
        for weight, was in zip(weights, wanted, strict=True):
            weight.requires_grad_(was)
    if broken := [i for i, trace in enumerate(found) if not math.isfinite(trace)]:
        raise BrokenModel(
            f"the Hessian of layer {broken[0]} has a trace that is not finite",
            "second derivatives that fit the type they are computed in",
            "use --dtype fp32, or another spread",
        )
    return found
