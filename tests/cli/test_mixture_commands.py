"""`regrow` with several sources for one recovery: what is on the record, what is compared with what, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import Command, Refused
from safetensors.torch import load_file
from training import Stop

FEW = ("--tokens", 1024, "--set", "recover.block=32", "--set", "recover.batch=4", "--text", "none",
       "--set", "recover.micro_batch=2", "--adapter", "full", "--learning-rate", 1e-3)  # fmt: skip
DYNAMIC = ("--set", "recover.balance=dynamic", "--set", "recover.balance_every=256")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two languages of made-up words; `small` has little text."""
    folder = tmp_path_factory.mktemp("texts")
    found = {}
    for name, low, high, count in (("low", 0, 40, 120), ("high", 40, 80, 120), ("small", 0, 80, 40)):
        source = random.Random(name)
        words = [" ".join(f"w{source.randint(low, high)}" for _ in range(40)) for _ in range(count)]
        path = folder / f"{name}.txt"
        path.write_text("\n\n".join(words), encoding="utf-8")
        found[name] = str(path)
    return found


def mixture(sources: dict[str, str], **weights: float) -> tuple[str, ...]:
    return "--set", f"recover.mixture={json.dumps({sources[name]: w for name, w in weights.items()})}"


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return found


def test_balanced_by_the_model_itself(
    regrow: Command, sprout_dir: Path, sources: dict[str, str], tmp_path: Path
) -> None:
    """1024 tokens are 8 steps, so the weights change every second one. What the whole model loses are the references:
    the first losses lie about as far above as the cut took."""
    out = tmp_path / "out"
    cut = ("--keep", "60%", "--axes", "neuron", "--criterion", "magnitude")
    recover = ("--recover", *FEW) if False else FEW
    asked = ("prune", sprout_dir, *cut, *recover, *DYNAMIC, *mixture(sources, low=3, high=1), "--out", out)
    done = regrow(*asked)
    assert done.code == 0, done.err
    training = report(out)["training"]
    rows = [row for row in training if f"weight {sources['low']}" in row]
    assert [row["step"] for row in rows if row["step"] % 2 == 0] == [2, 4, 6, 8]
    for row in rows:
        assert row[f"weight {sources['low']}"] + row[f"weight {sources['high']}"] == pytest.approx(1)
        assert row[f"heldout {sources['low']}"] > 0
    assert "sources were weighed by how far" in done.out
