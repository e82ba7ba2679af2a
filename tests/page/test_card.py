"""The model card: front matter that parses, the same rows as the page, text that cannot break out of its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from regrow.artifacts.report import Report
from regrow.page.card import markdown_table, model_card
from regrow.page.page import render
from regrow.page.rows import groups

LOAD = "from transformers import AutoModelForCausalLM"


def card(report: Report, recipe: str = "budget: 80%\n", **model: Any) -> str:
    """The card of the report, with these entries of its model changed."""
    return model_card(
        dataclasses.replace(report, model={**report.model, **model}) if model else report, load_code=LOAD, recipe=recipe
    )


def test_the_table_has_a_row_a_measure(report: Report) -> None:
    lines = markdown_table(report).splitlines()
    found = groups(report)
    assert len(lines) == 2 + len(found) + sum(len(group.rows) for group in found)
    assert {line.count("|") for line in lines} == {8}
    assert "| perplexity | 17.20 ± 0.11 | 18.94 ± 0.11 | perplexity | ×1.10 | ▲ worse | 164 |" in lines
    assert "| winogrande acc | 52.4 ± 1.4 % (at chance) | 51.9 ± 1.4 % (at chance) |" in "\n".join(lines)


def test_the_front_matter_parses(report: Report) -> None:
    _, front, rest = card(report, licence="other: a 'b'").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "license": "other: a 'b'",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "regrow"],
    }
    assert "\n# HuggingFaceTB/SmolLM2-135M, cut back and regrown\n" in rest


@pytest.mark.parametrize(
    ("asked", "base", "title"),
    [
        ("org/model", "org/model", "org/model"),
        ("org/model.v2-1", "org/model.v2-1", "org/model.v2-1"),
        ("/srv/secret/llama", None, "llama"),
        ("./models/llama", None, "llama"),
        ("../llama/", None, "llama"),
        ("~/llama", None, "llama"),
        ("a/b/llama", None, "llama"),
        ("C:\\secret\\llama", None, "llama"),
        ("llama", None, "llama"),
        ("here/llama", None, "llama"),
    ],
)
def test_only_a_hub_id_is_a_base_model(
    report: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    base: str | None,
    title: str,
) -> None:
    """A folder is called by its name, wherever it lies; the front matter does not name it, since no hub has it."""
    (tmp_path / "here" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = card(report, id="llama" if base is None else base, asked=asked)
    assert yaml.safe_load(text.split("---\n", 2)[1]).get("base_model") == base
    assert f"\n# {title}, cut back and regrown\n" in text
    assert "secret" not in text
    travelled = dataclasses.replace(
        report, model={**report.model, "id": asked, "asked": asked}, made_by={**report.made_by, "model": asked}
    )
    page = render(travelled, None, None, None)
    assert f"<h1>{title}</h1>" in page
    assert "secret" not in page
    assert (asked in page) is (asked in (title, base))


RECIPE = """\
model: {way}llama
sparsify:
  leave: [o_proj, 2:4]
recover:
  teacher: {way}teacher
  text: {way}tale.txt
evaluate:
  tasks: [piqa]
  samples: [/say something]
"""


@pytest.mark.parametrize("way", ["/srv/secret/", "~/secret/", "../secret/", "C:\\secret\\"])
def test_a_recipe_is_shown_without_the_ways_to_its_files(report: Report, way: str) -> None:
    recipe = RECIPE.format(way=way)
    made_by = {**report.made_by, **yaml.safe_load(recipe)}
    page = render(dataclasses.replace(report, made_by=made_by), None, None, recipe)
    for text in (model_card(report, load_code=LOAD, recipe=recipe), page):
        assert "secret" not in text
        assert "model: llama" in text
        assert "teacher: teacher" in text
        assert "text: tale.txt" in text
        assert "/say something" in text
    assert "<dt>recover.teacher</dt><dd>teacher</dd>" in page


def test_the_card_says_what_was_cut_how_to_load_and_what_to_mind(report: Report) -> None:
    text = card(report)
    for part in (
        "Asked for 80 % of decoder weights, reached 80.0 %.",
        "- after: 29 layers x (2..3 groups of 3 heads, 1040..1520 neurons), 576 channels",
        f"```python\n{LOAD}\n```",
        "```yaml\nbudget: 80%\n```",
        "**80.9 %** (5 of 7 tasks above chance)",
        "Layers differ in width",
        "no zeros in place",
        "boolq is below",
    ):
        assert part in text
    assert text.index("dequantised 4-bit (Q4_1)") < text.index("| Measure |")


def test_zeros_are_not_sold_as_a_smaller_model(report: Report) -> None:
    same = dataclasses.replace(report, shape=dict.fromkeys(("before", "after"), report.shape["before"]))
    assert "neither file nor memory shrinks" in card(same)
    assert "Layers differ" not in card(same)
    assert "neither file nor memory shrinks" not in card(report)


def test_text_cannot_break_out(report: Report) -> None:
    before = {**report.before, "task/a|b<script>/acc": report.before["task/piqa/acc"]}
    evil = dataclasses.replace(report, before=before, notes=("<script>",), model={"id": "<script>", "note": "<script>"})
    text = card(evil, recipe="a: |\n  ```\n  ````\n")
    body = text.split("---\n", 2)[2]
    assert "<script" not in body
    assert "a\\|b&lt;script>" in body
    assert "`````yaml\n" in body
    lines = markdown_table(evil).splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


@pytest.mark.parametrize("without", [{"shape": {}, "made_by": {}}, {"before": {}, "after": {}}, {"model": {"id": "x"}}])
def test_a_card_of_less(report: Report, without: dict[str, Any]) -> None:
    text = card(dataclasses.replace(report, **without))
    assert "## Limits" in text
    assert "None" not in text
