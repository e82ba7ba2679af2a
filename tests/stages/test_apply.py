"""Cutting in every type that can be computed in; 16 bits hide small faults, so fp32 stands in for the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Branch, Cut, Family, declare
from regrow.engines import checkpoint
from regrow.errors import IdentityError
from regrow.stages.apply import apply, prove
from regrow.stages.export import export
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_cut_in_any_type_leaves_the_folder_it_promises(sprout_dir: Path, tmp_path: Path, dtype: str) -> None:
    subject = load(str(sprout_dir), dtype=dtype, device="cpu")
    scores = score(subject, choose("magnitude", ("neuron", "group"), {}, {}), None)
    plan = make_plan(subject.anatomy, scores, Wish(budget=Budget.parse("70%")))
    cut = apply(subject, plan)
    assert cut.difference <= checkpoint.TOLERANCE[subject.model.dtype]
    before = {name: value.clone() for name, value in subject.model.named_parameters()}
    export(subject, cut.holder, tmp_path / "out", {}, {"id": "out"})
    for name, value in subject.model.named_parameters():
        assert torch.equal(value, before[name]), name
    again, _ = checkpoint.read(tmp_path / "out")
    assert sum(p.numel() for p in again.parameters()) == sum(value.numel() for value in before.values())


def test_sixteen_bits_still_notice_a_wrong_cut() -> None:
    ours = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(IdentityError, match="at most 1e-01"):
        checkpoint.check_equal("two models", ours, ours.flip(-1), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_neurons_that_depend_on_each_other_are_refused_in_every_type(
    sprout_dir: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks declared, but what a neuron says hangs on its neighbours; in 16 bits rounding alone would hide it."""
    subject = load(str(sprout_dir), dtype=dtype, device="cpu")

    def coupled(self: Any, x: torch.Tensor) -> torch.Tensor:
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        out: torch.Tensor = self.down_proj(h - 0.1 * h.mean(-1, keepdim=True))
        return out

    scores = score(subject, choose("magnitude", ("neuron",), {}, {}), None)
    plan = make_plan(subject.anatomy, scores, Wish(budget=Budget.parse("70%"), axes=("neuron",)))
    if dtype != "fp32":
        assert prove(subject.model, subject.anatomy, plan) < 1e-5
    monkeypatch.setattr(LlamaMLP, "forward", coupled)
    with pytest.raises(IdentityError, match="masked and sliced"):
        apply(subject, plan)


def test_channels_under_a_layer_norm_cannot_be_declared() -> None:
    branch = Branch("a", "a", "a", ())
    cuts = {"channel": (Cut("a", 0, role="gain"),)}
    with pytest.raises(TypeError, match="LayerNorm"):
        declare(
            Family(name="x", model_types=("x",), attention=branch, mlp=branch, cuts=cuts, whole=(), norm="layer")  # type: ignore[arg-type]
        )
