"""The page holds every number, fetches nothing, and shows whatever a model or a name says as text."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Report
from regrow.page.page import drawn_maps, render
from regrow.page.rows import groups

EVIL = '<script>alert("x")</script>'
VOID = ("meta", "br", "link", "img", "input", "hr")


def words(page: str) -> str:
    """The page without its tags and styles, entities resolved."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


class Balance(HTMLParser):
    """Fails when a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, _: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, _: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def balanced(page: str) -> bool:
    parser = Balance()
    parser.feed(page)
    return not parser.open


def test_every_number_of_the_report_is_on_the_page(report: Report, plan: Plan, scores: Any, recipe: str) -> None:
    text = words(render(report, plan, scores, recipe))
    rows = [row for group in groups(report) for row in group.rows]
    assert {row.path for row in rows} == set(report.before)
    for row in rows:
        for cell in (row.before, row.after, row.change, row.samples):
            assert cell in text, row.path
    assert text.count("at chance ") >= 5  # boolq and winogrande on both sides, arc_challenge's acc after


def test_the_headline_says_what_was_asked_and_reached(report: Report, plan: Plan) -> None:
    text = words(render(report, plan, None, None))
    assert "asked for 80 % of decoder weights , reached 80.0 % , by the recipe minitron" in text
    for part in ("134.5M → 113.0M", "84.0 % left", "17.20 → 18.94", "×1.18 as fast", "5 of 7 tasks above chance"):
        assert part in text


def test_the_note_on_the_checkpoint_stands_before_the_first_table(report: Report, plan: Plan) -> None:
    page = render(report, plan, None, None)
    assert 0 < page.index("dequantised 4-bit (Q4_1)") < page.index("<table")


def test_the_page_needs_no_network_and_no_script(report: Report, plan: Plan, scores: Any, recipe: str) -> None:
    page = render(report, plan, scores, recipe)
    assert not re.search(r"https?:|//\w|@import|<script|<link|\bsrc=", page)
    assert all(target.startswith("#") for target in re.findall(r"href=[\"']?([^\"'>]*)", page))
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#hatch", "#veil"}
    assert len(page) < 300_000
    assert balanced(page)


def test_text_of_the_run_stays_text(report: Report, plan: Plan, scores: Any) -> None:
    evil = dataclasses.replace(
        report,
        model={"id": EVIL, "note": EVIL, "fingerprint": EVIL},
        made_by={"recipe": EVIL, "budget": EVIL, EVIL: EVIL},
        before={**report.before, f"task/{EVIL}/acc": report.before["task/piqa/acc"]},
        after={**report.after, f"{EVIL}/x": dataclasses.replace(report.after["text/perplexity"], how={EVIL: EVIL})},
        samples=({"prompt": EVIL, "before": EVIL, "after": EVIL},),
        machine={"cpu": EVIL, EVIL: {"deep": [EVIL]}},
        notes=(EVIL,),
        stages={EVIL: {"seconds": 1.0, EVIL: EVIL}},
        training=tuple({"step": row["step"], f"{EVIL}loss": row["loss"]} for row in report.training),
    )
    page = render(evil, plan, {**scores, EVIL: scores["layer"]}, EVIL)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 20
    assert balanced(page)


@pytest.mark.parametrize(
    "without",
    [{"training": ()}, {"samples": ()}, {"shape": {}}, {"stages": {}, "machine": {}, "notes": ()}, {"made_by": {}}],
    ids=lambda change: "no " + " ".join(change),
)
def test_whatever_is_missing_leaves_no_hole(report: Report, plan: Plan, without: dict[str, Any]) -> None:
    page = render(dataclasses.replace(report, **without), None, None, None)
    assert balanced(page)
    assert "What mattered" not in page
    for name, title in (("training", "How it regrew"), ("samples", "What it writes"), ("shape", "What is left")):
        assert (title in page) == (name not in without)
    assert "Which units stay is not known here" in page or "shape" in without
    assert "Which units stay is not known here" not in render(report, plan, None, None)


def test_a_report_without_tasks_or_without_any_measure(report: Report) -> None:
    few = {path: m for path, m in report.before.items() if not path.startswith("task/")}
    page = render(dataclasses.replace(report, before=few, after=few), None, None, None)
    assert "zero-shot left" not in page
    assert "perplexity" in page
    bare = Report(model={"id": "a"}, made_by={}, shape={}, before={}, after={})
    assert balanced(render(bare, None, None, None))


def test_maps_of_an_earlier_page_can_be_taken_over(report: Report, plan: Plan, scores: Any, recipe: str) -> None:
    """Then the page is the same to the last character."""
    first = render(report, plan, scores, recipe)
    maps = drawn_maps(first)
    assert maps is not None
    assert maps.count("<svg") == 4
    assert render(report, plan, None, recipe, maps) == first
    assert render(report, plan, None, recipe) != first
    for other in ("", "hello", render(report, plan, None, recipe)):
        assert drawn_maps(other) is None


def test_the_same_shape_is_said_to_be_unchanged(report: Report) -> None:
    same = dataclasses.replace(report, shape=dict.fromkeys(("before", "after"), report.shape["before"]))
    assert "The shape is unchanged, 30 layers" in render(same, None, None, None)
    assert "The shape is unchanged" not in render(report, None, None, None)


def test_equal_records_are_written_once_and_differing_ones_apart(report: Report) -> None:
    assert render(report, None, None, None).count("wikitext-2 raw") == 1
    other = dataclasses.replace(report.after["text/perplexity"], how={"text": "another"})
    page = render(dataclasses.replace(report, after={**report.after, "text/perplexity": other}), None, None, None)
    assert "text/perplexity (before)" in page
    assert "text/perplexity (after)" in page
