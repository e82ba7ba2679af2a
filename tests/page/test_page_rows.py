"""Verdicts: nothing within noise is called better or worse, and every measure lands in one group."""

from __future__ import annotations

import dataclasses

import pytest

from regrow.artifacts.report import Measure, Report, retention
from regrow.page.headline import asked, reached, retained, stats, views
from regrow.page.rows import at_chance, groups, ratio, verdict


def measure(value: float, stderr: float | None = None, better: str = "higher", chance: float | None = None) -> Measure:
    return Measure(value, "", better, stderr, 100, chance)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (measure(0.50, 0.01), measure(0.53, 0.01), "better"),  # .03 > 2 * .0141
        (measure(0.50, 0.01), measure(0.528, 0.01), "noise"),
        (measure(0.53, 0.01), measure(0.50, 0.01), "worse"),
        (measure(9.0, 0.1, "lower"), measure(8.0, 0.1, "lower"), "better"),
        (measure(9.0, None, "lower"), measure(9.1, None, "lower"), "worse"),
        (measure(5.0), measure(5.0), "same"),
        (measure(5.0, better=""), measure(6.0, better=""), "changed"),
        (None, measure(5.0), ""),
        (measure(5.0), None, ""),
    ],
)
def test_verdict(before: Measure | None, after: Measure | None, found: str) -> None:
    assert verdict(before, after) == found


def test_chance() -> None:
    assert at_chance(measure(0.2699, 0.01, chance=0.25))  # 2 standard errors end at .27
    assert not at_chance(measure(0.271, 0.01, chance=0.25))
    assert not at_chance(measure(0.1, 0.01))
    assert not at_chance(None)


def test_rows_at_chance_agree_with_the_retention(report: Report) -> None:
    tasks = next(group for group in groups(report) if group.title == "Tasks")
    assert len(tasks.rows) == retention(report.before, report.after)["tasks"] == 7
    above = [row for row in tasks.rows if not row.chance_before]
    assert len(above) == retention(report.before, report.after)["tasks_above_chance"] == 5


def test_ratio_needs_positive_numbers() -> None:
    assert ratio(measure(2.0), measure(1.0)) == 0.5
    assert ratio(measure(0.0), measure(1.0)) is None
    assert ratio(measure(-1.0), measure(1.0)) is None
    assert ratio(None, measure(1.0)) is None


def test_groups_are_in_reading_order_and_hold_every_measure_once(report: Report) -> None:
    odd = dataclasses.replace(report, after={**report.after, "zeros/share": measure(0.5), "odd": measure(1.0)})
    found = groups(odd)
    titles = ["Text", "Tasks", "Tasks, gold answers", "Tasks, other metrics", "Size", "Speed", "Memory", "Zeros", "Odd"]
    assert [group.title for group in found] == titles
    paths = [row.path for group in found for row in group.rows]
    assert sorted(paths) == sorted(odd.after)


def test_the_budget_in_words(report: Report) -> None:
    assert asked({"budget": "108M"}) == "108,000,000 parameters"
    assert asked({"budget": "2:4"}) == "2:4"
    assert asked({}) == ""
    assert reached(report) == "80.0 %"
    assert reached(dataclasses.replace(report, made_by={"budget": "108M"})) == "112,967,232"
    assert reached(dataclasses.replace(report, made_by={"budget": "2:4"})) == ""
    assert reached(dataclasses.replace(report, after={})) == ""


def test_speed_counts_the_same_for_rates_and_times(report: Report) -> None:
    def speed(before: float, after: float, better: str) -> str:
        sides = {"before": {"speed/prompt": measure(before, better=better)}}
        sides["after"] = {"speed/prompt": measure(after, better=better)}
        return stats(dataclasses.replace(report, **sides))[0].change

    assert speed(100, 125, "higher") == speed(125, 100, "lower") == "×1.25 as fast"


def test_three_views_of_the_zero_shot_score(report: Report) -> None:
    left = retention(report.before, report.after)
    assert [view.share for view in views(report)] == ["96.0 %", "80.9 %", "94.3 %"]
    assert left["above_chance"] == pytest.approx(0.809, abs=0.0005)
    assert views(dataclasses.replace(report, before={}, after={})) == []


def test_what_is_retained_in_one_line(report: Report) -> None:
    """The same shares, and the names of the tasks that do not count once chance is taken off."""
    out = "left out, at chance from the start: boolq, winogrande"
    said = f"96.0 % of the zero-shot accuracy, 80.9 % corrected for chance ({out}), 94.3 % by gold bits"
    assert retained(report) == said

    def only(*words: str) -> str:
        kept = {path: m for path, m in report.before.items() if any(word in path for word in words)}
        return retained(dataclasses.replace(report, before=kept, after={k: report.after[k] for k in kept}))

    assert only("winogrande/acc").startswith("99.1 % of the zero-shot accuracy, – corrected for chance (left out")
    assert "left out" not in only("piqa")
    assert only("gold") == "94.3 % by gold bits"
    assert only("text/", "size/") == ""


def test_a_speed_within_noise_is_no_headline() -> None:
    def words(stderr: float) -> str:
        sides = [{"speed/prompt_ms": Measure(ms, "ms", "lower", stderr, 3)} for ms in (100.0, 80.0)]
        return stats(Report({}, {}, {}, sides[0], sides[1]))[0].change

    assert words(1.0) == "×1.25 as fast"
    assert words(40.0) == "no difference beyond noise"
