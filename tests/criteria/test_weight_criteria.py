"""One battery over every registered criterion of single weights, and each worked by hand on a 2 x 3 example."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regrow.artifacts.linear import SOLVERS
from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA, WeightCriterion, WeightSight, weight_criterion

NAMES = WEIGHT_CRITERIA.names()
EVERY = pytest.mark.parametrize("criterion", [WEIGHT_CRITERIA.get(n) for n in NAMES], ids=NAMES)
HAND = WeightSight(
    weight=torch.tensor([[1.0, -2, 3], [-4, 0, 6]]),
    norm=torch.tensor([3.0, 1, 2]),
    pivot=torch.tensor([0.5, 1, 2]),
    diagonal=torch.tensor([8.0, 2, 1]),
    inverse_diagonal=torch.tensor([0.25, 1, 4]),
)
BY_HAND = {
    "magnitude": [[1.0, 2, 3], [4, 0, 6]],
    "wanda": [[3.0, 2, 6], [12, 0, 12]],
    "wanda-variant": [[5 / 11, 2 / 11, 1], [0.5, 0, 1]],  # of 2, 3, 6 and of 0, 12, 12; of equals the first goes first
    "moe-pruner": [[3.0, 2, 6], [12, 0, 12]],
    "sparsegpt": [[4.0, 4, 2.25], [64, 0, 9]],
    "isc": [[6.0, 6, 5.625], [96, 0, 22.5]],
}


def sight(rows: int = 4, columns: int = 6, seed: int = 0) -> WeightSight:
    source = torch.Generator().manual_seed(seed)

    def positive() -> Tensor:
        return torch.rand(columns, generator=source) + 0.1

    return WeightSight(torch.randn(rows, columns, generator=source), positive(), positive(), positive(), positive())


def columns(seen: WeightSight, chosen: Tensor | slice) -> WeightSight:
    vectors = ("norm", "pivot", "diagonal", "inverse_diagonal")
    return replace(seen, weight=seen.weight[:, chosen], **{name: getattr(seen, name)[chosen] for name in vectors})


def test_head_count() -> None:
    assert NAMES == ["isc", "magnitude", "moe-pruner", "sparsegpt", "wanda", "wanda-variant"] == sorted(BY_HAND)


@EVERY
def test_by_hand(criterion: WeightCriterion) -> None:
    assert torch.equal(criterion.score(HAND), torch.tensor(BY_HAND[criterion.name]))


@EVERY
def test_pure_finite_and_shaped(criterion: WeightCriterion) -> None:
    seen = sight()
    before = seen.weight.clone()
    found = criterion.score(seen)
    assert found.shape == seen.weight.shape
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())
    assert torch.equal(criterion.score(seen), found)
    assert torch.equal(seen.weight, before)
    assert criterion.about.endswith(".")
    assert criterion.solver in SOLVERS.names()


@EVERY
def test_columns_are_judged_one_by_one(criterion: WeightCriterion) -> None:
    """A permutation moves the scores along, and where a solver asks again about a few columns they stand alone."""
    seen = sight()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(criterion.score(columns(seen, order)), criterion.score(seen)[:, order])
    alone = torch.equal(criterion.score(columns(seen, slice(2, 5))), criterion.score(seen)[:, 2:5])
    assert alone is (criterion.name != "wanda-variant")
    assert alone or not criterion.adapts


@EVERY
def test_signs_do_not_matter_and_zero_scores_nothing(criterion: WeightCriterion) -> None:
    seen = sight()
    assert torch.equal(criterion.score(replace(seen, weight=-seen.weight)), criterion.score(seen))
    assert not criterion.score(replace(seen, weight=torch.zeros(4, 6))).any()


def test_wanda_does_not_care_how_a_channel_is_scaled() -> None:
    wanda, seen = WEIGHT_CRITERIA.get("wanda"), sight(8, 32)
    assert seen.norm is not None
    scale = torch.ones(32)
    scale[5] = 64.0
    other = replace(seen, weight=seen.weight / scale, norm=seen.norm * scale)
    pattern = Pattern.parse("50%")
    assert torch.equal(lowest(wanda.score(other), pattern, "row"), lowest(wanda.score(seen), pattern, "row"))


def test_wanda_with_equal_inputs_is_magnitude_within_a_row() -> None:
    seen = replace(sight(8, 32), norm=torch.full((32,), 3.0))
    scores = [WEIGHT_CRITERIA.get(name).score(seen) for name in ("wanda", "magnitude")]
    masks = [lowest(s, Pattern.parse("50%"), "row") for s in scores]
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], lowest(scores[1], Pattern.parse("50%"), "matrix"))


# ---- Wanda's variant


def bisected(scores: Tensor, zeros: float) -> tuple[Tensor, float]:
    """The paper's code: what goes, and the share of each row's sum that goes with it."""
    rising = scores.sort(dim=1).values
    most = scores.sum(1, keepdim=True)
    low, high, share = 0.0, 0.8, 0.4
    while True:
        count = (rising.cumsum(1) <= share * most).sum(1, keepdim=True)
        edge = rising.gather(1, (count - 1).clamp_min(0))
        gone = (scores <= edge) & (count > 0)
        off = float(gone.double().mean()) - zeros
        if abs(off) <= 0.001 or high - low < 0.001:
            return gone, share
        low, high = (low, share) if off > 0 else (share, high)
        share = (low + high) / 2


@pytest.mark.parametrize("zeros", [30, 50, 60])
def test_the_variant_is_the_bisection_with_an_exact_count(zeros: int) -> None:
    """The same rows in the same order, and the count that was asked; at the bisection's own share the same mask."""
    seen = sight(64, 256, seed=3)
    scores = WEIGHT_CRITERIA.get("wanda-variant").score(seen)
    ours = lowest(scores, Pattern.parse(f"{zeros}%"), "matrix")
    theirs, share = bisected(WEIGHT_CRITERIA.get("wanda").score(seen), zeros / 100)
    assert int(ours.sum()) == zeros * ours.numel() // 100
    assert abs(int(theirs.sum()) - int(ours.sum())) <= 0.001 * ours.numel() + 1
    assert torch.equal(scores <= share, theirs)
    assert bool(((ours <= theirs).all(1) | (theirs <= ours).all(1)).all())
    assert len(ours.sum(1).unique()) > 5  # Wanda's own rows lose equal counts


def test_the_variant_keeps_the_order_of_wanda_in_a_row() -> None:
    seen = sight(16, 64, seed=4)
    ours, plain = (WEIGHT_CRITERIA.get(name).score(seen) for name in ("wanda-variant", "wanda"))
    assert torch.equal(ours.argsort(1), plain.argsort(1))
    assert torch.equal(ours.amax(1), torch.ones(16))
    for text in ("2:4", "1:4", "2:8"):
        pattern = Pattern.parse(text)
        assert torch.equal(lowest(ours, pattern, "matrix"), lowest(plain, pattern, "row"))
    assert torch.equal(lowest(ours, Pattern.parse("50%"), "row"), lowest(plain, Pattern.parse("50%"), "row"))


def test_an_output_that_is_zero_goes_first() -> None:
    seen = sight(4, 6)
    weight = seen.weight.clone()
    weight[2] = 0
    scores = WEIGHT_CRITERIA.get("wanda-variant").score(replace(seen, weight=weight))
    assert bool(scores.isfinite().all())
    assert lowest(scores, Pattern.parse("25%"), "matrix").sum(1).tolist() == [0, 0, 6, 0]


def test_bad_declarations() -> None:
    with pytest.raises(TypeError, match="cannot see"):
        weight_criterion(sees="everything", paper="-")  # type: ignore[arg-type]

    def silent(sight: WeightSight) -> Tensor:
        return sight.weight

    with pytest.raises(TypeError, match="no docstring"):
        weight_criterion(sees="nothing", paper="-")(silent)
