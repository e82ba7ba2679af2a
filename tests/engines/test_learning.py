"""Gates that learn in the training loop: who speaks when, what is lowered, sizes reached, resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import Stop, patterns, same, settings, tiny, weights

from models import difference, make
from regrow.artifacts.family import Unit
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.artifacts.plan import Plan
from regrow.artifacts.ramp import RAMPS
from regrow.engines.adapters import add_adapters, merge
from regrow.engines.banks import Bank, Shelf
from regrow.engines.bind import bind
from regrow.engines.distil import bare
from regrow.engines.gates import gated
from regrow.engines.hetero import build, holder
from regrow.engines.learnable import LearnedGates, of_weights, opened, show
from regrow.engines.learning import Learning, Pace, Rates
from regrow.engines.lesson import Lesson
from regrow.engines.numerous import Course, Teachers
from regrow.engines.surgery import slice_model
from regrow.engines.train import train
from regrow.learning import Learn

UNITS: tuple[Unit, ...] = ("group", "neuron", "channel")
KL, MSE = DIVERGENCES.get("forward-kl"), LIKENESSES.get("mse")


def adapted(seed: int = 0) -> Any:
    return add_adapters(tiny(), rank=2, alpha=2, dropout=0.0, seed=seed)


def learning(
    model: Any,
    share: float = 0.3,
    *,
    steps: int = 20,
    warm: int = 5,
    anneal: int | None = None,
    by: Any = "count",
    units: tuple[Unit, ...] = UNITS,
    taught: bool = True,
    **lesson: Any,
) -> Learning:
    anatomy = bind(bare(model).config)
    whole = of_weights(anatomy, share)
    gates = LearnedGates(anatomy, units, [whole], seed=0)
    course = Teachers(Course(share, spacing=0.05, lag=1, by=by, gap=1e-3), Shelf())
    words: dict[str, Any] = {"logits": 2.0, "hidden": 0.5, "places": (1, 2), **lesson}
    return Learning(
        model,
        anatomy,
        gates,
        whole,
        Pace(steps, 4, RAMPS.get("linear"), warm, steps if anneal is None else anneal),
        taught=(Lesson(KL, MSE, **words), course) if taught else None,
        settle=lambda: Plan.everything(anatomy),
    )


def batch() -> dict[str, Tensor]:
    return {"input_ids": patterns(4)}


def trained(
    model: Any, goal: Learning, folder: Path, rates: Rates | None = None, progress: Any = None, **changes: Any
) -> Any:
    numbers = settings(**{"tokens": goal.pace.steps * 64, "divergence": torch.inf, "micro_batch": 4, **changes})
    rates = rates or Rates(0.3, 0.3)
    with gated(bare(model), goal.anatomy, goal.live):
        return train(model, patterns(), numbers, folder=folder, loss=goal.objective(rates), progress=progress)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = bare(model)(input_ids=patterns(4), use_cache=False).logits
    return found


# --- who speaks


def spoilt(model: Any) -> Any:
    """Adapters that say something."""
    source = torch.Generator().manual_seed(7)
    for p in Bank(model).parameters:
        p.data.normal_(0, 0.1, generator=source)
    return model


def test_others_speak_and_the_student_is_what_it_was() -> None:
    model = spoilt(adapted())
    bank, own = Bank(model), weights(model)
    said, mine = logits(model), bank.written()
    with torch.no_grad(), bank.speaking(None):
        assert torch.equal(logits(model), logits(tiny()))  # the dense model, to the bit
    with torch.no_grad(), bank.speaking(mine * 2):
        assert difference(logits(model), said) > 1e-3
        assert torch.equal(bank.written(), mine * 2)
    with torch.no_grad(), bank.speaking(mine):
        assert torch.equal(logits(model), said)
    with pytest.raises(KeyError), torch.no_grad(), bank.speaking(mine * 3):
        raise KeyError("inside")
    assert same(weights(model), own)
    assert torch.equal(logits(model), said)
    assert all(p.requires_grad for p in bank.parameters)


def test_no_number_is_copied_for_a_teacher() -> None:
    model = adapted()
    bank = Bank(model)
    theirs = bank.written() + 1
    with torch.no_grad(), bank.speaking(theirs):
        held = {p.untyped_storage().data_ptr() for p in bank.parameters}
        assert held == {theirs.untyped_storage().data_ptr()}


def test_the_dense_teacher_is_the_model_itself() -> None:
    """However gates and adapters of the student are; after it the student speaks again."""
    model = spoilt(adapted())
    goal = learning(model)
    goal.gates.a["neuron"].data.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    with gated(bare(model), goal.anatomy, goal.live):
        before = logits(model)
        told = goal._told(bare(model), batch()["input_ids"], None, None)
        show(goal.live, goal.gates.settled())
        said = logits(model)
    dense = tiny()
    final = dense.model(input_ids=batch()["input_ids"], use_cache=False).last_hidden_state.flatten(0, 1)
    assert torch.equal(told.states, final)
    assert difference(before, said) > 0.01  # other gates now
    assert not bare(model).training


def test_a_record_says_what_its_student_said() -> None:
    model = spoilt(adapted())
    goal = learning(model)
    goal.gates.a["neuron"].data.normal_(0, 3, generator=torch.Generator().manual_seed(1))
    goal.gates.clamp()
    record = goal._record()
    with gated(bare(model), goal.anatomy, goal.live):
        show(goal.live, goal.gates.settled())
        said = bare(model).model(input_ids=batch()["input_ids"], use_cache=False).last_hidden_state
        spoilt(model)
        for p in goal.bank.parameters:
            p.data.mul_(3)
        goal.gates.a["neuron"].data.neg_()
        told = goal._told(bare(model), batch()["input_ids"], None, record)
    assert torch.allclose(told.states, said.flatten(0, 1), atol=1e-6)


# --- what is lowered


def test_a_lesson_by_hand() -> None:
    """With gates that are open and adapters that say nothing student and teacher agree; parts add up."""
    model = adapted()
    goal = learning(model)
    open_gates = {unit: torch.ones_like(a) for unit, a in goal.gates.a.items()}
    with gated(bare(model), goal.anatomy, goal.live):
        loss, parts = goal._taught(goal.teachers, model, batch(), open_gates, 10)  # type: ignore[arg-type]
        assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
        half = {**open_gates, "neuron": open_gates["neuron"] / 2}
        loss, parts = goal._taught(goal.teachers, model, batch(), half, 10)  # type: ignore[arg-type]
    assert float(loss.detach()) == pytest.approx(2 * float(parts["divergence"]) + 0.5 * float(parts["states"]))
    assert float(parts["states"]) > 1e-4
    assert float(parts["divergence"]) > 1e-6
    assert parts["teacher"] == 0.0


def test_states_are_compared_over_channels_that_live() -> None:
    model = adapted()
    goal = learning(model, places=(2,))
    values = {unit: torch.ones_like(a) for unit, a in goal.gates.a.items()}
    values["channel"][:20] = 0
    ids = batch()["input_ids"]
    with gated(bare(model), goal.anatomy, goal.live):
        _, parts = goal._taught(goal.teachers, model, batch(), values, 10)  # type: ignore[arg-type, misc]
        ours = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1]
    theirs = tiny()(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1]
    expected = (theirs - ours)[ours != 0].square().mean()
    assert float(parts["states"]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_without_a_lesson_it_is_the_text() -> None:
    model = adapted()
    goal = learning(model, taught=False)
    with gated(bare(model), goal.anatomy, goal.live):
        loss, parts = goal(model, batch())
        with torch.no_grad():
            text = bare(model)(input_ids=batch()["input_ids"], labels=batch()["input_ids"], use_cache=False).loss
    penalty, _ = goal.gates.penalty(goal.gates.chances(), 0.0)
    assert float(loss.detach()) == pytest.approx(float(text) + float(penalty.detach()), rel=1e-5)
    assert float(parts["sparsity"]) == pytest.approx(0.004, abs=2e-3)


def test_held_out_text_is_measured_with_settled_gates() -> None:
    model = adapted()
    goal = learning(model)
    goal.gates.a["neuron"].data.normal_(0, 2, generator=torch.Generator().manual_seed(1))
    with gated(bare(model), goal.anatomy, goal.live), torch.no_grad():
        found = goal(model, batch())
        show(goal.live, goal.gates.settled())
        text = bare(model)(input_ids=batch()["input_ids"], labels=batch()["input_ids"], use_cache=False).loss
    assert int(goal.seen) == 0
    assert float(found) == pytest.approx(float(text), rel=1e-5)


# --- in the loop


@pytest.mark.parametrize("by", ["count", "gap", "dense"])
def test_the_sparsity_is_reached_and_teachers_follow(tmp_path: Path, by: str) -> None:
    model = adapted()
    goal = learning(model, steps=160, warm=60, by=by)
    result = trained(model, goal, tmp_path)
    assert goal.gates.missed()["weights"][0] == pytest.approx(0.3, abs=0.04)
    who = [row["teacher"] for row in result.losses]
    assert who[0] == 0
    assert who[-1] == 0 or by == "gap"
    assert (max(who) > 0.1) is (by != "dense")
    assert len(goal.teachers.shelf) == (0 if by == "dense" else 5)  # type: ignore[union-attr]
    assert int(goal.seen) == 640


def test_interrupted_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Gates, multipliers, records, chance and the walk of the teachers, to the bit (section 4)."""
    whole = adapted()
    goal = learning(whole, steps=30, warm=10)
    trained(whole, goal, tmp_path / "whole")
    for stop in (7, 16, 26):
        model, folder = adapted(), tmp_path / f"cut{stop}"
        first = learning(model, steps=30, warm=10)

        def pull(done: int, total: int, note: str, stop: int = stop) -> None:  # noqa: ARG001
            if done >= stop * 64:
                raise Stop

        with pytest.raises(Stop):
            trained(model, first, folder, progress=pull)
        again = adapted()
        second = learning(again, steps=30, warm=10)
        assert trained(again, second, folder).resumed > 0
        assert same(weights(again), weights(whole))
        assert same(second.state_dict(), goal.state_dict())


def test_annealed_gates_end_at_1(tmp_path: Path) -> None:
    model = adapted()
    goal = learning(model, steps=40, warm=10, anneal=30)
    trained(model, goal, tmp_path)
    assert goal.plan is not None
    assert all(bool((value == 1).all()) for value in goal.settled().values())
    half = goal.kept(goal.plan, 0.5)["neuron"]
    assert torch.allclose(half, 0.5 + goal.gates.soft()["neuron"] / 2)


@pytest.mark.parametrize("rescale", [False, True])
def test_masked_with_adapters_is_sliced_without(tmp_path: Path, rescale: bool) -> None:
    """At the end of a run: soft gates folded, adapters merged, units gone (P4)."""
    model = adapted()
    goal = learning(model, steps=40, warm=10)
    goal.live.rescale_norms = rescale
    trained(model, goal, tmp_path)
    anatomy, sizes = goal.anatomy, goal.anatomy.sizes
    stays = {unit: (value != 0) for unit, value in goal.gates.settled().items()}
    whole = Plan.everything(anatomy)
    layers = []
    for layer in whole.layers:
        groups = tuple(stays["group"][layer.index].nonzero().flatten().tolist())
        heads = tuple(h for g in groups for h in range(g * sizes["G"], (g + 1) * sizes["G"]))
        neurons = tuple(stays["neuron"][layer.index].nonzero().flatten().tolist())
        layers.append(type(layer)(layer.index, groups, heads, neurons))
    plan = Plan(tuple(stays["channel"].nonzero().flatten().tolist()), tuple(layers), rescale_norms=rescale)
    plan.check(anatomy)
    assert plan.shape() != anatomy.dense
    values = goal.kept(plan)
    with gated(bare(model), anatomy, goal.live):
        show(goal.live, values)
        masked = logits(model)
    merged: Any = merge(model)
    gates = opened(anatomy, values, rescale_norms=rescale)
    cut = build(holder(merged.config, anatomy, plan).config, dict(slice_model(merged, anatomy, plan, gates)))
    assert difference(masked, logits(cut)) <= 1e-5


def test_multipliers_rise_by_the_rate_and_are_not_scheduled(tmp_path: Path) -> None:
    """AdamW's first step is the rate itself: upwards, as the aim is missed, and constant under a schedule."""
    model = adapted()
    goal = learning(model, steps=4, warm=0)
    trained(model, goal, tmp_path, Rates(0.1, 0.05), schedule="linear", warmup=0.0)
    first, second = goal.gates.multipliers[0].tolist()
    assert first == pytest.approx(-4 * 0.05, rel=0.05)  # s < t: its derivative is negative
    assert second == pytest.approx(4 * 0.05, rel=0.05)


def test_rates_that_follow(tmp_path: Path) -> None:
    model = adapted()
    goal = learning(model, steps=4, warm=0)
    trained(model, goal, tmp_path, Rates(0.1, 0.05, follow=True), schedule="linear", warmup=0.0)
    assert goal.gates.multipliers[0, 1].item() == pytest.approx(0.05 * (1 + 0.75 + 0.5 + 0.25), rel=0.05)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
def test_other_families(kind: str) -> None:
    model = add_adapters(make(kind).requires_grad_(False), rank=2, alpha=2, dropout=0.0)
    goal = learning(model, places=(1, 2, 3))
    for a in goal.gates.a.values():
        a.data.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    ids = {"input_ids": torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))}
    with gated(bare(model), goal.anatomy, goal.live):
        loss, _ = goal(model, ids)
        loss.backward()
    assert torch.isfinite(loss)
    for unit, a in goal.gates.a.items():
        assert a.grad is not None, unit
        assert a.grad.abs().sum() > 0, unit


def test_the_weight_of_the_divergence_is_the_published_one() -> None:
    """NutePrune: 0.1 times the temperature squared times the KL summed over tokens, over the sequences of a batch."""
    source = torch.Generator().manual_seed(0)
    batch, block, words, temperature = 2, 512, 7, 2 / 3
    teacher, student = (torch.randn(batch * block, words, generator=source) for _ in range(2))
    theirs, ours = (torch.log_softmax(logits / temperature, -1) for logits in (teacher, student))
    published = 0.1 * temperature**2 * (theirs.exp() * (theirs - ours)).sum() / batch
    forward = DIVERGENCES.get("forward-kl")
    lesson = Lesson(forward, LIKENESSES.get("mse"), {"temperature": temperature})
    found = lesson.logits * forward.measure(teacher, student, **lesson.options).mean()
    torch.testing.assert_close(found, published, rtol=1e-5, atol=0)
    assert Learn().logits == lesson.logits
