"""How large a model is expected to be whose units stay by chance; differentiable by the chances.

Counted as the papers count: weight matrices inside the layers, every dimension a sum of chances, so that no outer
product is formed. What this gives up: embedding, head, norms and biases, which the true count of a plan has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from regrow.artifacts.family import Unit
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.shape import Tensor as Spec

Chances = Mapping[Unit, Tensor]
"""The chance that a unit stays: layer (L,), group (L, K), head (L, H), neuron (L, F), channel (C,). Kinds that are not
named stay. A query head stays when its group does too."""


def expected_weights(anatomy: Anatomy, chances: Chances) -> Tensor:
    """Decoder weights that are expected to stay, () fp64; all of them where every chance is 1."""
    some = next(iter(chances.values()))
    layers, units = anatomy.sizes["L"], _units(anatomy, chances)
    stays = chances["layer"].double() if "layer" in chances else torch.ones(layers, device=some.device).double()
    total = torch.zeros((), dtype=torch.float64, device=some.device)
    for like in sorted(set(anatomy.alike)):
        rows = torch.tensor([i for i in range(layers) if anatomy.alike[i] == like], device=some.device)
        own = {unit: count[rows] if count.dim() else count for unit, count in units.items()}
        for tensor in anatomy.tensors:
            if tensor.layer == like and tensor.matrix:
                total = total + (stays[rows] * _size(anatomy, tensor, own)).sum()
    return total


def dense_weights(anatomy: Anatomy) -> int:
    """The same where everything stays."""
    return int(expected_weights(anatomy, {"channel": torch.ones(anatomy.sizes["C"])}))


def _units(anatomy: Anatomy, chances: Chances) -> dict[Unit, Tensor]:
    """How many units of a kind are expected to stay in each layer, (L,) fp64, or in the model, ()."""
    found: dict[Unit, Tensor] = {
        unit: chances[unit].double().sum(-1) for unit in ("group", "neuron", "channel") if unit in chances
    }
    if "head" in chances:
        heads = chances["head"].double()  # (L, H)
        if "group" in chances:
            heads = heads * chances["group"].double().repeat_interleave(anatomy.sizes["G"], -1)
        found["head"] = heads.sum(-1)
    elif "group" in found:
        found["head"] = found["group"] * anatomy.sizes["G"]
    return found


def _size(anatomy: Anatomy, tensor: Spec, units: Mapping[Unit, Tensor]) -> Tensor | int:
    """Elements of a tensor that are expected to stay: (layers,) or ()."""
    total: Tensor | int = 1
    for dim, size in enumerate(tensor.shape):
        runs: dict[int, Unit] = {}  # offset -> the smallest unit that owns the run
        widths: dict[int, int] = {}
        for unit, cut in tensor.cuts:
            if cut.dim == dim and runs.get(offset := anatomy.offset(cut)) != "head":
                runs[offset], widths[offset] = unit, anatomy.width(cut)
        rest = size - sum(widths[offset] * anatomy.units(unit) for offset, unit in runs.items())
        parts = [widths[o] * (units[u] if u in units else anatomy.units(u)) for o, u in runs.items()]
        total = total * sum(parts, start=rest)
    return total
