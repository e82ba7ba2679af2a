"""The next token's loss in pieces: the plain one in value and every gradient, and never whole logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import patterns, settings, tiny, weights

from models import VOCAB, families, ids, make
from regrow.engines import head as heads
from regrow.engines.adapters import add_adapters
from regrow.engines.correction import correct, heldout_loss
from regrow.engines.objective import next_token
from regrow.engines.packed import Packed
from regrow.engines.text_loss import by_pieces, text_loss
from regrow.engines.train import train

KINDS = [kind for kind, _ in families()]


def gradients(model: Any, loss: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    found = loss(model, batch)
    found.backward()
    return float(found.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def most_logits(model: Any) -> Iterator[list[int]]:
    """How many positions' logits the head is asked for at a time."""
    seen: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    yield seen
    handle.remove()


@pytest.mark.parametrize("learnt", ["all", "some", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, kind: str, learnt: str) -> None:
    """Tied or not, capped, biased; in pieces of three tokens."""
    monkeypatch.setattr(heads, "NUMBERS", 3 * VOCAB)
    batch = {"input_ids": ids(3)}
    if learnt != "all":
        share = 0.4 if learnt == "some" else 0.0
        chance = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
        batch["learn"] = chance < share
    plain, own = make(kind), make(kind)
    assert text_loss(own) is by_pieces
    expected, theirs = gradients(plain, next_token, batch)
    with most_logits(own) as seen:
        found, ours = gradients(own, by_pieces, batch)
    assert set(seen) == {1}
    assert found == pytest.approx(expected, rel=1e-5)
    assert (found > 0) is (learnt != "none")
    assert ours.keys() == theirs.keys()
    largest = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in theirs.items():
        assert torch.allclose(ours[name].to_dense(), grad, rtol=1e-4, atol=1e-5 * largest), name


def test_in_wrappers() -> None:
    """Under adapters, and without gradients."""
    for loss in (next_token, by_pieces):
        model = add_adapters(make("llama"), rank=2, dropout=0.0, seed=1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.1)
        found = gradients(model, loss, {"input_ids": ids()})
        if loss is next_token:
            expected = found
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert all(torch.allclose(found[1][name], grad, rtol=1e-4, atol=1e-6) for name, grad in expected[1].items())
    with torch.no_grad():
        assert float(by_pieces(model, {"input_ids": ids()})) == pytest.approx(found[0], rel=1e-6)


class Odd(nn.Module):
    """A head that does more than this house knows of."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states).tanh()


def test_heads_that_are_not_known_have_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """No linear, logits that are not its own, and a forward that cannot be asked for states alone."""
    model = make("llama")
    model.lm_head = Odd(model.lm_head)
    assert text_loss(model) is next_token
    model = make("llama")
    model.lm_head.register_forward_hook(lambda _, __, out: out.tanh())
    assert text_loss(model) is next_token
    model = make("llama")
    assert text_loss(model) is by_pieces
    monkeypatch.setattr(model, "forward", lambda **_: None)
    assert text_loss(model) is next_token


def test_a_training_ends_where_the_plain_one_does(tmp_path: Path) -> None:
    """To rounding; with accumulated passes, and products in 16 bits."""
    for autocast, near in (("fp32", 1e-4), ("bf16", 0.1)):
        ends = []
        for loss in (next_token, by_pieces):
            model = tiny()
            folder = tmp_path / f"{autocast} {loss.__name__}"
            done = train(model, patterns(), settings(autocast=autocast), folder=folder, loss=loss)
            ends.append((done.losses[-1]["loss"], weights(model)))
        assert ends[0][0] == pytest.approx(ends[1][0], rel=near)
        if autocast == "fp32":
            assert all(torch.allclose(ends[0][1][name], ends[1][1][name], atol=1e-3) for name in ends[0][1])


def test_a_correction_holds_no_whole_logits(tmp_path: Path) -> None:
    """Neither while it trains nor while it is measured."""
    teacher, held = tiny(), Packed(patterns(4, seed=7))
    with most_logits(teacher) as seen:
        kept = tmp_path / "kept.safetensors"
        correct(teacher, Packed(patterns()), settings(), folder=tmp_path / "a", kept=kept, heldout=held)
        heldout_loss(teacher, held, 2)
    assert seen
    assert max(seen) <= heads.PROBE
