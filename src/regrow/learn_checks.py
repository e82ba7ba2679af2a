"""What can be refused of gates that learn from the recipe alone.

What this gives up: what only texts or the model tell; that is `prepare` and `learned`.
"""

from __future__ import annotations

import warnings

from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.artifacts.ramp import RAMPS
from regrow.engines.trackers import check_trackers
from regrow.errors import RegrowWarning, SettingsError
from regrow.recovery import Distil
from regrow.settings import Recipe
from regrow.stages.learn import as_loop, pace_of, too_few

OWN_DISTIL = ("options", "text", "likeness")  # words about learning from a teacher that gates have too


def check_learn(recipe: Recipe) -> None:
    """Refuse gates that cannot learn as they are asked to. Raises `InputError`."""
    asked = recipe.learn
    if asked is None:
        return
    if not recipe.cuts:
        raise SettingsError("gates that learn, and nothing is to go", "keep or a shape", "say what is to be left")
    for name, beside in (
        ("search", recipe.search is not None),
        ("sparsify", recipe.sparsify is not None),
        ("refit", recipe.refit is not None),
        (f"merge_heads = {recipe.merge_heads}", recipe.merge_heads != "off"),
        (f"stages = {recipe.stages}", recipe.stages > 1),
        (f"protect = {list(recipe.protect)}", recipe.protect != (0, 0)),
    ):
        if beside:
            raise SettingsError(f"{name} beside gates that learn", "one of them", f"leave learn or {name} out")
    if asked.teacher is not None:
        raise SettingsError(
            f"learn.teacher = {asked.teacher}",
            "null: the teachers of gates live in the model itself",
            "leave it out; learn.teachers says which",
        )
    for name in Distil.model_fields:
        if name not in OWN_DISTIL and getattr(asked.distil, name) != getattr(Distil(), name):
            raise SettingsError(
                f"learn.distil.{name} = {getattr(asked.distil, name)}",
                ", ".join(f"learn.distil.{own}" for own in OWN_DISTIL),
                "leave it out",
            )
    if asked.patience is not None:
        raise SettingsError(
            f"learn.patience = {asked.patience}: the loss rises with the sparsity", "null", "leave it out"
        )
    check_trackers(asked.report_to)
    RAMPS.get(asked.ramp)
    DIVERGENCES.get(asked.loss).check(asked.distil.options)
    if LIKENESSES.get(asked.distil.likeness).of != "states":
        raise SettingsError(f"learn.distil.likeness = {asked.distil.likeness}", "cosine, mse", "name one of them")
    steps = as_loop(asked, recipe.seed).steps(asked.block)
    pace_of(asked, steps)
    if recipe.dtype != "fp32":
        raise SettingsError(f"gates that learn in {recipe.dtype}", "fp32", "use --dtype fp32")
    if said := too_few(asked, steps):
        warnings.warn(said, RegrowWarning, stacklevel=2)
