"""What a block's observer reads in 16 bits, of some sites only, and when a dense stream runs beside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import VOCAB, make
from regrow.artifacts.linear import SOLVERS
from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA
from regrow.engines import sparsify as walk
from regrow.engines.bind import bind
from regrow.engines.inputs import Observer
from regrow.engines.sparsify import Method, sparsify
from regrow.errors import BrokenModel

EXPERTS = ("mixtral", "qwen3_moe")
WIDE = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2}


def text(sequences: int = 4, tokens: int = 32) -> Tensor:  # (n, T)
    return torch.randint(VOCAB, (sequences, tokens), generator=torch.Generator().manual_seed(1))


def method(criterion: str, *solvers: str, **more: Any) -> Method:
    found = WEIGHT_CRITERIA.get(criterion)
    return Method(found, tuple((SOLVERS.get(name), {}) for name in solvers or (found.solver,)), **more)


def cut(model: Any, asked: Method, blocks: Tensor | None = None, **more: Any) -> Any:
    model = copy.deepcopy(model)
    anatomy = bind(model.config, model)
    blocks = text() if blocks is None else blocks
    sparsify(model, anatomy, blocks, asked, [Pattern.parse("2:4")] * anatomy.sizes["L"], **more)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """Our own run through the experts rounds otherwise than the model's; that is no other formula."""
    model = cut(make(kind, **WIDE).to(dtype), method("wanda"))
    for name, weight in model.named_parameters():
        if "experts" in name:
            assert bool(((weight != 0).view(*weight.shape[:-1], -1, 4).sum(-1) <= 2).all()), name


def test_experts_that_overflow_are_named_so() -> None:
    model = make("mixtral", **WIDE)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.fill_(1e38)
    with pytest.raises(BrokenModel, match="outputs of MixtralExperts are not finite"):
        cut(model, method("wanda"))


def test_any_number_of_sequences_is_read() -> None:
    """The published code keeps a buffer of 128. Planted: only those are read."""
    model, blocks = make("llama", **WIDE), text(131, 8)
    norm = model.model.layers[0].input_layernorm

    def by_hand(ids: Tensor) -> Tensor:
        with torch.no_grad():
            x = norm(model.model.embed_tokens(ids)).flatten(0, 1)
            weight = model.model.layers[0].self_attn.q_proj.weight
            return lowest(weight.abs() * x.square().sum(0).sqrt(), Pattern.parse("2:4"), "row")

    found = cut(model, method("wanda"), blocks).model.layers[0].self_attn.q_proj.weight == 0
    assert torch.equal(found, by_hand(blocks))
    assert not torch.equal(found, by_hand(blocks[:128]))


def test_what_is_left_out_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that compute something else do no harm when they stay dense."""
    model = make("mixtral", **WIDE)
    monkeypatch.setattr(model.model.layers[0].mlp.experts, "act_fn", nn.Identity())
    read: list[set[str]] = []
    own = Observer.__exit__
    monkeypatch.setattr(Observer, "__exit__", lambda self, *e: (read.append(set(self.readings)), own(self, *e))[1])
    cut(model, method("sparsegpt"), leave=("gate_up_proj", "down_proj", "o_proj"))
    assert read == [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}] * 2


def test_without_a_gram_matrix_no_dense_stream_runs_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0
    own = walk.run_layer

    def counted(*given: Any) -> Tensor:
        nonlocal runs
        runs += 1
        return own(*given)

    monkeypatch.setattr(walk, "run_layer", counted)
    model, passes, weights = make("llama", **WIDE), {}, {}
    for criterion, inputs in (("wanda", "pruned"), ("wanda", "both"), ("sparsegpt", "both")):
        runs = 0
        found = cut(model, method(criterion, inputs=inputs))
        passes[criterion, inputs], weights[criterion, inputs] = runs, found.model.layers[1].mlp.up_proj.weight
    assert passes["wanda", "both"] == passes["wanda", "pruned"]
    assert torch.equal(weights["wanda", "both"], weights["wanda", "pruned"])
    assert passes["sparsegpt", "both"] == passes["wanda", "pruned"] + 2 * len(text())
