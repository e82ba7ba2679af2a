"""Which weights a training of the model itself moves."""

from __future__ import annotations

from typing import Any

import pytest

from models import make
from regrow.engines.trained import Shapes, cut_and_norms, only
from regrow.errors import SettingsError


def shapes(model: Any) -> Shapes:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def small(names: set[str]) -> set[str]:
    """Last parts of names of matrices."""
    return {
        name.removesuffix(".weight").rpartition(".")[2] for name in names if "norm" not in name and "bias" not in name
    }


def test_what_a_cut_made_smaller_and_norms() -> None:
    before = shapes(make("llama"))
    narrow = make("llama", intermediate_size=16)
    found = cut_and_norms(narrow, before)
    assert small(found) == {"gate_proj", "up_proj", "down_proj"}
    assert {name for name, weight in narrow.named_parameters() if weight.ndim <= 1} <= found
    few = cut_and_norms(make("llama", num_attention_heads=3), before)
    assert small(few) == {"q_proj", "o_proj"}
    assert small(cut_and_norms(make("llama", hidden_size=12), before)) >= {"embed_tokens", "q_proj", "down_proj"}


def test_layers_that_moved_up_are_told_by_their_kind() -> None:
    """Of a model of two layers the second was the third; its widths are what counts."""
    found = cut_and_norms(make("llama", num_hidden_layers=2, intermediate_size=16), shapes(make("llama")))
    assert small(found) == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(SettingsError, match="no matrix is smaller"):
        cut_and_norms(make("llama", num_hidden_layers=2), shapes(make("llama")))


def test_only_those_require_gradients_meanwhile() -> None:
    model = make("llama")
    names = dict(model.named_parameters())
    kept = next(iter(names))
    frozen = list(names)[3]
    names[frozen].requires_grad_(False)
    with only(model, [kept, frozen]):
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {kept, frozen}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {frozen}
    with only(model, None):
        assert not names[frozen].requires_grad
        assert names[kept].requires_grad
