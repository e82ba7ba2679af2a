"""The Python form of `regrow run`: one call from a model's name to a finished folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regrow.artifacts.report import Report
from regrow.cli.finish import pages
from regrow.run import Progress, run
from regrow.settings import find_recipe, overlay, parse, read_recipe


def prune(
    model: str, out: str | Path, *, recipe: str | None = None, progress: Progress | None = None, **settings: Any
) -> Report:
    """Cut `model` and leave a folder at `out`; returns the report.

    `recipe` is a name or a path; `settings` are keys of a recipe and override it: `keep="80%"`, `criterion="taylor"`,
    `recover={"tokens": 100_000}`; None is a recipe's null: `recover=None` does not recover. Raises errors of
    `regrow.errors`.
    """
    data = read_recipe(find_recipe(recipe)) if recipe else {}
    return run(parse(overlay(data, {**settings, "model": model})), Path(out), page=pages, progress=progress)
