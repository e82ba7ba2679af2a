"""`regrow report`: make the page of a finished folder anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regrow.cache import replacing
from regrow.cli import console
from regrow.cli import options as o
from regrow.cli.show import read
from regrow.errors import OutputError


def report(
    folder: Annotated[Path, typer.Argument(help="a folder regrow wrote")],
    out: Annotated[Path | None, typer.Option(help="the page to write; FOLDER/report.html unless named")] = None,
    _seed: o.NoSeed = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make report.html from report.json and plan.json; importance maps are taken over from the page that is there."""
    from regrow.artifacts.plan import Plan
    from regrow.artifacts.report import Report
    from regrow.page.page import drawn_maps, render

    data = Report.from_json(read(folder / "report.json"))
    planned = folder / "plan.json"  # of a run where units went
    plan = Plan.from_json(read(planned)) if planned.exists() else None
    maps = drawn_maps(_text(folder / "report.html"))
    page = render(data, plan, None, _text(folder / "recipe.yaml") or None, maps)
    target = out or folder / "report.html"
    try:
        with replacing(target) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}", "a writable place", "name another --out") from error
    if as_json:
        console.emit({"page": str(target), "maps": bool(maps)})
    elif not quiet:
        missing = "" if maps else f" (without importance maps: {folder / 'report.html'} had none to take over)"
        print(f"{target}{missing}")


def _text(path: Path) -> str:
    """What a file says; nothing when it is not there."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""
