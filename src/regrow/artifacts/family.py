"""What can be cut in a model layout, and where: the words `Unit`, `Cut`, `Branch`, `Family`.

A family names only the places a cut touches; every other tensor is read from the live model, so that a norm
or a buffer nobody thought of cannot be forgotten. What this gives up: layouts whose coupling is not "unit u
owns a fixed run of one dimension" (state-space blocks, latent attention) need more than a declaration.

Sizes in expressions (`width`, `offset`): L layers, K key/value groups, G query heads in a group, H = K*G heads,
D head dimension, F MLP neurons, C hidden channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from regrow.registry import Registry

Unit = Literal["layer", "group", "head", "neuron", "channel"]
UNITS: tuple[Unit, ...] = ("layer", "group", "head", "neuron", "channel")

Role = Literal["select", "fold", "span", "embed", "gain", "write", "raw", "head"]
"""What happens to a tensor beside selecting the kept units (exact rules: docs/surgery.md).

select  nothing                              fold   multiplied by the unit's gate
span    a norm over all of the unit's kind: its statistics are taken over kept units (OLMo2's q- and k-norm)
embed   the embedding                        gain   a norm that reads the residual stream
write   writes to the residual stream        raw    a linear that reads the residual stream without a norm
head    turns the last state into logits
"""


@dataclass(frozen=True, slots=True)
class Cut:
    """Unit `u` owns `offset + u*width .. + width` of dimension `dim` of the module at `path`.

    `path` is relative to a layer, or to the whole model when the unit is not inside a layer (see `Family.whole`).
    It stands for the module's weight and, when `dim` is 0, its bias.
    """

    path: str
    dim: Literal[0, 1]
    width: str = "1"
    offset: str = "0"
    role: Role = "select"


@dataclass(frozen=True, slots=True)
class Branch:
    """A sub-block of a layer: attention or MLP."""

    module: str  # replaced by a no-op when all its units are gone
    site: str  # the linear whose input its units' gates multiply
    end: str  # the module whose output is added to the residual stream
    norms: tuple[str, ...]  # norms that only serve this branch and go with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One layout: which transformers model types have it, and what can be cut in it."""

    name: str
    model_types: tuple[str, ...]
    attention: Branch
    mlp: Branch
    cuts: Mapping[Unit, tuple[Cut, ...]]  # cuts inside every layer
    whole: tuple[Cut, ...]  # channel cuts outside the layers: embedding, final norm, head
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm: Literal["rms", "layer"] = "rms"
    gain_offset: float = 0.0  # a norm multiplies by (gain_offset + weight): 1 for Gemma
    embed_scale: Literal["1", "sqrt(C)"] = "1"
    routers: tuple[str, ...] = ()  # modules inside a layer that choose experts; never sparse
    carriers: tuple[str, ...] = ()  # model types that compute the same function with fewer checks
    refuses: Mapping[Unit, str] = field(default_factory=dict)  # why a unit of this layout cannot be cut


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """The value of a sum of products such as `"H*D+K*D"` or `"3*D"`."""
    total = 0
    for term in expression.split("+"):
        product = 1
        for factor in term.split("*"):
            product *= int(factor) if factor.isdigit() else sizes[factor]
        total += product
    return total


FAMILIES: Registry[Family] = Registry("family", "regrow.families")


def declare(family: Family) -> Family:
    """Register a family under its name; the one line every file in `families/` ends with."""
    if family.norm == "layer" and "channel" in family.cuts:
        raise TypeError(f"family {family.name!r}: a LayerNorm over kept channels cannot be folded into a stock one")
    return FAMILIES.add(family.name, family)
