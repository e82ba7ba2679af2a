"""How it was measured, as lines of text: nested records become `key: value`, equal records are written once.

What this gives up: types; everything a stage recorded is printed, whatever it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from regrow.artifacts.report import Report
from regrow.page.numbers import number

Line = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Record:
    """One way of measuring and the measures that were taken so."""

    paths: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class StageTime:
    name: str
    time: str
    share: float  # of the longest stage, 0..1
    lines: tuple[Line, ...]


def lines(record: Mapping[str, Any], prefix: str = "") -> Iterator[Line]:
    """`record` as (key, text) pairs; keys of inner mappings are joined by a point."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from lines(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", f"{value:,}" if _counts(key, value) else text(value)


def _counts(key: str, value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= 10_000 and "seed" not in key


def text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value) if abs(value) >= 0.001 or value == 0 else f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text(inner)}" for key, inner in value.items())
    return str(value)


def records(report: Report) -> list[Record]:
    """Every different `how`, with the measures it holds for; what differs before and after is written twice."""
    found: dict[str, tuple[dict[str, None], Mapping[str, Any]]] = {}
    for side, measures in (("before", report.before), ("after", report.after)):
        other = report.after if side == "before" else report.before
        for path, measure in measures.items():
            if not measure.how:
                continue
            same = path not in other or other[path].how == measure.how
            name = path if same else f"{path} ({side})"
            found.setdefault(json.dumps(measure.how, sort_keys=True, default=str), ({}, measure.how))[0][name] = None
    return [Record(tuple(paths), tuple(lines(how))) for paths, how in found.values()]


def stage_times(stages: Mapping[str, Any]) -> list[StageTime]:
    """Stages in the order they ran. A stage is its seconds, or a record with `seconds` and more."""
    rows = {name: value if isinstance(value, Mapping) else {"seconds": value} for name, value in stages.items()}
    seconds = {name: float(row.get("seconds") or 0.0) for name, row in rows.items()}
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        StageTime(
            name,
            duration(seconds[name]),
            seconds[name] / longest,
            tuple(lines({key: value for key, value in row.items() if key != "seconds"})),
        )
        for name, row in rows.items()
    ]


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
