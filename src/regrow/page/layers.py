"""The shape as a picture: one row a layer, with its attention groups as squares and its neurons as a bar.

What is gone is hatched where it was. Works from the two shapes alone; with a plan the very groups and layers are
known. What this gives up: which neurons and channels stay is not drawn here, only how many (the maps show which).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from markupsafe import Markup

from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import LayerShape, Shape
from regrow.page.svg import picture, tag, title

WIDTH, LEFT, NUMBERS, GAP, HEAD = 1000.0, 40.0, 56.0, 28.0, 62.0  # pixels: whole, row names, counts, between, top


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer of the intact model and what is left of it."""

    name: str
    full: LayerShape
    left: LayerShape | None  # None: the layer is gone
    groups: frozenset[int]  # kept, as indices into the intact layer

    @property
    def words(self) -> str:
        if self.left is None:
            return f"Layer {self.name}: gone"
        return (
            f"Layer {self.name}: {self.left.groups} of {self.full.groups} groups with {self.left.heads} of "
            f"{self.full.heads} heads each, {self.left.neurons:,} of {self.full.neurons:,} neurons"
        )


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where things are, in pixels."""

    row: float  # height of a row
    cell: float  # width of a group's square, which is as high as the row allows
    groups: int
    neurons: int

    @property
    def bar(self) -> float:
        return LEFT + self.groups * (self.cell + 2) + GAP

    @property
    def bar_width(self) -> float:
        return WIDTH - NUMBERS - self.bar


def layer_views(before: Shape, after: Shape, plan: Plan | None) -> list[LayerView]:
    """One view a layer of the intact model; without a plan those that are left come first, unnamed if some are gone."""
    if plan is None:
        named = len(before.layers) == len(after.layers)
        kept = {i: (layer, frozenset(range(layer.groups))) for i, layer in enumerate(after.layers)}
    else:
        named = True
        shapes = plan.shape().layers
        kept = {x.index: (shape, frozenset(x.groups)) for x, shape in zip(plan.layers, shapes, strict=True)}
    gone = (None, frozenset[int]())
    return [LayerView(str(i) if named else "·", full, *kept.get(i, gone)) for i, full in enumerate(before.layers)]


def draw(before: Shape, after: Shape, plan: Plan | None) -> Markup:
    """The picture of `after` inside `before`."""
    views = layer_views(before, after, plan)
    groups = max(x.full.groups for x in views)
    row = min(22.0, max(9.0, 720 / len(views)))
    cell = min(max(12.0, row - 3), 380 / max(groups, 1) - 2)
    grid = _Grid(row, cell, groups, max(x.full.neurons for x in views))
    every = 1 if row >= 12 else 5
    rows = [_row(view, HEAD + i * row, grid, numbered=i % every == 0) for i, view in enumerate(views)]
    label = f"{len(after.layers)} of {len(before.layers)} layers kept; before: {before}; after: {after}"
    top = [_channels(before, after), _headings(grid)]
    return picture(WIDTH, HEAD + len(views) * row + 4, label, *top, *rows, class_="shape")


def _channels(before: Shape, after: Shape) -> Markup:
    width = WIDTH - NUMBERS - LEFT
    kept = width * after.channels / before.channels
    return tag(
        "g",
        title(f"{after.channels:,} of {before.channels:,} hidden channels"),
        tag("text", "hidden channels", x=LEFT, y=11, class_="axis"),
        *_bar(LEFT, 17, width, kept, 10),
        tag("text", f"{after.channels:,}", x=WIDTH, y=26, class_="count", text_anchor="end"),
    )


def _headings(grid: _Grid) -> Markup:
    y = HEAD - 8
    return tag(
        "g",
        tag("text", "layer", x=LEFT - 10, y=y, class_="axis", text_anchor="end"),
        tag("text", "attention groups" if grid.groups * grid.cell > 80 else "groups", x=LEFT, y=y, class_="axis"),
        tag("text", "neurons", x=grid.bar, y=y, class_="axis"),
    )


def _row(view: LayerView, y: float, grid: _Grid, *, numbered: bool) -> Markup:
    base = y + grid.row / 2 + 3.5
    parts: list[Markup] = [title(view.words), tag("rect", x=0, y=y, width=WIDTH, height=grid.row, class_="hit")]
    parts += _squares(view, y, grid)
    full = grid.bar_width * view.full.neurons / max(grid.neurons, 1)
    left = view.left.neurons if view.left else 0
    parts += _bar(grid.bar, y + 1.5, full, full * left / max(view.full.neurons, 1), grid.row - 3)
    if numbered:
        count = "gone" if view.left is None else f"{left:,}"
        parts.append(tag("text", view.name, x=LEFT - 10, y=base, class_="count", text_anchor="end"))
        parts.append(tag("text", count, x=WIDTH, y=base, class_="count", text_anchor="end"))
    return tag("g", *parts, class_="layer gone" if view.left is None else "layer")


def _squares(view: LayerView, y: float, grid: _Grid) -> Iterator[Markup]:
    """A square a group, filled as far as the share of its query heads that stay."""
    share = view.left.heads / view.full.heads if view.left and view.full.heads else 0.0
    height = min(grid.cell, grid.row - 3)
    for index in range(view.full.groups):
        kept = grid.cell * share if index in view.groups else 0.0
        x = LEFT + index * (grid.cell + 2)
        yield from _bar(x, y + (grid.row - height) / 2, grid.cell, kept, height, "kept-group")


def _bar(x: float, y: float, full: float, kept: float, height: float, class_: str = "kept") -> Iterator[Markup]:
    box = {"y": y, "height": height, "rx": min(2.0, height / 4)}
    if kept < full:
        yield tag("rect", x=x, width=full, class_="cut", **box)
    if kept > 0:
        yield tag("rect", x=x, width=kept, class_=class_, **box)
