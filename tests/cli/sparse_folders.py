"""What is looked at in a sparse folder: its weights, zeros, and what its files say of them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from regrow.artifacts.pattern import Pattern
from regrow.artifacts.report import Report
from regrow.settings import Recipe

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj")


@lru_cache(maxsize=6)
def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor, as stock transformers load it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def matrices(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w for n, w in found.items() if n.removesuffix(".weight").rpartition(".")[2] in PROJECTIONS}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def check_pattern(found: dict[str, Tensor], pattern: Pattern) -> None:
    """Every group has exactly so many weights; of a percentage, every matrix has exactly so many zeros."""
    for name, weight in matrices(found).items():
        if pattern.of:
            groups = (weight != 0).reshape(-1, pattern.of).sum(-1)
            assert set(groups.tolist()) == {pattern.keep}, name
        else:
            assert int((weight == 0).sum()) == pattern.count(weight.numel()), name
        assert not bool(weight.signbit()[weight == 0].any()), name  # -0.0 is a zero, but not to every kernel


def check_manifest(folder: Path, pattern: Pattern) -> str:
    """regrow.json, sparsity.json, report.json and recipe.yaml say one thing; returns the mask hash."""
    noted, said, report = read(folder, "regrow.json")["sparsity"], read(folder, "sparsity.json"), read_report(folder)
    census = said["sparsity"]
    layers = noted.pop("layers")
    assert noted == {"pattern": pattern.written, "share": census["share"], "mask_hash": census["mask_hash"]}
    assert sum(layers) / len(layers) == pytest.approx(census["share"])
    assert (said["pattern"], said["pattern_text"]) == (pattern.written, str(pattern))
    assert all("met fewer tokens than they have inputs" in note for note in said["notes"])
    assert set(census["matrices"]) == set(matrices(weights(folder)))
    assert census["zeros"] == sum(m["zeros"] for m in census["matrices"].values())
    assert report.after["size/nonzero_weights"].value == census["weights"] - census["zeros"]
    assert report.before["size/nonzero_weights"].value == census["weights"]
    assert report.made_by["budget"] == str(pattern)
    recipe = Recipe(**yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")))
    assert recipe.keep is None
    assert recipe.sparsify is not None
    assert recipe.sparsify.pattern == pattern.written
    assert not (folder / "plan.json").exists()
    return str(noted["mask_hash"])


def read_report(folder: Path) -> Report:
    return Report.from_json(read(folder, "report.json"))


def untouched(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Embedding, head, norms, biases and routers are what they were, bit for bit."""
    others = set(before) - set(matrices(before))
    assert others
    assert any("embed" in name for name in others)
    for name in others:
        assert torch.equal(before[name], after[name]), name


def kept_as_they_were(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether every weight that is left is the one it was."""
    pairs = [(weight, after[name]) for name, weight in matrices(before).items()]
    return all(torch.equal(old[new != 0], new[new != 0]) for old, new in pairs)
