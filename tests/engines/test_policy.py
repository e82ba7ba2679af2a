"""Masks learned from losses alone: the published gradient on a toy that can be enumerated, projections, no backward."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import Stop, patterns, tiny

from regrow.engines.bind import bind
from regrow.engines.chance import stream
from regrow.engines.packed import Packed
from regrow.engines.policy import Search, Tries, begin, learn_masks, project, slope
from regrow.errors import SettingsError

S = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64)


def toy(mask: Tensor) -> float:
    """Units 0 and 2 help together, unit 1 a little."""
    a, b, c = mask.tolist()
    return 3.0 - 1.5 * a * c - 0.4 * b + 0.2 * a


def exact() -> Tensor:
    """The gradient of the expected loss by the chances, over all eight masks, times each unit's spread."""
    total = torch.zeros(3, dtype=torch.float64)
    for bits in product((0.0, 1.0), repeat=3):
        mask = torch.tensor(bits, dtype=torch.float64)
        chance = torch.where(mask == 1, S, 1 - S).prod()
        total += chance * toy(mask) * (mask - S) / (S * (1 - S))
    return total * (S * (1 - S)).sqrt()


def draws(count: int, masks: int, usual: Any) -> Tensor:  # (count, 3)
    source = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        drawn = [torch.bernoulli(S, generator=source) for _ in range(masks)]
        losses = [toy(mask) for mask in drawn]
        found.append(slope(losses, usual(losses), drawn, S))
    return torch.stack(found)


def test_the_gradient_is_right_on_average() -> None:
    """By the losses' own mean it is unbiased; by a number from elsewhere it is K / (K - 1) times that (4.1, 1)."""
    found = draws(100_000, 2, lambda losses: sum(losses) / len(losses))
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - exact()).abs() <= 4 * error).all()
    elsewhere = draws(30_000, 2, lambda _: 2.0)
    error = elsewhere.std(0) / len(elsewhere) ** 0.5
    assert ((elsewhere.mean(0) - 2 * exact()).abs() <= 4 * error).all()
    assert ((elsewhere.mean(0) - exact()).abs() > 4 * error).any()  # so the test can fail


def test_the_usual_loss_lowers_the_spread_and_not_the_mean() -> None:
    without, near = draws(20_000, 2, lambda _: 0.0), draws(20_000, 2, lambda _: 2.3)
    assert (near.std(0) < 0.6 * without.std(0)).all()
    error = (near.var(0) + without.var(0)).sqrt() / len(near) ** 0.5
    assert ((near.mean(0) - without.mean(0)).abs() <= 4 * error).all()


@pytest.mark.parametrize("total", [0.0, 1.0, 7.3, 20.0])
def test_projection(total: float) -> None:
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = project(values, total)
    assert float(found.sum()) == pytest.approx(total, abs=1e-4)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.allclose(project(found, total), found, atol=1e-9)


def test_projection_by_hand() -> None:
    """0.9, 0.5, 0.1 to a sum of 1: all lose 0.1667, and the last would go below 0, so the others lose 0.2."""
    assert project(torch.tensor([0.9, 0.5, 0.1]), 1.0).tolist() == pytest.approx([0.7, 0.3, 0.0], abs=1e-6)


def test_beginning() -> None:
    found = begin(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), 0.5)
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert float(found.sum()) == pytest.approx(3, abs=1e-4)
    assert (found[0].diff() > 0).all()
    assert begin(torch.ones(4), 0.25).tolist() == pytest.approx([0.25] * 4, abs=1e-6)


def test_it_finds_the_best_subset() -> None:
    """Two of three shall stay: 0 and 2 help together (4.1, 5)."""
    search = Search({"neuron": torch.full((3,), 2 / 3)}, Tries(2000, 1, rate=0.02))
    while search.step < 2000:
        search.move(lambda mask: toy(mask["neuron"]))
    assert search.chances["neuron"].tolist() == pytest.approx([1, 0, 1], abs=0.1)
    assert float(search.chances["neuron"].sum()) == pytest.approx(2, abs=1e-4)


def learn(folder: Path, progress: Any = None, steps: int = 60) -> Any:
    model = tiny()
    anatomy = bind(model.config)
    begun = {"neuron": begin(torch.randn(2, 48, generator=torch.Generator().manual_seed(0)), 0.7)}
    before = {name: p.clone() for name, p in model.named_parameters()}
    tries = Tries(steps, 4, rate=0.05)
    found = learn_masks(model, anatomy, Packed(patterns()), begun, tries, folder=folder, progress=progress)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return model, begun, found


def test_nothing_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", None)
    monkeypatch.setattr(torch.autograd, "grad", None)
    model, begun, (chances, records) = learn(tmp_path)
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(chances["neuron"], begun["neuron"])
    assert float(chances["neuron"].sum()) == pytest.approx(float(begun["neuron"].sum()), abs=1e-3)
    assert [row["step"] for row in records] == [20, 40, 60]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_interrupted_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    _, _, (whole, records) = learn(tmp_path / "whole")

    def pull(done: int, total: int, note: str) -> None:  # noqa: ARG001
        if done >= 0.55 * total:
            raise Stop

    with pytest.raises(Stop):
        learn(tmp_path / "cut", pull)
    seen: list[int] = []
    _, _, (again, told) = learn(tmp_path / "cut", lambda done, *_: seen.append(done))
    assert seen[0] == 21 * 64
    assert torch.equal(again["neuron"], whole["neuron"])
    assert told == records
    with pytest.raises(SettingsError, match="checkpoints of another run"):
        learn(tmp_path / "cut", steps=80)


def test_chance_is_of_the_step_alone() -> None:
    first, second = (torch.rand(3, generator=stream(1, 5, torch.device("cpu"))) for _ in range(2))
    assert torch.equal(first, second)
