"""Merges heads, folds gates into weights, slices along cuts; the only code that takes a model's tensors apart.

The rules (which tensor is scaled by what, for which kind of norm, tied or not) follow from the role of each cut; they
are derived in docs/surgery.md. A model is consumed tensor by tensor, so it is never held twice.
What this gives up: the intact model; load it again if it is still needed.

Notation: hz channel gate, d width, d' kept width, s = sqrt(d'/d), r = scale of the residual stream (s when norms keep
statistics over the original width, else 1), e = factor on the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow.artifacts.family import Branch
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.shape import Tensor as Spec
from regrow.engines.gates import Gates, LayerGates, expand, from_plan
from regrow.engines.merging import merge
from regrow.engines.room import give_back


@contextmanager
def merged(model: nn.Module, anatomy: Anatomy, plan: Plan) -> Iterator[None]:
    """The model with the plan's heads merged; on leaving it is what it was, to the bit."""
    before: dict[nn.Parameter, Tensor] = {}
    try:
        with torch.no_grad():
            for spec in anatomy.tensors:
                parameter = model.get_parameter(spec.name)
                before[parameter] = parameter.data
                parameter.data = merge(parameter.data, spec, anatomy, plan)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


@torch.no_grad()
def slice_model(
    model: nn.Module, anatomy: Anatomy, plan: Plan, gates: Gates | None = None, *, consume: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Yield (new name, tensor) of the cut model in the order of the intact one, emptying `model` as it goes.

    `gates` may be soft; units that the plan drops must be closed in them. None means binary, as the plan says. Without
    `consume` the model stays as it is, and what is yielded shares nothing with it.
    """
    gates = from_plan(anatomy, plan) if gates is None else gates
    kept = from_plan(anatomy, plan)
    place = {layer.index: position for position, layer in enumerate(plan.layers)}
    shape = dict(zip(place, plan.shape().layers, strict=True))
    for spec in anatomy.tensors:
        parameter = model.get_parameter(spec.name)
        weight, whole = parameter.data, parameter.data_ptr()
        if consume:
            parameter.data = weight.new_empty(0)
        if spec.layer is not None:
            if spec.layer not in place:
                continue
            layer = shape[spec.layer]
            if (spec.branch == "attention" and not layer.groups) or (spec.branch == "mlp" and not layer.neurons):
                continue
        weight = merge(weight, spec, anatomy, plan)
        weight = _fold(weight, spec, anatomy, gates)
        weight = _select(weight, spec, anatomy, kept)
        weight = weight.contiguous()
        if not consume and weight.data_ptr() == whole:
            weight = weight.clone()
        give_back()
        yield _renamed(spec, anatomy, place), weight


def _renamed(spec: Spec, anatomy: Anatomy, place: dict[int, int]) -> str:
    if spec.layer is None:
        return spec.name
    prefix = f"{anatomy.family.layers}."
    rest = spec.name.removeprefix(f"{prefix}{spec.layer}.")
    return f"{prefix}{place[spec.layer]}.{rest}"


def _select(weight: Tensor, spec: Spec, anatomy: Anatomy, kept: Gates) -> Tensor:
    """Keep the elements all of whose owners stay."""
    for dim in range(weight.dim()):
        mask = torch.ones(weight.shape[dim])
        for unit, cut in spec.cuts:
            if cut.dim != dim:
                continue
            gate = kept.channel if unit == "channel" else _layer_gate(kept, spec, unit)
            if gate is not None:
                mask = mask * expand(anatomy, cut, gate, weight.shape[dim])
        if not bool(mask.all()):
            weight = weight.index_select(dim, mask.nonzero().squeeze(1).to(weight.device))
    return weight


def _layer_gate(gates: Gates, spec: Spec, unit: str) -> Tensor | None:
    assert spec.layer is not None
    gate: Tensor | None = getattr(gates.layers[spec.layer], unit, None)
    return gate


def _fold(weight: Tensor, spec: Spec, anatomy: Anatomy, gates: Gates) -> Tensor:
    """Multiply what the gates would have multiplied at run time."""
    for unit, cut in spec.cuts:
        if unit == "channel" and gates.channel is not None:
            weight = _fold_channel(weight, spec, cut.role, cut.dim, anatomy, gates)
        elif cut.role == "fold":
            gate = _layer_gate(gates, spec, unit)
            if gate is not None:
                weight = _scale(weight, expand(anatomy, cut, gate, weight.shape[cut.dim]), cut.dim)
    if spec.layer is not None:
        weight = _fold_branches(weight, spec, anatomy, gates.layers[spec.layer])
    return weight


def _fold_branches(weight: Tensor, spec: Spec, anatomy: Anatomy, gates: LayerGates) -> Tensor:
    """A gate on a whole branch acts on its last module: a linear's rows, or a norm's gain."""
    family = anatomy.family
    path = spec.name.split(f"{family.layers}.{spec.layer}.", 1)[1].rpartition(".")[0]
    pairs: tuple[tuple[Branch, Tensor | None], ...] = ((family.attention, gates.attention), (family.mlp, gates.mlp))
    for branch, gate in pairs:
        if gate is not None and path == branch.end:
            ends_in_norm = branch.end in branch.norms
            weight = _gain(weight, gate, family.gain_offset) if ends_in_norm else weight * gate.to(weight)
    return weight


def _fold_channel(weight: Tensor, spec: Spec, role: str, dim: int, anatomy: Anatomy, gates: Gates) -> Tensor:
    assert gates.channel is not None
    family = anatomy.family
    hz = gates.channel.to(weight.device)  # (d,)
    share = float((hz != 0).float().mean())  # d'/d
    stream = share**0.5 if gates.rescale_norms else 1.0  # r
    embed = hz * (stream / share**0.5 if family.embed_scale == "sqrt(C)" else stream)  # (d,) e
    if role == "embed":
        return _scale(weight, embed, dim)
    if role == "write":
        return _scale(weight, hz * stream, dim)
    if role == "raw":
        return weight / stream
    if role == "gain":
        factor = torch.full_like(hz, 1 / stream)
        if anatomy.tied and spec.name.rpartition(".")[0] == family.final_norm:
            factor = factor / torch.where(hz == 0, 1.0, embed)  # the head is the scaled embedding: undo its factor
        return _gain(weight, factor, family.gain_offset)
    return weight


def _scale(weight: Tensor, factor: Tensor, dim: int) -> Tensor:
    view = [1] * weight.dim()
    view[dim] = -1
    return weight * factor.to(weight).view(view)


def _gain(weight: Tensor, factor: Tensor, offset: float) -> Tensor:
    """Scale the effective gain (offset + weight)."""
    return (offset + weight) * factor.to(weight) - offset
