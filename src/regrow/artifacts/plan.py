"""What stays: the indices of kept units, layer by layer. Plain data; prints, diffs, saves, re-applies anywhere.

What this gives up: a plan says nothing of weights, so it fits any checkpoint of the same shape, also a wrong one;
`made_by["scores"]["model"]` is the fingerprint of the one it was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from regrow.artifacts.shape import Anatomy, LayerShape, Shape
from regrow.errors import SettingsError

MERGES = ("minitron", "laco")
"""How a query head that goes is added into one that stays: `kept + (kept - gone)`, `kept + (gone - kept)`."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Kept units of one layer, as ascending indices into the intact layer."""

    index: int  # of the layer in the intact model
    groups: tuple[int, ...]
    heads: tuple[int, ...]  # query heads 0..H-1, group-major; the same number in every kept group
    neurons: tuple[int, ...]
    merged: tuple[tuple[int, int], ...] = ()  # (kept, gone) query heads, in the order in which they are merged


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that stays, and why: `made_by` is a record of budget, criteria and spread."""

    channels: tuple[int, ...]
    layers: tuple[LayerPlan, ...]
    rescale_norms: bool = False  # statistics over the original width (NutePrune) instead of the kept one
    made_by: Mapping[str, Any] = field(default_factory=dict)
    merge: str = "off"  # how heads that go are added into heads that stay: minitron, laco

    def shape(self) -> Shape:
        rows = (
            LayerShape(len(x.groups), len(x.heads) // len(x.groups) if x.groups else 0, len(x.neurons))
            for x in self.layers
        )
        return Shape(len(self.channels), tuple(rows))

    @staticmethod
    def everything(anatomy: Anatomy) -> Plan:
        """The plan that cuts nothing."""
        sizes = anatomy.sizes
        return Plan(
            tuple(range(sizes["C"])),
            tuple(
                LayerPlan(i, tuple(range(sizes["K"])), tuple(range(sizes["H"])), tuple(range(sizes["F"])))
                for i in range(sizes["L"])
            ),
        )

    def then(self, later: Plan) -> Plan:
        """This plan and a `later` one of what it leaves, as one of the intact model. Heads are merged in that order."""

        def of(kept: tuple[int, ...], picked: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(kept[i] for i in picked)

        rows = []
        for x in later.layers:
            own = self.layers[x.index]
            more = ((own.heads[into], own.heads[gone]) for into, gone in x.merged)
            rows.append(
                LayerPlan(
                    own.index,
                    of(own.groups, x.groups),
                    of(own.heads, x.heads),
                    of(own.neurons, x.neurons),
                    (*own.merged, *more),
                )
            )
        return replace(self, channels=of(self.channels, later.channels), layers=tuple(rows))

    def check(self, anatomy: Anatomy) -> None:
        """Raise `SettingsError` unless the plan fits the model: in range, ascending, even heads, nothing empty; heads
        that are merged go, into others of their group."""

        def bad(came: str, allowed: str) -> SettingsError:
            return SettingsError(f"plan: {came}", allowed, "make the plan anew with `regrow prune` for this model")

        def fits(kept: tuple[int, ...], size: int) -> bool:
            return all(0 <= i < size for i in kept) and list(kept) == sorted(set(kept))

        sizes, group = anatomy.sizes, anatomy.sizes["G"]
        if not self.channels or not fits(self.channels, sizes["C"]):
            raise bad("channels are empty or out of order", f"ascending indices below {sizes['C']}")
        if not self.layers or not fits(tuple(x.index for x in self.layers), sizes["L"]):
            raise bad("layers are empty or out of order", f"ascending indices below {sizes['L']}")
        for x in self.layers:
            for name, kept, size in (
                ("groups", x.groups, sizes["K"]),
                ("heads", x.heads, sizes["H"]),
                ("neurons", x.neurons, sizes["F"]),
            ):
                if not fits(kept, size):
                    raise bad(f"{name} of layer {x.index} are out of order", f"ascending indices below {size}")
            per_group = [sum(h // group == g for h in x.heads) for g in x.groups]
            if sum(per_group) != len(x.heads) or len(set(per_group)) > 1 or 0 in per_group:
                raise bad(
                    f"layer {x.index} keeps {per_group} query heads in its groups",
                    "the same number, at least one, in every kept group and none elsewhere",
                )
            if x.merged and self.merge not in MERGES:
                raise bad(f"layer {x.index} merges heads as {self.merge!r}", ", ".join(MERGES))
            for place, (into, gone) in enumerate(x.merged):
                left = {*x.heads, *(head for pair in x.merged[place + 1 :] for head in pair)}
                alike = group == 1 or into // group == gone // group
                if into not in left or gone in left or not alike or not 0 <= gone < sizes["H"]:
                    raise bad(
                        f"layer {x.index} merges head {gone} into head {into}",
                        "heads that go, each once, into others of their group that stay or are merged later",
                    )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "channels": list(self.channels),
            "rescale_norms": self.rescale_norms,
            "merge": self.merge,
            "layers": [
                {
                    "index": x.index,
                    "groups": list(x.groups),
                    "heads": list(x.heads),
                    "neurons": list(x.neurons),
                    "merged": [list(pair) for pair in x.merged],
                }
                for x in self.layers
            ],
            "made_by": dict(self.made_by),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """A plan that was written. Older ones merge nothing. Raises `SettingsError` for anything else."""
        try:
            layers = tuple(
                LayerPlan(
                    x["index"],
                    tuple(x["groups"]),
                    tuple(x["heads"]),
                    tuple(x["neurons"]),
                    tuple((kept, gone) for kept, gone in x.get("merged", ())),
                )
                for x in data["layers"]
            )
            merge = data.get("merge", "off")
            return Plan(tuple(data["channels"]), layers, data["rescale_norms"], data["made_by"], merge)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SettingsError(
                f"not a plan: {error!r}", "a plan.json that regrow wrote", "check the path; `regrow show` prints plans"
            ) from error
