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
    assert NAMES == ["isc", "magnitude", "moe-pruner", "sparsegpt", "wanda"] == sorted(BY_HAND)


@EVERY
def test_by_hand(criterion: WeightCriterion) -> None:
    assert criterion.score(HAND).tolist() == BY_HAND[criterion.name]


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
    """So that a solver may ask again about a few of them, and a permutation moves the scores along."""
    seen = sight()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(criterion.score(columns(seen, order)), criterion.score(seen)[:, order])
    assert torch.equal(criterion.score(columns(seen, slice(2, 5))), criterion.score(seen)[:, 2:5])


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


def test_bad_declarations() -> None:
    with pytest.raises(TypeError, match="cannot see"):
        weight_criterion(sees="everything", paper="-")  # type: ignore[arg-type]

    def silent(sight: WeightSight) -> Tensor:
        return sight.weight

    with pytest.raises(TypeError, match="no docstring"):
        weight_criterion(sees="nothing", paper="-")(silent)
