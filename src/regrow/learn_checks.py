"""What can be refused of gates that learn from the recipe alone.

What this gives up: what only texts or the model tell; that is `prepare` and `learned`.
"""

from __future__ import annotations

import warnings

from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.artifacts.ramp import RAMPS
from regrow.engines import processes
from regrow.engines.trackers import check_trackers
from regrow.errors import RegrowWarning, SettingsError
from regrow.learning import Learn
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
    if asked.until is not None:
        raise SettingsError(
            f"learn.until = {asked.until}: what gates say counts at the end alone",
            "null",
            "leave it out; an interrupted training goes on when the same command is given again",
        )
    if asked.patience is not None:
        raise SettingsError(
            f"learn.patience = {asked.patience}: the loss rises with the sparsity", "null", "leave it out"
        )
    check_trackers(asked.report_to)
    _check_together(asked)
    RAMPS.get(asked.ramp)
    DIVERGENCES.get(asked.loss).check(asked.distil.options)
    if LIKENESSES.get(asked.distil.likeness).of != "states":
        raise SettingsError(f"learn.distil.likeness = {asked.distil.likeness}", "cosine, mse", "name one of them")
    steps = as_loop(asked, recipe.seed).steps(asked.block)
    if asked.gates != "policy-gradient":
        pace_of(asked, steps)
    if recipe.dtype != "fp32":
        raise SettingsError(f"gates that learn in {recipe.dtype}", "fp32", "use --dtype fp32")
    said = None if asked.gates == "policy-gradient" else too_few(asked, steps)
    if said is not None:
        warnings.warn(said, RegrowWarning, stacklevel=2)


def _check_together(asked: Learn) -> None:
    """Refuse ways to learn that do not go together. Raises `SettingsError`."""
    alone = asked.gates == "policy-gradient"
    if alone != (asked.method == "none"):
        raise SettingsError(
            f"learn.method = {asked.method} of learn.gates = {asked.gates}",
            "none of policy-gradient, which moves no weight, and lora or full of the others",
            "change one of them",
        )
    if alone and asked.teachers != "none":
        raise SettingsError(
            f"learn.teachers = {asked.teachers} of policy-gradient", "none: it learns from the text", "say none"
        )
    if alone and processes.count() > 1:
        raise SettingsError(
            f"policy-gradient in {processes.count()} processes", "one process", "start it without a launcher"
        )
    if asked.method == "full" and asked.teachers != "none":
        raise SettingsError(
            f"learn.teachers = {asked.teachers} where all weights learn: the teachers live in them",
            "method lora, or teachers none",
            "change one of them",
        )
