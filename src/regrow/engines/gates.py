"""The gate: a number a unit that multiplies what the unit contributes, by hooks, on any declared family.

One mechanism, four uses: scoring reads its gradient, learning trains it, searching sets it to 0 or 1 without copying
the model, surgery folds it into the weights. `masked` means: statistics of norms over the kept channels only (or over
all, with `rescale_norms`), in every family; so masked logits equal sliced logits.
What this gives up: torch.compile while gated; a hook on every gated module (under 2 % of a step).

Shapes: group (K,), head (H,), neuron (F,), attention () and mlp () for each layer; channel (C,) once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
Read = Callable[[], Tensor | None]
INSIDE: tuple[Unit, ...] = ("group", "head", "neuron")  # units that lie inside a layer


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
    """Run the model with gates acting; everything is restored on leaving, also after an error.

    Gates are read in every pass, so they may be replaced meanwhile, and one that becomes None is open; one that is None
    on entering has no hook.
    """
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
        spans: dict[str, list[Read]] = {}  # norms over many units -> their gates, laid out
        for unit in INSIDE:
            if getattr(layer, unit) is None:
                continue
            for cut in family.cuts.get(unit, ()):
                path = prefix + cut.path
                read = partial(_laid_out, anatomy, cut, sizes[f"{path}.weight"][cut.dim], layer, unit)
                if cut.role == "fold":
                    sites.setdefault(path, []).append((cut.dim == 1, partial(_times, read)))
                elif cut.role == "span":
                    spans.setdefault(path, []).append(read)
        for path, reads in spans.items():
            sites.setdefault(path, []).extend(_statistics(partial(_share, reads)))
        if gates.channel is not None:
            for cut in family.cuts["channel"]:
                sites.setdefault(prefix + cut.path, []).extend(_channel_hooks(cut, gates))
        for name, branch in (("attention", family.attention), ("mlp", family.mlp)):
            if getattr(layer, name) is not None:
                sites.setdefault(prefix + branch.end, []).append(
                    (False, partial(_times, partial(getattr, layer, name)))
                )
    if gates.channel is not None:
        for cut in family.whole:
            sites.setdefault(cut.path, []).extend(_channel_hooks(cut, gates))
    return sites


def _laid_out(anatomy: Anatomy, cut: Cut, size: int, layer: LayerGates, unit: Unit) -> Tensor | None:
    gate: Tensor | None = getattr(layer, unit)
    return None if gate is None else expand(anatomy, cut, gate, size)


def _channel_hooks(cut: Cut, gates: Gates) -> list[tuple[bool, Hook]]:
    read = partial(getattr, gates, "channel")
    if cut.role in ("embed", "write"):
        return [(False, partial(_times, read))]
    if cut.role in ("gain", "span") and not gates.rescale_norms:
        return _statistics(partial(_share, [read]))
    return []


def _share(reads: Sequence[Read]) -> Tensor | None:
    """Of a norm's elements, those all of whose owners are not shut: () fp32; None where all gates are open."""
    kept = [gate.detach() != 0 for read in reads if (gate := read()) is not None]
    return torch.stack(kept).all(0).float().mean() if kept else None


def _statistics(share: Read) -> list[tuple[bool, Hook]]:
    """Make an RMS norm average over the kept elements only: scale its input up and its output back down."""

    def up(x: Tensor) -> Tensor:
        kept = share()
        return x if kept is None else x * kept.rsqrt().to(x.device)

    def down(y: Tensor) -> Tensor:
        kept = share()
        return y if kept is None else y * kept.sqrt().to(y.device)

    return [(True, up), (False, down)]


def _times(read: Read, x: Tensor) -> Tensor:
    gate = read()
    return x if gate is None else x * gate.to(x.device, x.dtype)
