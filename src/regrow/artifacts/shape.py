"""How many units each layer has, and what that costs: parameters, FLOPs, KV bytes, file bytes.

Counted from shapes alone, never from weights: a 70B model is sized in milliseconds. `Anatomy` is a family bound to
one configuration: every tensor of the model with the units that own its dimensions.
What this gives up: costs that hang on values rather than shapes (quantised storage, sparse formats).

Worked number: LLaMA-7B, 8 of 32 heads and 2752 of 11008 neurons gone from layers 4..29 -> 5,422,977,024 parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from regrow.artifacts.family import UNITS, Cut, Family, Unit, evaluate

KV_BYTES = 2  # a cached key or value is stored in 16 bits


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Units of one layer. `groups` = 0: no attention; `neurons` = 0: no MLP."""

    groups: int  # key/value heads, each with its query heads
    heads: int  # query heads in each group
    neurons: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Units of a whole model; layers that are gone are not listed."""

    channels: int
    layers: tuple[LayerShape, ...]

    @property
    def uniform(self) -> bool:
        """True when every layer has the same, non-empty widths: a stock checkpoint can hold it."""
        return len(set(self.layers)) == 1 and min(self.layers[0].groups, self.layers[0].neurons) > 0

    def __str__(self) -> str:
        def span(values: list[int]) -> str:
            low, high = min(values), max(values)
            return str(low) if low == high else f"{low}..{high}"

        return (
            f"{len(self.layers)} layers x ({span([x.groups for x in self.layers])} groups of "
            f"{span([x.heads for x in self.layers])} heads, {span([x.neurons for x in self.layers])} neurons), "
            f"{self.channels} channels"
        )

    def to_json(self) -> dict[str, Any]:
        return {"channels": self.channels, "layers": [[x.groups, x.heads, x.neurons] for x in self.layers]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Shape:
        return Shape(data["channels"], tuple(LayerShape(*row) for row in data["layers"]))


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter of the model, by name and shape, with the cuts that own its dimensions."""

    name: str
    shape: tuple[int, ...]
    layer: int | None  # index of the layer it lies in
    cuts: tuple[tuple[Unit, Cut], ...]  # `Cut.dim` counts in `shape`
    branch: str | None  # "attention" or "mlp": goes when that branch goes

    @property
    def matrix(self) -> bool:
        return len(self.shape) > 1


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A family bound to one configuration."""

    family: Family
    model_type: str
    tied: bool  # the head is the embedding
    sizes: Mapping[str, int]  # L K G H D F C V; of experts A, how many of them a token meets
    tensors: tuple[Tensor, ...]  # every parameter once; a tied head is not listed
    alike: tuple[int, ...]  # for each layer, the first layer whose tensors look the same
    supported: tuple[Unit, ...]
    store_bytes: int = 2  # bytes a stored weight takes

    @property
    def dense(self) -> Shape:
        layer = LayerShape(self.sizes["K"], self.sizes["G"], self.sizes["F"])
        return Shape(self.sizes["C"], (layer,) * self.sizes["L"])

    def width(self, cut: Cut) -> int:
        return evaluate(cut.width, self.sizes)

    def offset(self, cut: Cut) -> int:
        return evaluate(cut.offset, self.sizes)

    def units(self, unit: Unit) -> int:
        """How many units of this kind the intact model has (in one layer, for units inside layers)."""
        return self.sizes[{"layer": "L", "group": "K", "head": "H", "neuron": "F", "channel": "C"}[unit]]


def tensor_size(anatomy: Anatomy, tensor: Tensor, layer: LayerShape | None, channels: int) -> tuple[int, ...]:
    """The shape of `tensor` once its layer has `layer`'s units and the model `channels` channels."""
    sizes = anatomy.sizes
    shape = list(tensor.shape)
    for dim, size in enumerate(tensor.shape):
        runs: dict[int, list[tuple[Unit, Cut]]] = {}
        for unit, cut in tensor.cuts:
            if cut.dim == dim:
                runs.setdefault(anatomy.offset(cut), []).append((unit, cut))
        for owners in runs.values():
            length = kept = anatomy.width(owners[0][1]) * anatomy.units(owners[0][0])
            for unit, _ in owners:
                if unit == "channel":
                    kept = kept * channels // sizes["C"]
                elif layer is not None and unit == "group":
                    kept = kept * layer.groups // sizes["K"]
                elif layer is not None and unit == "head":
                    kept = kept * layer.heads // sizes["G"]
                elif layer is not None and unit == "neuron":
                    kept = kept * layer.neurons // sizes["F"]
            size += kept - length
        shape[dim] = size
    return tuple(shape)


def count(anatomy: Anatomy, shape: Shape, *, decoder_only: bool = False) -> int:
    """Parameters of a model of this shape.

    `decoder_only` counts the weight matrices inside the layers alone, as the papers do: no embedding, head, norms
    or biases. Layers are taken to keep their order, so layer i of `shape` is counted with layer i's tensors.
    """
    by_layer: dict[int | None, list[Tensor]] = {}
    for tensor in anatomy.tensors:
        by_layer.setdefault(tensor.layer, []).append(tensor)
    counted: dict[tuple[int, LayerShape], int] = {}
    total = 0
    if not decoder_only:
        total += sum(math.prod(tensor_size(anatomy, t, None, shape.channels)) for t in by_layer.get(None, []))
    for index, layer in enumerate(shape.layers):
        key = (anatomy.alike[index], layer)
        if key not in counted:
            counted[key] = sum(
                math.prod(tensor_size(anatomy, t, layer, shape.channels))
                for t in by_layer[key[0]]
                if (t.matrix or not decoder_only) and not gone(t, layer)
            )
        total += counted[key]
    return total


def gone(tensor: Tensor, layer: LayerShape) -> bool:
    """True when the branch the tensor serves has no units left."""
    return (tensor.branch == "attention" and layer.groups == 0) or (tensor.branch == "mlp" and layer.neurons == 0)


def alike(tensors: tuple[Tensor, ...], layers: int) -> tuple[int, ...]:
    """For each layer, the index of the first layer with equal shapes and cuts."""
    looks: list[list[Any]] = [[] for _ in range(layers)]
    for tensor in tensors:
        if tensor.layer is not None:
            looks[tensor.layer].append((tensor.shape, tensor.cuts, tensor.branch))
    return tuple(looks.index(look) for look in looks)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a shape costs. Ratios between two shapes are what a user should look at."""

    parameters: int
    decoder_weights: int
    flops_per_token: int  # multiply and add counted as two, at `context` tokens of context
    kv_bytes_per_token: int
    file_bytes: int
    context: int

    def to_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


CONTEXT = 1024  # tokens attended to, on average, where FLOPs are counted


def idle_weights(anatomy: Anatomy) -> int:
    """Weights of the experts that a token does not meet; stacks of experts are the tensors with three dimensions."""
    stacks = [tensor.shape for tensor in anatomy.tensors if len(tensor.shape) == 3]
    return sum((shape[0] - anatomy.sizes["A"]) * shape[1] * shape[2] for shape in stacks)


def flops_per_token(anatomy: Anatomy, shape: Shape, context: int = CONTEXT) -> int:
    """2 for every weight of a matrix product, and 4 for every attended position of every channel of every head.

    Of experts those count that a token meets.
    """
    matrices = count(anatomy, shape, decoder_only=True) - idle_weights(anatomy) + anatomy.sizes["V"] * shape.channels
    attention = sum(x.groups * x.heads for x in shape.layers) * anatomy.sizes["D"]
    return 2 * matrices + 4 * context * attention


def kv_bytes_per_token(anatomy: Anatomy, shape: Shape) -> int:
    return sum(2 * x.groups * anatomy.sizes["D"] * KV_BYTES for x in shape.layers)


MEASURES: dict[str, Callable[[Anatomy, Shape], int]] = {
    "parameters": count,
    "decoder_weights": lambda anatomy, shape: count(anatomy, shape, decoder_only=True),
    "flops_per_token": flops_per_token,
    "kv_bytes_per_token": kv_bytes_per_token,
    "file_bytes": lambda anatomy, shape: count(anatomy, shape) * anatomy.store_bytes,
}


def costs(anatomy: Anatomy, shape: Shape) -> Costs:
    """Every count of a shape at once."""
    return Costs(**{name: measure(anatomy, shape) for name, measure in MEASURES.items()}, context=CONTEXT)


def even(anatomy: Anatomy, totals: Mapping[Unit, int]) -> Shape:
    """A shape with these totals over the kept layers, shared as evenly as whole units allow."""
    layers = totals.get("layer", anatomy.sizes["L"])

    def share(unit: Unit, full: int) -> list[int]:
        each, rest = divmod(totals.get(unit, full * layers), layers)
        return [each + (i < rest) for i in range(layers)]

    rows = zip(
        share("group", anatomy.sizes["K"]),
        share("head", anatomy.sizes["G"]),
        share("neuron", anatomy.sizes["F"]),
        strict=True,
    )
    return Shape(totals.get("channel", anatomy.sizes["C"]), tuple(LayerShape(*row) for row in rows))


def loss_by_axis(anatomy: Anatomy, shape: Shape) -> dict[str, float]:
    """The split that was realised: share of the units of each kind that is gone."""
    dense, layers = anatomy.dense, len(shape.layers)
    gone: dict[str, float] = {
        "layer": 1 - layers / len(dense.layers),
        "group": 1 - sum(x.groups for x in shape.layers) / (layers * anatomy.sizes["K"]),
        "head": 1
        - sum(x.heads for x in shape.layers if x.groups)
        / (sum(bool(x.groups) for x in shape.layers) * anatomy.sizes["G"] or 1),
        "neuron": 1 - sum(x.neurons for x in shape.layers) / (layers * anatomy.sizes["F"]),
        "channel": 1 - shape.channels / dense.channels,
    }
    return {unit: round(gone[unit], 4) for unit in UNITS}
