"""`regrow report`: make the page of a finished folder anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regrow.cli import options as o
from regrow.cli.console import emit
from regrow.cli.show import read
from regrow.errors import OutputError


def report(
    folder: Annotated[Path, typer.Argument(help="a folder regrow wrote")],
    out: Annotated[Path | None, typer.Option(help="the page to write; FOLDER/report.html unless named")] = None,
    as_json: o.Json = False,
) -> None:
    """Make report.html from report.json and plan.json (importance maps need the run itself)."""
    from regrow.artifacts.plan import Plan
    from regrow.artifacts.report import Report
    from regrow.page.page import render

    data = Report.from_json(read(folder / "report.json"))
    plan = Plan.from_json(read(folder / "plan.json"))
    recipe = folder / "recipe.yaml"
    page = render(data, plan, None, recipe.read_text() if recipe.exists() else None)
    target = out or folder / "report.html"
    try:
        target.write_text(page)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}", "a writable place", "name another --out") from error
    emit({"page": str(target)}) if as_json else print(target)
