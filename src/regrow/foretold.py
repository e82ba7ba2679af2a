"""The plan of a run before any score is known: its shape, and what cannot be planned whatever the scores.

What this gives up: which units go, and with the spread `across` the shape too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from regrow.artifacts.family import Unit
from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.space import Widths, full
from regrow.engines.bind import bind
from regrow.engines.hetero import holder
from regrow.errors import SettingsError
from regrow.staged import staged
from regrow.stages.plan import Wish

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def foretold_plan(config: PreTrainedConfig, anatomy: Anatomy, wish: Wish, stages: int = 1) -> tuple[Plan, bool]:
    """A plan of the shape that the run will leave, and whether scores may change that shape.

    Only `across` looks at scores to share units among layers; for the others they decide which units go, and which
    layers get the few that are left over. Raises as `make_plan` does, and `SettingsError` where no stock class holds
    what lies between two steps.
    """

    def between(plan: Plan) -> tuple[Anatomy, Scores]:
        found = holder(config, anatomy, plan)
        if found.kind == "heterogeneous":
            raise SettingsError(
                f"stages = {stages}, and {plan.shape()} between two of them, which no stock class holds",
                "shapes that can be scored on the way",
                "use stages=1, or other divisors",
            )
        left = replace(bind(found.config), store_bytes=anatomy.store_bytes)
        return left, _even(left, wish)

    guessed = wish.spread == "across" and not wish.uniform and bool({"group", "head", "neuron"} & set(wish.axes))
    asked = replace(wish, spread="uniform") if guessed else wish
    plan = staged(anatomy, _even(anatomy, wish), asked, stages, between)
    return plan, guessed and plan.shape() != anatomy.dense


def first_units(anatomy: Anatomy, widths: Widths) -> Plan:
    """A plan that keeps the first units and layers: what `widths` alone decide, it has in common with any other."""
    kept, group = {**full(anatomy), **widths}, anatomy.sizes["G"]
    groups, neurons = tuple(range(kept["group"])), tuple(range(kept["neuron"]))
    heads = tuple(g * group + h for g in groups for h in range(kept["head"]))
    rows = (LayerPlan(index, groups, heads, neurons) for index in range(kept["layer"]))
    return Plan(tuple(range(kept["channel"])), tuple(rows))


def _even(anatomy: Anatomy, wish: Wish) -> Scores:
    """Scores that are all the same."""
    sizes = anatomy.sizes
    sides: dict[Unit, tuple[int, ...]] = {
        "layer": (sizes["L"],),
        "group": (sizes["L"], sizes["K"]),
        "head": (sizes["L"], sizes["H"]),
        "neuron": (sizes["L"], sizes["F"]),
        "channel": (sizes["C"],),
    }
    table = {unit: torch.ones(sides[unit]) for unit in wish.axes}
    return Scores(table, {"criteria": {unit: {"comparable": True} for unit in wish.axes}})
