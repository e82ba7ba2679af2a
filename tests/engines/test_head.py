"""Losses through the head in pieces: equal to the plain way, in value and in every gradient, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from models import ids, make
from regrow.engines import head as heads
from regrow.engines.head import Head, head_of, mean_over_tokens, next_token, shaping, sum_over_tokens, trusted_head

N, C, V = 7, 5, 11
Parts = tuple[Tensor, Tensor, Tensor]


class Capped:
    logit_scale, logits_scaling, final_logit_softcapping = 1.5, 2.0, 3.0


def parts(seed: int = 0) -> Parts:
    source = torch.Generator().manual_seed(seed)
    shapes = ((N, C), (V, C), (V,))
    return tuple(torch.randn(s, generator=source, dtype=torch.float64).requires_grad_() for s in shapes)  # type: ignore[return-value]


def plain(given: Parts, config: Any, targets: Tensor, shares: Tensor) -> Tensor:
    logits = linear(*given)
    if isinstance(config, Capped):
        logits = 3 * torch.tanh(logits * 1.5 / 2 / 3)
    return (cross_entropy(logits, targets, reduction="none") * shares).sum()


@pytest.mark.parametrize("config", [object(), Capped()], ids=["plain", "capped"])
@pytest.mark.parametrize("numbers", [V, 3 * V, 10**6], ids=["a token", "three", "all"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equal_to_the_plain_way(monkeypatch: pytest.MonkeyPatch, config: Any, numbers: int, weighted: bool) -> None:
    monkeypatch.setattr(heads, "NUMBERS", numbers)
    targets = torch.arange(N) % V
    weights = torch.tensor([0.0, 1, 2, 0, 1, 3, 1]) if weighted else torch.ones(N)
    mine, theirs = parts(), parts()
    expected = plain(theirs, config, targets, (weights / weights.sum()).double())
    (2 * expected).backward()
    head = Head(mine[1], mine[2], shaping(config))

    def measure(logits: Tensor, piece: slice) -> Tensor:
        return cross_entropy(logits, targets[piece], reduction="none")

    shares = weights / weights.sum()
    found = sum_over_tokens(head, mine[0], measure, shares) if weighted else mean_over_tokens(head, mine[0], measure)
    (2 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, other in zip(mine, theirs, strict=True):
        assert ours.grad is not None
        assert other.grad is not None
        assert torch.allclose(ours.grad, other.grad, rtol=1e-5, atol=1e-7)
        assert float(ours.grad.abs().max()) > 0.01


def test_gradients_of_16_bits_are_added_up_in_wider_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token a piece: each adds too little to a large sum for bf16 to see."""
    monkeypatch.setattr(heads, "NUMBERS", V)
    source = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, C, generator=source).bfloat16() for n in (2048, V))
    targets = torch.arange(2048) % V

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = weight.to(dtype).requires_grad_()
        head = Head(leaf, None, shaping(object()))
        mean_over_tokens(
            head, states.to(dtype), lambda logits, piece: cross_entropy(logits, targets[piece], reduction="none")
        ).backward()
        assert leaf.grad is not None
        return leaf.grad.float()

    exact, found = gradient(torch.float32), gradient(torch.bfloat16)
    assert (found - exact).abs().max() <= 0.01 * exact.abs().max()


def test_only_what_is_wanted_gets_a_gradient() -> None:
    states, weight, bias = parts()
    head = Head(weight.detach(), None, shaping(object()))
    mean_over_tokens(head, states, lambda logits, _: logits.square().sum(1)).backward()
    assert states.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_without_gradients_none_is_made() -> None:
    """Held-out losses of a head that is trained."""
    states, weight, bias = parts()

    def measure(logits: Tensor, _: slice) -> Tensor:
        assert not logits.requires_grad
        return logits.square().sum(1)

    with torch.no_grad():
        found = mean_over_tokens(Head(weight, bias, shaping(object())), states, measure)
    assert not found.requires_grad


def test_a_token_that_weighs_nothing_has_no_gradient() -> None:
    states, weight, _ = parts()
    weights = torch.ones(N)
    weights[3] = 0
    sum_over_tokens(Head(weight, None, shaping(object())), states, lambda x, _: x.square().sum(1), weights).backward()
    assert states.grad is not None
    assert bool((states.grad[3] == 0).all())
    assert bool((states.grad[2] != 0).any())


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_the_models_own_loss(kind: str) -> None:
    model = make(kind)
    head = trusted_head(model, ids())
    assert head is not None
    own = model(input_ids=ids(), labels=ids(), use_cache=False).loss
    assert next_token(model, head, ids()).item() == pytest.approx(own.item(), rel=1e-5)


def test_a_head_that_does_more_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gemma2")
    assert trusted_head(model, ids()) is not None
    monkeypatch.setattr(heads, "shaping", lambda _: lambda logits: logits)  # its soft cap is forgotten
    assert trusted_head(model, ids()) is None
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert head_of(model) is None
    assert trusted_head(model, ids()) is None
