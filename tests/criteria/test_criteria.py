"""One battery over every registered criterion, and each worked by hand on two units of three weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from regrow.artifacts.family import UNITS
from regrow.artifacts.sight import CRITERIA, Criterion, Moments, Sight

NAMES = CRITERIA.names()
EVERY = pytest.mark.parametrize("criterion", [CRITERIA.get(n) for n in NAMES], ids=NAMES)
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{}, {"power": 1}],
    "activation": [{}, *({"sequence": s, "batch": b} for s in ("mean", "l2", "var") for b in ("mean", "l2", "var"))],
}
RUNS = {"contiguous", "contiguous-task"}
WHOLE_LAYERS = {"block-influence", "perplexity", "contiguous", "contiguous-task"}


def sight(criterion: Criterion, units: int = 5, width: int = 2, rest: int = 4, seed: int = 0) -> Sight:
    """Random numbers of the kind this criterion looks at."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    def moments() -> Moments:
        sequences = normal(6, units, width).double()
        return Moments(sequences.abs().sum(0), sequences.square().sum(0), 6)

    if criterion.sees == "angles":
        rows = torch.nn.functional.normalize(normal(units + 1, 64), dim=1)
        return Sight("layer", units, angles=rows @ rows.T)
    if criterion.sees == "removal":
        return Sight("layer", units, removal=normal(units))
    if criterion.sees == "task":
        return Sight("layer", units, runs={"winogrande": normal(2, units, units + 1).abs()})
    flow = {how: moments() for how in ("mean", "l2", "var")}
    return Sight(
        criterion.units[-1],
        units,
        seed=seed,
        weight=normal(units, width, rest),
        grad=normal(units, width, rest),
        fisher=normal(units, width, rest).square(),
        flow=flow if criterion.sees == "flow" else None,
    )


def permuted(seen: Sight, order: Tensor) -> Sight:
    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[order]

    flow = seen.flow and {how: Moments(m.total[order], m.squares[order], m.sequences) for how, m in seen.flow.items()}
    return replace(
        seen,
        weight=pick(seen.weight),
        grad=pick(seen.grad),
        fisher=pick(seen.fisher),
        removal=pick(seen.removal),
        flow=flow,
    )


def tensors(seen: Sight) -> list[Tensor]:
    plain = [seen.weight, seen.grad, seen.fisher, seen.angles, seen.removal]
    flows = [t for m in (seen.flow or {}).values() for t in (m.total, m.squares)]
    return [t for t in [*plain, *flows, *(seen.runs or {}).values()] if t is not None]


def test_head_count() -> None:
    assert NAMES == [
        "activation",
        "block-influence",
        "contiguous",
        "contiguous-task",
        "magnitude",
        "perplexity",
        "random",
        "taylor",
        "taylor-mix",
        "taylor-second",
        "taylor-vectorize",
    ]
    assert set(NAMES) == set(BY_HAND)
    assert set(UNITS) == {u for n in NAMES for u in CRITERIA.get(n).units}


@EVERY
def test_it_says_what_it_is(criterion: Criterion) -> None:
    assert criterion.about.endswith(".")
    assert len(criterion.about) <= 120
    assert criterion.paper
    assert set(criterion.units) <= set(UNITS)
    layers = CRITERIA.get(criterion.layers_by)
    assert "layer" in layers.units


@EVERY
def test_pure_finite_and_of_the_right_shape(criterion: Criterion) -> None:
    for options in OPTIONS.get(criterion.name, [{}]):
        seen = sight(criterion)
        before = [t.clone() for t in tensors(seen)]
        first, second = (criterion.score(seen, **options) for _ in range(2))
        assert torch.equal(first, second)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors(seen), strict=True))
        assert bool(first.isfinite().all())
        assert first.shape == ((5, 6) if criterion.name in RUNS else (5,))


@EVERY
def test_permuting_units_permutes_scores(criterion: Criterion) -> None:
    if criterion.sees in ("nothing", "angles", "task"):
        assert criterion.name in {"random", "block-influence", *RUNS}  # they see no unit that could be moved
        return
    order = torch.tensor([3, 0, 4, 1, 2])
    for options in OPTIONS.get(criterion.name, [{}]):
        seen = sight(criterion)
        moved = criterion.score(permuted(seen, order), **options)
        torch.testing.assert_close(moved, criterion.score(seen, **options)[order])


@EVERY
def test_dead_units_score_nothing(criterion: Criterion) -> None:
    """A unit whose weights are all zero, or that never fires."""
    if criterion.sees not in ("weight", "grad", "fisher", "flow"):
        return
    seen = sight(criterion)
    for tensor in tensors(seen):
        tensor[2] = 0
    for options in OPTIONS.get(criterion.name, [{}]):
        scores = criterion.score(seen, **options)
        assert scores[2] == 0
        assert scores.min() >= 0


W = torch.tensor([[[1.0, -2.0, 3.0]], [[0.0, 4.0, -1.0]]])  # (2 units, width 1, 3)
G = torch.tensor([[[0.5, 1.0, -1.0]], [[9.0, -0.5, 2.0]]])
F = torch.tensor([[[2.0, 1.0, 0.0]], [[5.0, 0.25, 1.0]]])
ANGLES = torch.tensor([[1.0, 0.9, 0.5], [0.9, 1.0, 0.8], [0.5, 0.8, 1.0]])  # two layers, three streams


def weights(name: str, **options: Any) -> list[float]:
    seen = Sight("neuron", 2, weight=W, grad=G, fisher=F)
    return list(CRITERIA.get(name).score(seen, **options).tolist())


def flowing(**options: Any) -> list[float]:
    """Three sequences; unit 0 has channels (1,2,2) and (0,3,0), unit 1 has (2,2,2) and (1,1,1)."""
    each = torch.tensor([[[1.0, 0], [2, 1]], [[2, 3], [2, 1]], [[2, 0], [2, 1]]])
    moments = Moments(each.sum(0), each.square().sum(0), 3)
    seen = Sight("head", 2, flow={"mean": moments, "var": moments})
    return list(CRITERIA.get("activation").score(seen, **options).tolist())


def layers(name: str) -> Any:
    seen = Sight("layer", 2, angles=ANGLES, removal=torch.tensor([0.25, -0.5]))
    return CRITERIA.get(name).score(seen).tolist()


def hand_activation() -> None:
    assert flowing() == pytest.approx([(9 + 9) ** 0.5, (12 + 3) ** 0.5])
    assert flowing(batch="mean") == pytest.approx([((5 / 3) ** 2 + 1) ** 0.5, 5**0.5])
    assert flowing(sequence="var", batch="var") == pytest.approx([((2 / 9) ** 2 + 2**2) ** 0.5, 0])


def hand_contiguous_task() -> None:
    """One layer of two: without the first 6 of 10 go wrong at 1 bit a byte, without the second 6 at 3 bits."""
    runs = torch.full((2, 2, 3), torch.nan)
    runs[:, 0, 1], runs[:, 1, 2] = torch.tensor([6.0, 1.0]), torch.tensor([6.0, 3.0])
    found = CRITERIA.get("contiguous-task").score(Sight("layer", 2, runs={"piqa": runs}), task="piqa", limit=10)
    assert (found[0, 1].item(), found[1, 2].item()) == pytest.approx((0.65, 0.675))
    assert bool(found[0, 0].isnan())


def hand_random() -> None:
    score = CRITERIA.get("random").score
    ours = score(Sight("neuron", 2, seed=7))
    assert ours.tolist() == torch.rand(2, generator=torch.Generator().manual_seed(7)).tolist()
    assert not torch.equal(ours, score(Sight("neuron", 2, seed=8)))


def hand_magnitude() -> None:
    assert weights("magnitude") == [1 + 4 + 9, 16 + 1]
    assert weights("magnitude", power=1) == [6, 5]


def hand_taylor() -> None:
    assert weights("taylor") == [0.5 + 2 + 3, 0 + 2 + 2]


def hand_vectorize() -> None:
    assert weights("taylor-vectorize") == [abs(0.5 - 2 - 3), abs(0 - 2 - 2)]
    two_rows = Sight("head", 1, weight=W.reshape(1, 2, 3), grad=G.reshape(1, 2, 3))
    assert CRITERIA.get("taylor-vectorize").score(two_rows).tolist() == [4.5 + 4]  # rows first, then their sizes


def hand_second() -> None:
    assert weights("taylor-second") == [1 * 2 + 4 * 1 + 0, 0 + 16 * 0.25 + 1]


def hand_mix() -> None:
    assert weights("taylor-mix") == [
        abs(0.5 - 2 / 2) + abs(-2 - 4 / 2) + abs(-3 - 0),
        0 + abs(-2 - 4 / 2) + abs(-2 - 1 / 2),
    ]


def hand_influence() -> None:
    assert layers("block-influence") == pytest.approx([1 - 0.9, 1 - 0.8])


def hand_perplexity() -> None:
    assert layers("perplexity") == [0.25, -0.5]


def hand_contiguous() -> None:
    """Removing layer 0 costs 0.1, layer 1 costs 0.2, both cost 0.5; a run of none costs nothing."""
    assert layers("contiguous") == [pytest.approx([0, 0.1, 0.5]), pytest.approx([0, 0, 0.2])]


BY_HAND: dict[str, Callable[[], None]] = {
    "activation": hand_activation,
    "block-influence": hand_influence,
    "contiguous": hand_contiguous,
    "contiguous-task": hand_contiguous_task,
    "magnitude": hand_magnitude,
    "perplexity": hand_perplexity,
    "random": hand_random,
    "taylor": hand_taylor,
    "taylor-mix": hand_mix,
    "taylor-second": hand_second,
    "taylor-vectorize": hand_vectorize,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    BY_HAND[name]()


def test_identities_of_the_taylor_forms() -> None:
    """Mix is first order when F = 0 and half of second order when g = 0; sums bound each other."""
    criterion = CRITERIA.get("taylor-mix")
    seen = sight(criterion)
    assert seen.weight is not None
    zero = torch.zeros_like(seen.weight)
    score = {name: CRITERIA.get(name).score for name in NAMES if name.startswith("taylor")}
    torch.testing.assert_close(
        score["taylor-mix"](replace(seen, fisher=zero)), score["taylor"](replace(seen, fisher=zero))
    )
    torch.testing.assert_close(
        score["taylor-mix"](replace(seen, grad=zero)), score["taylor-second"](replace(seen, grad=zero)) / 2
    )
    assert bool((score["taylor-vectorize"](seen) <= score["taylor"](seen) + 1e-6).all())
    assert bool((score["taylor-second"](seen) >= 0).all())
