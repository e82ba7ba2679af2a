"""Stage learn: gates are trained beside the weights until as many are shut as the budget asks for, and say what stays.

What the gates say is handed on as scores, their free scalars, and as the shares that each kind of unit loses; the
planner makes of it a plan whose true count fits the budget. Adapters end merged, gates to be folded.
What this gives up: weights that are spread over processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.artifacts.family import Unit
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.artifacts.plan import Plan
from regrow.artifacts.ramp import RAMPS
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy
from regrow.engines.adapters import add_adapters, merge
from regrow.engines.asked import as_train
from regrow.engines.banks import Shelf
from regrow.engines.bind import Subject
from regrow.engines.gates import Gates, from_plan, gated
from regrow.engines.hard_concrete import LIMIT
from regrow.engines.learnable import SIZES, Aim, LearnedGates, lower_by, of_units, of_weights, opened
from regrow.engines.learning import Learning, Pace, Rates
from regrow.engines.lesson import FINAL, Lesson
from regrow.engines.numerous import Course, Teachers
from regrow.engines.packed import Packed
from regrow.engines.policy import Tries, begin, learn_masks
from regrow.engines.train import TrainResult, train
from regrow.engines.train_settings import TrainSettings
from regrow.errors import BudgetError, SettingsError
from regrow.learning import Learn

Progress = Callable[[int, int, str], None]
Settle = Callable[[Scores, Mapping[Unit, float]], Plan]
"""(the gates' scalars as scores, the share that each kind of unit loses) -> the plan of that."""

PULL, USUAL = 0.1, 12_000  # NutePrune's rate of multipliers, and more steps than it has: they let go in time
CLIMB = 2.0  # how often gates could cross their whole range in the steps there are; with less they are warned of


@dataclass(frozen=True, slots=True)
class Target:
    """What is to go: a share of the decoder weights, and of single kinds of units where widths are named."""

    share: float
    units: tuple[Unit, ...]
    widths: Mapping[Unit, float] | None = None  # unit -> share of each layer's, or of the model's
    rescale_norms: bool = False  # norms keep statistics over the whole width
    start: Scores | None = None  # what gates or chances begin after; None: gates begin alike


@dataclass(frozen=True, slots=True)
class Learned:
    """What stays and with which gates, what said so, and how the training went."""

    plan: Plan
    gates: Gates
    scores: Scores
    training: TrainResult
    notes: tuple[str, ...]


def learn(
    subject: Subject,
    texts: tuple[Packed, Packed | None],
    settings: Learn,
    target: Target,
    settle: Settle,
    *,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> Learned:
    """Train gates and weights of `subject.model` on the first of `texts`, its curve measured on the second; the model
    ends with its adapters merged, uncut.

    `folder` holds checkpoints: an interrupted training goes on where it stopped. Raises `BudgetError` when the gates
    end elsewhere than at their aims, with the checkpoint kept, and what `train` raises.
    """
    anatomy, numbers = subject.anatomy, as_loop(settings, seed)
    pace = pace_of(settings, numbers.steps(texts[0].ids.shape[1]), seed)
    aims, lower = aims_of(anatomy, target), None if target.start is None else lowered(anatomy, target.start)
    gates = LearnedGates(anatomy, target.units, aims, seed=seed, lower=lower, unwind=settings.unwind)
    model = _adapted(subject.model, settings, seed)

    def settled() -> Plan:
        return settle(scores_of(gates), lost_of(gates))

    goal = Learning(
        model,
        anatomy,
        gates,
        of_weights(anatomy, target.share),
        pace,
        taught=taught_by(settings, anatomy, target.share, folder),
        settle=settled,
    )
    goal.live.rescale_norms = target.rescale_norms
    rates = Rates(settings.gate_rate, settings.multiplier_rate or pull_of(pace.steps), settings.follow)
    with gated(subject.model, anatomy, goal.live):
        result = train(
            model,
            texts[0],
            numbers,
            folder=folder,
            loss=goal.objective(rates),
            heldout=texts[1],
            resume=settings.resume,
            progress=progress,
        )
    check_reached(gates, settings, result)
    plan = goal.plan or settled()
    open_gates = opened(anatomy, goal.kept(plan, goal.hardened), rescale_norms=target.rescale_norms)
    subject.model = merge(model) if settings.method == "lora" else model.requires_grad_(True).eval()
    return Learned(plan, open_gates, scores_of(gates), result, notes_of(gates, settings, result, target.start))


def _adapted(model: Any, settings: Learn, seed: int) -> Any:
    """The model with what learns beside the gates: all of it, or adapters."""
    if settings.method == "full":
        return model.requires_grad_(True)
    assert settings.alpha is not None  # the rank where none was named
    names: Any = settings.targets or "all-linear"
    rank, alpha, dropout = settings.rank, settings.alpha, settings.dropout or 0.0
    return add_adapters(model, "lora", rank=rank, alpha=alpha, dropout=dropout, targets=names, seed=seed)


def learn_by_masks(
    subject: Subject,
    text: Packed,
    settings: Learn,
    target: Target,
    settle: Settle,
    *,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> Learned:
    """What stays by losses of drawn masks, beginning with chances after `target.start`; no weight moves.

    Raises what `learn_masks` raises.
    """
    assert target.widths is not None and target.start is not None  # noqa: PT018
    steps = as_loop(settings, seed).steps(text.ids.shape[1])
    assert settings.learning_rate is not None
    tries = Tries(steps, settings.batch, settings.masks, settings.learning_rate, settings.window, seed)
    begun = {unit: begin(target.start.table[unit], 1 - target.widths[unit]) for unit in target.units}
    began = time.perf_counter()
    chances, records = learn_masks(
        subject.model,
        subject.anatomy,
        text,
        begun,
        tries,
        folder=folder,
        resume=settings.resume,
        progress=progress,
    )
    criteria = {unit: {"name": "learned", "options": {}, "comparable": True} for unit in chances}
    scores = Scores(chances, {"criteria": criteria})
    plan = settle(scores, target.widths)
    sure = [float(torch.maximum(x, 1 - x).mean()) for x in chances.values()]
    note = f"chances of units learned from {steps * settings.masks:,} masks; they are {min(sure):.2f} sure on average"
    seen = steps * settings.batch * text.ids.shape[1]
    result = TrainResult(steps, seen, 0, records, time.perf_counter() - began, None)
    gates = from_plan(subject.anatomy, plan)
    return Learned(plan, gates, scores, result, (note,))


def as_loop(settings: Learn, seed: int) -> TrainSettings:
    """The training loop's settings; its loss rises with the sparsity, so that rising is no sign of anything."""
    return replace(as_train(settings, seed), divergence=math.inf, skip=settings.skip)


def pace_of(settings: Learn, steps: int, seed: int = 0) -> Pace:
    """Raises `SettingsError` when there is no step in which the sparsity rises, or none after it."""
    warm, anneal = round(settings.rise * steps), steps - round(settings.anneal * steps)
    if settings.rise and not 1 <= warm < anneal:
        raise SettingsError(
            f"{steps} steps, of which the sparsity rises in {warm} and gates are annealed in {steps - anneal}",
            "at least one step of rising, and one after it before gates are annealed",
            "raise learn.tokens, or lower learn.rise or learn.anneal",
        )
    return Pace(steps, settings.batch, RAMPS.get(settings.ramp), warm, anneal, seed)


def pull_of(steps: int) -> float:
    """The rate of multipliers that nobody named: in a short training they must climb as high as in a long one."""
    return PULL * max(1.0, USUAL / steps)


def too_few(settings: Learn, steps: int) -> str | None:
    """A warning where gates cannot move far enough in the steps there are."""
    needed = math.ceil(CLIMB * 2 * LIMIT / settings.gate_rate)
    if steps >= needed:
        return None
    return (
        f"{steps} steps at learn.gate_rate {settings.gate_rate:g}: a gate needs {needed // 2} to cross its range, so "
        f"that {needed} or more are advisable: raise learn.tokens, or lower learn.batch or learn.block"
    )


def aims_of(anatomy: Anatomy, target: Target) -> list[Aim]:
    if target.widths is None:
        return [of_weights(anatomy, target.share)]
    return [of_units(unit, share) for unit, share in target.widths.items()]


def lowered(anatomy: Anatomy, scores: Scores) -> dict[Unit, Tensor]:
    """How far below the usual start units of each kind begin; scores of runs of layers say nothing of one."""
    known = scores.made_by["criteria"]
    return {
        unit: lower_by(values, comparable=known[unit]["comparable"])
        for unit, values in scores.table.items()
        if list(values.shape) == [anatomy.sizes[size] for size in SIZES[unit]]
    }


def taught_by(settings: Learn, anatomy: Anatomy, share: float, folder: Path) -> tuple[Lesson, Teachers] | None:
    if settings.teachers == "none":
        return None
    depth = anatomy.sizes["L"]
    places = tuple(range(FINAL, depth + 1)) if settings.places is None else settings.places
    lesson = Lesson(
        DIVERGENCES.get(settings.loss),
        LIKENESSES.get(settings.distil.likeness),
        settings.distil.options,
        settings.logits,
        settings.hidden,
        places,
        settings.distil.text,
    )
    by = "dense" if settings.teachers == "dense" else settings.choice
    course = Course(share, settings.spacing, settings.lag, by, settings.gap)
    return lesson, Teachers(course, Shelf(folder / "teachers" if settings.records == "disk" else None))


def scores_of(gates: LearnedGates) -> Scores:
    """The free scalars: the higher, the surer a unit stays. They share one scale."""
    gates.clamp()
    table = {unit: a.detach().float().cpu().clone() for unit, a in gates.values()}
    criteria = {unit: {"name": "learned", "options": {}, "comparable": True} for unit in table}
    return Scores(table, {"criteria": criteria})


@torch.no_grad()
def lost_of(gates: LearnedGates) -> dict[Unit, float]:
    """The share of each kind of unit that is expected to go; of those inside layers, of the layers that stay."""
    chances = gates.chances()
    layers = chances.get("layer")
    found: dict[Unit, float] = {}
    for unit, chance in chances.items():
        rows = chance.double().mean(-1)  # () or (L,)
        if rows.dim() == 0:
            found[unit] = 1 - float(rows)
        else:
            weight = torch.ones_like(rows) if layers is None else layers.double()
            found[unit] = 1 - float((rows * weight).sum() / weight.sum())
    return found


def check_reached(gates: LearnedGates, settings: Learn, result: TrainResult) -> None:
    """Raise `BudgetError` for gates that are not where they should be."""
    for name, (found, asked) in gates.missed().items():
        if abs(found - asked) <= settings.tolerance:
            continue
        what = "decoder weights" if name == "weights" else f"{name}s"
        raise BudgetError(
            f"the gates ended at {100 * found:.1f} % of the {what} gone, and {100 * asked:.1f} % are to go "
            f"({result.steps} steps)",
            f"within {100 * settings.tolerance:g} points of it",
            "nothing was cut; give them more steps (learn.tokens, or a smaller batch), raise learn.multiplier_rate, "
            "or lower learn.rise",
        )


def notes_of(gates: LearnedGates, settings: Learn, result: TrainResult, start: Scores | None) -> tuple[str, ...]:
    parts = [f"{100 * found:.1f} % of {name}" for name, (found, _) in gates.missed().items()]
    names = sorted({row["name"] for row in start.made_by["criteria"].values()}) if start else []
    begun = f", begun in the order of {' and '.join(names)}," if names else ""
    notes = [f"gates ({settings.gates}){begun} learned over {result.tokens:,} tokens to let go of {', '.join(parts)}"]
    if skipped := int(result.losses[-1].get("skipped", 0)) if result.losses else 0:
        notes.append(f"{skipped} of {result.steps} steps were left out: their loss or gradient was not finite")
    return tuple(notes)
