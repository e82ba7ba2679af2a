"""The Python form of `regrow run`, `sparsify` and `recover`: one call from a model's name to a finished folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regrow.artifacts.report import Report
from regrow.cli.finish import pages
from regrow.kept import Progress
from regrow.recipe_files import exact, find_recipe, of_method, overlay, read_recipe
from regrow.recovery import Recover
from regrow.run import run
from regrow.settings import SPARSE_CALIBRATION, Sparsify, parse


def prune(
    model: str, out: str | Path, *, recipe: str | None = None, progress: Progress | None = None, **settings: Any
) -> Report:
    """Cut `model` and leave a folder at `out`; returns the report.

    `recipe` is a name or a path; `settings` are keys of a recipe and override it: `keep="80%"`, `criterion="taylor"`,
    `recover={"tokens": 100_000}`; None is a recipe's null: `recover=None` does not recover. Raises errors of
    `regrow.errors`.
    """
    data = read_recipe(find_recipe(recipe)) if recipe else {}
    laid = overlay(of_method(data, settings), {**settings, "model": model})
    return _run(exact(laid, settings), out, progress)


def sparsify(model: str, out: str | Path, *, progress: Progress | None = None, **settings: Any) -> Report:
    """Make weights of `model` zero and leave a folder at `out`; returns the report.

    `settings` are keys of a recipe's `sparsify` (`pattern="2:4"`, `criterion="wanda"`), and others of a recipe
    (`calibration={"text": "my.txt"}`, `seed=1`). Raises errors of `regrow.errors`.
    """
    usual = {"name": "sparsify", "calibration": SPARSE_CALIBRATION, "evaluate": {"speed": False}}
    inner = {key: settings.pop(key) for key in list(settings) if key in Sparsify.model_fields}
    return _unstructured(model, out, overlay({**usual, "sparsify": inner}, settings), progress)


def recover(model: str, out: str | Path, *, progress: Progress | None = None, **settings: Any) -> Report:
    """Train `model`, cut or sparse or neither, and leave a folder at `out`; returns the report.

    `settings` are keys of a recipe's `recover` (`method="spp"`, `tokens=200_000`, `teacher="base"`), and others of a
    recipe (`evaluate={"text": None}`, `seed=1`). Raises errors of `regrow.errors`.
    """
    inner = {key: settings.pop(key) for key in list(settings) if key in Recover.model_fields}
    usual = {"name": "recover", "evaluate": {"speed": False}, "recover": inner}
    return _unstructured(model, out, overlay(usual, settings), progress)


def _unstructured(model: str, out: str | Path, data: dict[str, Any], progress: Progress | None) -> Report:
    """A run in which no unit goes."""
    return _run({**data, "model": model, "keep": None}, out, progress)


def _run(data: dict[str, Any], out: str | Path, progress: Progress | None) -> Report:
    return run(parse(data), Path(out).expanduser(), page=pages, progress=progress)
