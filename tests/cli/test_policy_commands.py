"""Recipes in which a student writes or its teacher learns, from a prompt: what is done, on record, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import Command, Refused
from safetensors.torch import load_file

FEW = (
    "--recover-tokens", 2048, "--calibration-tokens", 256, "--set", "calibration.block=64", "--set", "recover.block=64",
    "--set", "recover.batch=4", "--set", "recover.micro_batch=1", "--set", "evaluate.tasks=[]", "--text", "none",
    "--set", "recover.evaluate_every=1024", "--set", "evaluate.speed=false", "--set", "evaluate.samples=[]",
)  # fmt: skip
SHORT = ("--tokens", 1024, "--set", "recover.block=64", "--set", "recover.batch=4", "--text", "none")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])


def curve(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text(encoding="utf-8"))["training"]
    return found


@pytest.mark.parametrize(
    ("recipe", "parts"), [("gkd", {"on_policy"}), ("okd", {"teacher_divergence", "teacher_next_token"})]
)
def test_the_recipes(regrow: Command, sprout_dir: Path, tmp_path: Path, recipe: str, parts: set[str]) -> None:
    out = tmp_path / "out"
    done = regrow("run", recipe, "--model", sprout_dir, *FEW, "--out", out)
    assert done.code == 0, done.err
    records = curve(out)
    assert all(parts <= record.keys() for record in records)
    held = [record["heldout_loss"] for record in records if "heldout_loss" in record]
    assert held[-1] < held[0]
    if recipe == "gkd":
        assert 0.2 < sum(record["on_policy"] for record in records) / len(records) < 0.8


def test_what_was_cut_from_a_teacher_that_learns(regrow: Command, sprout_dir: Path, tmp_path: Path) -> None:
    """Its adapters do not hide which matrices were larger before."""
    cut, out = tmp_path / "cut", tmp_path / "out"
    narrow = ("--keep", "80%", "--axes", "neuron", "--uniform", "--criterion", "magnitude", "--divisors", "neuron=8")
    assert regrow("prune", sprout_dir, *narrow, "--text", "none", "--out", cut, "--quiet").code == 0
    how = ("--adapter", "cut", "--teacher", sprout_dir, "--learning-rate", 1e-2)
    done = regrow("recover", cut, *how, "--set", "recover.distil.online_rate=1e-3", *SHORT, "--out", out)
    assert done.code == 0, done.err
    before, after = (load_file(folder / "model.safetensors") for folder in (cut, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved if "norm" not in name} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("on_policy=1.5",), ("recover.distil.on_policy", "less than or equal to 1")),
        (("on_policy=-0.1",), ("recover.distil.on_policy", "greater than or equal to 0")),
        (("on_policy=.nan",), ("recover.distil.on_policy", "finite")),
        (("prompt=0",), ("recover.distil.prompt", "greater than 0")),
        (("prompt=1",), ("recover.distil.prompt", "less than 1")),
        (("sampling=0",), ("recover.distil.sampling", "greater than 0")),
        (("online_rate=-1",), ("recover.distil.online_rate", "greater than or equal to 0")),
        (("online_rank=0",), ("recover.distil.online_rank", "greater than or equal to 1")),
        (("on_policy=0.5", "text=0.25"), ("recover.distil.text = 0.25 beside on_policy = 0.5", "the student's own")),
        (("online_rate=1e-3", "teacher_dtype=fp16"), ("online_rate of a teacher in fp16", "bf16")),
        (("on_policy=0.5", "online_rate=1e-3"), ("recover.distil.online_rate = 0.001 beside on_policy = 0.5",)),
    ],
)
def test_what_is_refused(
    refused: Refused, sprout_dir: Path, tmp_path: Path, words: tuple[str, ...], says: tuple[str, ...]
) -> None:
    flags = [part for word in words for part in ("--set", f"recover.distil.{word}")]
    refused("recover", sprout_dir, "--teacher", "base", *SHORT, *flags, "--out", tmp_path / "out", says=says)
