"""The model card that travels with a cut checkpoint, and its before/after table in Markdown.

Whoever downloads the folder must learn what was cut, what it cost, how to load it and how to make it again.
What this gives up: evaluation metadata in the hub's own schema; the table is for people.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from regrow.artifacts.report import Report
from regrow.artifacts.shape import Shape
from regrow.page.headline import asked, reached, stats, views
from regrow.page.origin import hub_id, recipe_without_paths, title
from regrow.page.rows import NOISE_MARGIN, WORDS, Row, groups

_COLUMNS = ("Measure", "Before", "After", "Unit", "After / before", "Verdict", "Samples")


def markdown_table(report: Report) -> str:
    """The before/after table as one Markdown table; a row a measure, a bold line a group."""
    body = [
        line
        for group in groups(report)
        for line in [_line([f"**{_plain(group.title)}**", *[""] * 6]), *(_line(_cells(row)) for row in group.rows)]
    ]
    return "\n".join([_line(_COLUMNS), "|:--|--:|--:|:--|--:|:--|--:|", *body]) + "\n"


def model_card(report: Report, *, load_code: str, recipe: str) -> str:
    """A Hugging Face model card: front matter, what was cut, the table, how to load, how to make it again, limits.

    The front matter names the base model only when the hub has it.
    """
    base = hub_id(report.model)
    front = {
        **({"base_model": base} if base else {}),
        "license": str(report.model.get("licence", "unknown")),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "regrow"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(title(report.model))}, cut back and regrown",
        _summary(report),
        "## What was cut",
        _cut(report),
        "## Before and after",
        *_note(report),
        markdown_table(report).rstrip(),
        f"± is one standard error; better and worse mean beyond {NOISE_MARGIN:g} of them.",
        "## Load it",
        _fence(load_code, "python"),
        "## Make it again",
        "The recipe that made this checkpoint; `report.json` beside it holds every number with its seed and machine.",
        _fence(recipe_without_paths(recipe), "yaml"),
        "## Limits",
        _limits(report),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(report: Report) -> str:
    found = [f"- {stat.label}: {stat.was} → **{stat.now}** {stat.unit} ({stat.change})" for stat in stats(report)]
    found += [f"- {view.label}: **{view.share}** ({view.words})" for view in views(report)]
    return _plain("\n".join(found).replace("  ", " ")) or "Nothing was measured."


def _cut(report: Report) -> str:
    budget = asked(report.made_by)
    got = reached(report)
    lines = [f"Asked for {_plain(budget)}{f', reached {got}' if got else ''}."] if budget else []
    if "before" in report.shape and "after" in report.shape:
        before, after = Shape.from_json(report.shape["before"]), Shape.from_json(report.shape["after"])
        lines.append("The shape is unchanged." if before == after else f"\n- before: {before}\n- after: {after}")
    return "\n".join(lines) or "The run did not record it."


def _note(report: Report) -> list[str]:
    note = report.model.get("note")
    return [f"> **About this checkpoint.** {_plain(str(note))}"] if note else []


def _limits(report: Report) -> str:
    lines = []
    if "before" in report.shape and report.shape["before"] == report.shape.get("after"):
        lines.append(
            "No unit was removed: what was cut is stored as zeros, so neither file nor memory shrinks by itself."
        )
    elif "after" in report.shape:
        lines.append("Units are removed as a whole: what is left is dense, with no zeros in place of what was cut.")
        if not Shape.from_json(report.shape["after"]).uniform:
            lines.append("Layers differ in width: software that reads one width for all layers cannot load it.")
    lines.append("Measured on the texts and tasks above only; whatever they do not cover may have suffered more.")
    lines += [str(note) for note in report.notes]
    if report.model.get("note"):
        lines.append(f"Numbers are relative to the dense checkpoint as it was: {report.model['note']}")
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _cells(row: Row) -> list[str]:
    def side(value: str, chance: bool) -> str:
        return f"{value} (at chance)" if chance else value

    name = f"{row.name} {row.detail}".rstrip()
    before, after = side(row.before, row.chance_before), side(row.after, row.chance_after)
    verdict = f"{row.arrow} {WORDS[row.verdict]}".strip()
    return [_plain(cell) for cell in (name, before, after, row.unit, row.change, verdict, row.samples)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown neither reads as HTML nor as the end of a cell."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _fence(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    ticks = "`" * (longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"
