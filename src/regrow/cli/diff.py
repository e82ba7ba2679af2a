"""`regrow diff`: what two plans or two reports do not share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regrow.cli import console
from regrow.cli import options as o
from regrow.cli.show import read
from regrow.errors import InputError

Path_ = Annotated[Path, typer.Argument(help="a plan.json, a report.json, or a folder regrow wrote")]


def diff(one: Path_, other: Path_, as_json: o.Json = False) -> None:
    """Compare two plans (units kept by one only) or two reports (their measures after)."""
    first, second = (read(p / "report.json" if p.is_dir() else p) for p in (one, other))
    if ("layers" in first) != ("layers" in second):
        raise InputError("a plan and a report", "two plans or two reports", "name files of one kind")
    rows, columns = plans(first, second) if "layers" in first else reports(first, second)
    if as_json:
        console.emit({"columns": columns, "rows": rows})
    else:
        console.table("", columns, rows)


def plans(first: dict[str, object], second: dict[str, object]) -> tuple[list[list[str]], list[str]]:
    """Per layer: units kept by both, by the first only, by the second only."""
    from regrow.artifacts.plan import Plan

    sides = [{x.index: x for x in Plan.from_json(data).layers} for data in (first, second)]
    rows = []
    for index in sorted({*sides[0], *sides[1]}):
        for kind in ("groups", "heads", "neurons"):
            kept = [set(getattr(side[index], kind)) if index in side else set() for side in sides]
            if kept[0] != kept[1]:
                both = len(kept[0] & kept[1])
                rows.append([f"{index} {kind}", str(both), str(len(kept[0]) - both), str(len(kept[1]) - both)])
    return rows, ["layer", "both", "first only", "second only"]


def reports(first: dict[str, object], second: dict[str, object]) -> tuple[list[list[str]], list[str]]:
    from regrow.artifacts.report import Report

    sides = [Report.from_json(data).after for data in (first, second)]
    rows = [
        [name, console.figure(sides[0].get(name)), console.figure(sides[1].get(name))]
        for name in dict.fromkeys([*sides[0], *sides[1]])
    ]
    return rows, ["measure after", "first", "second"]
