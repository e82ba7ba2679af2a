"""The search on the page: every shape that was scored, its losses as cut and trained a little, and which was taken.

What this gives up: more than `MOST` rows; the file `search.json` has them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from regrow.page.curve import drawn
from regrow.page.numbers import number, short

MOST = 24
AXES = {"layer": "layers", "group": "groups", "head": "heads a group", "neuron": "neurons", "channel": "channels"}


@dataclass(frozen=True, slots=True)
class Row:
    cells: tuple[str, ...]
    chosen: bool


@dataclass(frozen=True, slots=True)
class Candidates:
    about: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    svg: Markup | None


def candidates(search: Mapping[str, Any] | None) -> Candidates | None:
    """What a report's `search` holds, ready to be shown; None without one."""
    if search is None:
        return None
    marks = list(dict.fromkeys(point["tokens"] for row in search["ranked"] for point in row["losses"]))
    trained = {_name(row["widths"]): row["losses"] for row in search["ranked"]}
    timed = any("latency_ms" in row for row in search["scored"])
    axes = [axis for axis in AXES if axis in search["chosen"]]
    heads = (
        "",
        *(AXES[axis] for axis in axes),
        "parameters",
        *(["ms a token"] if timed else []),
        "loss as cut",
        *(f"after {short(mark)} tokens" for mark in marks),
    )
    rows = []
    for place, row in enumerate(search["scored"][:MOST], 1):
        losses = {point["tokens"]: point.get("loss") for point in trained.get(_name(row["widths"]), ())}
        cells = (
            f"#{place}",
            *(f"{row['widths'][axis]:,}" for axis in axes),
            short(row["parameters"]),
            *([_figure(row.get("latency_ms")) + (", too slow" if row.get("slow") else "")] if timed else []),
            _figure(row.get("loss")),
            *(_figure(losses.get(mark)) for mark in marks),
        )
        rows.append(Row(cells, row["widths"] == search["chosen"]))
    return Candidates(_about(search), heads, tuple(rows), _curves(search))


def _about(search: Mapping[str, Any]) -> str:
    scored, shown = len(search["scored"]), min(len(search["scored"]), MOST)
    said = f"Of {search['size']:,} shapes {search['inside']:,} fill the budget"
    if search.get("unfit", {}).get("shapes"):
        said += f", and {search['unfit']['shapes']:,} of these cannot be trained as asked"
    if search.get("unbeaten") is not None:
        said += f"; {search['unbeaten']:,} are exceeded by no other"
    said += f"; {scored:,} of them were scored as cut"
    if slow := sum(bool(row.get("slow")) for row in search["scored"]):
        said += f", {slow} of which are too slow"
    if search["ranked"]:
        said += f", {len(search['ranked'])} trained, {search['tokens']:,} tokens in all; {search['end']}"
    if search["tau"]:
        said += f". Kendall's tau from one checkpoint to the next: {', '.join(_tau(tau) for tau in search['tau'])}"
    return said + (f". The best {shown} are shown." if shown < scored else ".")


def _curves(search: Mapping[str, Any]) -> Markup | None:
    trained = {_name(row["widths"]): row["losses"] for row in search["ranked"]}
    lines = {}
    for place, row in enumerate(search["scored"], 1):
        if losses := trained.get(_name(row["widths"])):
            points = [(0.0, row.get("loss")), *((float(point["tokens"]), point.get("loss")) for point in losses)]
            lines[f"#{place}"] = [(x, float(y)) for x, y in points if y is not None]
    return drawn(lines, "tokens", "candidates")


def _name(widths: Mapping[str, int]) -> str:
    return " · ".join(str(widths[axis]) for axis in AXES if axis in widths)


def _tau(value: float | None) -> str:
    return "none" if value is None else number(value, 2)


def _figure(value: float | None) -> str:
    return "–" if value is None else number(value)
