"""A cut in equal steps: scores are taken anew of what each leaves, and all steps become one plan of the intact model.

Minitron (arXiv:2407.14679, table 14) found one step as good as several once the model is trained: one is the default.
What this gives up: training between steps, and widths that differ by layer, since what lies between two steps must be a
model that can be scored; it lies in memory beside the intact one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from regrow import cache
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy, Shape
from regrow.artifacts.space import Widths, full
from regrow.engines.bind import Subject, bind
from regrow.stages.apply import cut_copy
from regrow.stages.plan import DIVISORS, Wish, make_plan

Between = Callable[[Plan], tuple[Anatomy, Scores]]  # what a plan leaves of the intact model, and its scores


def staged(anatomy: Anatomy, scores: Scores, wish: Wish, count: int, between: Between) -> Plan:
    """The plan of a cut in `count` steps, in indices of the intact model, whose `scores` decide its first step.

    It leaves the shape that one step would leave. Raises as `make_plan` does.
    """
    if count == 1:
        return make_plan(anatomy, scores, wish)
    plan = make_plan(anatomy, scores, replace(wish, merge="off"))
    for number, widths in enumerate(steps(anatomy, wish, plan.shape(), count)):
        if number == 0:
            plan = make_plan(anatomy, scores, replace(wish, widths=widths))
        else:
            left, found = between(plan)
            plan = plan.then(make_plan(left, found, _fitting(wish, widths, left, anatomy)))
    plan.check(anatomy)
    return replace(plan, made_by={**plan.made_by, "stages": count})


def steps(anatomy: Anatomy, wish: Wish, shape: Shape, count: int) -> list[Widths]:
    """The widths after each step: those of every axis fall to `shape`, which is uniform, in equal parts.

    On the way they are multiples as the wish says; a step in which nothing would go is left out.
    """
    whole, first = full(anatomy), shape.layers[0]
    last: Widths = {
        "layer": len(shape.layers),
        "group": first.groups,
        "head": first.heads,
        "neuron": first.neurons,
        "channel": shape.channels,
    }
    found: list[Widths] = []
    for i in range(1, count + 1):
        widths: dict[Unit, int] = {}
        for unit in wish.axes:
            gone = (whole[unit] - last[unit]) * i // count
            divisor = wish.divisors.get(unit, DIVISORS[unit]) if i < count else 1
            widths[unit] = whole[unit] - gone // divisor * divisor
        if widths != (found[-1] if found else {unit: whole[unit] for unit in wish.axes}):
            found.append(widths)
    return found


def _fitting(wish: Wish, widths: Widths, left: Anatomy, intact: Anatomy) -> Wish:
    """A later step, without axes of which nothing can go any more, such as heads once every group has one."""
    axes = tuple(unit for unit in wish.axes if unit in left.supported)
    merges = "head" in axes or intact.sizes["G"] == 1
    own = {unit: widths[unit] for unit in axes}
    return replace(wish, axes=axes, split={}, divisors={}, widths=own, merge=wish.merge if merges else "off")


def left_by(subject: Subject, plan: Plan) -> Subject:
    """What a plan leaves, as a model to be scored, under a fingerprint of its own; the intact one stays as it is."""
    small = cut_copy(subject, plan)
    anatomy = replace(bind(small.model.config, small.model), store_bytes=subject.anatomy.store_bytes)
    known = cache.key({"model": subject.source["fingerprint"], "plan": plan.to_json()})
    return replace(small, anatomy=anatomy, source={**subject.source, "fingerprint": known})
