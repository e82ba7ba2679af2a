"""A student of a teacher gets the loss and the gradients that whole logits would give, and no other teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from training import patterns, settings, tiny
from transformers import PreTrainedTokenizerFast

from models import ids, make, randomise
from regrow.artifacts.goal import DIVERGENCES, Divergence, divergence
from regrow.engines import head as heads
from regrow.engines.adapters import add_adapters
from regrow.engines.distil import FromTeacher, bare, check_teacher, checked_head, needed_head
from regrow.engines.objective import next_token
from regrow.engines.train import train
from regrow.errors import SettingsError, UnknownName, UnsupportedModel
from regrow.losses.forward_kl import forward_kl

CAP = {"final_logit_softcapping": 1.5}  # low enough to bend every logit


def kl() -> Divergence:
    return DIVERGENCES.get("forward-kl")


def pair(kind: str) -> tuple[Any, Any]:
    """A student, and a teacher of other weights."""
    changes = CAP if kind == "gemma2" else {}
    student, teacher = make(kind, **changes), make(kind, **changes)
    randomise(teacher, gains=1.0, seed=9)
    return student, teacher


def plain(student: Any, teacher: Any, tokens: Tensor) -> Tensor:
    """Mean KL over all positions, from whole logits and probabilities."""
    ours = student(input_ids=tokens, use_cache=False).logits.float().log_softmax(-1)  # (b, T, V)
    with torch.no_grad():
        theirs = teacher(input_ids=tokens, use_cache=False).logits.float().softmax(-1)
    return nn.functional.kl_div(ours.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the divergence


def test_by_hand() -> None:
    """p = (3/4, 1/8, 1/8) and q = (1/4, 1/4, 1/2): the two directions differ."""
    p, q = torch.tensor([[3 / 4, 1 / 8, 1 / 8]]), torch.tensor([[1 / 4, 1 / 4, 1 / 2]])
    forward = 3 / 4 * math.log(3) - 3 / 8 * math.log(2)
    reverse = 5 / 4 * math.log(2) - 1 / 4 * math.log(3)
    assert forward_kl(p.log(), q.log()).item() == pytest.approx(forward, abs=1e-6)
    assert forward_kl(q.log(), p.log()).item() == pytest.approx(reverse, abs=1e-6)
    assert abs(forward - reverse) > 0.02


def test_of_a_model_from_itself_nothing_is_learnt() -> None:
    logits = 3 * torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    mine = logits.clone().requires_grad_()
    found = forward_kl(logits, mine)
    found.sum().backward()
    assert found.shape == (5,)
    assert torch.equal(found, torch.zeros(5))
    assert mine.grad is not None
    assert float(mine.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_the_difference_of_the_predictions(temperature: float) -> None:
    source = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(5, 11, generator=source, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    forward_kl(teacher, student, temperature).sum().backward()
    p, q = (x.detach().div(temperature).softmax(-1) for x in (teacher, student))
    assert torch.allclose(student.grad, temperature * (q - p), atol=1e-12)


def test_logits_may_be_shifted_and_large() -> None:
    source = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 11, generator=source) for _ in range(2))
    shifted = forward_kl(teacher + 100, student - 50)
    assert torch.allclose(shifted, forward_kl(teacher, student), atol=1e-4)
    assert bool(forward_kl(1e4 * teacher, student).isfinite().all())
    assert bool((forward_kl(teacher, student) > 0).all())


def test_what_a_teacher_rules_out_costs_nothing() -> None:
    """Rows that pad a vocabulary are -inf in some models: of them nothing is learnt, and nothing is NaN."""
    source = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, 11, generator=source) for _ in range(2))
    padded = torch.cat([teacher, torch.full((5, 3), -math.inf)], 1)
    wide = torch.cat([student, torch.full((5, 3), -math.inf)], 1).requires_grad_()
    found = forward_kl(padded, wide)
    assert torch.allclose(found, forward_kl(teacher, student))
    found.sum().backward()
    assert wide.grad is not None
    assert bool(wide.grad.isfinite().all())
    assert bool(forward_kl(padded, torch.cat([student, torch.zeros(5, 3)], 1)).isfinite().all())
    assert bool(forward_kl(teacher * math.nan, student).isnan().all())


def test_losses_are_registered_with_their_paper() -> None:
    assert kl().measure is forward_kl
    assert kl().options == {"temperature": 1.0}
    assert "2407.14679" in kl().paper
    assert "nats" in kl().about
    with pytest.raises(UnknownName, match="did you mean 'forward-kl'"):
        DIVERGENCES.get("foward-kl")

    def silent(teacher: Tensor, student: Tensor) -> Tensor:
        return teacher - student

    with pytest.raises(TypeError, match="'silent' has no docstring"):
        divergence(paper="none")(silent)


# --- the loss of a batch


@pytest.mark.parametrize("rows", [1, 7, 10**6], ids=["a token", "seven", "all"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_equal_to_whole_logits(monkeypatch: pytest.MonkeyPatch, kind: str, rows: int) -> None:
    """Value, and gradient of every parameter of the student; the teacher gets none."""
    student, teacher = pair(kind)
    monkeypatch.setattr(heads, "NUMBERS", rows * student.config.vocab_size)
    expected = plain(student, teacher, ids())
    expected.backward()
    theirs = gradients(student)
    student.zero_grad()
    tracked: list[bool] = []
    goal = FromTeacher(teacher, kl())
    teacher.register_forward_hook(lambda *_: tracked.append(torch.is_grad_enabled()))
    found = goal(student, {"input_ids": ids()})
    found.backward()
    ours = gradients(student)
    assert tracked == [False], "the teacher runs once, and keeps nothing for a backward pass"
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.item() > 0.1
    assert ours.keys() == theirs.keys() == {name for name, _ in student.named_parameters()}
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5 * float(theirs[name].abs().max())), name
    assert max(float(grad.abs().max()) for grad in ours.values()) > 1e-2
    assert gradients(teacher) == {}


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_forgotten_soft_cap_is_seen(monkeypatch: pytest.MonkeyPatch, whose: str) -> None:
    """Planted: the head of one of the two is read without what its family does to logits."""
    student, teacher = pair("gemma2")
    expected = plain(student, teacher, ids()).item()
    right, forgetful = heads.shaping, {"student": student, "teacher": teacher}[whose].config
    monkeypatch.setattr(heads, "shaping", lambda c: (lambda x: x) if c is forgetful else right(c))
    monkeypatch.setattr("regrow.engines.distil.trusted_head", lambda *_: True)  # which would refuse it
    found = FromTeacher(teacher, kl())(student, {"input_ids": ids()}).item()
    assert abs(found - expected) > 0.01 * expected


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_is_at_no_distance_from_itself(kind: str) -> None:
    student, teacher = make(kind), make(kind)
    found = FromTeacher(teacher, kl())(student, {"input_ids": ids()})
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert max(float(grad.abs().max()) for grad in gradients(student).values()) < 1e-4


def test_a_student_may_be_narrower() -> None:
    """Only the vocabulary is shared."""
    teacher = make("llama")
    student = make("llama", hidden_size=12, num_hidden_layers=2)
    expected = plain(student, teacher, ids()).item()
    assert FromTeacher(teacher, kl())(student, {"input_ids": ids()}).item() == pytest.approx(expected, rel=1e-5)


def test_options_reach_the_divergence() -> None:
    student, teacher = pair("llama")
    batch = {"input_ids": ids()}
    warm = FromTeacher(teacher, kl(), {"temperature": 2.0})(student, batch).item()
    assert warm != pytest.approx(FromTeacher(teacher, kl())(student, batch).item(), rel=0.01)
    with torch.no_grad():
        logits = [model(**batch).logits.flatten(0, 1) for model in (teacher, student)]
    assert warm == pytest.approx(forward_kl(logits[0], logits[1], 2.0).mean().item(), rel=1e-5)
    with pytest.raises(TypeError, match="heat"):
        FromTeacher(teacher, kl(), {"heat": 2.0})(student, batch)


def test_without_gradients_it_is_a_number() -> None:
    student, teacher = pair("llama")
    with torch.no_grad():
        found = FromTeacher(teacher, kl())(student, {"input_ids": ids()})
    assert not found.requires_grad
    assert found.item() == pytest.approx(plain(student, teacher, ids()).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "spp"])
def test_a_student_with_adapters(kind: str) -> None:
    student, teacher = pair("llama")
    expected = FromTeacher(teacher, kl())(student, {"input_ids": ids()}).item()
    adapted = add_adapters(student, kind, rank=2, dropout=0)
    found = FromTeacher(teacher, kl())(adapted, {"input_ids": ids()})
    found.backward()
    assert found.item() == pytest.approx(expected, rel=1e-6)
    trained = gradients(adapted)
    assert trained.keys() == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(f"{kind}_" in name for name in trained)
    last = [grad for name, grad in trained.items() if "lora_B" in name or "spp_beta" in name]
    assert len(last) == 3 * 7
    assert all(bool(grad.any()) for grad in last)


class Wrapped(nn.Module):
    """Stands for what a distributed run puts around a model."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, **given: Any) -> Any:
        return self.module(**given)


def test_wrappers_are_seen_through() -> None:
    student, teacher = pair("llama")
    expected = FromTeacher(teacher, kl())(student, {"input_ids": ids()}).item()
    assert FromTeacher(teacher, kl())(Wrapped(student), {"input_ids": ids()}).item() == pytest.approx(expected)
    assert bare(Wrapped(Wrapped(student))) is student
    assert bare(Wrapped(add_adapters(student, rank=2))) is student


def test_training_brings_the_student_near(tmp_path: Path) -> None:
    """Through the loop, with a teacher that says what the text does not."""
    student, teacher = tiny(), tiny()
    randomise(teacher, gains=1.0, seed=9)
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    start = plain(student, teacher, patterns()).item()
    goal = FromTeacher(teacher.train(), kl())
    result = train(student, patterns(), settings(tokens=30 * 64, batch=4), folder=tmp_path, loss=goal)
    assert result.losses[0]["loss"] == pytest.approx(start, rel=0.2)
    assert plain(student, teacher, patterns()).item() < 0.6 * start
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert gradients(teacher) == {}
    assert not teacher.training


def test_a_resumed_run_needs_the_same_teacher(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny()
    train(student, patterns(), settings(), folder=tmp_path, loss=FromTeacher(teacher, kl()))
    with torch.no_grad():
        teacher.model.norm.weight[0] += 1
    for other in (FromTeacher(teacher, kl()), next_token):
        with pytest.raises(SettingsError, match="loss"):
            train(tiny(), patterns(), settings(), folder=tmp_path, loss=other)


def test_a_run_at_another_temperature_is_another_run(tmp_path: Path) -> None:
    teacher = tiny()
    train(tiny(), patterns(), settings(), folder=tmp_path, loss=FromTeacher(teacher, kl(), {"temperature": 2.0}))
    with pytest.raises(SettingsError, match=r"loss: 'forward-kl temperature=2\.0 from"):
        train(tiny(), patterns(), settings(), folder=tmp_path, loss=FromTeacher(teacher, kl()))


# --- what cannot teach


def tongue(change: Callable[[Any], None] = lambda _: None, **special: str) -> Any:
    """A tokenizer with a token for every byte, whose backend was changed."""
    vocabulary = {"<s>": 0, "</s>": 1, **{byte: i + 2 for i, byte in enumerate(sorted(ByteLevel.alphabet()))}}
    backend = Tokenizer(BPE(vocabulary, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    change(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "<s>", "eos_token": "</s>", **special})


def sized(size: int = 258) -> Any:
    return SimpleNamespace(vocab_size=size)


def test_teachers_must_share_the_vocabulary() -> None:
    check_teacher(sized(), sized(), tongue(), tongue())
    check_teacher(sized(), sized(1024), tongue(), tongue())  # rows behind the last token only pad
    check_teacher(sized(1024), sized(), tongue(), tongue())
    with pytest.raises(SettingsError, match=r"whose tokens are others \(embeddings of 257 rows there and 258 here\)"):
        check_teacher(sized(), sized(257), tongue(), tongue())

    def swapped(backend: Any) -> None:
        vocabulary = {**backend.get_vocab(), "a": backend.token_to_id("b"), "b": backend.token_to_id("a")}
        backend.model = BPE(vocabulary, [])

    for other, match in (
        (tongue(swapped), "token 'a' is 67 there and 66 here"),
        (tongue(lambda backend: backend.add_tokens(["<think>"])), "token '<think>' is 258 there and none here"),
        (tongue(eos_token="<s>"), "eos_token is '<s>' there and '</s>' here"),
        (tongue(bos_token="</s>"), "bos_token is '</s>' there and '<s>' here"),
    ):
        with pytest.raises(SettingsError, match=match):
            check_teacher(sized(), sized(), tongue(), other)


@pytest.mark.parametrize("sign", ["ï", "ё", "敏", "\t", "  ", "5", "1,", "🎉", "\u200d"])
def test_teachers_must_cut_text_alike(sign: str) -> None:
    """One vocabulary, and one sign that is read as another: an English line would not show it."""

    def deaf(backend: Any) -> None:
        backend.normalizer = Replace(sign, "?")

    assert tongue()("The quick brown fox!").input_ids == tongue(deaf)("The quick brown fox!").input_ids
    with pytest.raises(SettingsError, match=r"it cuts '.*' in other places"):
        check_teacher(sized(), sized(), tongue(), tongue(deaf))


def test_heads_must_be_linear() -> None:
    odd = make("llama")
    odd.lm_head = nn.Sequential(odd.lm_head)
    with pytest.raises(UnsupportedModel, match="a teacher whose head is a Sequential"):
        FromTeacher(odd, kl())
    with pytest.raises(UnsupportedModel, match="a student whose head is a Sequential"):
        FromTeacher(make("llama"), kl())(odd, {"input_ids": ids()})
    assert needed_head(make("llama"), "teacher").bias is None


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_heads_that_scale_or_cap_are_known(kind: str) -> None:
    assert checked_head(make(kind), "teacher").bias is None


def test_a_head_that_does_more_teaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its probabilities would be wrong without a word."""
    model = make("gemma2", **CAP)
    monkeypatch.setattr(heads, "shaping", lambda _: lambda logits: logits)
    with pytest.raises(UnsupportedModel, match=r"a teacher \(gemma2\) whose logits are not those"):
        FromTeacher(model, kl())
