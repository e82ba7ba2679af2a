"""Stage plan: which units stay so that the budget is met, exactly where units are small enough.

The cut is one number `x`: every axis named loses a share `weight * x` of its units. Coarse axes are rounded, then the
finest axis is set so that the count lands on the budget, never above it. What this gives up: trading one axis
against another by their scores; that is a search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import Tensor

from regrow.artifacts.ask import SPREADS, Ask
from regrow.artifacts.budget import Budget
from regrow.artifacts.choice import best, head_slots, heads_in, in_steps, keep_layers, known, merges, merges_in
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy, even
from regrow.artifacts.space import Widths, check_widths, totals_of
from regrow.engines.bind import why_not
from regrow.errors import BudgetError, InputError, SettingsError

FINEST: tuple[Unit, ...] = ("neuron", "channel", "head", "group", "layer")  # smallest unit first
DIVISORS: dict[Unit, int] = {"neuron": 32, "channel": 64, "head": 1, "group": 1, "layer": 1}
STEPS = 400  # values of x that are tried
GRID = 12  # values of x that are tried for each axis when no even cut lands on the budget
TRIES = 12  # totals that are turned into plans, best first, until one lands on the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """How a budget is to be met."""

    budget: Budget
    axes: tuple[Unit, ...] = ("neuron", "group")
    split: Mapping[Unit, float] = field(default_factory=dict)  # share of x each axis loses; 1 unless named
    spread: str = "ends"
    uniform: bool = False  # the same widths in every layer
    divisors: Mapping[Unit, int] = field(default_factory=dict)  # widths are multiples; DIVISORS when uniform, else 1
    rescale_norms: bool = False
    protect: tuple[int, int] = (0, 0)  # so many of the first and of the last layers never go
    merge: str = "off"  # how query heads that go are added into heads that stay: minitron, laco
    widths: Widths | None = None  # exactly these, instead of what the budget allows


def check_wish(anatomy: Anatomy, wish: Wish) -> None:
    """Raise `InputError` for an axis or widths that this model does not have, a divisor above its width, a spread."""
    SPREADS.get(wish.spread)
    for unit in wish.axes:
        if unit not in anatomy.supported:
            raise InputError(
                f"{unit}s of this {anatomy.model_type} model cannot be cut: "
                f"{why_not(anatomy.family, dict(anatomy.sizes), unit)}",
                f"axes: {', '.join(anatomy.supported)}",
                "name other axes",
            )
    for name, named in (("split", wish.split), ("divisors", wish.divisors)):
        for unit in named:
            if unit not in wish.axes:
                raise SettingsError(
                    f"{name} names {unit}s, which are not among the axes of this cut",
                    f"axes: {', '.join(wish.axes)}",
                    f"add {unit} to axes, or leave it out of {name}",
                )
    if not any(wish.split.get(unit, 1.0) for unit in wish.axes):
        raise SettingsError(
            f"a split in which {', '.join(wish.axes)} lose nothing", "at least one share above 0", "correct the split"
        )
    check_widths(anatomy, wish.widths or {})
    _check_protected(anatomy, wish)
    if wish.rescale_norms and "channel" not in wish.axes:
        raise SettingsError(
            "rescale_norms in a cut without channels",
            "only cuts of the hidden width change what norms average over",
            "add channel to axes, or leave rescale_norms out",
        )
    heads: Unit = "group" if anatomy.sizes["G"] == 1 else "head"
    if wish.merge != "off" and heads not in wish.axes:
        raise SettingsError(
            f"merge_heads = {wish.merge} in a cut where no query heads go: {', '.join(wish.axes)}",
            f"an axis {heads}, which are what can be merged in this model",
            f"add {heads} to axes, or leave merge_heads out",
        )
    for unit, divisor in wish.divisors.items():
        if divisor > (width := _full(anatomy, unit, layers=1)):
            raise SettingsError(
                f"divisor {unit}={divisor} of a model with {width} {unit}s", f"1 to {width}", "name a smaller divisor"
            )


def _check_protected(anatomy: Anatomy, wish: Wish) -> None:
    """Raise `SettingsError` when more layers are to go than are free."""
    count, left = sum(wish.protect), (wish.widths or {}).get("layer", anatomy.sizes["L"])
    if count > left:
        raise SettingsError(
            f"protect = {list(wish.protect)}: {count} layers that never go, of which {left} are to stay",
            f"at most {left} in all",
            "protect fewer, or keep more layers",
        )


def make_plan(anatomy: Anatomy, scores: Scores, wish: Wish) -> Plan:
    """The plan that meets the budget. Raises `BudgetError` naming the nearest budget that can be met."""
    check_wish(anatomy, wish)
    if wish.widths is not None:
        return realise(anatomy, scores, replace(wish, uniform=True), totals_of(anatomy, wish.widths))
    target = wish.budget.target(anatomy)
    found: tuple[int, Plan] | None = None
    ranked = _ranked(anatomy, wish, target)
    for totals in [t for t in ranked if "layer" not in t or known(scores.table["layer"], t["layer"])][:TRIES]:
        lands, excess, plan = _nearby(anatomy, scores, wish, totals, target)
        if excess <= 0 and (found is None or lands or excess > found[0]):
            found = excess, plan
        if lands:
            break
    if found is None:
        raise _unmet(anatomy, wish, target, target + excess)
    found[1].check(anatomy)
    return found[1]


def _nearby(
    anatomy: Anatomy, scores: Scores, wish: Wish, totals: Mapping[Unit, int], target: int
) -> tuple[bool, int, Plan]:
    """The largest plan within the target near these totals: (within one step of it, count - target, plan).

    Groups and heads multiply, so what a plan counts hangs on which layers keep which; the finest axis sets it right.
    """
    finest, unit = _finest(anatomy, wish, totals)
    layers = totals.get("layer", anatomy.sizes["L"])
    least, full = _least(anatomy, wish, finest, layers), _full(anatomy, finest, layers)
    step, total, tried = _step(wish, finest, layers), totals[finest], dict[int, tuple[int, Plan]]()
    whole = target >= wish.budget.count(anatomy, anatomy.dense)
    while total not in tried:
        plan = realise(anatomy, scores, wish, {**totals, finest: total})
        excess = wish.budget.count(anatomy, plan.shape()) - target
        tried[total] = excess, plan
        if whole or -unit < excess <= 0:
            return True, excess, plan
        total = min(full, max(least, total - -(-excess // unit) * step))
    excess, plan = max(tried.values(), key=lambda found: (found[0] <= 0, found[0] if found[0] <= 0 else -found[0]))
    return False, excess, plan


def _finest(anatomy: Anatomy, wish: Wish, totals: Mapping[Unit, int]) -> tuple[Unit, int]:
    """The axis that lands the count on the budget, and what one step of it counts."""
    axes = [unit for unit in FINEST if unit in totals]
    moving = [(cost, unit) for unit in axes if (cost := _step_cost(anatomy, wish, unit))]
    inside = [found for found in moving if found[1] != "layer"]  # the others count over the layers that stay
    finest = min(inside or moving, key=lambda found: found[0], default=(0, axes[0]))[1]
    layers = totals.get("layer", anatomy.sizes["L"])
    step = _step(wish, finest, layers)
    less = {**totals, finest: max(totals[finest] - step, _least(anatomy, wish, finest, layers))}
    more = {**less, finest: less[finest] + step}
    return finest, max(
        1, wish.budget.count(anatomy, even(anatomy, more)) - wish.budget.count(anatomy, even(anatomy, less))
    )


def meet(anatomy: Anatomy, wish: Wish, target: int) -> dict[Unit, int]:
    """Units to keep of each axis, over all layers that stay: the best totals whose even shape is within the target."""
    return _ranked(anatomy, wish, target)[0]


def _ranked(anatomy: Anatomy, wish: Wish, target: int) -> list[dict[Unit, int]]:
    """Totals within the target: those that land on it first, then those nearest to the split that was asked for."""
    axes = [unit for unit in FINEST if unit in wish.axes]
    if target >= wish.budget.count(anatomy, anatomy.dense):
        return [{unit: _full(anatomy, unit) for unit in axes}]
    finest, _ = _finest(anatomy, wish, {unit: _full(anatomy, unit) for unit in axes})
    within: list[_Found] = []
    for coarse in (_even_cuts, _uneven_cuts):
        filled = [_fill(anatomy, wish, totals, finest, target) for totals in coarse(anatomy, wish, axes, finest)]
        within += [found for found in filled if found.count <= target]
        if not within:
            raise _unmet(anatomy, wish, target, min(found.count for found in filled))
        if not all(found.misses for found in within):
            break
    within.sort(key=lambda found: (found.misses, *_unevenness(anatomy, wish, found)))
    return [dict(found.totals) for found in within]


@dataclass(frozen=True, slots=True)
class _Found:
    """Totals that were tried, what they count, and whether that lies a step or more below the target."""

    totals: Mapping[Unit, int]
    count: int
    misses: bool


def _full(anatomy: Anatomy, unit: Unit, layers: int | None = None) -> int:
    """All units of an axis: per model for layers and channels, over `layers` layers for the others."""
    if unit in ("layer", "channel"):
        return anatomy.units(unit)
    each = anatomy.sizes["G"] if unit == "head" else anatomy.units(unit)
    return each * (anatomy.sizes["L"] if layers is None else layers)


def _divisor(wish: Wish, unit: Unit) -> int:
    """What the width of every layer is a multiple of."""
    return wish.divisors.get(unit, DIVISORS[unit] if wish.uniform else 1)


def _step(wish: Wish, unit: Unit, layers: int) -> int:
    """The smallest change of a total: one divisor in one layer, or in every layer when widths are uniform."""
    inside = unit not in ("layer", "channel")
    return _divisor(wish, unit) * (layers if wish.uniform and inside else 1)


def _least(anatomy: Anatomy, wish: Wish, unit: Unit, layers: int) -> int:
    """One divisor in every layer, or the layers that never go: nothing is emptied by accident."""
    least = _divisor(wish, unit) * (layers if unit not in ("layer", "channel") else 1)
    return min(max(least, sum(wish.protect) if unit == "layer" else 0), _full(anatomy, unit, layers))


def _even_cuts(anatomy: Anatomy, wish: Wish, axes: Sequence[Unit], finest: Unit) -> list[dict[Unit, int]]:
    """Totals of all axes but the finest when each is cut by its share of one x, for many x."""
    return _rounded(anatomy, wish, axes, finest, (dict.fromkeys(axes, step / STEPS) for step in range(STEPS + 1)))


def _uneven_cuts(anatomy: Anatomy, wish: Wish, axes: Sequence[Unit], finest: Unit) -> list[dict[Unit, int]]:
    """The same with an x of its own for each axis: coarse steps may land on the budget only off the even split."""
    shares = [(0.0,) if unit == finest else tuple(i / GRID for i in range(GRID + 1)) for unit in axes]
    return _rounded(anatomy, wish, axes, finest, (dict(zip(axes, x, strict=True)) for x in product(*shares)))


def _rounded(
    anatomy: Anatomy, wish: Wish, axes: Sequence[Unit], finest: Unit, cuts: Iterable[Mapping[Unit, float]]
) -> list[dict[Unit, int]]:
    """Every axis cut by its share of its x, rounded to whole steps, layers first since the others count over them."""
    most = max(wish.split.get(unit, 1.0) for unit in axes) or 1.0  # the axis that loses most is gone at x = 1
    found: dict[tuple[int, ...], dict[Unit, int]] = {}
    for x in cuts:
        totals: dict[Unit, int] = {}
        for unit in reversed(axes):
            layers = totals.get("layer", anatomy.sizes["L"])
            full, step = _full(anatomy, unit, layers), _step(wish, unit, layers)
            keep = full * (1 - wish.split.get(unit, 1.0) / most * x[unit])
            totals[unit] = min(full, max(_least(anatomy, wish, unit, layers), round(keep / step) * step))
        del totals[finest]
        found.setdefault(tuple(totals.values()), totals)
    return list(found.values())


def _fill(anatomy: Anatomy, wish: Wish, coarse: Mapping[Unit, int], finest: Unit, target: int) -> _Found:
    """Set the finest axis to the largest total within the target, or to its least when even that is too much.

    Every count is linear in the units of one axis, so two counts tell them all.
    """
    layers = coarse.get("layer", anatomy.sizes["L"])
    step, full = _step(wish, finest, layers), _full(anatomy, finest, layers)
    least = _least(anatomy, wish, finest, layers)

    def found(total: int) -> _Found:
        totals = {**coarse, finest: total}
        count = wish.budget.count(anatomy, even(anatomy, totals))
        return _Found(totals, count, (target - count) * (full - least) >= step * slope)

    lowest, highest = (wish.budget.count(anatomy, even(anatomy, {**coarse, finest: t})) for t in (least, full))
    slope = highest - lowest  # from the least to the full axis
    if lowest > target or highest <= target:
        return found(least if lowest > target else full)
    return found(least + (full - least) * (target - lowest) // slope // step * step)


def _unevenness(anatomy: Anatomy, wish: Wish, found: _Found) -> tuple[float, float]:
    """How far the axes are from losing the shares asked for; ties go to the larger model."""
    layers = found.totals.get("layer", anatomy.sizes["L"])
    lost = [
        (1 - total / _full(anatomy, unit, layers)) / wish.split.get(unit, 1.0)
        for unit, total in found.totals.items()
        if wish.split.get(unit, 1.0) > 0
    ]
    return (round(max(lost) - min(lost), 3) if len(lost) > 1 else 0.0, -found.count)


def _step_cost(anatomy: Anatomy, wish: Wish, unit: Unit) -> int:
    """What the intact model loses of the budget's count with one step of this axis; 0 when it may not be cut."""
    full, layers = _full(anatomy, unit), anatomy.sizes["L"]
    less = max(full - _step(wish, unit, layers), _least(anatomy, wish, unit, layers))
    if wish.split.get(unit, 1.0) == 0 or less >= full:
        return 0
    return wish.budget.count(anatomy, anatomy.dense) - wish.budget.count(anatomy, even(anatomy, {unit: less}))


def _unmet(anatomy: Anatomy, wish: Wish, target: int, nearest: int) -> BudgetError:
    dense = wish.budget.count(anatomy, anatomy.dense)
    what = wish.budget.measure.replace("_", " ")
    return BudgetError(
        f"budget {wish.budget.text} ({target:,} {what}) cannot be met by cutting {', '.join(wish.axes)}",
        f"at least {nearest:,} {what} ({100 * nearest / dense:.1f} % of {dense:,})",
        "ask for more, name more axes (layer, group, head, neuron, channel), or smaller divisors",
    )


def realise(anatomy: Anatomy, scores: Scores, wish: Wish, totals: Mapping[Unit, int]) -> Plan:
    """Choose the units: layers first, then each axis among the layers that stay."""
    sizes = anatomy.sizes
    layers = list(range(sizes["L"]))
    if "layer" in totals:
        layers = keep_layers(scores.table["layer"], totals["layer"], wish.protect)
    channels = tuple(range(sizes["C"]))
    if "channel" in totals:
        channels = best(scores.table["channel"], totals["channel"])
    groups = _per_layer(scores, wish, "group", layers, totals, sizes["K"])
    slots = head_slots(scores.table["head"], sizes["K"]) if "head" in totals else None
    heads = _per_layer(scores, wish, "head", layers, totals, sizes["G"], slots)
    neurons = _per_layer(scores, wish, "neuron", layers, totals, sizes["F"])
    rows = []
    for position, index in enumerate(layers):
        kept = best(scores.table["group"][index], groups[position]) if "group" in totals else tuple(range(sizes["K"]))
        rows.append(
            LayerPlan(
                index,
                kept,
                _heads(scores, index, kept, heads[position], sizes["G"]),
                best(scores.table["neuron"][index], neurons[position])
                if "neuron" in totals
                else tuple(range(sizes["F"])),
                () if wish.merge == "off" else _merged(anatomy, scores, totals, index, (kept, heads[position])),
            )
        )
    return Plan(channels, tuple(rows), wish.rescale_norms, _record(scores, wish), wish.merge)


def _heads(scores: Scores, layer: int, groups: Sequence[int], keep: int, size: int) -> tuple[int, ...]:
    """The query heads that stay in a layer, of all of which `keep` of `size` stay in each group."""
    if keep == size:
        return tuple(g * size + h for g in groups for h in range(size))
    return heads_in(scores.table["head"][layer].view(-1, size), groups, keep)


def _merged(
    anatomy: Anatomy, scores: Scores, totals: Mapping[Unit, int], layer: int, kept: tuple[Sequence[int], int]
) -> tuple[tuple[int, int], ...]:
    """Pairs of heads of a layer that keeps these groups and so many heads in each: inside groups, or inside a layer
    whose groups are single heads."""
    groups, heads = kept
    if anatomy.sizes["G"] == 1 and "group" in totals:
        return merges(scores.table["group"][layer], len(groups))
    if "head" not in totals:
        return ()
    return merges_in(scores.table["head"][layer].view(-1, anatomy.sizes["G"]), groups, heads)


def _per_layer(
    scores: Scores,
    wish: Wish,
    unit: Unit,
    layers: Sequence[int],
    totals: Mapping[Unit, int],
    full: int,
    table: Tensor | None = None,
) -> list[int]:
    """Units of this kind that each remaining layer keeps."""
    if unit not in totals:
        return [full] * len(layers)
    if wish.uniform:
        return [totals[unit] // len(layers)] * len(layers)
    table = (scores.table[unit] if table is None else table)[list(layers)]  # (layers, units)
    divisor = _divisor(wish, unit)
    steps = in_steps(table, divisor)
    ask = Ask(min(totals[unit] // divisor, steps.numel()), steps, comparable=scores.comparable(unit))
    counts = [share * divisor for share in SPREADS.get(wish.spread).share(ask)]
    return [full if count + divisor > full else count for count in counts]


def _spread_said(wish: Wish) -> str:
    if not {"group", "head", "neuron"} & set(wish.axes):
        return "none: whole layers and channels have no share of layers"
    return "uniform widths" if wish.uniform else wish.spread


def unprotected(anatomy: Anatomy, plan: Plan, wish: Wish) -> list[Unit]:
    """Kinds of units that the spread `ends` had to take from the end layers too, because the budget is so small."""
    if wish.uniform or wish.spread != "ends":
        return []
    first = plan.layers[0]
    kept: dict[Unit, int] = {
        "group": len(first.groups),
        "head": len(first.heads) // max(len(first.groups), 1) * anatomy.sizes["K"],
        "neuron": len(first.neurons),
    }
    return [unit for unit, count in kept.items() if unit in wish.axes and count < anatomy.units(unit)]


def _record(scores: Scores, wish: Wish) -> dict[str, Any]:
    return {
        "budget": wish.budget.text,
        "axes": list(wish.axes),
        "split": {unit: wish.split.get(unit, 1.0) for unit in wish.axes},
        "spread": _spread_said(wish),
        "scores": dict(scores.made_by),
    }
