"""`regrow recover` from a teacher who is asked once, corrected first, or heard by what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import FEW, Command, Refused, tree
from safetensors.torch import load_file
from torch import Tensor

from regrow.engines import correction, pairs
from regrow.stages import recover as recovering


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])


def distil(**keys: Any) -> list[str]:
    return [part for name, value in keys.items() for part in ("--set", f"recover.distil.{name}={value}")]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def held(folder: Path) -> list[float]:
    return [x["heldout_loss"] for x in report(folder)["training"] if "heldout_loss" in x]


def unused(*_: Any, **__: Any) -> None:
    raise AssertionError("asked again")


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the teacher's weights are when a training begins."""
    seen: list[str] = []
    begin, taught = recovering.train, recovering._taught
    teachers: list[Any] = []

    def noted(subject: Any, teacher: Any, *given: Any) -> Any:
        teachers.append(teacher.model)
        return taught(subject, teacher, *given)

    def training(*given: Any, **how: Any) -> Any:
        seen.append(str(next(teachers[-1].parameters()).device))
        return begin(*given, **how)

    monkeypatch.setattr(recovering, "_taught", noted)
    monkeypatch.setattr(recovering, "train", training)
    return seen


def test_a_teacher_who_is_asked_once(
    regrow: Command,
    sprout_dir: Path,
    cut: Path,
    tmp_path: Path,
    emptied: list[str],
) -> None:
    """Nearly what the teacher itself would have taught; what was cut is known of one that is gone."""
    often = ("--set", "recover.evaluate_every=1024")
    how = ("--adapter", "cut", "--learning-rate", 3e-3, "--teacher", sprout_dir, *FEW, *often)
    for out, more in (("itself", []), ("kept", distil(cache=200))):
        done = regrow("recover", cut, *how, *more, "--out", tmp_path / out)
        assert done.code == 0, done.err
    assert emptied == ["cpu", "meta"]
    itself, kept = held(tmp_path / "itself"), held(tmp_path / "kept")
    assert kept[-1] < kept[0]
    assert kept[-1] == pytest.approx(itself[-1], rel=0.15)


def test_a_teacher_who_learns_first(
    regrow: Command, sprout_dir: Path, cut: Path, tale: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a text that it does not know; its files stay as they are, and it is not trained twice."""
    before = tree(sprout_dir)
    text = ("--train", tale, *FEW, *distil(teacher_tokens=4096))
    how = ("--adapter", "full", "--learning-rate", 1e-3, "--teacher", sprout_dir, *text)
    done = regrow("recover", cut, *how, "--out", tmp_path / "one")
    assert done.code == 0, done.err
    note = next(x for x in report(tmp_path / "one")["notes"] if x.startswith("the teacher was trained on 4,096 tokens"))
    first, then = (float(x) for x in re.findall(r"\d\.\d+", note))
    assert then < first - 0.3
    assert tree(sprout_dir) == before
    monkeypatch.setattr(correction, "train", unused)
    done = regrow("recover", cut, *how, "--out", tmp_path / "two")
    assert done.code == 0, done.err
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert note in report(tmp_path / "two")["notes"]


def test_a_teacher_who_is_heard_by_what_it_writes(
    regrow: Command,
    sprout_dir: Path,
    cut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    emptied: list[str],
) -> None:
    """A teacher in 16 bits writes too; the second run reads what it wrote."""
    asked = distil(preferences=5, by_length="true", teacher_dtype="bf16")
    how = ("--adapter", "full", "--learning-rate", 1e-3, "--teacher", sprout_dir, *FEW, *asked)
    done = regrow("recover", cut, *how, "--out", tmp_path / "one")
    assert done.code == 0, done.err
    assert emptied == ["meta"]
    training = report(tmp_path / "one")["training"]
    assert {"loss", "lead", "ranked", "heldout_loss"} <= training[-1].keys()
    assert training[-1]["tokens"] == 2048
    assert training[-1]["lead"] > training[0]["lead"]
    monkeypatch.setattr(pairs, "continued", unused)
    done = regrow("recover", cut, *how, "--out", tmp_path / "two")
    assert done.code == 0, done.err
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"cache": 100}, ("recover.distil.cache = 100", "greater than 100")),
        ({"cache": 10**6}, ("cache = 1,000,000 of a vocabulary of", "fewer than")),
        ({"cache": 200, "states": "[1]"}, ("cache and states", "states need the teacher itself")),
        ({"cache": 200, "options": "{temperature: 2}"}, ("cache at another temperature", "temperature 1")),
        ({"preferences": -1}, ("recover.distil.preferences = -1", "greater than or equal to 0")),
        ({"preferences": 1, "states": "[1]"}, ("preferences and states",)),
        ({"preferences": 1, "cache": 200}, ("preferences and cache",)),
        ({"preferences": 1, "text": 0.5}, ("preferences and recover.distil.text", "preferences alone")),
        ({"preferences": 1, "prompt": 1}, ("recover.distil.prompt = 1", "less than 1")),
        ({"preferences": 1, "sampling": 0}, ("recover.distil.sampling = 0", "greater than 0")),
        ({"on_policy": 0.5, "LEARN": 1}, ("on_policy and learn: answers", "learnt whole")),
        ({"preferences": 1, "MIXTURE": 1}, ("preferences and recover.mixture", "one text")),
        ({"teacher_tokens": 64, "teacher_dtype": "bf16"}, ("a teacher in bf16 that is to be trained", "fp32")),
        ({"teacher_dtype": "int4"}, ("unknown recover.distil.teacher_dtype 'int4'", "bf16")),
    ],
)
def test_what_is_refused(
    refused: Refused, sprout_dir: Path, cut: Path, tmp_path: Path, keys: dict[str, Any], says: tuple[str, ...]
) -> None:
    beside = {"LEARN": "recover.learn=answers", "MIXTURE": "recover.mixture={demo:coqa: 1, demo:squad: 1}"}
    others = [part for name, text in beside.items() if keys.pop(name, None) for part in ("--set", text)]
    asked = ("recover", cut, "--teacher", sprout_dir, *FEW, *distil(**keys), *others, "--out", tmp_path / "out")
    refused(*asked, says=says)


def test_the_recipe_dry_runs(regrow: Command, sprout_dir: Path) -> None:
    """A correction has a row of its own."""
    for more, rows in (([], 0), (distil(teacher_tokens=5000), 1)):
        done = regrow("estimate", sprout_dir, "--recipe", "plad", "--gflops", 10, *more, "--json")
        assert done.code == 0, done.err
        found = [row for row in done.json["stages"] if row["stage"] == "correct the teacher"]
        assert [row["tokens"] for row in found] == [5000] * rows
