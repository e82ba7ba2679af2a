"""What a recipe's gates are to reach, and what they learned: the words of the stage, checked, kept, handed on.

What this gives up: sizes that are not shares of the decoder weights while gates learn; the plan alone is held to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regrow import cache
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy, count, even
from regrow.engines import processes, resume
from regrow.engines.bind import Subject
from regrow.engines.learnable import SIZES
from regrow.engines.numerous import Course
from regrow.engines.texts import fingerprint
from regrow.engines.train_settings import FREE
from regrow.errors import SettingsError
from regrow.kept import Progress, scored
from regrow.prepare import recovery_text, training_parts
from regrow.settings import Recipe
from regrow.stages.learn import Learned, Target, learn, learn_by_masks
from regrow.stages.plan import Wish, make_plan, meet


def target_of(anatomy: Anatomy, recipe: Recipe, wish: Wish) -> Target:
    """What gates are to reach. Raises `SettingsError` for more records than are allowed, `BudgetError`."""
    asked, dense = recipe.learn, count(anatomy, anatomy.dense, decoder_only=True)
    assert asked is not None
    widths: dict[Unit, int] = {}
    if wish.widths is not None:
        widths = {unit: _total(anatomy, wish.widths, unit) for unit in wish.axes}
    elif wish.budget.measure != "decoder_weights" or asked.gates != "hard-concrete":
        uniform = replace(wish, uniform=wish.uniform or asked.gates == "sheared")
        widths = meet(anatomy, uniform, wish.budget.target(anatomy))
    left = count(anatomy, even(anatomy, widths), decoder_only=True) if widths else wish.budget.target(anatomy)
    share = 1 - left / dense
    levels = Course(share, asked.spacing).levels if asked.teachers == "numerous" else 0
    if levels > asked.most_records:
        raise SettingsError(
            f"{levels} records of teachers, one at every {asked.spacing:g} of sparsity up to {share:.3g}",
            f"{asked.most_records} at most",
            "raise learn.spacing, or learn.most_records",
        )
    if asked.gates == "hard-concrete":
        return Target(share, wish.axes, rescale_norms=wish.rescale_norms)
    layers = widths.get("layer", anatomy.sizes["L"])
    lost = {unit: 1 - widths[unit] / _full(anatomy, unit, layers) for unit in wish.axes}
    some = {unit: gone for unit, gone in lost.items() if gone > 0}  # gates that are all to stay never quite would
    return Target(share, tuple(some), some, wish.rescale_norms)


def _full(anatomy: Anatomy, unit: Unit, layers: int) -> int:
    """All units of a kind, of those inside layers in `layers` of them; query heads as slots of a group."""
    if unit in ("layer", "channel"):
        return anatomy.units(unit)
    return layers * (anatomy.sizes["G"] if unit == "head" else anatomy.units(unit))


def _total(anatomy: Anatomy, widths: Mapping[Unit, int], unit: Unit) -> int:
    layers = widths.get("layer", anatomy.sizes["L"])
    return widths[unit] * (1 if unit in ("layer", "channel") else layers)


def planned(anatomy: Anatomy, wish: Wish, scores: Scores, lost: Mapping[Unit, float]) -> Plan:
    """The plan of what gates say: each kind of unit loses as they have it, single units by one ranking over all layers,
    and the true count fits the budget. Raises `BudgetError`."""
    whole = {unit: torch.ones([anatomy.sizes[size] for size in SIZES[unit]]) for unit in wish.axes}
    comparable = {unit: {"comparable": True} for unit in wish.axes}
    scores = Scores({**whole, **scores.table}, {**scores.made_by, "criteria": comparable})
    if wish.widths is not None:
        return make_plan(anatomy, scores, wish)
    least = min(share for share in lost.values() if share > 0)
    split = {unit: max(lost[unit], least) if unit in lost else 0.0 for unit in wish.axes}  # what did not learn stays
    return make_plan(anatomy, scores, replace(wish, split=split, spread="across"))


def learned(subject: Subject, recipe: Recipe, wish: Wish, progress: Progress | None) -> tuple[Learned, Path]:
    """Let the gates of a recipe learn; what they learned, and the folder of the training's checkpoints."""
    asked = recipe.learn
    assert asked is not None
    target = target_of(subject.anatomy, recipe, wish)
    if asked.gates == "sheared" and wish.widths is None:
        wish = replace(wish, uniform=True)
    if asked.scored:
        target = replace(target, start=scored(subject, recipe, {}, progress))
    inputs = {
        "model": subject.source["fingerprint"],
        "learn": asked.model_dump(exclude=set(FREE)),
        "share": target.share,
        "widths": dict(target.widths or {}),
        "axes": recipe.axes,
        "rescale_norms": recipe.rescale_norms,
        "code": cache.code(),
        "seed": recipe.seed,
        "start": {unit: resume.fingerprint(x) for unit, x in target.start.table.items()} if target.start else None,
        "text": [*map(fingerprint, asked.sources)],
    }
    work = cache.cache_dir("learn", cache.key(inputs))
    text, heldout = (
        recovery_text(subject, asked, part, count=tokens, seed=seed)
        for part, tokens, seed in training_parts(asked, recipe.seed)
    )
    say = None if progress is None else lambda done, total, what: progress(f"learn: {what}", done, total)
    where: dict[str, Any] = {"folder": work, "seed": recipe.seed, "progress": say}

    def settle(scores: Scores, lost: Mapping[Unit, float]) -> Plan:
        return planned(subject.anatomy, wish, scores, lost)

    if asked.gates == "policy-gradient":
        with cache.held(work, "these masks"):
            return learn_by_masks(subject, text, asked, target, settle, **where), work
    with cache.held(work, "this training of gates") if processes.first() else nullcontext():
        return learn(subject, (text, heldout), asked, target, settle, **where), work
