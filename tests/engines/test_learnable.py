"""Gates as parameters: multipliers climb and pull, sizes are reached, values are shown to a model at work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import anatomy_of, difference, ids, logits, make
from regrow.artifacts.family import Unit
from regrow.engines.expected import dense_weights, expected_weights
from regrow.engines.gates import gated
from regrow.engines.hard_concrete import LIMIT
from regrow.engines.learnable import Aim, LearnedGates, lower_by, of_units, of_weights, opened, show

UNITS: tuple[Unit, ...] = ("layer", "group", "neuron", "channel")


def gates_of(kind: str = "llama", units: tuple[Unit, ...] = UNITS, *aims: Aim, seed: int = 0) -> Any:
    anatomy = anatomy_of(make(kind))
    return LearnedGates(anatomy, units, aims or (of_weights(anatomy, 0.4),), seed=seed)


def optimiser(gates: LearnedGates, rate: float = 0.1) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [{"params": list(gates.a.parameters())}, {"params": [gates.multipliers], "maximize": True}],
        lr=rate,
        weight_decay=0,
    )


def test_sizes_and_start() -> None:
    gates, size = gates_of(units=(*UNITS, "head")), anatomy_of(make("llama")).sizes
    assert {unit: tuple(a.shape) for unit, a in gates.a.items()} == {
        "layer": (size["L"],),
        "group": (size["L"], size["K"]),
        "head": (size["L"], size["H"]),
        "neuron": (size["L"], size["F"]),
        "channel": (size["C"],),
    }
    assert float(torch.cat([a.detach().flatten() for a in gates.a.values()]).std()) == pytest.approx(0.01, rel=0.2)
    again = gates_of(units=(*UNITS, "head"))
    assert all(torch.equal(a, again.a[unit]) for unit, a in gates.a.items())
    assert not torch.equal(gates.a["neuron"], gates_of(seed=1).a["neuron"])


def test_a_penalty_by_hand() -> None:
    """Two rows lose 0.2 and 0.4 where half of 0.5 is asked by now: apart by -0.05 and 0.15."""
    lost = torch.tensor([0.2, 0.4])
    gates = gates_of("llama", ("neuron",), Aim("neuron", 0.5, lambda _: lost))
    gates.multipliers.data = torch.tensor([[2.0, 3.0]])
    total, told = gates.penalty({}, 0.5)
    assert float(total.detach()) == pytest.approx(2 * 0.05 + 3 * (0.05**2 + 0.15**2) / 2)
    assert {name: float(value) for name, value in told.items()} == pytest.approx(
        {"sparsity neuron": 0.3, "multiplier neuron": 2.0, "multiplier 2 neuron": 3.0}
    )


def test_multipliers_climb_while_too_little_is_lost() -> None:
    """The first falls and the second rises, so that a gate's gradient pushes it down (P5)."""
    gates = gates_of()
    steps = optimiser(gates)
    seconds = []
    for _ in range(5):
        steps.zero_grad()
        gates.penalty(gates.chances(), 1.0)[0].backward()
        steps.step()
        for a in gates.a.values():
            a.data.fill_(4.0)  # held, so that the aim stays missed
        seconds.append(float(gates.multipliers[0, 1].detach()))
    assert float(gates.multipliers[0, 0].detach()) < -0.3
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    steps.zero_grad()
    gates.penalty(gates.chances(), 1.0)[0].backward()
    assert all((a.grad > 0).all() for a in gates.a.values())  # descent lowers it


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_without_a_task_the_size_is_reached(share: float) -> None:
    anatomy = anatomy_of(make("llama"))
    gates = gates_of("llama", ("group", "neuron", "channel"), of_weights(anatomy, share))
    steps = optimiser(gates)
    for step in range(600):
        gates.clamp()
        steps.zero_grad()
        gates.penalty(gates.chances(), min(1.0, step / 100))[0].backward()
        steps.step()
    found, asked = gates.missed()["weights"]
    assert asked == share
    assert found == pytest.approx(share, abs=0.005)


def test_every_layer_goes_to_the_same_width() -> None:
    gates = gates_of("llama", ("neuron", "layer"), of_units("neuron", 0.3), of_units("layer", 0.0))
    gates.a["neuron"].data[0].fill_(0.0)  # one that begins elsewhere
    steps = optimiser(gates)
    for _ in range(800):
        gates.clamp()
        steps.zero_grad()
        gates.penalty(gates.chances(), 1.0)[0].backward()
        steps.step()
    lost = 1 - gates.chances()["neuron"].mean(-1)
    assert lost.tolist() == pytest.approx([0.3] * 3, abs=0.01)
    assert gates.missed()["layer"][0] == pytest.approx(0.002, abs=0.001)  # its floor: 0 is out of reach


def test_limits() -> None:
    gates = gates_of()
    gates.a["neuron"].data.fill_(9)
    gates.a["channel"].data.fill_(-9)
    gates.clamp()
    assert float(gates.a["neuron"].detach().min()) == pytest.approx(LIMIT)
    assert float(gates.a["channel"].detach().max()) == pytest.approx(-LIMIT)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_values_are_shown_to_a_model_at_work(kind: str, rescale: bool) -> None:
    """What is shown acts as gates that were there from the beginning; opened, the model is itself to the bit."""
    model = make(kind)
    anatomy = anatomy_of(model)
    units = tuple(unit for unit in (*UNITS, "head") if unit in anatomy.supported)
    gates = LearnedGates(anatomy, units, [of_weights(anatomy, 0.5)], seed=0)
    for a in gates.a.values():
        a.data.normal_(0, 2, generator=torch.Generator().manual_seed(3))
    dense, values = logits(model, ids()), gates.settled()
    with gated(model, anatomy, opened(anatomy, values, rescale_norms=rescale)):
        expected = logits(model, ids())
    assert difference(dense, expected) > 0.1
    live = opened(anatomy, gates.drawn(torch.Generator().manual_seed(1)), rescale_norms=rescale)
    with gated(model, anatomy, live), torch.no_grad():
        drawn = logits(model, ids())
        show(live, None)
        assert torch.equal(logits(model, ids()), dense)
        show(live, values)
        assert difference(logits(model, ids()), expected) <= 1e-6
        show(live, gates.drawn(torch.Generator().manual_seed(1)))
        assert torch.equal(logits(model, ids()), drawn)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("rescale", [False, True])
def test_gates_that_are_all_1_are_no_gates(kind: str, rescale: bool) -> None:
    """To the bit, with every kind of unit at once (P1, S3)."""
    model = make(kind)
    anatomy = anatomy_of(model)
    units = tuple(unit for unit in (*UNITS, "head") if unit in anatomy.supported)
    gates = LearnedGates(anatomy, units, [of_weights(anatomy, 0.5)], seed=0)
    ones = {unit: torch.ones_like(a) for unit, a in gates.values()}
    with gated(model, anatomy, opened(anatomy, ones, rescale_norms=rescale)):
        found = logits(model, ids())
    assert torch.equal(found, logits(model, ids()))


def test_gradients_reach_every_kind_of_unit() -> None:
    model = make("llama").requires_grad_(False)
    anatomy = anatomy_of(model)
    gates = gates_of(units=(*UNITS, "head"))
    for a in gates.a.values():
        a.data.normal_(0, 1, generator=torch.Generator().manual_seed(3))
    with gated(model, anatomy, opened(anatomy, gates.drawn(torch.Generator().manual_seed(1)))):
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    for unit, a in gates.a.items():
        assert a.grad is not None, unit
        assert a.grad.abs().sum() > 0, unit


def test_what_is_lost_is_a_share_of_the_weights() -> None:
    anatomy = anatomy_of(make("llama"))
    gates = gates_of()
    for a in gates.a.values():
        a.data.normal_(0, 2, generator=torch.Generator().manual_seed(3))
    found = gates.missed()["weights"][0]
    expected = 1 - expected_weights(anatomy, gates.chances()).detach() / dense_weights(anatomy)
    assert found == pytest.approx(float(expected), abs=1e-6)


# --- what is ours: a start by scores, and multipliers that let go


def test_gates_begin_in_the_order_of_scores() -> None:
    """By hand: three units 3, 1.5 and 0 below the usual start; in one order over layers, or in one a layer."""
    scores = torch.tensor([[1.0, 5.0, 3.0]])
    assert torch.equal(lower_by(scores, comparable=True), torch.tensor([[3.0, 0.0, 1.5]]))
    rows = torch.tensor([[1.0, 2.0], [30.0, 20.0]])
    assert torch.equal(lower_by(rows, comparable=False), torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
    torch.testing.assert_close(lower_by(rows, comparable=True), torch.tensor([[3.0, 2.0], [0.0, 1.0]]))
    assert torch.equal(lower_by(torch.ones(1), comparable=True), torch.tensor([3.0]))
    anatomy = anatomy_of(make("llama"))
    aims = [of_weights(anatomy, 0.4)]
    even = LearnedGates(anatomy, ("neuron", "group"), aims, seed=0)
    lower = {"neuron": torch.rand(3, anatomy.sizes["F"])}
    begun = LearnedGates(anatomy, ("neuron", "group"), aims, seed=0, lower=lower)
    assert torch.equal(begun.a["neuron"], even.a["neuron"] - lower["neuron"])
    assert torch.equal(begun.a["group"], even.a["group"])


def test_a_multiplier_lets_go_only_where_its_aim_is_passed() -> None:
    anatomy = anatomy_of(make("llama"))
    gates = LearnedGates(anatomy, ("neuron",), [of_weights(anatomy, 0.2)], seed=0, unwind=0.1)
    for pull, open_, left in ((-50.0, 4.0, -50.0), (-50.0, -4.0, -45.0), (50.0, 4.0, 45.0), (50.0, -4.0, 50.0)):
        with torch.no_grad():
            gates.multipliers[0] = torch.tensor([pull, 7.0])
            gates.a["neuron"].fill_(open_)
        gates.let_go(gates.chances(), 1.0)
        assert gates.multipliers[0].tolist() == [pytest.approx(left), 7.0]
    published = LearnedGates(anatomy, ("neuron",), [of_weights(anatomy, 0.2)], seed=0)
    with torch.no_grad():
        published.multipliers[0] = torch.tensor([-50.0, 7.0])
        published.a["neuron"].fill_(-4.0)
    published.let_go(published.chances(), 1.0)
    assert published.multipliers[0].tolist() == [-50.0, 7.0]


def test_a_pull_that_went_on_for_long_does_not_carry_gates_away() -> None:
    """A task that holds gates until the pull is strong, and then lets them: how far the aim is passed at most."""
    anatomy = anatomy_of(make("llama"))

    def worst(unwind: float) -> float:
        gates = LearnedGates(anatomy, ("neuron",), [of_weights(anatomy, 0.2)], seed=0, unwind=unwind)
        slow = torch.optim.Adam(gates.a.values(), lr=0.05)
        fast = torch.optim.Adam([gates.multipliers], lr=1.0, maximize=True)
        passed = 0.0
        for _ in range(300):
            gates.clamp()
            chances = gates.chances()
            gates.let_go(chances, 1.0)
            penalty, told = gates.penalty(chances, 1.0)
            (penalty - 20 * chances["neuron"].mean()).backward()
            for optimizer in (slow, fast):
                optimizer.step()
                optimizer.zero_grad()
            passed = max(passed, float(told["sparsity"]) - 0.2)
        return passed

    assert worst(0.1) < 0.6 * worst(0.0)
