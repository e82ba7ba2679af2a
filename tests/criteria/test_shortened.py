"""Shortened LLaMA: whole blocks by the loss without each, or by first-order Taylor; ends that never go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import anatomy_of, cut, ids, logits, make
from regrow.artifacts.budget import Budget
from regrow.artifacts.choice import keep_layers
from regrow.engines.bind import Subject
from regrow.errors import BudgetError, SettingsError
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

BLOCKS = ids(4)
LAYERS = 8


def deep(**changes: Any) -> Subject:
    model = make("llama", num_hidden_layers=LAYERS, **changes)
    return Subject(model, None, anatomy_of(model), {}, torch.float32)  # type: ignore[arg-type]


def scored(subject: Subject, name: str, blocks: Tensor = BLOCKS) -> Tensor:  # (L,)
    return score(subject, choose(name, ("layer",), {}, {}), blocks).table["layer"]


def wish(keep: str, protect: tuple[int, int] = (0, 0)) -> Wish:
    return Wish(budget=Budget.parse(keep), axes=("layer",), protect=protect)


def test_without_an_identity_block_the_loss_is_the_base() -> None:
    subject = deep()
    block = subject.model.model.layers[3]
    with torch.no_grad():
        for parameter in (*block.self_attn.o_proj.parameters(), *block.mlp.down_proj.parameters()):
            parameter.zero_()
    found = scored(subject, "perplexity")
    assert float(found[3]) == pytest.approx(0, abs=1e-6)
    assert float(found.abs().median()) > 1e-3


def test_taylor_of_a_block_without_weights_is_nothing() -> None:
    subject = deep()
    with torch.no_grad():
        for parameter in subject.model.model.layers[2].parameters():
            parameter.zero_()
    found = scored(subject, "taylor")
    assert float(found[2]) == 0
    assert sorted(found.tolist())[1] > 0


@pytest.mark.parametrize("name", ["perplexity", "taylor"])
def test_the_order_of_samples_makes_no_difference(name: str) -> None:
    found = scored(deep(), name)
    turned = scored(deep(), name, BLOCKS.flip(0))
    assert torch.allclose(found, turned, rtol=1e-4)
    assert not torch.allclose(found, scored(deep(), name, ids(4, seed=7)), rtol=1e-4)


@pytest.mark.parametrize("protect", [(4, 2), (0, 3), (2, 0)])
def test_ends_never_go(protect: tuple[int, int]) -> None:
    """Though their scores are the lowest; without protection they go first."""
    subject = deep()
    first, last = protect
    ends = [*range(first), *range(LAYERS - last, LAYERS)]
    scores = score(subject, choose("random", ("layer",), {}, {}), None)
    table = torch.arange(1.0, LAYERS + 1)
    table[ends] = 0.0
    scores = replace(scores, table={"layer": table})
    for keep in range(len(ends), LAYERS):
        kept = keep_layers(table, keep, protect)
        assert len(kept) == keep
        assert set(ends) <= set(kept)
    plan = make_plan(subject.anatomy, scores, wish("90%", protect))
    assert set(ends) <= {layer.index for layer in plan.layers}
    plain = make_plan(subject.anatomy, scores, wish("90%"))
    assert not set(ends) <= {layer.index for layer in plain.layers}


def test_runs_stay_between_the_ends() -> None:
    costs = torch.full((6, 7), 9.0)
    costs[0, 2], costs[2, 4], costs[4, 6] = 0.0, 2.0, 1.0
    assert keep_layers(costs, 4) == [2, 3, 4, 5]
    assert keep_layers(costs, 4, (1, 0)) == [0, 1, 2, 3]
    assert keep_layers(costs, 4, (1, 1)) == [0, 1, 4, 5]


def test_more_than_is_free() -> None:
    subject = deep()
    scores = score(subject, choose("random", ("layer",), {}, {}), None)
    with pytest.raises(BudgetError, match=r"cannot be met.*\n.*at least"):
        make_plan(subject.anatomy, scores, wish("50%", (4, 2)))
    with pytest.raises(SettingsError, match=r"9 layers that never go, of which 8"):
        make_plan(subject.anatomy, scores, wish("90%", (5, 4)))
    exact = replace(wish("100%", (4, 2)), widths={"layer": 5})
    with pytest.raises(SettingsError, match=r"6 layers that never go, of which 5"):
        make_plan(subject.anatomy, scores, exact)


def test_cached_generation_equals_the_whole_forward() -> None:
    subject = deep()
    scores = score(subject, choose("perplexity", ("layer",), {}, {}), BLOCKS)
    small = cut(subject.model, make_plan(subject.anatomy, scores, wish("80%", (4, 2)))).model
    text, cache, steps = ids(1), None, []
    with torch.no_grad():
        for token in text.split(1, 1):
            out = small(input_ids=token, past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            cache = out.past_key_values
    assert torch.allclose(torch.cat(steps, 1), logits(small, text), atol=1e-5)
