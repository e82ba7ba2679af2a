"""`regrow recover` from a teacher: what learns, what is compared, when it stops, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt import Command, Refused
from safetensors.torch import load_file
from torch import Tensor

FEW = ("--tokens", 2048, "--set", "recover.block=64", "--set", "recover.batch=4", "--text", "none")
NARROW = ("--keep", "70%", "--axes", "neuron", "--uniform", "--criterion", "magnitude", "--divisors", "neuron=8")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are continued by other tests."""
    monkeypatch.setattr("regrow.run.write_samples", lambda *seen: ["" for _ in seen[2]])


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory, sprout_dir: Path) -> Path:
    """Sprout with fewer neurons."""
    from regrow.cli.main import main

    out = tmp_path_factory.mktemp("narrow") / "cut"
    asked = ("prune", sprout_dir, *NARROW, "--text", "none", "--out", out, "--quiet")
    assert main([str(a) for a in asked]) == 0
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def curve(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "report.json").read_text(encoding="utf-8"))["training"]
    return found


def test_norms_and_what_was_cut(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--adapter", "cut", "--learning-rate", 1e-2, "--teacher", sprout_dir, "--loss", "reverse_kl")
    done = regrow("recover", cut, *how, *FEW, "--out", out)
    assert done.code == 0, done.err
    before, after = weights(cut), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved if "norm" not in name} == {"gate_proj", "up_proj", "down_proj"}
    assert any("norm" in name for name in moved)


def test_states_are_on_the_record(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ("--adapter", "lora", "--teacher", sprout_dir, "--set", "recover.distil.states=[0,1,4]")
    done = regrow("recover", cut, *how, "--set", "recover.distil.text=0.5", *FEW, "--out", out)
    assert done.code == 0, done.err
    assert {"loss", "divergence", "states", "next_token", "heldout_loss"} <= curve(out)[-1].keys()


def test_it_stops_when_nothing_is_gained(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    """At an absurd rate held-out loss rises at once."""
    out = tmp_path / "out"
    how = ("--adapter", "full", "--learning-rate", 0.02, "--teacher", sprout_dir, "--set", "recover.warmup=0")
    early = ("--set", "recover.evaluate_every=256", "--set", "recover.patience=2")
    done = regrow("recover", cut, *how, *early, *FEW, "--out", out)
    assert done.code == 0, done.err
    held = [x["heldout_loss"] for x in curve(out) if "heldout_loss" in x]
    assert len(held) < 8
    assert min(held) == held[-3]
    assert "not in 2 evaluations since" in done.out


def test_a_smaller_teacher_is_warned_of(regrow: Command, sprout_dir: Path, cut: Path, tmp_path: Path) -> None:
    for student, teacher, said in ((sprout_dir, cut, True), (cut, sprout_dir, False)):
        done = regrow("recover", student, "--teacher", teacher, *FEW, "--out", tmp_path / student.name)
        assert done.code == 0, done.err
        assert done.err.count("warning: teacher") == said == done.err.count("little is learnt from one that knows less")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--loss", "foward-kl"), ("unknown loss 'foward-kl'", "forward-kl")),
        (("--set", "recover.distil.options={heat: 2}"), ("unknown option 'heat'", "temperature")),
        (("--set", "recover.distil.options={temperature: 0}"), ("option temperature=0", "more than 0")),
        (("--loss", "jsd", "--set", "recover.distil.options={beta: 1.5}"), ("option beta=1.5", "0 to 1")),
        (("--set", "recover.distil.likeness=cosinus"), ("unknown loss of states 'cosinus'", "cosine")),
        (("--set", "recover.distil.states=[9]"), ("states at place 9", "to 6")),
        (("--set", "recover.distil.heat=2"), ("recover.distil.heat", "recover.distil.states")),
    ],
)
def test_what_is_refused(
    refused: Refused, sprout_dir: Path, cut: Path, tmp_path: Path, flags: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("recover", cut, "--teacher", sprout_dir, *FEW, *flags, "--out", tmp_path / "out", says=says)


def test_only_what_was_cut_of_a_model_that_was_not(refused: Refused, sprout_dir: Path, tmp_path: Path) -> None:
    refused("recover", sprout_dir, "--adapter", "cut", *FEW, "--out", tmp_path / "out", says=("no matrix is smaller",))
