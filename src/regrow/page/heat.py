"""Importance maps: what each unit scored, layer by layer, as heat maps with the cut marked.

Colour is a score against the average of its own layer, since most criteria do not put layers on one scale. Runs of
equal colour are one rectangle, so a map of 80 x 11008 neurons stays small. What this gives up: exact values; nine
steps of colour and at most `COLUMNS` columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from markupsafe import Markup

from regrow.artifacts.plan import Plan
from regrow.page.numbers import number
from regrow.page.svg import picture, tag, title

COLUMNS, LEVELS = 200, 9
WIDTH, LEFT, TOP = 600.0, 34.0, 6.0  # pixels: widest map, row names, above the rows
CELL, NARROW = 15.0, 240.0  # a row's height and an unsorted unit's width; the narrowest map
SORTED = ("neuron", "channel")  # units without a place of their own: sorted, kept first

Table = Sequence[Sequence[float]]
Kept = Sequence[frozenset[int] | None]  # one set a row; None: nothing is known to be cut


@dataclass(frozen=True, slots=True)
class Map:
    """One heat map with what a reader must know to read it."""

    unit: str
    about: str
    svg: Markup
    low: str  # what the palest colour stands for
    high: str


def heat_map(unit: str, table: Table, plan: Plan | None) -> Map | None:
    """The map of one kind of unit; rows are layers, or one row for units that lie in no layer. None: nothing finite."""
    relative, log = _relative(table, by_row=unit != "layer")
    kept = _kept(unit, table, plan)
    order = [_order(row, keep, by_score=unit in SORTED) for row, keep in zip(table, kept, strict=True)]
    binned = [_binned([row[i] for i in indices]) for row, indices in zip(relative, order, strict=True)]
    seen = sorted(value for row in binned for value in row if math.isfinite(value))
    if not seen:
        return None
    low, high = seen[int(0.02 * (len(seen) - 1))], seen[math.ceil(0.98 * (len(seen) - 1))]
    levels = [[_level(value, low, high) for value in row] for row in binned]
    drawn = _draw(_Sheet(unit, levels, order, kept))
    return Map(unit, _about(unit, table), drawn, _edge(low, log), _edge(high, log))


def _about(unit: str, table: Table) -> str:
    if unit in SORTED:
        return "sorted inside each row, what stays first"
    if unit == "layer" and len(table) > 1:
        return "as runs: the row is the first layer of a run, the column the one after its last"
    return "in the model's own order"


def _relative(table: Table, *, by_row: bool) -> tuple[list[list[float]], bool]:
    """Scores against the mean of their row, or of all: log2 of the ratio when none is negative, else in deviations."""
    finite = [v for row in table for v in row if math.isfinite(v)]
    floor = min((v for v in finite if v > 0), default=1.0)
    log = all(v >= 0 for v in finite)

    def against(row: Sequence[float], peers: Sequence[float]) -> list[float]:
        known = [v for v in peers if math.isfinite(v)]
        mean = sum(known) / len(known) if known else 0.0
        scale = 1.0 if log else sum(abs(v - mean) for v in known) / max(len(known), 1) or 1.0
        return [(v - mean) / scale for v in row]

    shown = [[math.log2(max(v, floor)) if log and math.isfinite(v) else v for v in row] for row in table]
    everyone = [v for row in shown for v in row]
    return [against(row, row if by_row else everyone) for row in shown], log


def _kept(unit: str, table: Table, plan: Plan | None) -> Kept:
    if plan is not None and unit == "channel":
        return [frozenset(plan.channels)] * len(table)
    if plan is not None and unit == "layer" and len(table) == 1:
        return [frozenset(x.index for x in plan.layers)]
    if plan is not None and unit in ("group", "head", "neuron"):
        kept = {x.index: frozenset[int](getattr(x, f"{unit}s")) for x in plan.layers}
        return [kept.get(i, frozenset()) for i in range(len(table))]
    return [None] * len(table)


def _order(row: Sequence[float], kept: frozenset[int] | None, *, by_score: bool) -> list[int]:
    if not by_score:
        return list(range(len(row)))
    return sorted(range(len(row)), key=lambda i: (kept is not None and i not in kept, math.isnan(row[i]), -row[i]))


def _binned(row: Sequence[float]) -> list[float]:
    """At most `COLUMNS` means over neighbours, each over as many units as any other, give or take one."""
    bins = min(COLUMNS, len(row))
    edges = [len(row) * i // bins for i in range(bins + 1)]
    return [sum(row[a:b]) / (b - a) for a, b in pairwise(edges)]


def _level(value: float, low: float, high: float) -> int | None:
    if not math.isfinite(value):
        return None
    share = 0.5 if high <= low else (value - low) / (high - low)
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def _edge(value: float, log: bool) -> str:
    if log:
        return f"×{number(2**value, 2)}"
    return f"{'+' if value > 0 else ''}{number(value, 2)} deviations"


def maps(scores: Mapping[str, Table] | None, plan: Plan | None) -> list[Map]:
    """A map for every kind of unit that was scored."""
    drawn = (heat_map(unit, table, plan) for unit, table in (scores or {}).items() if table and all(table))
    return [found for found in drawn if found is not None]


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A map on its way to the page: a step of colour for every cell, and which units lie where."""

    unit: str
    levels: Sequence[Sequence[int | None]]
    order: Sequence[Sequence[int]]  # units of each row from left to right
    kept: Kept

    @property
    def width(self) -> float:
        return WIDTH if self.unit in SORTED else min(WIDTH, max(NARROW, CELL * len(self.levels[0])))

    @property
    def height(self) -> float:
        """Of a row."""
        return 24.0 if self.single else min(CELL, max(5.0, 450 / len(self.levels)))

    @property
    def single(self) -> bool:
        return len(self.levels) == 1


def _draw(sheet: _Sheet) -> Markup:
    runs = {level: "".join(_runs(sheet, level)) for level in range(LEVELS)}
    cells = [tag("path", d=path, class_=f"h{level}") for level, path in runs.items() if path]
    rows = [part for i in range(len(sheet.levels)) for part in _row(sheet, i)]
    below = 18.0 if sheet.single and sheet.unit not in SORTED else 4.0
    columns = list(_column_numbers(sheet)) if below > 4 else []
    label = f"importance of every {sheet.unit}, rows: {len(sheet.levels)}, units in a row: {len(sheet.order[0])}"
    height = TOP + len(sheet.levels) * sheet.height + below
    return picture(LEFT + sheet.width + 1, height, label, *cells, *rows, *columns, class_="heat")


def _runs(sheet: _Sheet, level: int) -> Iterator[str]:
    """The cells of one level as path commands, neighbours joined."""
    for i, row in enumerate(sheet.levels):
        cell, start = sheet.width / len(row), 0
        for value, run in groupby(row):
            length = len(list(run))
            if value == level:
                x, w = LEFT + start * cell, length * cell
                yield f"M{x:.5g} {TOP + i * sheet.height:.5g}h{w:.5g}v{sheet.height - 1:.4g}h-{w:.5g}z"
            start += length


def _row(sheet: _Sheet, i: int) -> Iterator[Markup]:
    """What lies over the colours of row `i`: marks of the cut, words for the pointer, the layer's number."""
    y, keep, units = TOP + i * sheet.height, sheet.kept[i], len(sheet.order[i])
    if keep is not None:
        yield from _marks(sheet, i, keep)
    words = f"{units:,} units" if keep is None else f"{len(keep):,} of {units:,} kept"
    where = "" if sheet.single else f"Layer {i}: "
    yield tag("rect", title(where + words), x=LEFT, y=y, width=sheet.width, height=sheet.height, class_="hit")
    if not sheet.single and i % (1 if sheet.height >= 10 else 5) == 0:
        yield tag("text", str(i), x=LEFT - 7, y=y + sheet.height / 2 + 3.5, class_="count", text_anchor="end")


def _marks(sheet: _Sheet, i: int, kept: frozenset[int]) -> Iterator[Markup]:
    """A veil over what was cut, neighbours joined; in sorted rows, a line where the cut begins."""
    cell, start = sheet.width / len(sheet.order[i]), 0
    box = {"y": TOP + i * sheet.height, "height": sheet.height - 1}
    for stays, run in groupby(sheet.order[i], key=kept.__contains__):
        length = len(list(run))
        if not stays:
            x = LEFT + start * cell
            yield tag("rect", x=x, width=length * cell, class_="veil", **box)
            if start and sheet.unit in SORTED:
                yield tag("rect", x=x - 0.5, width=1.5, class_="edge", **box)
        start += length


def _column_numbers(sheet: _Sheet) -> Iterator[Markup]:
    columns = len(sheet.levels[0])
    for i in range(0, columns, 5):
        x = LEFT + sheet.width * (i + 0.5) / columns
        yield tag("text", str(i), x=x, y=TOP + sheet.height + 13, class_="count", text_anchor="middle")
