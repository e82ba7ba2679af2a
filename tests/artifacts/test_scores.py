"""Scores travel as safetensors with their record in the header."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from regrow.artifacts.scores import Scores
from regrow.errors import BrokenModel, OutputError


def scores() -> Scores:
    criteria = {"neuron": {"name": "taylor", "comparable": True}, "group": {"name": "activation", "comparable": False}}
    made_by = {"criteria": criteria, "seed": 3, "text": "ü"}
    return Scores({"neuron": torch.rand(2, 3).T.contiguous().T, "group": torch.rand(2, 4)}, made_by)


def test_there_and_back(tmp_path: Path) -> None:
    one = scores()
    one.save(tmp_path / "s.safetensors")
    other = Scores.load(tmp_path / "s.safetensors")
    assert other.made_by == one.made_by
    assert {k: v.tolist() for k, v in other.table.items()} == {k: v.tolist() for k, v in one.table.items()}
    assert other.comparable("neuron")
    assert not other.comparable("group")


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="scores cannot be written"):
        Scores({"neuron": torch.ones(2, 3)}, {}).save(tmp_path / "no such folder" / "x.safetensors")


def test_what_is_no_scores(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    scores().save(whole)
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-5])
    (tmp_path / "empty").write_bytes(b"")
    save_file({"neuron": torch.rand(2)}, tmp_path / "bare")
    save_file({"neuron": torch.rand(2)}, tmp_path / "words", metadata={"made_by": "{"})
    for name in ("cut", "empty", "bare", "words", "missing"):
        with pytest.raises(BrokenModel, match=f"scores at .*{name}"):
            Scores.load(tmp_path / name)
