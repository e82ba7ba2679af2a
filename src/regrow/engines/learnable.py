"""Gates of a model as parameters: drawn anew in every pass, pulled to a size by multipliers, settled in the end.

Each unit has one free scalar (`engines.hard_concrete`). For every aim two multipliers climb while it is missed, so
that missing it costs more and more (NutePrune with one aim, Sheared LLaMA with one for each kind of unit). A pull that
went on for long would carry gates far past their aim: a multiplier lets go by and by where its aim is passed.
What this gives up: aims that are not shares of what the model has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.engines import hard_concrete
from regrow.engines.expected import Chances, dense_weights, expected_weights
from regrow.engines.gates import INSIDE, Gates, LayerGates

SIZES: dict[Unit, tuple[str, ...]] = {
    "layer": ("L",),
    "group": ("L", "K"),
    "head": ("L", "H"),
    "neuron": ("L", "F"),
    "channel": ("C",),
}
START = hard_concrete.logit(0.99)  # where gates begin, with noise that breaks ties
NOISE = 0.01
LOWER = 3.0  # how far below that a unit with the lowest score begins, where there are scores

Values = Mapping[Unit, Tensor]


@dataclass(frozen=True, slots=True)
class Aim:
    """A share that is to go in the end, and how it is seen from the chances that units stay: () or (L,), each row."""

    name: str
    share: float
    lost: Callable[[Chances], Tensor]


def of_weights(anatomy: Anatomy, share: float) -> Aim:
    """So much of the decoder weights, wherever."""
    dense = dense_weights(anatomy)
    return Aim("weights", share, lambda chances: 1 - expected_weights(anatomy, chances) / dense)


def of_units(unit: Unit, share: float) -> Aim:
    """So much of one kind of unit; of those inside layers in every layer, so that widths end up the same."""
    return Aim(unit, share, lambda chances: 1 - chances[unit].double().mean(-1))


class LearnedGates(nn.Module):
    """`a`: a free scalar a unit of each kind in `units`, fp32. `multipliers` (aims, 2) fp32 climb.

    `lower`: how far below the usual start gates begin, shaped as `a`. `unwind`: the share of its pull that a multiplier
    loses in a step in which its aim is passed.
    From arXiv:2402.09773, 3.1, and arXiv:2310.06694, 2.1; with groups for heads where heads share keys and values.
    Neither has a start by scores, nor multipliers that let go (the reset of integrators in control).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        units: Sequence[Unit],
        aims: Sequence[Aim],
        *,
        seed: int,
        lower: Values | None = None,
        unwind: float = 0.0,
    ) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.aims, self.unwind = tuple(aims), unwind
        sizes = {unit: [anatomy.sizes[size] for size in SIZES[unit]] for unit in units}
        drawn = {unit: START + NOISE * torch.randn(size, generator=source) for unit, size in sizes.items()}
        self.a = nn.ParameterDict(
            {unit: a - lower[unit] if lower and unit in lower else a for unit, a in drawn.items()}
        )
        self.multipliers = nn.Parameter(torch.zeros(len(aims), 2))

    @torch.no_grad()
    def clamp(self) -> None:
        """Back within the limits; before every use, which is the same as after every step."""
        for a in self.a.values():
            a.clamp_(-hard_concrete.LIMIT, hard_concrete.LIMIT)

    def chances(self) -> Chances:
        return {unit: hard_concrete.keep(a) for unit, a in self.values()}

    def drawn(self, source: torch.Generator) -> Values:
        """Gates of one pass, with gradients."""
        return {unit: hard_concrete.draw(a, _noise(a, source)) for unit, a in self.values()}

    @torch.no_grad()
    def settled(self) -> Values:
        """Gates without chance; as many of each row are 0 as are expected to be."""
        return {unit: hard_concrete.settled(a) for unit, a in self.values()}

    @torch.no_grad()
    def soft(self) -> Values:
        """What gates that stay multiply by."""
        return {unit: hard_concrete.soft(a) for unit, a in self.values()}

    def penalty(self, chances: Chances, risen: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What it costs to miss the aims, () fp32, of which `risen` (0 to 1) is asked by now; and what is to be told.

        Each costs the mean over its rows of l1 (s - t) + l2 (s - t)^2, s what is lost and t what is to be.
        """
        total, told = self.multipliers.new_zeros(()), dict[str, Tensor]()
        for aim, (first, second) in zip(self.aims, self.multipliers, strict=True):
            lost = aim.lost(chances).float()  # () or (L,)
            apart = lost - risen * aim.share
            total = total + (first * apart + second * apart.square()).mean()
            name = "" if aim.name == "weights" else f" {aim.name}"
            told[f"sparsity{name}"] = lost.detach().mean()
            told[f"multiplier{name}"] = first.detach()
            told[f"multiplier 2{name}"] = second.detach()
        return total, told

    @torch.no_grad()
    def let_go(self, chances: Chances, risen: float) -> None:
        """Weaken first multipliers that pull away from their aim; once a step. Without it they would climb down no
        faster than they climbed up."""
        for aim, pair in zip(self.aims, self.multipliers, strict=True):
            apart = (aim.lost(chances).float() - risen * aim.share).mean()
            if pair[0] * apart < 0:
                pair[0] *= 1 - self.unwind

    @torch.no_grad()
    def missed(self) -> dict[str, tuple[float, float]]:
        """Of each aim what is lost on average now and what is to be."""
        self.clamp()
        chances = self.chances()
        return {aim.name: (float(aim.lost(chances).mean()), aim.share) for aim in self.aims}

    def values(self) -> list[tuple[Unit, Tensor]]:
        """The free scalars of each kind of unit."""
        return [(unit, self.a[unit]) for unit in SIZES if unit in self.a]


def lower_by(scores: Tensor, *, comparable: bool) -> Tensor:
    """How far below the usual start units begin, by the order of their scores, (layers, n) or (n,): the best at it, the
    worst `LOWER` below; in one order over all layers where scores are `comparable`, else in one a layer."""
    rows = scores.float().reshape(1, -1) if comparable else scores.float().reshape(-1, scores.shape[-1])
    places = rows.argsort(-1).argsort(-1).float()  # 0 = the lowest
    return (LOWER * (1 - places / max(1, rows.shape[-1] - 1))).reshape(scores.shape)


def kept_by(anatomy: Anatomy, plan: Plan, units: Sequence[Unit]) -> Values:
    """1 where the plan keeps a unit of these kinds, else 0."""
    sizes = anatomy.sizes
    found = {unit: torch.zeros([sizes[size] for size in SIZES[unit]]) for unit in units}
    inside = {
        layer.index: {"group": layer.groups, "head": layer.heads, "neuron": layer.neurons} for layer in plan.layers
    }
    for unit, values in found.items():
        if unit == "channel":
            values[list(plan.channels)] = 1
        elif unit == "layer":
            values[list(inside)] = 1
        else:
            for index, kept in inside.items():
                values[index, list(kept[unit])] = 1
    return found


def _noise(a: Tensor, source: torch.Generator) -> Tensor:
    return torch.rand(a.shape, generator=source, device=a.device, dtype=a.dtype)


def opened(anatomy: Anatomy, values: Values, *, rescale_norms: bool = False) -> Gates:
    """Gates of a model that have these values, and none elsewhere; `show` gives them others."""
    gates = Gates([LayerGates() for _ in range(anatomy.sizes["L"])], rescale_norms=rescale_norms)
    show(gates, values)
    return gates


def show(gates: Gates, values: Values | None) -> None:
    """Give gates that are at work other values, in place; None opens them all."""
    given = values or {}
    gates.channel = given.get("channel")
    for index, layer in enumerate(gates.layers):
        for unit in INSIDE:
            setattr(layer, unit, given[unit][index] if unit in given else None)
        layer.attention = layer.mlp = given["layer"][index] if "layer" in given else None
