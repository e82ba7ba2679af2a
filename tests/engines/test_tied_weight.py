"""A head that is its model's embedding: the gradients of plain autograd, in one tensor where that makes two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding as lookup
from torch.nn.functional import kl_div
from torch.profiler import profile
from training import patterns, settings, weights

from models import ids, make, randomise
from regrow.artifacts.goal import DIVERGENCES
from regrow.engines import distil, head
from regrow.engines.adapters import add_adapters
from regrow.engines.distil import FromTeacher
from regrow.engines.head import tied_weight
from regrow.engines.kept_teacher import FromKept, Kept, keep
from regrow.engines.pairs import Preferred
from regrow.engines.train import train

KINDS = ("llama", "gemma2", "gemma3_text", "gpt_neox", "cohere")  # Gemma 3 has a class of its own, which scales
MANY = 4096  # rows of an embedding that is larger than all else
Change = Callable[[Any], object]
Grads = dict[str, Tensor]


class Doubled(nn.Embedding):
    """A forward of its own that knows nothing of rows alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * lookup(tokens, self.weight)


def student(kind: str = "llama", *, tied: bool = True, **changes: int) -> Any:
    model = make(kind, tie_word_embeddings=tied, **changes)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    return model


def goal(kind: str = "llama", **changes: int) -> FromTeacher:
    teacher = make(kind, **changes)
    randomise(teacher, gains=1.0, seed=9)
    return FromTeacher(teacher, DIVERGENCES.get("forward-kl"), text=0.5)


@contextmanager
def two_gradients() -> Iterator[None]:
    """As autograd does it by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "tied_weight", lambda _: nullcontext())
        yield


def learn(model: Any, loss: Any, *batches: Tensor) -> Grads:
    for batch in batches or (ids(),):
        answer = loss(model, {"input_ids": batch})
        (answer[0] if isinstance(answer, tuple) else answer).mul(0.5).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(ours: Grads, theirs: Grads) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert not value.is_sparse, name
        assert (value - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max(), name


def compare(kind: str = "llama", change: Change = lambda _: None, *batches: Tensor, tied: bool = True) -> Any:
    """One that learns by one gradient, after it was found to learn what another one learns by two."""
    ours, theirs = student(kind, tied=tied), student(kind, tied=tied)
    change(ours)
    change(theirs)
    with two_gradients():
        expected = learn(theirs, goal(kind), *batches)
    same(learn(ours, goal(kind), *batches), expected)
    return ours


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_plain_autograd(kind: str, tied: bool) -> None:
    model = compare(kind, tied=tied)
    assert not model.get_input_embeddings().sparse


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_the_gradients_of_whole_logits(kind: str) -> None:
    """And none of it twice: neither the lookup's nor the head's."""
    ours, theirs, loss = student(kind), student(kind), goal(kind)
    loss.text = 0.0
    logits = theirs(input_ids=ids()).logits.log_softmax(-1).flatten(0, 1)
    with torch.no_grad():
        told = loss.teacher(input_ids=ids()).logits.log_softmax(-1).flatten(0, 1)
    kl_div(logits, told, log_target=True, reduction="batchmean").mul(0.5).backward()
    expected = theirs.get_input_embeddings().weight.grad
    learn(ours, loss)
    assert torch.allclose(ours.get_input_embeddings().weight.grad, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As many tensors as large as the embedding are made on the way; the plain way makes two."""
    monkeypatch.setattr(head, "NUMBERS", 1)
    for expected, way in ((1, nullcontext), (2, two_gradients)):
        model, loss = student(kind, vocab_size=MANY), goal(kind, vocab_size=MANY)
        weight = model.get_input_embeddings().weight
        with way(), profile(profile_memory=True) as seen:
            learn(model, loss)
        large = [event.name for event in seen.events() if event.self_cpu_memory_usage >= weight.nbytes]
        assert len(large) == expected, large


def test_with_what_is_there_already() -> None:
    compare("llama", lambda _: None, ids(), ids(seed=4))


def test_with_activations_made_twice() -> None:
    def checkpointed(model: Any) -> None:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})

    compare("llama", checkpointed)


def test_a_row_that_pads_learns_by_the_head_alone() -> None:
    token = int(ids()[0, 0])

    def padded(model: Any) -> None:
        model.get_input_embeddings().padding_idx = token

    rows = [compare("llama", change).lm_head.weight.grad for change in (padded, lambda _: None)]
    apart = (rows[0] - rows[1]).abs().amax(1)
    assert apart[token] > 1e-3
    assert float(apart.sum() - apart[token]) == 0


@pytest.mark.parametrize("flag", ["scale_grad_by_freq", "sparse"])
def test_what_a_lookup_is_told(flag: str) -> None:
    def told(model: Any) -> None:
        setattr(model.get_input_embeddings(), flag, True)
        with tied_weight(model) as weight:
            assert weight is None

    assert getattr(compare("llama", told).get_input_embeddings(), flag) is True


def test_a_lookup_of_its_own_kind() -> None:
    def replaced(model: Any) -> None:
        own = Doubled(*model.lm_head.weight.shape)
        own.weight = model.lm_head.weight
        model.set_input_embeddings(own)

    assert type(compare("llama", replaced).get_input_embeddings()) is Doubled


def test_an_embedding_that_does_not_learn() -> None:
    def adapted(model: Any) -> None:
        add_adapters(model, rank=2, dropout=0.0)

    model = compare("llama", adapted)
    assert model.get_input_embeddings().weight.grad is None
    with tied_weight(model) as weight:
        assert weight is None


def test_without_gradients_and_without_a_way_back() -> None:
    model, loss = student(), goal()
    with torch.no_grad(), tied_weight(model) as weight:
        assert weight is None
    with torch.no_grad():
        loss(model, {"input_ids": ids()})
    loss(model, {"input_ids": ids(seed=4)})  # nobody goes back through it
    with two_gradients():
        expected = learn(student(), goal())
    same(learn(model, loss), expected)


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = student()
    before = dict(vars(model.get_input_embeddings()))

    def fail(*_: Any) -> None:
        assert model.get_input_embeddings().sparse
        raise RuntimeError("planted")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        goal()(model, {"input_ids": ids()})
    handle.remove()
    assert vars(model.get_input_embeddings()) == before
    with two_gradients():
        expected = learn(student(), goal())
    same(learn(model, goal()), expected)


@pytest.mark.parametrize("rows", [64, 60])
def test_predictions_that_are_kept(tmp_path: Path, rows: int) -> None:
    """Also of a vocabulary with fewer rows than the student's."""
    kept = Kept(8, rows, "teacher")
    keep(goal().teacher, ids(), kept, tmp_path, batch=2)
    loss = FromKept(kept, DIVERGENCES.get("forward-kl"))
    with two_gradients():
        expected = learn(student(), loss)
    same(learn(student(), loss), expected)


def test_pairs() -> None:
    loss = Preferred(1e3, 3, (2,))
    with two_gradients():
        expected = learn(student(), loss)
    same(learn(student(), loss), expected)


def test_through_the_loop(tmp_path: Path) -> None:
    """Two passes a step, and held-out text between steps."""
    asked = settings(learning_rate=1e-3, evaluate_every=2)
    ours, theirs = student(), student()
    train(ours, patterns(), asked, folder=tmp_path / "one", loss=goal(), heldout=patterns(3, 1))
    with two_gradients():
        train(theirs, patterns(), asked, folder=tmp_path / "two", loss=goal(), heldout=patterns(3, 1))
    start, found, expected = weights(student()), weights(ours), weights(theirs)
    assert max(float((found[name] - start[name]).abs().max()) for name in found) > 1e-3
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
