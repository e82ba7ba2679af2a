"""Runs a recipe and says what came of it: shared by `run` and `prune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.cli import console
from regrow.settings import Recipe

if TYPE_CHECKING:
    from regrow.artifacts.plan import Plan
    from regrow.artifacts.report import Report
    from regrow.artifacts.scores import Scores


def finish(recipe: Recipe, out: Path, *, as_json: bool, quiet: bool) -> None:
    """Walk the road, print the table and where things are."""
    from regrow.engines import processes
    from regrow.run import run

    out, quiet = out.expanduser(), quiet or not processes.first()
    with console.progress(quiet) as say:
        report = run(recipe, out, page=pages, progress=say)
    if not quiet:
        from regrow.cache import cache_dir, size_bytes

        console.show_report(report)
        split = {unit: share for unit, share in report.made_by.get("split_realised", {}).items() if share}
        if split:
            print("cut:    " + ", ".join(f"{100 * share:.1f} % of {unit}s" for unit, share in split.items()))
        print(f"model:  {out}\nreport: {out / 'report.html'}\nload:   {load_line(report, out)}")
        print(f"cache:  {cache_dir()} ({size_bytes(cache_dir()) / 1e6:,.0f} MB; safe to delete)")
    if as_json and processes.first():
        data = report.to_json()
        console.emit({"out": str(out), **{k: data[k] for k in ("before", "after", "retention", "shape", "notes")}})


def help_out(recipe: Recipe, *, as_json: bool, quiet: bool) -> None:
    """Measure candidates of a search that others share, until there are none left."""
    from regrow.run import help_search

    with console.progress(quiet) as say:
        chosen = help_search(recipe, progress=say)
    if not quiet:
        print(f"the search is over: {chosen.plan.shape()}")
    if as_json:
        found = chosen.record
        measured = {"scored": len(found["scored"]), "ranked": len(found["ranked"]), "tokens": found["tokens"]}
        console.emit({"chosen": found["chosen"], **measured, "notes": chosen.notes})


def pages(report: Report, plan: Plan | None, scores: Scores | None, recipe: str) -> Mapping[str, str]:
    """The files for people that lie beside the model."""
    from regrow.page.card import model_card
    from regrow.page.page import render

    card = model_card(report, load_code=load_code(report, "THIS_FOLDER"), recipe=recipe)
    return {"report.html": render(report, plan, None if scores is None else tables(scores), recipe), "README.md": card}


def tables(scores: Scores) -> dict[str, list[list[float]]]:
    """Scores as plain lists; a single row for channels and layers. Scores of runs of layers are not a map."""
    found: dict[str, list[list[float]]] = {}
    for unit, values in scores.table.items():
        rows = values if values.dim() == 2 else values[None]
        if unit != "layer" or values.dim() == 1:
            found[unit] = rows.tolist()
    return found


def load_line(report: Report, out: Path | str, what: str = "AutoModelForCausalLM") -> str:
    trust = ", trust_remote_code=True" if report.model["holder"] == "heterogeneous" else ""
    return f'{what}.from_pretrained("{out}"{trust})'


def load_code(report: Report, out: str) -> str:
    """Without trust the tokenizer would ask too: it reads the model's configuration."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = {load_line(report, out)}\n"
        f"tokenizer = {load_line(report, out, 'AutoTokenizer')}\n"
    )
