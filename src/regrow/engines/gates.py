"""The gate: a number a unit that multiplies what the unit contributes, by hooks, on any declared family.

One mechanism, four uses: scoring reads its gradient, learning trains it, searching sets it to 0 or 1 without copying
the model, surgery folds it into the weights. `masked` means: statistics of norms over the kept channels only (or over
all, with `rescale_norms`), in every family; so masked logits equal sliced logits.
What this gives up: torch.compile while gated; a hook on every gated module (under 2 % of a step).

Shapes: group (K,), head (H,), neuron (F,), attention () and mlp () for each layer; channel (C,) once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regrow.artifacts.family import Cut, Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.errors import UnsupportedModel

Hook = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class LayerGates:
    """Gates of one layer; None is open."""

    group: Tensor | None = None  # (K,)
    head: Tensor | None = None  # (H,)
    neuron: Tensor | None = None  # (F,)
    attention: Tensor | None = None  # () multiplies what the branch adds to the stream, biases included
    mlp: Tensor | None = None  # ()


@dataclass(slots=True)
class Gates:
    """All gates of a model. Values may be soft and may require gradients; exact zeros are units that are gone."""

    layers: list[LayerGates]
    channel: Tensor | None = None  # (C,)
    rescale_norms: bool = False  # norms over channels keep statistics over the original width


def from_plan(anatomy: Anatomy, plan: Plan) -> Gates:
    """Binary gates that leave open what the plan keeps. A layer or branch that is gone has its whole branch shut.

    Raises `UnsupportedModel` when the plan drops units that this family cannot cut.
    """
    gone = torch.zeros(())
    layers = [LayerGates(attention=gone, mlp=gone) for _ in range(anatomy.sizes["L"])]
    for kept in plan.layers:
        layers[kept.index] = LayerGates(
            group=_binary(anatomy, "group", kept.groups) if kept.groups else None,
            head=_binary(anatomy, "head", kept.heads) if kept.groups else None,
            neuron=_binary(anatomy, "neuron", kept.neurons) if kept.neurons else None,
            attention=None if kept.groups else gone,
            mlp=None if kept.neurons else gone,
        )
    return Gates(layers, _binary(anatomy, "channel", plan.channels), plan.rescale_norms)


def _binary(anatomy: Anatomy, unit: Unit, kept: tuple[int, ...]) -> Tensor | None:
    size = anatomy.units(unit)
    if len(kept) == size:
        return None
    if unit in anatomy.family.refuses:
        raise UnsupportedModel(
            f"the plan keeps {len(kept)} of {size} {unit}s of a {anatomy.model_type} model",
            f"{', '.join(anatomy.supported)} ({anatomy.family.refuses[unit]})",
            f"leave {unit} out of the axes",
        )
    return torch.zeros(size).index_fill_(0, torch.tensor(kept, dtype=torch.long), 1.0)


def expand(anatomy: Anatomy, cut: Cut, gate: Tensor, size: int) -> Tensor:
    """A gate laid out along a dimension of `size` elements: (units,) -> (size,); what the cut does not own stays 1."""
    width, offset = anatomy.width(cut), anatomy.offset(cut)
    run = gate.repeat_interleave(width)
    if len(run) == size:
        return run
    return torch.cat([gate.new_ones(offset), run, gate.new_ones(size - offset - len(run))])


@contextmanager
def gated(model: nn.Module, anatomy: Anatomy, gates: Gates) -> Iterator[None]:
    """Run the model with gates acting; everything is restored on leaving, also after an error."""
    handles: list[Any] = []
    try:
        for path, hooks in _sites(anatomy, gates).items():
            module = model.get_submodule(path)
            for before, function in hooks:
                if before:
                    handles.append(module.register_forward_pre_hook(partial(_before, function)))
                else:
                    handles.append(module.register_forward_hook(partial(_after, function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(function: Hook, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return function(args[0]), *args[1:]


def _after(function: Hook, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return function(output[0]), *output[1:]
    return function(output)


def _sites(anatomy: Anatomy, gates: Gates) -> dict[str, list[tuple[bool, Hook]]]:
    """Module path -> hooks, each before (on the input) or after (on the output)."""
    sites: dict[str, list[tuple[bool, Hook]]] = {}
    family = anatomy.family
    sizes = {tensor.name: tensor.shape for tensor in anatomy.tensors}
    for index, layer in enumerate(gates.layers):
        prefix = f"{family.layers}.{index}."
        spans: dict[str, Tensor] = {}  # norms over many units -> (n,) 1 where all of an element's owners stay
        for cut, gate in _gated_cuts(anatomy, layer):
            path = prefix + cut.path
            value = expand(anatomy, cut, gate, sizes[f"{path}.weight"][cut.dim])
            if cut.role == "fold":
                sites.setdefault(path, []).append((cut.dim == 1, partial(_times, value)))
            elif cut.role == "span":
                spans[path] = spans.get(path, 1.0) * (value.detach() != 0).float()
        for path, kept in spans.items():
            sites.setdefault(path, []).extend(_statistics(float(kept.mean())))
        if gates.channel is not None:
            for cut in family.cuts["channel"]:
                sites.setdefault(prefix + cut.path, []).extend(_channel_hooks(cut, gates))
        for shut, branch in ((layer.attention, family.attention), (layer.mlp, family.mlp)):
            if shut is not None:
                sites.setdefault(prefix + branch.end, []).append((False, partial(_times, shut)))
    if gates.channel is not None:
        for cut in family.whole:
            sites.setdefault(cut.path, []).extend(_channel_hooks(cut, gates))
    return sites


def _gated_cuts(anatomy: Anatomy, layer: LayerGates) -> Iterator[tuple[Cut, Tensor]]:
    """Every cut inside the layer whose unit has a gate, with that gate."""
    pairs: tuple[tuple[Unit, Tensor | None], ...] = (
        ("group", layer.group),
        ("head", layer.head),
        ("neuron", layer.neuron),
    )
    for unit, gate in pairs:
        if gate is not None:
            for cut in anatomy.family.cuts.get(unit, ()):
                yield cut, gate


def _channel_hooks(cut: Cut, gates: Gates) -> list[tuple[bool, Hook]]:
    assert gates.channel is not None
    if cut.role in ("embed", "write"):
        return [(False, partial(_times, gates.channel))]
    if cut.role in ("gain", "span") and not gates.rescale_norms:
        return _statistics(float((gates.channel.detach() != 0).float().mean()))
    return []


def _statistics(share: float) -> list[tuple[bool, Hook]]:
    """Make an RMS norm average over the kept elements only: scale its input up and its output back down."""
    factor = share**-0.5
    return [(True, lambda x: x * factor), (False, lambda y: y / factor)]


def _times(gate: Tensor, x: Tensor) -> Tensor:
    return x * gate.to(x.device, x.dtype)
