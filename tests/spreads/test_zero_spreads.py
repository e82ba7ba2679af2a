"""How zeros are shared among layers: the total that was asked, who gets more, and the traces that one of them reads."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from models import anatomy_of, make
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.share import LEAST, ZERO_SPREADS, ZeroSpread, levelled, rounded, share
from regrow.engines.trace import traces
from regrow.engines.zeros import prunable
from regrow.errors import BrokenModel, SettingsError, UnknownName
from regrow.spreads.zeros import OUTLIER, by_outliers, by_rank, outliers

NAMES = ZERO_SPREADS.names()
EVERY = pytest.mark.parametrize("spread", [ZERO_SPREADS.get(n) for n in NAMES], ids=NAMES)
PERCENTAGES = ("0%", "0.5%", "5%", "33.3%", f"{100 / 3}%", "50%", "75%", "95%", "99.9%")
GROUPS = ("1:2", "2:4", "1:4", "3:4", "4:8", "2:8", "8:16", "15:16")


def draws(count: int = 60) -> list[tuple[list[float], list[int]]]:
    """(what a layer measures, weights of it) for models of one to twelve layers."""
    source = random.Random(0)
    found = []
    for _ in range(count):
        layers = source.randint(1, 12)
        measures = [source.random() ** 3 for _ in range(layers)]
        found.append((measures, [source.randint(50, 400) for _ in range(layers)]))
    return found


def shared(spread: ZeroSpread, pattern: str, measures: Sequence[float], weights: Sequence[int] | None = None) -> Any:
    return share(Pattern.parse(pattern), measures, weights or [100] * len(measures), spread)


def mean(patterns: Sequence[Pattern], weights: Sequence[int]) -> Fraction:
    return sum((w * p.zeros for w, p in zip(weights, patterns, strict=True)), Fraction(0)) / sum(weights)


# ---- one battery over every spread


def test_head_count() -> None:
    assert NAMES == ["hessian", "owl", "uniform"]


def test_an_unknown_spread() -> None:
    with pytest.raises(UnknownName, match="did you mean 'owl'"):
        ZERO_SPREADS.get("olw")


@EVERY
def test_it_says_what_it_is(spread: ZeroSpread) -> None:
    assert spread.about.endswith(".")
    assert len(spread.about) <= 120
    assert spread.paper
    assert 0 <= spread.band < 0.2
    assert spread.groups in (0, 1)


@EVERY
@pytest.mark.parametrize("pattern", PERCENTAGES)
def test_percentages_meet_the_mean_over_weights(spread: ZeroSpread, pattern: str) -> None:
    asked = Pattern.parse(pattern)
    for measures, weights in draws():
        found = shared(spread, pattern, measures, weights)
        assert len(found) == len(measures)
        assert mean(found, weights) == asked.zeros
        assert all(min(LEAST, asked.zeros) <= p.zeros <= max(1 - LEAST, asked.zeros) for p in found)
        assert max(abs(p.zeros - asked.zeros) for p in found) <= 2 * spread.band + 1e-5
        assert not any(p.of for p in found)


@EVERY
@pytest.mark.parametrize("pattern", GROUPS)
def test_groups_meet_the_total_exactly(spread: ZeroSpread, pattern: str) -> None:
    asked = Pattern.parse(pattern)
    for measures, _ in draws():
        found = shared(spread, pattern, measures)
        assert sum(p.keep for p in found) == len(measures) * asked.keep
        assert {p.of for p in found} == {asked.of}
        assert max(abs(p.keep - asked.keep) for p in found) <= 2 * spread.groups
        assert all(0 < p.keep < p.of for p in found)


@EVERY
def test_measures_are_left_alone_and_equal_ones_share_alike(spread: ZeroSpread) -> None:
    measures = [0.3, 0.1, 0.2]
    shared(spread, "50%", measures)
    assert measures == [0.3, 0.1, 0.2]
    assert shared(spread, "50%", measures) == shared(spread, "50%", measures)


def test_largest_remainders_by_hand() -> None:
    """Zeros wanted of eight: 6 + 0.6, 6 - 0.1, 6 - 0.5; rounded down 6, 5, 5, and the two missing go to .9 and .6."""
    spread = ZeroSpread("x", "nothing", "-", "X.", float, list, 0.1, 1.0)
    found = share(Pattern.parse("2:8"), [0.6, -0.1, -0.5], [10, 10, 10], spread)
    assert [p.of - p.keep for p in found] == [7, 6, 5]
    with_band = share(Pattern.parse("50%"), [0.6, -0.1, -0.5], [10, 10, 10], spread)
    assert [float(p.zeros) for p in with_band] == pytest.approx([0.56, 0.49, 0.45], abs=1e-6)


def test_large_layers_count_as_what_they_are() -> None:
    """A layer nine times as large moves the mean nine times as far: offsets 1 and -1 are centred at .8."""
    spread = ZeroSpread("x", "nothing", "-", "X.", float, list, 0.1, 1.0)
    found = share(Pattern.parse("50%"), [1.0, -1.0], [90, 10], spread)
    assert [float(p.zeros) for p in found] == pytest.approx([0.52, 0.32], abs=1e-6)
    assert abs(mean(found, [90, 10]) - Fraction(1, 2)) < 1e-6
    assert abs(mean(found, [50, 50]) - Fraction(1, 2)) > 0.07  # what a mean over layers would have met


def test_what_a_full_layer_cannot_take_goes_to_the_others() -> None:
    """Wanted .95 and .08 about it: 1.03 is more than .99, so the others go up by .02."""
    spread = ZeroSpread("x", "nothing", "-", "X.", float, list, 0.08, 1.0)
    found = share(Pattern.parse("95%"), [1.0, 0.0, -1.0], [7, 7, 7], spread)
    assert [p.zeros for p in found] == [Fraction(99, 100), Fraction(97, 100), Fraction(89, 100)]
    late = [min(Fraction(95 + by, 100), 1 - LEAST) for by in (8, 0, -8)]  # the mutation: bounded after sharing
    assert sum(late) < 3 * Fraction(95, 100)


def test_sharing_again_meets_the_mean_and_keeps_the_order() -> None:
    source = random.Random(2)
    for _ in range(200):
        layers, parts = source.randint(1, 9), range(-40, 140)
        wishes = [Fraction(source.choice(parts), 100) for _ in range(layers)]
        weights = [source.randint(1, 30) for _ in range(layers)]
        level = Fraction(source.randint(0, 60), 60)
        found = levelled(wishes, weights, level, Fraction(0), Fraction(1))
        assert sum(w * x for w, x in zip(weights, found, strict=True)) == level * sum(weights)
        assert all(0 <= x <= 1 for x in found)
        shifts = {x - wish for x, wish in zip(found, wishes, strict=True) if 0 < x < 1}
        assert len(shifts) <= 1


def rounding(numbers: Sequence[int], wishes: Sequence[Fraction], weights: Sequence[int]) -> tuple[Fraction, Fraction]:
    """How far the sum is moved, and how far all of it."""
    moved = [w * (n - x) for n, x, w in zip(numbers, wishes, weights, strict=True)]
    return abs(sum(moved, Fraction(0))), sum(map(abs, moved), Fraction(0))


def test_whole_numbers_come_as_near_as_can_be() -> None:
    """Against all ways to round: the nearest sum, and of those the least rounding."""
    source = random.Random(3)
    for _ in range(100):
        layers = source.randint(1, 7)
        wishes = [Fraction(source.randint(100, 300), 100) for _ in range(layers)]
        weights = [source.choice((6, 10, 15, 77)) for _ in range(layers)]
        ways = product(*({math.floor(x), math.ceil(x)} for x in wishes))
        best = min(rounding(way, wishes, weights) for way in ways)
        assert rounding(rounded(wishes, weights), wishes, weights) == best


def test_many_layers_of_many_sizes_are_soon_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few sums are followed the total is still met to a small part of one layer."""
    source = random.Random(4)
    weights = [source.randint(10**8, 2 * 10**8) for _ in range(80)]
    measures = [source.random() for _ in weights]
    monkeypatch.setattr("regrow.artifacts.share.SUMS", 1024)
    found = shared(ZERO_SPREADS.get("owl"), "4:8", measures, weights)
    assert len({p.keep for p in found}) == 3
    assert abs(sum(w * (p.keep - 4) for w, p in zip(weights, found, strict=True))) < min(weights) / 20


def test_no_layer_has_weights() -> None:
    """Everything inside is left dense, and the embedding alone becomes sparse."""
    for name in NAMES:
        for pattern in ("50%", "4:8"):
            assert shared(ZERO_SPREADS.get(name), pattern, [0.0, 0.0], [0, 0]) == [Pattern.parse(pattern)] * 2


def test_a_layer_without_weights_has_no_say() -> None:
    for name in NAMES:
        spread = ZERO_SPREADS.get(name)
        for pattern in ("50%", "4:8"):
            found = shared(spread, pattern, [0.0, 2.0, 4.0, 6.0], [0, 10, 10, 10])
            assert found == [Pattern.parse(pattern), *shared(spread, pattern, [2.0, 4.0, 6.0], [10, 10, 10])]


@pytest.mark.parametrize("name", ["owl", "hessian"])
@pytest.mark.parametrize("pattern", GROUPS)
def test_groups_of_layers_of_different_sizes(name: str, pattern: str) -> None:
    """Of two sizes: no rounding comes nearer, so the total is off by half a weight of one layer's groups at most."""
    kept = Pattern.parse(pattern).keep
    for measures, weights in draws():
        sizes = [100 if w < 225 else 75 for w in weights]
        found = shared(ZERO_SPREADS.get(name), pattern, measures, sizes)
        assert all(0 < p.keep < p.of for p in found)
        assert abs(sum(w * (p.keep - kept) for w, p in zip(sizes, found, strict=True))) <= max(sizes) / 2


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "3:4", "0%", "0.5%", "99.9%"])
def test_where_no_layer_can_give_way_all_get_the_same(pattern: str) -> None:
    """One weight less in some layers would leave others dense, or empty."""
    for name in NAMES:
        assert set(shared(ZERO_SPREADS.get(name), pattern, [1.0, 2.0, 3.0])) == {Pattern.parse(pattern)}


# ---- uniform


@pytest.mark.parametrize("pattern", [*PERCENTAGES, *GROUPS])
def test_uniform_gives_every_layer_what_was_asked(pattern: str) -> None:
    for measures, weights in draws(10):
        found = shared(ZERO_SPREADS.get("uniform"), pattern, measures, weights)
        assert found == [Pattern.parse(pattern)] * len(measures)


# ---- owl


def outlying(*matrices: Tensor) -> float:
    return outliers(lambda: iter(matrices))


def test_outliers_by_hand() -> None:
    """Means 2: only what lies above 10 counts, and 10 itself does not."""
    assert OUTLIER == 5
    assert outlying(torch.tensor([1.0] * 9 + [11.0])) == pytest.approx(10)
    assert outlying(torch.tensor([0.0] * 4 + [10.0])) == 0
    assert outlying(torch.ones(7)) == 0
    assert outlying(torch.tensor([1.0] * 99 + [600.0])) == pytest.approx(1)


def test_outliers_know_no_scale_and_no_matrices() -> None:
    """The mean is that of a layer, however its scores are dealt to matrices."""
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs() ** 3
    assert outlying(64 * scores) == outlying(scores) > 0
    small, large = scores.sort().values.split([900, 100])
    assert outlying(small, large.view(4, 25)) == outlying(scores)
    assert outlying(large) != outlying(scores)


def test_more_outliers_fewer_zeros() -> None:
    spread = ZERO_SPREADS.get("owl")
    found = [float(p.zeros) for p in shared(spread, "50%", [3.0, 1.0, 7.0, 5.0])]
    order = sorted(range(4), key=lambda i: found[i])
    assert order == [2, 3, 0, 1]
    assert len(set(found)) == 4


def test_the_ends_of_owl_lie_two_bands_apart() -> None:
    spread = ZERO_SPREADS.get("owl")
    for measures, _ in draws():
        if len(set(measures)) == 1:
            continue
        found = [p.zeros for p in shared(spread, "50%", measures)]
        assert float(max(found) - min(found)) == pytest.approx(2 * spread.band, abs=3e-6)
        assert found.index(min(found)) == measures.index(max(measures))
        assert found.index(max(found)) == measures.index(min(measures))


def test_owl_by_hand() -> None:
    assert by_outliers([2.0, 4.0, 6.0]) == [1.0, 0.0, -1.0]
    zeros = [float(p.zeros) for p in shared(ZERO_SPREADS.get("owl"), "50%", [2.0, 4.0, 6.0])]
    assert zeros == pytest.approx([0.58, 0.5, 0.42], abs=1e-6)
    assert [p.keep for p in shared(ZERO_SPREADS.get("owl"), "4:8", [2.0, 4.0, 6.0])] == [3, 4, 5]


@pytest.mark.parametrize("measures", [[0.0], [0.0] * 5, [3.5] * 2])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_nothing_to_tell_layers_apart(measures: list[float], pattern: str) -> None:
    assert shared(ZERO_SPREADS.get("owl"), pattern, measures) == [Pattern.parse(pattern)] * len(measures)


# ---- by the trace of the Hessian


def test_the_most_curved_layer_gets_fewest_zeros() -> None:
    assert by_rank([5.0, -1.0, 100.0]) == [0.0, 1.0, -1.0]
    assert by_rank([7.0]) == [0.0]
    found = shared(ZERO_SPREADS.get("hessian"), "50%", [5.0, -1.0, 100.0])
    assert [float(p.zeros) for p in found] == pytest.approx([0.5, 0.55, 0.45], abs=1e-6)


def test_only_the_order_of_traces_counts() -> None:
    source = random.Random(1)
    measures = [source.uniform(0.1, 9) for _ in range(9)]
    assert by_rank(measures) == by_rank([m**3 for m in measures])
    assert by_rank(measures) != by_rank([-m for m in measures])
    assert sorted(by_rank(measures)) == pytest.approx([i / 4 - 1 for i in range(9)])


@dataclass(frozen=True)
class Curved:
    """A model so small that its whole Hessian is known."""

    model: Any
    blocks: Tensor  # (1, T)
    hessian: Tensor  # (n, n) over all weight matrices
    layers: Tensor  # (n,) whose layer a weight is in

    @property
    def exact(self) -> list[float]:
        return [float(self.hessian.diagonal()[self.layers == i].sum()) for i in range(2)]

    def deviations(self) -> list[float]:
        """Standard deviation of one probe: pairs inside a layer count twice, pairs across layers once."""
        squares = (self.hessian - self.hessian.diag().diag()).square()
        found = []
        for i in range(2):
            mine = squares[self.layers == i]
            found.append(float(2 * mine[:, self.layers == i].sum() + mine[:, self.layers != i].sum()) ** 0.5)
        return found


@pytest.fixture(scope="module")
def curved() -> Curved:
    model = make(
        "llama",
        hidden_size=4,
        intermediate_size=3,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=16,
    )
    anatomy = anatomy_of(model)
    blocks = torch.randint(3, 16, (1, 12), generator=torch.Generator().manual_seed(0))
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in prunable(anatomy)]
    with sdpa_kernel(SDPBackend.MATH):
        logits = model(input_ids=blocks, use_cache=False).logits
        loss = cross_entropy(logits[0, :-1], blocks[0, 1:])
        first = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
        rows = [torch.autograd.grad(g, weights, retain_graph=True) for g in first]
    layer = {tensor.name: int(tensor.layer or 0) for tensor in anatomy.tensors}
    layers = torch.cat([torch.full((parameters[n].numel(),), layer[n]) for n in prunable(anatomy)])
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return Curved(model, blocks, hessian, layers)


PROBES = 150


def off(curved: Curved, **more: Any) -> list[float]:
    """How many standard errors each layer's estimate is from the exact trace."""
    found = traces(curved.model, anatomy_of(curved.model), curved.blocks, probes=PROBES, **more)
    errors = [deviation / PROBES**0.5 for deviation in curved.deviations()]
    return [abs(f - e) / error for f, e, error in zip(found, curved.exact, errors, strict=True)]


def test_the_exact_hessian_is_one(curved: Curved) -> None:
    assert len(curved.hessian) == len(curved.layers) == 168
    assert torch.allclose(curved.hessian, curved.hessian.T, atol=1e-4)
    assert min(abs(e) for e in curved.exact) > 0.01
    assert abs(curved.exact[0] - curved.exact[1]) > 0.01


def test_traces_are_those_of_the_exact_hessian(curved: Curved) -> None:
    for seed in (0, 1):
        assert max(off(curved, seed=seed)) < 4


def test_probes_that_are_not_random_are_found_out(curved: Curved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda _high, shape, **_: torch.ones(shape, dtype=torch.int64))
    assert max(off(curved)) > 4


def test_what_stays_dense_has_no_say(curved: Curved) -> None:
    """All matrices of a layer, then one: its part of the exact trace is gone."""
    anatomy = anatomy_of(curved.model)
    first = [name.removesuffix(".weight") for name in prunable(anatomy) if ".layers.0." in name]
    assert traces(curved.model, anatomy, curved.blocks, leave=first, probes=2)[0] == 0
    whole = traces(curved.model, anatomy, curved.blocks, probes=2)
    assert traces(curved.model, anatomy, curved.blocks, leave=["layers.0.mlp.down_proj"], probes=2)[0] != whole[0]


def test_a_trace_that_is_no_number(curved: Curved) -> None:
    """fp16 overflows without a word; a ranking by NaN would look like any other."""
    model = copy.deepcopy(curved.model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(BrokenModel, match="the Hessian of layer 0 has a trace that is not finite"):
        traces(model, anatomy_of(model), curved.blocks, probes=1)


def test_equal_seeds_give_equal_traces(curved: Curved) -> None:
    anatomy = anatomy_of(curved.model)
    one, same, other = (traces(curved.model, anatomy, curved.blocks, probes=2, seed=s) for s in (3, 3, 4))
    assert one == same != other


def test_gradients_are_left_as_they_were(curved: Curved) -> None:
    model, anatomy = curved.model, anatomy_of(curved.model)
    parameters = dict(model.named_parameters())
    frozen = prunable(anatomy)[::2]
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    done: list[tuple[int, int]] = []
    traces(model, anatomy, curved.blocks, probes=2, progress=lambda *seen: done.append(seen))
    assert done == [(1, 2), (2, 2)]
    with pytest.raises(IndexError):
        traces(model, anatomy, curved.blocks + 1000)  # ids that the model does not have
    assert [name for name, p in parameters.items() if not p.requires_grad] == frozen
    assert all(p.grad is None for p in parameters.values())
    model.requires_grad_(True)


# ---- bad input


@pytest.mark.parametrize("text", ["100%", "-5%", "4:4", "5:4", "0:4", "2 of 4", "", "half", "2:4%"])
def test_nonsense_is_no_pattern(text: str) -> None:
    with pytest.raises(SettingsError, match="write 50%"):
        Pattern.parse(text)
