"""Several sources for one recovery: what is on the record, what is compared with what, what is refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import Command, Refused

from regrow.engines.domains import by_domain
from regrow.engines.objective import next_token
from regrow.prepare import recovery_text
from regrow.recovery import HELDOUT_TOKENS, Recover
from regrow.stages.load import load

FEW = ("--set", "recover.block=32", "--set", "recover.batch=4", "--set", "recover.micro_batch=2", "--text", "none",
       "--set", "recover.method=full", "--set", "recover.learning_rate=1e-3",
       "--set", "evaluate.speed=false")  # fmt: skip
DYNAMIC = ("--set", "recover.balance=dynamic", "--set", "recover.balance_every=256")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two languages of made-up words, and a little of both."""
    folder, found = tmp_path_factory.mktemp("texts"), {}
    for name, low, high, count in (("low", 0, 40, 120), ("high", 40, 80, 120), ("small", 0, 80, 25)):
        source, path = random.Random(name), folder / f"{name}.txt"
        words = [" ".join(f"w{source.randint(low, high)}" for _ in range(40)) for _ in range(count)]
        path.write_text("\n\n".join(words), encoding="utf-8")
        found[name] = str(path)
    return found


def mixture(sources: dict[str, str], **weights: float) -> tuple[str, ...]:
    return "--set", f"recover.mixture={json.dumps({sources.get(name, name): w for name, w in weights.items()})}"


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def references(folder: Path) -> list[float]:
    (note,) = (note for note in report(folder)["notes"] if note.startswith("sources were weighed"))
    return [float(found) for found in re.findall(r"txt (\d+\.\d+)", note)]


def test_balanced_by_the_whole_model_or_the_teacher(
    regrow: Command, sprout_dir: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    """1024 tokens are 8 steps. The model that is cut and the teacher are the same, so what is compared with is too."""
    cut, out = tmp_path / "cut", tmp_path / "out"
    asked = (*FEW, *DYNAMIC, *mixture(sources, low=3, high=1))
    tiny = ("--keep", "60%", "--set", "axes=[neuron]", "--set", "criterion=magnitude", "--recover-tokens", 1024)
    done = regrow("run", "demo", "--model", sprout_dir, "--out", cut, *tiny, *asked, "--set", "evaluate.tasks=[]")
    assert done.code == 0, done.err
    low, high = (f" {sources[name]}" for name in ("low", "high"))
    rows = [row for row in report(cut)["training"] if f"weight{low}" in row]
    assert {2, 4, 6, 8} <= {row["step"] for row in rows}
    assert len({row[f"weight{low}"] for row in rows}) >= 4
    assert all(row[f"weight{low}"] + row[f"weight{high}"] == pytest.approx(1) for row in rows)
    own = references(cut)
    subject, settings = load(str(sprout_dir)), Recover(mixture={sources["low"]: 3, sources["high"]: 1}, block=32)
    heldout = recovery_text(subject, settings, "heldout", count=HELDOUT_TOKENS, seed=0)
    assert own == pytest.approx(by_domain(subject.model, next_token, heldout, 4, torch.device("cpu")), abs=1e-3)
    done = regrow("recover", cut, "--teacher", sprout_dir, "--tokens", 1024, "--out", out, *asked)
    assert done.code == 0, done.err
    assert references(out) == own
    assert {"heldout_loss", f"heldout{low}", f"weight{high}"} <= report(out)["training"][-1].keys()


def test_fixed_weights_and_references_that_are_given(
    regrow: Command, sprout_dir: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    """A source of few words is read again and again, which is said of it alone."""
    asked = ("recover", sprout_dir, "--tokens", 4096, *FEW, *mixture(sources, low=1, small=1))
    done = regrow(*asked, "--out", tmp_path / "fixed")
    assert done.code == 0, done.err
    rows = [row for row in report(tmp_path / "fixed")["training"] if "heldout_loss" in row]
    assert {row[f"weight {sources['small']}"] for row in rows} == {0.5}
    again = [note for note in report(tmp_path / "fixed")["notes"] if note.startswith("trained")]
    assert len(again) == 1
    assert f"times over a recovery text of {sources['small']}" in again[0]
    given = f"recover.references={json.dumps({sources['low']: 9.0, sources['small']: 1.0})}"
    done = regrow(*asked, *DYNAMIC, "--set", given, "--out", tmp_path / "given")
    assert done.code == 0, done.err
    last = report(tmp_path / "given")["training"][-1]
    assert last[f"weight {sources['small']}"] > 0.999, "eight nats are much"
    assert references(tmp_path / "given") == [9.0, 1.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n\n".join(f"line {n}" for n in range(4)), ("the recovery part of", "few.txt gives", "one block")),
        ("word " * 400, ("few.txt' has 1 different documents",)),
    ],
    ids=["no block", "no part"],
)
def test_a_source_too_short_is_named(
    refused: Refused, sprout_dir: Path, sources: dict[str, str], tmp_path: Path, text: str, says: tuple[str, ...]
) -> None:
    """Though the others have enough: one without a whole block, one whose only document is of another part."""
    (tmp_path / "few.txt").write_text(text, encoding="utf-8")
    mixed = mixture({**sources, "few": str(tmp_path / "few.txt")}, low=1, few=1)
    refused("recover", sprout_dir, "--tokens", 256, *FEW, *mixed, "--out", tmp_path / "out", says=says)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--set", "recover.mixture={demo:poems: 1}"), ("no demo text is called 'poems'", "demo:squad")),
        (("--set", "recover.mixture={demo:squad: -1, demo:coqa: 2}"), ("demo:squad: -1", "weights above 0")),
        (("--set", "recover.mixture={demo:squad: a}"), ("recover.mixture.demo:squad = 'a'",)),
        (("--set", "recover.mixture={demo:squad: 1}", *DYNAMIC), ("of one source (demo:squad: 1)", "two sources")),
        (DYNAMIC, ("of one source (demo: 1)",)),
        (
            ("--set", "recover.mixture={demo:squad: 1, demo:coqa: 1}", *DYNAMIC,
             "--set", "recover.references={demo:squad: 2, demo:drop: 3}"),
            ("references for demo:drop, demo:squad", "demo:coqa, demo:squad"),
        ),
        (("--set", "recover.balance=dynamc"), ("unknown recover.balance 'dynamc'", "dynamic")),
        (("--set", "recover.mixture={demo:squad: 1}", "--set", "recover.learn=answers"), ("of plain text",)),
    ],
)  # fmt: skip
def test_what_is_refused(
    refused: Refused, sprout_dir: Path, tmp_path: Path, flags: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("recover", sprout_dir, "--tokens", 256, *FEW, *flags, "--out", tmp_path / "out", says=says)
