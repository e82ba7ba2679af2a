"""The zeros of a sparse model are found, stay through real training steps, and are missed when one is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import patterns, settings, tiny

from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.shape import Anatomy
from regrow.engines import masks
from regrow.engines.bind import bind
from regrow.engines.train import train
from regrow.errors import IdentityError

DECAY = {"weight_decay": 0.5, "micro_batch": 2}


def inside(model: Any) -> dict[str, Tensor]:
    """The matrices in decoder layers."""
    return {n: p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}


def sparse(pattern: str = "2:4") -> tuple[Any, Anatomy]:
    model = tiny()
    with torch.no_grad():
        for weight in inside(model).values():
            weight[lowest(weight.abs(), Pattern.parse(pattern), "row")] = 0.0
    return model, bind(model.config, model)


def found(model: Any, anatomy: Anatomy) -> masks.Masks:
    made = masks.masks_of(model, anatomy)
    assert made is not None
    return made


# --- where the zeros are


def test_masks_are_the_zeros_of_the_matrices_in_layers() -> None:
    model, anatomy = sparse()
    with torch.no_grad():
        model.model.embed_tokens.weight[:5] = 0
        model.lm_head.weight[:5] = 0
    made = found(model, anatomy)
    assert set(made) == set(inside(model))
    assert len(made) == 2 * 7
    for name, mask in made.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, inside(model)[name] == 0), name
        assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_few_zeros_are_no_sparse_model() -> None:
    """From 5 % of one matrix on: one weight more or less decides, however many matrices are dense."""
    model, anatomy = tiny(), bind(tiny().config)
    assert masks.masks_of(model, anatomy) is None
    flat = list(inside(model).values())[3].view(-1)
    least = -(-flat.numel() // 20)
    with torch.no_grad():
        flat[: least - 1] = 0
        assert masks.masks_of(model, anatomy) is None
        flat[-1] = 0
    assert masks.masks_of(model, anatomy) is not None


def test_a_head_of_zeros_is_no_sparse_model() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert masks.masks_of(model, bind(model.config, model)) is None


# --- they stay while training


def test_held_zeros_stay_through_training(tmp_path: Path) -> None:
    """Adam with weight decay, two micro-batches a step; all else trains as it would without."""
    model, anatomy = sparse()
    made, before = found(model, anatomy), {n: p.detach().clone() for n, p in model.named_parameters()}
    with masks.held(model, made):
        result = train(model, patterns(), settings(**DECAY), folder=tmp_path)
    assert result.steps == 6
    masks.check_kept(model, made)
    for name, parameter in model.named_parameters():
        mask = made.get(name)
        changed = parameter != before[name]
        if mask is None:
            assert bool(changed.any()), name
        else:
            assert bool((parameter[mask] == 0).all()), name
            assert not bool(parameter[mask].signbit().any()), name
            assert float(changed[~mask].float().mean()) > 0.99, name


def test_zeros_that_nobody_holds_are_lost(tmp_path: Path) -> None:
    """Planted: training without the hooks, then with those of one matrix alone."""
    model, anatomy = sparse()
    made = found(model, anatomy)
    train(model, patterns(), settings(**DECAY), folder=tmp_path / "a")
    gone = masks.lost(model, made)
    assert set(gone) == set(made)
    with pytest.raises(IdentityError, match="zeros were filled"):
        masks.check_kept(model, made)
    model, _ = sparse()
    kept = next(iter(made))
    with masks.held(model, {kept: made[kept]}):
        train(model, patterns(), settings(**DECAY), folder=tmp_path / "b")
    assert set(masks.lost(model, made)) == set(made) - {kept}


def test_held_changes_no_other_gradient_and_ends() -> None:
    model, anatomy = sparse()
    made = found(model, anatomy)
    name, parameter = next(iter(inside(model).items()))

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=patterns(), labels=patterns()).loss.backward()
        assert parameter.grad is not None
        return parameter.grad.clone()

    free = gradient()
    assert bool(free[made[name]].any())
    with masks.held(model, made):
        assert torch.equal(gradient(), free.masked_fill(made[name], 0))
    assert torch.equal(gradient(), free)
    with pytest.raises(RuntimeError, match="pulled"), masks.held(model, made):
        raise RuntimeError("pulled")
    assert torch.equal(gradient(), free)


def test_nothing_to_hold() -> None:
    """A dense model, and weights that are frozen."""
    model, anatomy = sparse()
    with masks.held(model, None):
        model(input_ids=patterns(), labels=patterns()).loss.backward()
    assert all(bool(weight.grad[weight == 0].any()) for weight in inside(model).values())
    model.requires_grad_(False)
    with masks.held(model, found(model, anatomy)):
        pass


# --- the proof afterwards


def test_lost_counts_by_hand() -> None:
    model, anatomy = sparse()
    made = found(model, anatomy)
    assert masks.lost(model, made) == {}
    masks.check_kept(model, made)
    first, *_, last = made
    with torch.no_grad():
        for name, count in ((first, 1), (last, 3)):
            flat = inside(model)[name].view(-1)
            flat[made[name].view(-1).nonzero()[:count, 0]] = 1e-30
        weight = inside(model)[first]
        weight[~made[first]] = 0.0
    assert masks.lost(model, made) == {first: 1, last: 3}, "a weight that became zero is no loss"
    with pytest.raises(IdentityError, match=rf"4 zeros were filled, 1 of them in {first}"):
        masks.check_kept(model, made)


def test_what_is_put_back_is_plain_zero() -> None:
    model, anatomy = sparse()
    made = found(model, anatomy)
    before = {name: weight.detach().clone() for name, weight in inside(model).items()}
    with torch.no_grad():
        for name, weight in inside(model).items():
            weight[made[name]] = -0.0 if name.endswith("q_proj.weight") else -1.0
    assert masks.lost(model, made)
    masks.put_back(model, made)
    for name, weight in inside(model).items():
        assert torch.equal(weight, before[name]), name
        assert not bool(weight[made[name]].signbit().any()), name
        assert weight.requires_grad


def test_not_a_number_is_no_zero() -> None:
    model, anatomy = sparse()
    made = found(model, anatomy)
    name = next(iter(made))
    with torch.no_grad():
        inside(model)[name][made[name]] = torch.nan
    assert masks.lost(model, made) == {name: int(made[name].sum())}


def test_masks_of_another_model_are_an_error() -> None:
    model, anatomy = sparse()
    made = {f"other.{name}": mask for name, mask in found(model, anatomy).items()}
    with pytest.raises(KeyError, match=r"other\.model"):
        masks.lost(model, made)
    with pytest.raises(KeyError, match=r"other\.model"), masks.held(model, made):
        pass
