"""Every loss between a teacher and a student, and what is true of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from regrow.artifacts.goal import DIVERGENCES, LIKENESSES, divergence, kl, likeness
from regrow.errors import UnknownName
from regrow.losses.cosine import cosine
from regrow.losses.forward_kl import forward_kl
from regrow.losses.jsd import jsd
from regrow.losses.mse import mse
from regrow.losses.relations import relations
from regrow.losses.reverse_kl import reverse_kl

LOGITS, STATES = ["forward-kl", "jsd", "reverse-kl"], ["cosine", "mse", "relations"]
P, Q = (3 / 4, 1 / 8, 1 / 8), (1 / 4, 1 / 4, 1 / 2)  # two predictions, whose KL differs by direction
FORWARD = 3 / 4 * math.log(3) - 3 / 8 * math.log(2)
REVERSE = 5 / 4 * math.log(2) - 1 / 4 * math.log(3)


def pair(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    one, two = (scale * torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(2))
    return one, two


def shape_of(name: str) -> tuple[int, ...]:
    return (2, 5, 12) if name == "relations" else (7, 12)


def measures() -> list[tuple[str, Callable[..., Tensor]]]:
    return [(name, found.measure) for registry in (DIVERGENCES, LIKENESSES) for name, found in registry.items()]


def test_the_head_count() -> None:
    assert DIVERGENCES.names() == LOGITS
    assert LIKENESSES.names() == STATES
    assert [LIKENESSES.get(name).of for name in STATES] == ["states", "states", "attention"]


@pytest.mark.parametrize(("name", "measure"), measures())
def test_equal_inputs_cost_nothing_and_teach_nothing(name: str, measure: Callable[..., Tensor]) -> None:
    teacher, _ = pair(*shape_of(name))
    student = teacher.clone().requires_grad_()
    found = measure(teacher, student)
    found.sum().backward()
    assert found.shape == teacher.shape[:-1]
    assert float(found.detach().abs().max()) < 1e-12
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-12


@pytest.mark.parametrize(("name", "measure"), measures())
def test_others_cost_something_each_token_on_its_own(name: str, measure: Callable[..., Tensor]) -> None:
    """Of attention a token also depends on those before it, so rows of the batch are looked at there."""
    teacher, student = pair(*shape_of(name))
    found = measure(teacher, student)
    assert bool(found.isfinite().all())
    assert bool((found > (-1e-12 if name == "relations" else 1e-6)).all()), "the first token looks at itself alone"
    student.requires_grad_()
    measure(teacher, student)[0].sum().backward()
    assert student.grad is not None
    assert not student.grad[1:].any()
    assert student.grad[0].any()


@pytest.mark.parametrize(("name", "measure"), measures())
def test_a_right_gradient(name: str, measure: Callable[..., Tensor]) -> None:
    teacher, student = pair(*shape_of(name), scale=0.7)
    assert torch.autograd.gradcheck(lambda x: measure(teacher, x), student.requires_grad_())


# --- of predictions


@pytest.mark.parametrize(
    ("measure", "there", "back"),
    [(forward_kl, FORWARD, REVERSE), (reverse_kl, REVERSE, FORWARD)],
    ids=["forward", "reverse"],
)
def test_by_hand(measure: Callable[..., Tensor], there: float, back: float) -> None:
    p, q = torch.tensor([P]).log(), torch.tensor([Q]).log()
    assert measure(p, q).item() == pytest.approx(there, abs=1e-6)
    assert measure(q, p).item() == pytest.approx(back, abs=1e-6)
    assert abs(there - back) > 0.02


def test_jsd_by_hand() -> None:
    """beta 1/4: the mixture is a quarter of the teacher and three quarters of the student."""
    mixture = [(p + 3 * q) / 4 for p, q in zip(P, Q, strict=True)]
    theirs = sum(p * math.log(p / m) for p, m in zip(P, mixture, strict=True))
    ours = sum(q * math.log(q / m) for q, m in zip(Q, mixture, strict=True))
    found = jsd(torch.tensor([P]).log(), torch.tensor([Q]).log(), beta=0.25)
    assert found.item() == pytest.approx(theirs / 4 + 3 * ours / 4, abs=1e-6)


def test_jsd_between_its_ends() -> None:
    """Divided by beta it tends to KL(teacher || student), divided by 1 - beta to the other; at the ends it is they."""
    teacher, student = pair(5, 9)
    there, back = forward_kl(teacher, student), reverse_kl(teacher, student)
    assert torch.allclose(jsd(teacher, student, beta=1e-6) / 1e-6, there, rtol=1e-3)
    assert torch.allclose(jsd(teacher, student, beta=1 - 1e-6) / 1e-6, back, rtol=1e-3)
    assert torch.equal(jsd(teacher, student, beta=0), there)
    assert torch.equal(jsd(teacher, student, beta=1), back)


def test_jsd_is_even_handed_and_bounded_in_the_middle() -> None:
    teacher, student = pair(50, 9, scale=30.0)
    found = jsd(teacher, student)
    assert torch.allclose(found, jsd(student, teacher))
    assert float(found.max()) <= math.log(2) + 1e-12
    assert float(found.max()) > 0.6, "else the bound says nothing"
    assert not torch.allclose(jsd(teacher, student, beta=0.2), jsd(student, teacher, beta=0.2))


@pytest.mark.parametrize("name", LOGITS)
def test_temperature(name: str) -> None:
    """Logits are divided by it, and the loss is multiplied by its square, so that gradients keep their size."""
    teacher, student = pair(5, 9)
    measure = DIVERGENCES.get(name).measure
    warm = measure(teacher, student, temperature=3.0)
    assert torch.allclose(warm, 9 * measure(teacher / 3, student / 3))
    assert not torch.allclose(warm, measure(teacher, student), rtol=0.01)


@pytest.mark.parametrize("name", LOGITS)
def test_logits_may_be_shifted_and_large(name: str) -> None:
    teacher, student = pair(5, 11)
    measure = DIVERGENCES.get(name).measure
    assert torch.allclose(measure(teacher + 100, student - 50), measure(teacher, student), atol=1e-4)
    assert bool(measure(1e4 * teacher.float(), student.float()).isfinite().all())


@pytest.mark.parametrize("name", LOGITS)
def test_what_both_rule_out_costs_nothing(name: str) -> None:
    """Rows that pad a vocabulary are -inf in some models: of them nothing is learnt, and nothing is NaN."""
    teacher, student = pair(5, 11)
    nothing = torch.full((5, 3), -math.inf, dtype=teacher.dtype)
    measure = DIVERGENCES.get(name).measure
    padded, wide = torch.cat([teacher, nothing], 1), torch.cat([student, nothing], 1).requires_grad_()
    found = measure(padded, wide)
    assert torch.allclose(found, measure(teacher, student))
    found.sum().backward()
    assert wide.grad is not None
    assert bool(wide.grad.isfinite().all())
    assert bool(measure(teacher * math.nan, student).isnan().all())


def test_a_teacher_may_rule_out_what_the_student_does_not() -> None:
    teacher, student = pair(5, 11)
    padded = torch.cat([teacher, torch.full((5, 3), -math.inf, dtype=teacher.dtype)], 1)
    wide = torch.cat([student, torch.zeros(5, 3, dtype=student.dtype)], 1)
    assert bool(forward_kl(padded, wide).isfinite().all())
    assert bool(reverse_kl(padded, wide).isinf().all()), "infinitely wrong, and said to be"


# --- of states


def test_cosine_sees_no_length() -> None:
    teacher, student = pair(7, 12)
    assert torch.allclose(cosine(teacher, student), cosine(3 * teacher, 0.1 * student))
    assert torch.allclose(cosine(teacher, -teacher), torch.full((7,), 2.0, dtype=teacher.dtype))
    assert cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])).item() == pytest.approx(1 - 1 / math.sqrt(2))


def test_mse_by_hand() -> None:
    assert mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])).item() == pytest.approx((4 + 9) / 2)


def test_relations_by_hand() -> None:
    """Two tokens of one channel, teacher (1, 2) and student (1, 0). The first sees itself; the second weighs (2, 4)
    there and (0, 0) here."""
    teacher, student = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [0.0]]])
    p = 1 / (1 + math.exp(2))  # what the teacher's second token gives the first
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    found = relations(teacher, student)
    assert found[0, 0].item() == pytest.approx(0, abs=1e-7)
    assert found[0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_relations_of_models_with_other_heads() -> None:
    teacher, student = torch.randn(2, 6, 24), torch.randn(2, 6, 8)
    assert relations(teacher, student, heads=4).shape == (2, 6)
    assert not torch.allclose(relations(teacher, student, heads=4), relations(teacher, student, heads=2))


def test_relations_look_back_only() -> None:
    teacher, student = pair(1, 6, 4)
    later = teacher.clone()
    later[0, -1] += 1
    assert torch.equal(relations(teacher, student)[0, :-1], relations(later, student)[0, :-1])


# --- the registries


def test_losses_are_registered_with_their_paper() -> None:
    found = DIVERGENCES.get("forward-kl")
    assert found.measure is forward_kl
    assert found.options == {"temperature": 1.0}
    assert "2407.14679" in found.paper
    assert "nats" in found.about
    assert DIVERGENCES.get("jsd").options == {"beta": 0.5, "temperature": 1.0}
    with pytest.raises(UnknownName, match="did you mean 'forward-kl'"):
        DIVERGENCES.get("foward-kl")
    with pytest.raises(UnknownName, match=r"loss of states 'cosinus'.*did you mean 'cosine'"):
        LIKENESSES.get("cosinus")


@pytest.mark.parametrize("register", [divergence, likeness])
def test_a_loss_says_what_it_measures(register: Callable[..., Any]) -> None:
    def silent(teacher: Tensor, student: Tensor) -> Tensor:
        return teacher - student

    with pytest.raises(TypeError, match="'silent' has no docstring"):
        register(paper="none")(silent)


def test_kl_of_log_chances() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(2))
    assert kl(q, p).item() == math.inf
