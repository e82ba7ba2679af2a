"""The plan of a run before any score is known: its shape, and whether heads can be merged so far.

What this gives up: which units go, and with the spread `across` the shape too.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy
from regrow.stages.plan import Wish, make_plan


def foretold_plan(anatomy: Anatomy, wish: Wish) -> tuple[Plan, bool]:
    """A plan of the shape that the run will leave, and whether scores may change that shape.

    Only `across` looks at scores to share units among layers; for the others they decide which units go, and which
    layers get the few that are left over.
    """
    sizes = anatomy.sizes
    sides: dict[Unit, tuple[int, ...]] = {
        "layer": (sizes["L"],),
        "group": (sizes["L"], sizes["K"]),
        "head": (sizes["L"], sizes["H"]),
        "neuron": (sizes["L"], sizes["F"]),
        "channel": (sizes["C"],),
    }
    table = {unit: torch.ones(sides[unit]) for unit in wish.axes}
    even = Scores(table, {"criteria": {unit: {"comparable": True} for unit in wish.axes}})
    guessed = wish.spread == "across" and not wish.uniform and bool({"group", "head", "neuron"} & set(wish.axes))
    plan = make_plan(anatomy, even, replace(wish, spread="uniform") if guessed else wish)
    return plan, guessed and plan.shape() != anatomy.dense
