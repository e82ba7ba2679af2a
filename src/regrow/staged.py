"""A cut in equal steps: scores are taken anew of what each leaves, and all steps become one plan of the intact model.

Minitron (arXiv:2407.14679, table 14) found one step as good as several once the model is trained: one is the default.
What this gives up: training between steps, and widths that differ by layer, since what lies between two steps must be a
model that can be scored; it lies in memory beside the intact one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from regrow import cache
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.space import full, shape_of
from regrow.engines.bind import Subject, bind
from regrow.stages.apply import cut_copy
from regrow.stages.plan import Wish, make_plan

Between = Callable[[Plan], tuple[Anatomy, Scores]]  # what a plan leaves of the intact model, and its scores


def staged(anatomy: Anatomy, scores: Scores, wish: Wish, count: int, between: Between) -> Plan:
    """The plan of a cut in `count` steps, in indices of the intact model, whose `scores` decide the first.

    Raises as `make_plan` does.
    """
    first, *others = steps(anatomy, wish, count)
    plan = make_plan(anatomy, scores, first)
    for asked in others:
        if not _reached(anatomy, plan, asked):
            left, found = between(plan)
            plan = plan.then(make_plan(left, found, _fitting(asked, left, anatomy)))
    plan.check(anatomy)
    return plan if count == 1 else replace(plan, made_by={**plan.made_by, "stages": count})


def steps(anatomy: Anatomy, wish: Wish, count: int) -> list[Wish]:
    """What is to be left after each step: from the whole down to what is wished in equal parts."""
    if count == 1:
        return [wish]
    if wish.widths is not None:
        whole = full(anatomy)
        return [
            replace(
                wish, widths={unit: whole[unit] - (whole[unit] - n) * i // count for unit, n in wish.widths.items()}
            )
            for i in range(1, count + 1)
        ]
    dense, target = wish.budget.count(anatomy, anatomy.dense), wish.budget.target(anatomy)
    limits = (max(target, dense - (dense - target) * i // count) for i in range(1, count + 1))
    return [replace(wish, budget=replace(wish.budget, limit=float(n), relative=False)) for n in limits]


def _reached(anatomy: Anatomy, plan: Plan, wish: Wish) -> bool:
    """Whether steps before went as far as this one should: coarse units go further than was asked."""
    if wish.widths is not None:
        return plan.shape() == shape_of(anatomy, wish.widths)
    return wish.budget.count(anatomy, plan.shape()) <= wish.budget.target(anatomy)


def _fitting(wish: Wish, left: Anatomy, intact: Anatomy) -> Wish:
    """Without axes of which nothing can go any more, such as heads once every group has one."""
    axes = tuple(unit for unit in wish.axes if unit in left.supported)
    merges = "head" in axes or intact.sizes["G"] == 1
    return replace(
        wish,
        axes=axes,
        split={unit: share for unit, share in wish.split.items() if unit in axes},
        divisors={unit: step for unit, step in wish.divisors.items() if unit in axes},
        widths=None if wish.widths is None else {unit: n for unit, n in wish.widths.items() if unit in axes},
        merge=wish.merge if merges else "off",
    )


def left_by(subject: Subject, plan: Plan) -> Subject:
    """What a plan leaves, as a model to be scored, under a fingerprint of its own; the intact one stays as it is."""
    small = cut_copy(subject, plan)
    anatomy = replace(bind(small.model.config, small.model), store_bytes=subject.anatomy.store_bytes)
    known = cache.key({"model": subject.source["fingerprint"], "plan": plan.to_json()})
    return replace(small, anatomy=anatomy, source={**subject.source, "fingerprint": known})
