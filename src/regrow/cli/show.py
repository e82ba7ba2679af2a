"""`regrow show`: print an artifact: a plan, a report, a recipe, or a folder that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regrow.cli import console
from regrow.cli import options as o
from regrow.errors import InputError

if TYPE_CHECKING:
    from regrow.artifacts.plan import Plan


def show(
    what: Annotated[str, typer.Argument(help="a folder regrow wrote, a plan.json, a report.json, or a recipe's name")],
    _seed: o.NoSeed = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Print a plan, a report or a recipe."""
    from regrow.artifacts.plan import Plan
    from regrow.artifacts.report import Report
    from regrow.recipe_files import find_recipe, read_recipe, recipe_names

    if what in recipe_names():
        recipe = find_recipe(what)
        if as_json:
            console.emit(read_recipe(recipe))
        elif not quiet:
            print(recipe.read_text(encoding="utf-8"), end="")
        return
    path = Path(what)
    data = read(path / "report.json" if path.is_dir() else path)
    artifact = Plan.from_json(data) if "layers" in data else Report.from_json(data)
    if as_json:
        console.emit(data)
    elif not quiet:
        show_plan(artifact) if isinstance(artifact, Plan) else console.show_report(artifact)


def read(path: Path) -> dict[str, object]:
    """The JSON of an artifact. Raises `InputError` when there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no artifact: {error}",
            "a folder regrow wrote, plan.json, report.json, a recipe",
            "check the path",
        ) from error
    if not isinstance(data, dict) or not ("layers" in data or "before" in data):
        raise InputError(f"{path} is neither a plan nor a report", "plan.json or report.json", "check the path")
    return data


def show_plan(plan: Plan) -> None:
    print(plan.shape())
    columns = ["layer", "groups", "query heads", "neurons"]
    rows = [[str(x.index), str(len(x.groups)), str(len(x.heads)), str(len(x.neurons))] for x in plan.layers]
    if plan.merge != "off":
        columns.append(f"heads that go into others ({plan.merge})")
        for row, layer in zip(rows, plan.layers, strict=True):
            row.append(", ".join(f"{gone} into {kept}" for kept, gone in layer.merged))
    console.table("", columns, rows)
