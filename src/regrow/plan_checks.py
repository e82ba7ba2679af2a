"""What can be refused of a recovery once it is known what stays, before anything is cut or trained for it.

What this gives up: what only the recipe, or only the intact model, tells; those come first (`cut_checks`, `prepare`).
"""

from __future__ import annotations

import warnings
from dataclasses import astuple

from regrow.artifacts.goal import LIKENESSES
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy, count, gone, tensor_size
from regrow.engines import checkpoint, spp_forward, zeros
from regrow.engines.bind import Subject
from regrow.engines.match import Match, check_depths, check_heads
from regrow.engines.refit import check_refit
from regrow.errors import RegrowWarning, SettingsError
from regrow.settings import Recipe


def check_planned(subject: Subject, plan: Plan, recipe: Recipe) -> None:
    """Refuse what `check_left` does, and warn of a smaller teacher (a search has). Raises `SettingsError`."""
    check_left(subject.anatomy, plan, recipe)
    asked = recipe.recover
    if recipe.search is None and asked is not None and asked.tokens and asked.teacher is not None:
        warn_of_smaller(asked.teacher, count(subject.anatomy, plan.shape()))


def check_left(anatomy: Anatomy, plan: Plan, recipe: Recipe) -> None:
    """Refuse heads that cannot be refitted, a rank of SPP that does not divide the outputs which a cut leaves, places
    of states in layers which it does not, and to train what was cut where nothing is narrower. Raises `SettingsError`.
    """
    if recipe.refit is not None:
        check_refit(anatomy, plan)
    asked = recipe.recover
    if asked is None or not asked.tokens:
        return
    if asked.teacher is not None:
        match = Match(LIKENESSES.get(asked.distil.likeness), asked.distil.states, None, asked.distil.likeness_options)
        check_depths(match.likeness, match.places, len(plan.layers))
        check_attention(anatomy, plan, match)
    if asked.method == "cut" and plan.layers and not narrower(anatomy, plan):
        raise SettingsError(
            "recovery of what was cut alone, and the cut makes no matrix smaller: whole layers go",
            "a cut of widths",
            "use method full or lora, or let neurons, heads or channels go too",
        )
    if asked.method != "spp":
        return
    shape, names = plan.shape(), set(zeros.prunable(anatomy))
    layers = {units.index: left for units, left in zip(plan.layers, shape.layers, strict=True)}
    rows = {
        tensor.name: tensor_size(anatomy, tensor, layers[tensor.layer], shape.channels)[-2]
        for tensor in anatomy.tensors
        if tensor.name in names and tensor.layer in layers and not gone(tensor, layers[tensor.layer])
    }
    spp_forward.check_rank(asked.rank, rows)


def warn_of_smaller(teacher: str, own: int, student: str = "the student") -> None:
    """Say so where a teacher is smaller than its student of `own` parameters."""
    size = checkpoint.count(checkpoint.locate(teacher))
    if size < own:
        what = f"teacher {teacher} has {size:,} parameters and {student} {own:,}"
        warnings.warn(f"{what}: little is learnt from one that knows less", RegrowWarning, stacklevel=2)


def check_attention(anatomy: Anatomy, plan: Plan, match: Match) -> None:
    """Refuse relations among queries and keys where a cut leaves none, or widths that their heads do not divide."""
    if match.likeness.of != "attention":
        return
    for place in match.places:
        left, width = plan.layers[-place], anatomy.sizes["D"]
        if not left.groups:
            raise SettingsError(
                f"states of attention at place {place}, layer {left.index}, whose attention the plan drops",
                "places whose layers keep theirs",
                "name other places, or compare states by cosine or mse",
            )
        check_heads(match, [len(left.heads) * width, len(left.groups) * width])


def narrower(anatomy: Anatomy, plan: Plan) -> bool:
    """Whether a matrix that stays has fewer rows or columns than before."""
    found, before = plan.shape(), anatomy.dense
    return found.channels < before.channels or any(
        0 < now < then
        for layer in found.layers
        for now, then in zip(astuple(layer), astuple(before.layers[0]), strict=True)
    )
