"""The few numbers a reader sees first: parameters, perplexity, what is left of the zero-shot score, prompt speed.

What this gives up: a report whose measures have other names shows fewer of them here; the table always has all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regrow.artifacts.budget import Budget
from regrow.artifacts.report import Report, retention
from regrow.errors import BudgetError
from regrow.page.numbers import percent, quantity, short, times, unit_label
from regrow.page.rows import at_chance_before, pick, ratio, verdict


@dataclass(frozen=True, slots=True)
class Stat:
    """One big number. `was` is empty when there is nothing to compare with."""

    label: str
    was: str
    now: str
    unit: str
    change: str


@dataclass(frozen=True, slots=True)
class View:
    """One way to say how much of the zero-shot score is left."""

    label: str
    share: str
    words: str


def stats(report: Report) -> list[Stat]:
    """Parameters, perplexity and prompt speed, as far as both sides were measured."""
    size = "nonzero_weights" if report.sparsity else "parameters"
    wanted = (
        (size.replace("nonzero_", "non-zero "), "size", (size,)),
        ("perplexity", "text", ("perplexity",)),
    )
    found = [_stat(report, label, pick(_both(report), group, *hints)) for label, group, hints in wanted]
    found.append(_stat(report, "prompt speed", pick(_both(report), "speed", "prompt", "prefill")))
    return [stat for stat in found if stat is not None]


def views(report: Report) -> list[View]:
    """Raw, corrected for chance, and gold bits; empty without tasks."""
    left = retention(report.before, report.after)
    tasks, above = int(left["tasks"] or 0), int(left["tasks_above_chance"] or 0)
    found = []
    if left["raw"] is not None:
        count = f"{above} of {tasks} tasks above chance"
        found.append(View("zero-shot left, raw", percent(left["raw"]), f"mean over {tasks} tasks"))
        found.append(View("zero-shot left, corrected for chance", percent(left["above_chance"]), count))
    if left["gold_bits"] is not None:
        found.append(View("zero-shot left, gold bits", percent(left["gold_bits"]), "bits for the right answers"))
    return found


def retained(report: Report) -> str:
    """What is left of the zero-shot score, in one line; empty without tasks."""
    left, out, said = retention(report.before, report.after), at_chance_before(report), []
    if left["raw"] is not None:
        aside = f" (left out, at chance from the start: {', '.join(out)})" if out else ""
        said.append(f"{percent(left['raw'])} of the zero-shot accuracy")
        said.append(f"{percent(left['above_chance'])} corrected for chance{aside}")
    if left["gold_bits"] is not None:
        said.append(f"{percent(left['gold_bits'])} by gold bits")
    return ", ".join(said)


def asked(made_by: Mapping[str, Any]) -> str:
    """The budget in words; as it was written when it is no budget of a shape (`2:4`, a latency)."""
    budget = _budget(made_by)
    return str(budget) if budget else str(made_by.get("budget") or "")


def reached(report: Report) -> str:
    """The same count as the budget's, as it came out; empty when it was not measured."""
    budget = _budget(report.made_by)
    path = f"size/{budget.measure}" if budget else ""
    if budget is None or path not in _both(report):
        return ""
    after = report.after[path]
    return percent(ratio(report.before[path], after)) if budget.relative else quantity(after.value, after.unit)


def _budget(made_by: Mapping[str, Any]) -> Budget | None:
    try:
        return Budget.parse(str(made_by.get("budget")))
    except BudgetError:
        return None


def _both(report: Report) -> dict[str, None]:
    return {path: None for path in report.before if path in report.after}


def _stat(report: Report, label: str, path: str | None) -> Stat | None:
    if path is None:
        return None
    before, after = report.before[path], report.after[path]
    share = ratio(before, after)
    if path.startswith("size/"):
        return Stat(label, short(before.value), short(after.value), "", f"{percent(share)} left")
    was, now = quantity(before.value, before.unit), quantity(after.value, after.unit)
    if label == "prompt speed":
        faster = 1 / share if share and after.better == "lower" else share
        words = f"{times(faster)} as fast" if verdict(before, after) != "noise" else "no difference beyond noise"
        return Stat(label, was, now, unit_label(after.unit), words)
    return Stat(label, was, now, unit_label(after.unit) if after.unit != "perplexity" else "", times(share))
