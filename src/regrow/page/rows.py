"""The before/after table as rows of text: grouped, rounded, each with a verdict that knows what noise is.

The page and the model card both print these rows. Measures that kept one value a sample are compared in pairs.
What this gives up: speed and memory are compared as if the two runs were independent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from regrow.artifacts.report import CHANCE_MARGIN, Measure, Report, errors_apart
from regrow.page.numbers import NONE, percent, quantity, times, unit_label

NOISE_MARGIN = 2.0  # a difference counts when it is larger than this many standard errors

Verdict = Literal["better", "worse", "noise", "same", "changed", ""]

WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "noise": "within noise",
    "same": "equal",
    "changed": "changed",
    "": "",
}

_ACCURACY, _GOLD, _OTHER = "task/accuracy", "task/gold", "task/other"
_TITLES = {
    "text": ("Text", "how well the model predicts text"),
    _ACCURACY: ("Tasks", "zero-shot accuracy; these rows make up the retention above"),
    _GOLD: ("Tasks, gold answers", "bits per byte the model needs for the right answer"),
    _OTHER: ("Tasks, other metrics", ""),
    "size": ("Size", ""),
    "speed": ("Speed", ""),
    "memory": ("Memory", ""),
}
_SHARED = (_ACCURACY, "size", "memory")  # groups where after / before reads best as a percentage


@dataclass(frozen=True, slots=True)
class Row:
    """One measure, ready to print."""

    path: str
    name: str
    detail: str
    before: str
    after: str
    unit: str
    change: str
    verdict: Verdict
    arrow: str
    samples: str
    chance_before: bool
    chance_after: bool


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    about: str
    rows: tuple[Row, ...]


def groups(report: Report) -> list[Group]:
    """Every measure of the report once; groups in reading order, rows in the order they were measured."""
    paths = list(dict.fromkeys([*report.before, *report.after]))
    found: dict[str, list[str]] = {name: [] for name in _TITLES}
    for path in paths:
        found.setdefault(_group(path, paths), []).append(path)
    return [
        Group(*_TITLES.get(name, (words(name).capitalize(), "")), tuple(_row(path, report) for path in members))
        for name, members in found.items()
        if members
    ]


def verdict(before: Measure | None, after: Measure | None) -> Verdict:
    """Better or worse only beyond `NOISE_MARGIN` standard errors of the difference; counts have none."""
    if before is None or after is None:
        return ""
    difference = after.value - before.value
    if difference == 0:
        return "same"
    if errors_apart(before, after) <= NOISE_MARGIN:
        return "noise"
    if before.better not in ("higher", "lower"):
        return "changed"
    return "better" if (difference > 0) == (before.better == "higher") else "worse"


def at_chance(measure: Measure | None) -> bool:
    """True when guessing could have scored this: not above chance by `CHANCE_MARGIN` standard errors."""
    if measure is None or measure.chance is None:
        return False
    return measure.value - measure.chance <= CHANCE_MARGIN * (measure.stderr or 0.0)


def at_chance_before(report: Report) -> list[str]:
    """Tasks that the intact model answers no better than by guessing, so that nothing of them can be retained."""
    scored = {path: measure for path, measure in report.before.items() if path in report.after}
    return [path.split("/")[1] for path, m in scored.items() if _group(path, scored) == _ACCURACY and at_chance(m)]


def ratio(before: Measure | None, after: Measure | None) -> float | None:
    """after / before, where both are above zero."""
    if before is None or after is None or before.value <= 0 or after.value < 0:
        return None
    return after.value / before.value


def words(name: str) -> str:
    return name.replace("_", " ")


def _group(path: str, paths: Iterable[str]) -> str:
    head, _, rest = path.partition("/")
    if head != "task":
        return head
    task, _, metric = rest.rpartition("/")
    if metric == "gold_bits_per_byte":
        return _GOLD
    if metric == "acc_norm" or (metric == "acc" and f"task/{task}/acc_norm" not in paths):
        return _ACCURACY
    return _OTHER


def _row(path: str, report: Report) -> Row:
    before, after = report.before.get(path), report.after.get(path)
    parts = path.split("/")
    task = parts[0] == "task" and len(parts) > 2
    group, share = _group(path, report.before), ratio(before, after)
    measure = after or before
    assert measure is not None  # the path came from one of the two
    return Row(
        path=path,
        name="/".join(parts[1:-1]) if task else " · ".join(map(words, parts[1:] or parts)),
        detail=parts[-1] if task and group != _GOLD else "",
        before=_cell(before),
        after=_cell(after),
        unit=unit_label(measure.unit),
        change=percent(share) if group in _SHARED else times(share),
        verdict=verdict(before, after),
        arrow=_arrow(before, after),
        samples=_samples(before, after),
        chance_before=at_chance(before),
        chance_after=at_chance(after),
    )


def _cell(measure: Measure | None) -> str:
    return NONE if measure is None else quantity(measure.value, measure.unit, measure.stderr)


def _arrow(before: Measure | None, after: Measure | None) -> str:
    if before is None or after is None or before.value == after.value:
        return ""
    return "▲" if after.value > before.value else "▼"


def _samples(before: Measure | None, after: Measure | None) -> str:
    counts = [f"{m.samples:,}" for m in (before, after) if m is not None and m.samples is not None]
    return " / ".join(dict.fromkeys(counts))


def pick(measures: Iterable[str], group: str, *hints: str) -> str | None:
    """The first path of `group` whose name holds one of the hints, the best hint first."""
    for hint in hints:
        for path in measures:
            if path.startswith(f"{group}/") and hint in path.removeprefix(f"{group}/"):
                return path
    return None
