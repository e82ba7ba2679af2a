"""Shapes to choose among: how many there are, which fit a budget, which no other exceeds."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.artifacts.budget import Budget, Latency
from regrow.artifacts.shape import Anatomy, count
from regrow.artifacts.space import Space, drawn, full, inside, said, shape_of, space_of, totals_of, unbeaten
from regrow.engines.bind import bind
from regrow.errors import BudgetError, SettingsError

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "tie_word_embeddings": True,
}


def small() -> Anatomy:
    return bind(LlamaConfig(**SMALL))


def test_the_published_grids() -> None:
    """Minitron's 160 and 240 combinations; 18 of the latter lie within 5 % of four billion, as printed."""
    ratios = (2.5, 3, 3.5, 4)
    eight = Space({"layer": (29, 30, 31, 32), "head": (4, 6), "neuron": (1, 2, 3, 4), "channel": (1, 2, 3, 4, 5)})
    four = Space({"layer": (29, 30, 31, 32), "head": (3, 4, 6), "neuron": (0, 1, 2, 3), "channel": tuple(range(5))})
    assert (eight.size, four.size) == (160, 240)
    assert len(list(four.grid())) == four.size
    widths = (2560, 3072, 3584, 4096, 4608)
    sizes = []
    for point in four.grid():
        d = widths[point["channel"]]
        f = ratios[point["neuron"]] * d
        sizes.append(2 * 256_000 * d + point["layer"] * (2 * d * 8 * point["head"] * 128 + 2 * d * 8 * 128 + 2 * d * f))
    assert sum(0.95 * 4e9 <= size <= 1.05 * 4e9 for size in sizes) == 18


def test_values_go_down_from_the_whole() -> None:
    space = space_of(small(), ("layer", "head", "neuron"), {}, {"neuron": 16})
    assert space.choices == {"layer": (4,), "head": (2,), "neuron": (48, 32)}
    deep = space_of(bind(LlamaConfig(**SMALL | {"num_hidden_layers": 10})), ("layer",), {}, {})
    assert deep.choices == {"layer": (10, 9, 8)}
    named = space_of(small(), ("layer", "neuron"), {"layer": (2, 4, 2), "neuron": (7,)}, {})
    assert named.choices == {"layer": (4, 2), "neuron": (7,)}


def test_wide_models_have_no_more_values_than_narrow_ones() -> None:
    wide = space_of(bind(LlamaConfig(**SMALL | {"intermediate_size": 14336})), ("neuron",), {}, {})
    values = wide.choices["neuron"]
    assert len(values) <= 33
    assert values[0] == 14336
    assert all(value % 32 == 0 and value >= 0.6 * 14336 for value in values)


@pytest.mark.parametrize("budget", ["80%", "20K", "kv=75%", "flops=70%", "30KB"])
def test_all_are_inside_by_the_real_count(budget: str) -> None:
    anatomy = small()
    space = space_of(anatomy, ("layer", "group", "head", "neuron", "channel"), {"layer": (4, 3), "group": (2, 1)}, {
        "neuron": 8, "channel": 8
    })  # fmt: skip
    wish = Budget.parse(budget)
    points = inside(anatomy, space, [wish], 0.3)
    target = wish.target(anatomy)
    assert points
    for point in points:
        counted = wish.count(anatomy, shape_of(anatomy, point))
        assert 0.7 * target <= counted <= target
    out = [p for p in space.grid() if p not in points]
    assert all(not 0.7 * target <= wish.count(anatomy, shape_of(anatomy, p)) <= target for p in out)
    counts = [wish.count(anatomy, shape_of(anatomy, point)) for point in points]
    assert counts == sorted(counts, reverse=True)


def test_the_count_is_that_of_the_built_model() -> None:
    anatomy = small()
    for point in space_of(anatomy, ("layer", "neuron"), {"layer": (4, 2)}, {"neuron": 16}).grid():
        changed = SMALL | {"num_hidden_layers": point["layer"], "intermediate_size": point["neuron"]}
        assert count(anatomy, shape_of(anatomy, point)) == LlamaForCausalLM(LlamaConfig(**changed)).num_parameters()


def test_every_budget_counts() -> None:
    anatomy = small()
    space = space_of(anatomy, ("group", "neuron"), {"group": (2, 1)}, {"neuron": 8})
    budgets = [Budget.parse("90%"), Budget.parse("kv=50%")]
    both = inside(anatomy, space, budgets, 1.0)
    assert both == [point for point in inside(anatomy, space, budgets[:1], 1.0) if point["group"] == 1]


def test_unbeaten_by_brute_force() -> None:
    points = [{"layer": a, "neuron": b} for a, b in product(range(1, 6), repeat=2) if a * b <= 10]
    left = unbeaten(points)
    for point in points:
        over = [p for p in points if p != point and p["layer"] >= point["layer"] and p["neuron"] >= point["neuron"]]
        assert (point in left) == (not over)
    assert unbeaten([{"layer": 2}, {"layer": 2}]) == [{"layer": 2}, {"layer": 2}]


def test_lots_are_the_same_for_the_same_seed() -> None:
    points = [{"layer": i} for i in range(40)]
    assert drawn(points, 5, 0) == drawn(points, 5, 0) != drawn(points, 5, 1)
    assert drawn(points, 50, 0) == points
    kept = [p["layer"] for p in drawn(points, 5, 3)]
    assert kept == sorted(set(kept))


def test_totals_are_over_the_layers_that_stay() -> None:
    anatomy = small()
    assert full(anatomy) == {"layer": 4, "group": 2, "head": 2, "neuron": 48, "channel": 32}
    assert totals_of(anatomy, {"layer": 3, "neuron": 10, "channel": 16}) == {"layer": 3, "neuron": 30, "channel": 16}
    assert totals_of(anatomy, {"head": 1}) == {"head": 4}
    assert said({"layer": 3, "neuron": 10}) == "layer=3,neuron=10"


def test_out_of_reach() -> None:
    anatomy = small()
    space = space_of(anatomy, ("neuron",), {}, {"neuron": 16})
    with pytest.raises(BudgetError, match="within 1 % below") as wide:
        inside(anatomy, space, [Budget.parse("95%")], 0.01)
    band = float(re.findall(r"widen search.band to ([\d.]+),", str(wide.value))[0])
    assert inside(anatomy, space, [Budget.parse("95%")], band)
    with pytest.raises(BudgetError, match="none of 2 shapes is inside"):
        inside(anatomy, space, [Budget.parse("100%"), Budget.parse("kv=0KB")], 1)
    with pytest.raises(SettingsError, match="not among the axes"):
        space_of(anatomy, ("neuron",), {"layer": (2,)}, {})
    with pytest.raises(SettingsError, match="1 to 48"):
        space_of(anatomy, ("neuron",), {"neuron": (64,)}, {})


@pytest.mark.parametrize("asked", [("10%",), ("10%", "kv=10%"), ("100%", "kv=10%"), ("10K", "flops=90%")])
def test_the_nearest_that_is_named_can_be_had(asked: tuple[str, ...]) -> None:
    """It lies as little beyond the budgets as any; asked for exactly, it is a shape."""
    anatomy = small()
    space = space_of(anatomy, ("group", "neuron"), {"group": (2, 1)}, {"neuron": 16})
    budgets = [Budget.parse(text) for text in asked]
    shapes = [shape_of(anatomy, point) for point in space.grid()]
    counts = [[budget.count(anatomy, shape) for budget in budgets] for shape in shapes]
    with pytest.raises(BudgetError, match=r"none of 4 shapes is inside.*\n.*the nearest has") as caught:
        inside(anatomy, space, budgets, 0.05)
    named = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) [a-z]", caught.value.allowed)]

    def beyond(row: list[int]) -> float:
        return max(n / budget.target(anatomy) for n, budget in zip(row, budgets, strict=True))

    assert beyond(named) == min(map(beyond, counts)) < max(map(beyond, counts))
    kinds = {
        "decoder_weights": "decoder",
        "kv_bytes_per_token": "kv",
        "flops_per_token": "flops",
        "parameters": "params",
    }
    exactly = [Budget.parse(f"{kinds[b.measure]}={n}") for b, n in zip(budgets, named, strict=True)]
    assert [b.measure for b in exactly] == [b.measure for b in budgets]
    (point,) = inside(anatomy, space, exactly, 0)
    assert [budget.count(anatomy, shape_of(anatomy, point)) for budget in budgets] == named


def test_latencies() -> None:
    assert Latency.parse("12.5 ms") == Latency(12.5, relative=False)
    assert Latency.parse("80%") == Latency(0.8, relative=True)
    for bad in ("12", "0ms", "-3ms", "fast", "80"):
        with pytest.raises(BudgetError, match="not understood"):
            Latency.parse(bad)
