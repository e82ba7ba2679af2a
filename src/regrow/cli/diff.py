"""`regrow diff`: what two plans or two reports do not share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regrow.cli import console
from regrow.cli import options as o
from regrow.cli.show import read
from regrow.errors import InputError

Path_ = Annotated[Path, typer.Argument(help="a plan.json, a report.json, or a folder regrow wrote")]


def diff(
    one: Path_,
    other: Path_,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="of two folders: are the zeros of the first kept? (what is compared when one has no report)",
        ),
    ] = False,
    _seed: o.NoSeed = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Compare two plans (units kept by one only), two reports (measures after), or the zeros of two checkpoints."""
    folders = all((p / "config.json").is_file() for p in (one, other))
    if weights or (folders and not all((p / "report.json").is_file() for p in (one, other))):
        rows, columns, data = checkpoints(one, other)
        if as_json:
            console.emit(data)
        elif not quiet:
            console.table("", columns, rows)
            said = {True: "the pattern is intact", False: f"{data['lost']:,} zeros were lost"}
            print(said.get(data["intact"], "the first has no pattern that could be lost: it is dense"))
        return
    first, second = (read(p / "report.json" if p.is_dir() else p) for p in (one, other))
    if ("layers" in first) != ("layers" in second):
        raise InputError("a plan and a report", "two plans or two reports", "name files of one kind")
    rows, columns = plans(first, second) if "layers" in first else reports(first, second)
    if as_json:
        console.emit({"columns": columns, "rows": rows})
    elif not quiet:
        console.table("", columns, rows)


def plans(first: dict[str, object], second: dict[str, object]) -> tuple[list[list[str]], list[str]]:
    """Units kept by both, by the first only, by the second only: channels, then layer by layer."""
    from regrow.artifacts.plan import Plan

    found = [Plan.from_json(data) for data in (first, second)]
    sides = [{x.index: x for x in plan.layers} for plan in found]
    kept: dict[str, list[set[int]]] = {"channels": [set(plan.channels) for plan in found]}
    for index in sorted({*sides[0], *sides[1]}):
        for kind in ("groups", "heads", "neurons", "merged"):
            kept[f"{index} {kind}"] = [set(getattr(s[index], kind)) if index in s else set() for s in sides]
    rows = [
        [name, *(str(len(units)) for units in (one & other, one - other, other - one))]
        for name, (one, other) in kept.items()
        if one != other
    ]
    return rows, ["layer", "both", "first only", "second only"]


def reports(first: dict[str, object], second: dict[str, object]) -> tuple[list[list[str]], list[str]]:
    from regrow.artifacts.report import Report

    sides = [Report.from_json(data).after for data in (first, second)]
    rows = [
        [name, console.figure(sides[0].get(name)), console.figure(sides[1].get(name))]
        for name in dict.fromkeys([*sides[0], *sides[1]])
    ]
    return rows, ["measure after", "first", "second"]


def checkpoints(one: Path, other: Path) -> tuple[list[list[str]], list[str], dict[str, Any]]:
    """Where the first is zero and the second is not, matrix by matrix."""
    from regrow.engines.bind import bind_any
    from regrow.engines.checkpoint import check_files, read_config
    from regrow.engines.zeros import lost, names_in, of_folder, stored

    anatomies = []
    for folder in (one, other):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder", "two folders of models", "check the path")
        check_files(folder)
        anatomies.append(bind_any(read_config(folder))[0])
    names = names_in(one, anatomies[0])
    alike = set(names) <= {tensor.name for tensor in anatomies[1].tensors}
    sides = [of_folder(folder, names) for folder in (one, other)] if alike else []
    if not alike or [m.shape for m in sides[0].matrices] != [m.shape for m in sides[1].matrices]:
        raise InputError(
            "two checkpoints of different shapes",
            "the same matrices in both",
            "compare a model with its own tuned form",
        )
    found = lost(stored(one, names), stored(other, names))
    rows = [[name, f"{count:,}"] for name, count in found.items()]
    data = {
        "intact": not found if sides[0].sparse else None,
        "lost": sum(found.values()),
        "lost_by_matrix": found,
        "same_mask": sides[0].mask_hash == sides[1].mask_hash,
        "share": [side.share for side in sides],
        "groups": [side.groups for side in sides],
    }
    return rows, ["matrix", "zeros of the first that the second fills"], data
