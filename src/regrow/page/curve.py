"""The recovery's training curve: every loss that was logged, against tokens, with a smooth line through the noise.

What this gives up: zooming; long logs are thinned to `POINTS` points a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from regrow.page.numbers import number, short
from regrow.page.svg import picture, tag

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 1000.0, 300.0, 48.0, 40.0, 14.0, 120.0  # pixels
POINTS = 400
SMOOTH = 25  # the smooth line averages over a 25th of the run

PARTS = ("divergence", "next_token", "states")  # of a loss from a teacher, where it has several

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Data to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float

    def at(self, point: Point) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - self.x0) / (self.x1 - self.x0)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (self.y1 - point[1]) / (self.y1 - self.y0)
        return f"{x:.1f} {y:.1f}"

    def xy(self, point: Point) -> Point:
        x, y = self.at(point).split()
        return float(x), float(y)


def curve(training: Sequence[Mapping[str, float]]) -> Markup | None:
    """Loss and its parts against tokens (steps when tokens were not logged). None when no loss was logged twice."""
    axis = "tokens" if all("tokens" in row for row in training) else "step"
    names = list(dict.fromkeys(key for row in training for key in row if key.endswith("loss") or key in PARTS))
    lines = {name.replace("_", " "): _points(training, axis, name) for name in names}
    return drawn(lines, axis, "recovery")


def path(learning: Sequence[Mapping[str, float]]) -> Markup | None:
    """Sparsity, what is asked for by then, and the teacher's, in per cent against tokens, while gates learned."""
    names = {"sparsity": "sparsity", "asked": "asked for", "teacher": "teacher"}
    lines = {said: [(x, 100 * y) for x, y in _points(learning, "tokens", name)] for name, said in names.items()}
    return drawn(lines, "tokens", "sparsity in per cent")


def drawn(lines: Mapping[str, Sequence[Point]], axis: str, what: str) -> Markup | None:
    """Lines of losses with their names at their ends. None when none has two points."""
    lines = {name: _thin(points) for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    y_ticks = ticks(min(ys), max(ys), 5)
    frame = _Frame(min(0.0, *xs), max(xs) or 1.0, min(*y_ticks, *ys), max(*y_ticks, *ys))
    parts = [*_axes(frame, axis, ticks(frame.x0, frame.x1, 6), y_ticks)]
    ends: list[tuple[float, str, int]] = []
    for index, (name, points) in enumerate(lines.items()):
        smooth = _smooth(points) if len(points) > 2 * SMOOTH else points
        if smooth is not points:
            parts.append(_path(frame, points, f"raw s{index % 4}"))
        parts.append(_path(frame, smooth, f"line s{index % 4}"))
        _, y = frame.xy(smooth[-1])
        ends.append((y, f"{name} {number(smooth[-1][1], 3)}", index % 4))
    parts += _labels(ends)
    return picture(WIDTH, HEIGHT, f"{what}: {', '.join(lines)} against {axis}", *parts, class_="curve")


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) that span low..high from inside."""
    if high <= low:
        return [low, low + (abs(low) or 1.0)]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _points(training: Sequence[Mapping[str, float]], axis: str, name: str) -> list[Point]:
    rows = (row for row in training if name in row and axis in row)
    return [(float(row[axis]), float(row[name])) for row in rows if math.isfinite(row[name])]


def _thin(points: Sequence[Point]) -> list[Point]:
    every = math.ceil(len(points) / POINTS) or 1
    return [_mean(points[i : i + every]) for i in range(0, len(points), every)]


def _mean(points: Sequence[Point]) -> Point:
    return points[-1][0], sum(y for _, y in points) / len(points)


def _smooth(points: Sequence[Point]) -> list[Point]:
    """A centred mean, so that the line does not lag; narrow at the steep start, looking back at the end."""
    half = len(points) // (2 * SMOOTH)
    reach = [min(half, i) for i in range(len(points))]
    return [(points[i][0], _mean(points[i - k : i + k + 1])[1]) for i, k in enumerate(reach)]


def _axes(frame: _Frame, axis: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Iterator[Markup]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else 1.0
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    for tick in y_ticks:
        _, y = frame.xy((frame.x0, tick))
        yield tag("path", d=f"M{LEFT} {y}H{right}", class_="grid")
        yield tag("text", f"{tick:,.{places}f}", x=LEFT - 8, y=y + 3.5, class_="count", text_anchor="end")
    for tick in x_ticks:
        x, _ = frame.xy((tick, frame.y0))
        yield tag("text", short(tick), x=x, y=floor + 17, class_="count", text_anchor="middle")
    yield tag("path", d=f"M{LEFT} {floor}H{right}", class_="ground")
    yield tag("text", axis, x=right, y=HEIGHT - 6, class_="axis", text_anchor="end")


def _path(frame: _Frame, points: Sequence[Point], class_: str) -> Markup:
    return tag("path", d="M" + "L".join(map(frame.at, points)), class_=class_)


def _labels(ends: Sequence[tuple[float, str, int]]) -> Iterator[Markup]:
    """The name of each line beside its end, pushed apart where lines end together."""
    x, below = WIDTH - RIGHT, -math.inf
    for y, text, colour in sorted(ends):
        below = max(y, below + 15)
        yield tag("circle", cx=x, cy=y, r=3, class_=f"dot s{colour}")
        yield tag("text", text, x=x + 9, y=below + 4, class_=f"label s{colour}")
