"""The report as one HTML page that needs nothing else: no network, no script, no font, no image file.

Every text of the run goes through jinja's escaping; pictures are inline SVG from this package. The page lives in
light, dark and on paper. What this gives up: interaction beyond hovering; the page is a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Report
from regrow.artifacts.shape import Shape
from regrow.page.candidates import candidates
from regrow.page.curve import curve, path
from regrow.page.headline import asked, reached, stats, views
from regrow.page.heat import LEVELS, maps
from regrow.page.layers import draw
from regrow.page.origin import recipe_without_paths, title, without_paths
from regrow.page.record import lines, records, stage_times
from regrow.page.rows import NOISE_MARGIN, WORDS, groups
from regrow.page.zeros import draw_zeros

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(
    report: Report,
    plan: Plan | None,
    scores: Mapping[str, Sequence[Sequence[float]]] | None,
    recipe: str | None,
    drawn: Markup | None = None,
) -> str:
    """The whole page. `scores`: by kind of unit a row a layer, or one row for channels and whole layers.

    A table of `Scores` turns into such rows by `tensor.reshape(-1, tensor.shape[-1]).tolist()`. Without scores, `drawn`
    holds maps of an earlier page (`drawn_maps`).
    """
    before, after = _shapes(report)
    named = report.made_by.get("recipe")
    return _ENVIRONMENT.get_template("page.html").render(
        model=report.model,
        title=title(report.model),
        asked=asked(report.made_by),
        reached=reached(report),
        recipe_name=named if isinstance(named, str) else "",
        stats=stats(report),
        views=views(report),
        groups=groups(report),
        words=WORDS,
        noise=f"{NOISE_MARGIN:g}",
        before=before,
        after=after,
        shape=draw(before, after, plan) if before and after and not report.sparsity else None,
        zeros=draw_zeros(report.sparsity) if report.sparsity else None,
        maps=maps(scores, plan),
        drawn=drawn,
        planned=plan is not None,
        levels=range(LEVELS),
        curve=curve(report.training),
        path=path(report.learning),
        learned=curve([{k: v for k, v in row.items() if k != "loss"} for row in report.learning]),
        search=candidates(report.search),
        samples=report.samples,
        made_by=list(lines(without_paths(report.made_by))),
        source=list(lines({key: value for key, value in without_paths(report.model).items() if key != "note"})),
        machine=list(lines(report.machine)),
        records=records(report),
        stages=stage_times(report.stages),
        notes=report.notes,
        recipe=recipe and recipe_without_paths(recipe),
    )


def drawn_maps(page: str) -> Markup | None:
    """The section of importance maps of a page that `render` made; None when it has none."""
    _, begin, rest = page.partition('<section id="importance">')
    inside, end, _ = rest.partition("</section>")
    return Markup(begin + inside + end) if end else None


def _shapes(report: Report) -> tuple[Shape | None, Shape | None]:
    if "before" not in report.shape or "after" not in report.shape:
        return None, None
    return Shape.from_json(report.shape["before"]), Shape.from_json(report.shape["after"])
