"""Reference losses from three sizes of a family: the published vectors, the three points themselves, refusals."""

from __future__ import annotations

import pytest

from regrow.artifacts.scaling import reference_loss
from regrow.errors import SettingsError

SIZES = (6_738_415_616, 13_015_864_320, 68_976_648_192)  # Llama-2
LOSSES = {
    "cc": (1.7520, 1.6680, 1.4621),
    "github": (0.6216, 0.5791, 0.4890),
    "book": (1.9063, 1.8242, 1.6450),
    "stackexchange": (1.4482, 1.3936, 1.2805),
    "wiki": (1.4844, 1.3945, 1.2118),
    "arxiv": (1.2637, 1.2109, 1.1148),
    "c4": (1.9219, 1.8486, 1.6848),
}
SMALL = (2.1401, 0.8694, 2.3625, 1.7791, 2.047, 1.6637, 2.3139)  # of 373,867,520 parameters


@pytest.mark.parametrize(("domain", "expected"), list(zip(LOSSES, SMALL, strict=True)))
def test_published_references(domain: str, expected: float) -> None:
    assert reference_loss(SIZES, LOSSES[domain], 373_867_520) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("domain", LOSSES)
def test_the_curve_goes_through_its_points(domain: str) -> None:
    found = [reference_loss(SIZES, LOSSES[domain], size) for size in SIZES]
    assert found == pytest.approx(LOSSES[domain], abs=1e-9)


def test_by_hand() -> None:
    """3 / sqrt(N) + 1 at 1, 4, 9 parameters, and at 100."""
    assert reference_loss((1, 4, 9), (4.0, 2.5, 2.0), 100) == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("sizes", "losses", "size"),
    [
        ((1, 4), (2.0, 1.0), 9),
        ((4, 1, 9), (3.0, 2.0, 1.0), 9),
        ((1, 4, 9), (2.0, 1.0, 1.5), 9),
        ((1, 10, 100), (3.0, 2.0, 0.5), 9),
        ((1, 4, 9), (3.0, 2.0, 1.0), 0),
    ],
)
def test_points_that_no_curve_goes_through(sizes: tuple[float, ...], losses: tuple[float, ...], size: float) -> None:
    with pytest.raises(SettingsError, match="parameters"):
        reference_loss(sizes, losses, size)
