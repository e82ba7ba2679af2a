"""Before a cut, what will read fewer units is fitted anew on those that stay: least squares on calibration text.

Units that stay know something of those that go, so the linear behind them can make up for a part (channel pruning by
least squares, arXiv:1707.06168). It is the last linear of attention and of the MLP, in every layer that loses heads or
neurons, on what the cut layers before it give; weights change in the intact model, which is then proved and sliced as
any other. How far weights may go is found by halves of the text, unless it is said. What this gives up: what channels
and layers carried that go; two forward passes of every layer, or three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regrow.artifacts.curvature import Curvature
from regrow.artifacts.family import Branch, Unit
from regrow.artifacts.least_squares import onto_by_halves
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.engines.gates import Gates, LayerGates, expand, from_plan, gated
from regrow.engines.inputs import Observer, Reading
from regrow.engines.removal import enter, run_layer
from regrow.engines.room import give_back
from regrow.engines.walk import check_finite
from regrow.errors import SettingsError, TextError

Progress = Callable[[int, int], None]  # (layers done, layers in all)
SEVERAL = 8  # tokens for each input; with fewer much of what is fitted is chance
INSIDE: tuple[tuple[str, tuple[Unit, ...]], ...] = (("attention", ("group", "head")), ("mlp", ("neuron",)))


@dataclass(frozen=True, slots=True)
class Refitted:
    """Errors of a linear's outputs on the text, relative: |(W' - W) X|^2 / |W X|^2, as cut and as fitted."""

    name: str
    before: float
    after: float
    tokens: int
    inputs: int  # how many stay
    damping: float  # as a share of the mean diagonal; infinite where the weights stay as they were


def check_refit(anatomy: Anatomy, plan: Plan) -> None:
    """Raise `SettingsError` where heads go behind a norm over all of them: what stays would be read otherwise."""
    norms = any(cut.role == "span" for unit in ("group", "head") for cut in anatomy.family.cuts.get(unit, ()))
    if norms and any(0 < len(layer.heads) < anatomy.units("head") for layer in plan.layers):
        raise SettingsError(
            f"refit of heads in a {anatomy.model_type}, whose queries and keys pass a norm over all heads",
            "neurons, channels and layers",
            "leave refit out, or cut other units",
        )


def check_halves(blocks: Tensor) -> None:
    """Raise `TextError` for a single block (1, T): what is fitted on one half of the text is judged on the other."""
    if len(blocks) < 2:
        raise TextError(
            f"refit on one block of text, of {blocks.shape[1]} tokens",
            "two at least",
            "raise refit.tokens, shorten calibration.block, or give more text",
        )


@torch.no_grad()
def refit(
    model: Any,
    anatomy: Anatomy,
    plan: Plan,
    blocks: Tensor,  # (n, T) int64
    *,
    damping: float | None = None,
    progress: Progress | None = None,
) -> list[Refitted]:
    """Change the weights of `model` behind the units that `plan` drops, in place; they are the best for those it keeps.

    `damping` None: of every linear the one that does best between halves of the text. Raises `SettingsError` (see
    `check_refit`), `TextError` for a single block, `BrokenModel` for inputs that are not finite or all the same.
    """
    check_refit(anatomy, plan)
    check_halves(blocks)
    gates = from_plan(anatomy, plan)
    layers = list(model.get_submodule(anatomy.family.layers).children())
    with gated(model, anatomy, _only(gates)):
        stream, calls = enter(model, layers, blocks)  # (n, T, d)
    found: list[Refitted] = []
    kept = {layer.index for layer in plan.layers}
    for i, layer in enumerate(layers):
        if i not in kept:
            continue
        for branch, units in INSIDE:
            own, which = getattr(anatomy.family, branch), _staying(anatomy, gates.layers[i], i, branch)
            if which is None:
                continue
            whole = replace(gates.layers[i], **dict.fromkeys(units))
            with gated(model, anatomy, _only(gates, i, whole)):
                halves = [_read(layer, own.site, stream, calls[i], first) for first in (0, 1)]
            found.append(_fit(layer, own, f"{anatomy.family.layers}.{i}", halves, which, damping))
            give_back()
        with gated(model, anatomy, _only(gates, i, gates.layers[i])):
            for k in range(len(stream)):
                stream[k : k + 1] = run_layer(layer, stream[k : k + 1], *calls[i])
        if progress is not None:
            progress(i + 1, len(layers))
    return found


def _only(gates: Gates, index: int | None = None, layer: LayerGates | None = None) -> Gates:
    """Those of one layer, and of the channels; all others open."""
    layers = [LayerGates() for _ in gates.layers]
    if index is not None and layer is not None:
        layers[index] = layer
    return Gates(layers, gates.channel, gates.rescale_norms)


def _staying(anatomy: Anatomy, gates: LayerGates, index: int, branch: str) -> Tensor | None:
    """(n,) bool: which inputs of a branch's last linear stay; None where all of them do, or the branch goes."""
    site = getattr(anatomy.family, branch).site
    spec = next(t for t in anatomy.tensors if t.name == f"{anatomy.family.layers}.{index}.{site}.weight")
    if getattr(gates, branch) is not None:
        return None
    which = torch.ones(spec.shape[1])
    for unit, cut in spec.cuts:
        gate = getattr(gates, unit, None) if cut.dim == 1 and unit != "channel" else None
        if gate is not None:
            which = which * expand(anatomy, cut, gate, spec.shape[1])
    return None if bool(which.all()) else which > 0


def _read(layer: nn.Module, site: str, stream: Tensor, call: Any, first: int) -> Reading:
    """What every second sequence brings to the linear at `site`."""
    with Observer(layer, "gram", sites=[site]) as observer:
        for k in range(first, len(stream), 2):
            run_layer(layer, stream[k : k + 1], *call)
    return observer.readings[site]


def _fit(
    layer: nn.Module, branch: Branch, prefix: str, halves: Sequence[Reading], which: Tensor, damping: float | None
) -> Refitted:
    name, tokens = f"{prefix}.{branch.site}", sum(half.tokens for half in halves)
    weight: Tensor = layer.get_submodule(branch.site).weight  # type: ignore[assignment]
    grams = [half.take_gram() for half in halves]  # (n, n) each
    for half in halves:
        check_finite(f"inputs of {name}", half.squares)
    dense, which = weight.float(), which.to(weight.device)
    fitted, chosen = onto_by_halves(dense, grams, which, damping)
    curvature = Curvature(grams[0] + grams[1])
    whole = curvature.size(dense) or 1.0
    errors = [curvature.size(other - dense) / whole for other in (dense * which, fitted)]
    weight.copy_(fitted)
    return Refitted(name, errors[0], errors[1], tokens, int(which.sum()), chosen)


def said(found: Sequence[Refitted]) -> tuple[str, ...]:
    """What a reader must know of it."""
    if not found:
        return ("refit: no layer that stays loses heads or neurons, so nothing was fitted",)
    before, after = (sum(getattr(x, when) for x in found) / len(found) for when in ("before", "after"))
    tokens, most = found[0].tokens, max(x.inputs for x in found)
    what = f"{len(found)} linears behind what went were refitted on {tokens:,} tokens"
    left = sum(math.isinf(x.damping) for x in found)
    plain = f"; {left} of them stay as they were, which did best" if left else ""
    notes = [f"{what}: mean relative error of their outputs {before:.3f}, then {after:.3f}{plain}"]
    if tokens < SEVERAL * most:
        notes.append(f"refit: {tokens:,} tokens for up to {most:,} inputs are few: {SEVERAL} for each are better")
    return tuple(notes)
