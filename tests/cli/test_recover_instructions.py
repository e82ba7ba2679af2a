"""`regrow recover` on instructions: all of them or answers alone, by Alpaca's template or the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prompt import Command

from regrow.artifacts.report import Report

SHORT = ("--tokens", 2048, "--set", "recover.block=64", "--set", "recover.batch=4", "--text", "none")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Sixty questions with the same answer."""
    data = [{"instruction": f"What is {i} times {i + 1}?", "output": "Nobody knows that yet."} for i in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": data}), encoding="utf-8")
    return path


def trained(regrow: Command, model: Path, out: Path, *arguments: object) -> tuple[dict[str, Any], float]:
    """What the recipe of the folder says of the recovery, and the loss on held-out lessons in the end."""
    rate = ("--adapter", "lora", "--learning-rate", 0.01, "--dropout", 0)
    done = regrow("recover", model, "--out", out, *rate, *SHORT, *arguments, "--json")
    assert done.code == 0, done.err
    recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    report = Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))
    return recipe["recover"], report.training[-1]["heldout_loss"]


def test_answers_alone_are_learnt(regrow: Command, sprout_dir: Path, rows: Path, tmp_path: Path) -> None:
    """The one answer is soon known; questions, which differ, are not."""
    alpaca = ("--template", "alpaca", "--learn", "answers")
    some, answers = trained(regrow, sprout_dir, tmp_path / "some", "--train", rows, *alpaca)
    every, whole = trained(regrow, sprout_dir, tmp_path / "every", "--train", rows)
    assert (some["template"], some["learn"]) == ("alpaca", "answers")
    assert (every["template"], every["learn"]) == (None, "all")
    assert answers < 0.2 < whole


def test_long_questions_are_passed_over(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    """One block in twenty reaches into an answer; as many of those are read as were asked for."""
    rows, out = tmp_path / "long.json", tmp_path / "out"
    data = [{"prompt": f"{i} " + "many words " * 300, "completion": "Yes."} for i in range(60)]
    rows.write_text(json.dumps(data), encoding="utf-8")
    few = ("--tokens", 128, "--set", "recover.block=32", "--set", "recover.batch=2", "--set", "recover.micro_batch=2")
    asked = ("--train", rows, "--template", "alpaca", "--learn", "answers", "--text", "none")
    done = regrow("recover", sprout_dir, "--out", out, "--adapter", "lora", *few, *asked, "--json")
    assert done.code == 0, done.err
    report = Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))
    assert not [note for note in report.notes if "times over" in note]
