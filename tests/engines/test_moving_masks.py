"""AST: masked weights live on under a straight-through gradient, decay alone, and come back; counts stay."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook
from training import VOCAB, Stop, patterns, pull_plug, same, settings, tiny, weights
from transformers import LlamaConfig, LlamaForCausalLM

from models import ids, make
from regrow.artifacts.goal import DIVERGENCES
from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.engines import masks, moving_masks
from regrow.engines.bind import bind
from regrow.engines.distil import FromTeacher
from regrow.engines.moving_masks import Mask, check_counts, moving, needed, width
from regrow.engines.objective import next_token
from regrow.engines.train import train
from regrow.errors import IdentityError, SettingsError

NEVER = 10**6
RATE, BETAS, EPS = 1e-2, (0.9, 0.95), 1e-8


def inside(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".layers." in n and p.dim() > 1}


def sparse(pattern: str = "2:4", dropout: float = 0.0) -> tuple[Any, masks.Masks]:
    model = tiny(dropout)
    with torch.no_grad():
        for weight in inside(model).values():
            weight[lowest(weight.abs(), Pattern.parse(pattern), "matrix")] = 0.0
    return model, needed(masks.masks_of(model, bind(model.config, model)))


def seen(model: Any) -> dict[str, tuple[Tensor, Mask]]:
    """The parametrized weights of an open run, by their usual names: as they live on, and their masks."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith("parametrizations.weight"):
            found[name.replace("parametrizations.", "")] = module.original, module[0]
    return found


def loss(model: Any) -> Tensor:
    return next_token(model, {"input_ids": patterns()})


def step(model: Any, optimizer: AdamW) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


# --- who competes


@pytest.mark.parametrize(
    ("pattern", "run"), [("2:4", 4), ("1:2", 2), ("1:4", 4), ("2:8", 8), ("3:6", 6), ("4:8", 8), ("16:32", 32)]
)
def test_groups_are_found(pattern: str, run: int) -> None:
    scores = torch.rand(50, 96, generator=torch.Generator().manual_seed(0))
    empty = lowest(scores, Pattern.parse(pattern), "row")
    assert width(empty) == run
    assert width(empty.view(5, 10, 96)) == run
    empty.view(-1, run)[7] = True  # a group that lost more, by rounding
    assert width(empty) == run


def test_groups_that_were_sparse_before_are_found() -> None:
    """Half of the weights had gone at random before 2:4 took the rest: two of four kept, or fewer."""
    scores = torch.rand(100, 96, generator=torch.Generator().manual_seed(0))
    scores[torch.rand(100, 96, generator=torch.Generator().manual_seed(1)) < 0.5] = 0.0
    assert width(lowest(scores, Pattern.parse("2:4"), "row") | (scores == 0)) == 4


@pytest.mark.parametrize("pattern", ["5%", "10%", "17%", "20%", "22%", "30%", "50%", "75%", "95%"])
@pytest.mark.parametrize("within", ["row", "matrix"])
def test_chance_makes_no_groups(pattern: str, within: Any) -> None:
    """Nor in small matrices, where no group of 32 may be full."""
    for seed, shape in enumerate([(400, 96), (192, 576), (32, 96), (32, 64)]):
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        assert width(lowest(scores, Pattern.parse(pattern), within)) == shape[1]


def test_a_full_and_an_empty_matrix_have_no_groups_that_matter() -> None:
    assert width(torch.zeros(3, 8, dtype=torch.bool)) == 8
    mask = Mask(torch.ones(3, 8, dtype=torch.bool))
    mask.move(torch.rand(3, 8))
    assert bool(mask.empty.all())


# --- zeros are chosen anew


def test_groups_by_hand() -> None:
    """2:4: each group keeps its two largest, and a group that has three zeros keeps three."""
    start = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1, 1, 0]]).bool()
    grown = torch.tensor([[0.1, -5.0, 2.0, 3.0, 0.0, 0.3, 1.0, -2.0], [-9.0, 8.0, 7.0, 6.0, 1.0, 4.0, -3.0, 2.0]])
    mask = Mask(start)
    assert mask.width == 4
    mask.move(grown)
    assert mask.empty.int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 1, 1]]
    assert mask(grown).tolist() == [[0, -5, 0, 3, 0, 0, 1, -2], [-9, 8, 0, 0, 0, 4, 0, 0]]
    assert not bool(mask(-grown)[mask.empty].signbit().any()), "plain zeros"


def test_rows_by_hand() -> None:
    """Without groups every row keeps its own count."""
    start = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    grown = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [3.0, -0.5, 9.0, 1.0, 2.0], [0.1, 0.2, 0.3, 0.4, 0.5]])
    mask = Mask(start)
    assert mask.width == 5
    mask.move(grown)
    assert mask.empty.int().tolist() == [[0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


# --- a step


def stepped_by_hand(steps: int, *, dense: bool) -> dict[str, Tensor]:
    """AdamW on a dense copy, from gradients of a plain model that holds the masked copy."""
    model, empty = sparse()
    live = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in live.items()} for _ in range(2))
    for done in range(1, steps + 1):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(live[name] * ~empty[name] if name in empty else live[name])
        model.zero_grad()
        loss(model).backward()
        for name, p in model.named_parameters():
            grad = p.grad if dense or name not in empty else p.grad * ~empty[name]
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * grad
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * grad**2
            mean, square = first[name] / (1 - BETAS[0] ** done), second[name] / (1 - BETAS[1] ** done)
            live[name] -= RATE * mean / (square.sqrt() + EPS)
    return live


def test_frozen_and_without_decay_it_is_adamw_on_the_dense_gradient() -> None:
    model, empty = sparse()
    with moving(model, empty, 3, decay=0.0, every=NEVER):
        optimizer = AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
        for _ in range(3):
            step(model, optimizer)
        found = {name: weight.detach().clone() for name, (weight, _) in seen(model).items()}
        assert set(found) == set(empty)
    right, wrong = (stepped_by_hand(3, dense=dense) for dense in (True, False))
    for name, parameter in model.named_parameters():
        expected = right[name] if name not in empty else right[name].masked_fill(empty[name], 0)
        assert torch.allclose(parameter, expected, atol=1e-5), name
    for name, weight in found.items():
        assert torch.allclose(weight, right[name], atol=1e-5), name
        assert float((weight[empty[name]] != 0).float().mean()) > 0.99, "masked weights receive gradient and live on"
        assert not torch.allclose(weight, wrong[name], atol=1e-3), "planted: the gradient of kept weights alone"


def test_a_masked_weight_has_the_gradient_of_a_kept_one() -> None:
    plain, empty = sparse()
    model = copy.deepcopy(plain)
    loss(plain).backward()
    with moving(model, empty, 1):
        loss(model).backward()
        for name, (weight, _) in seen(model).items():
            assert torch.equal(weight.grad, inside(plain)[name].grad), name
            assert bool(weight.grad[empty[name]].any())


# --- decay


def check_pull(heights: tuple[float, ...]) -> None:
    """What AdamW sees of a loss that is always 0, against masked weights times the coefficient by hand."""
    model, empty = sparse()
    grads: list[dict[str, Tensor]] = []
    with moving(model, empty, len(heights), decay=0.5, every=NEVER):
        with torch.no_grad():
            for weight, mask in seen(model).values():
                weight[mask.empty] = -2.0
        optimizer = AdamW(model.parameters(), lr=1e-9, weight_decay=0.0)
        optimizer.register_step_pre_hook(
            lambda *_: grads.append({name: weight.grad.clone() for name, (weight, _) in seen(model).items()})
        )
        for _ in heights:
            optimizer.zero_grad()
            (0 * loss(model)).backward()
            optimizer.step()
    assert len(grads) == len(heights)
    for found, height in zip(grads, heights, strict=True):
        for name, grad in found.items():
            assert torch.allclose(grad, empty[name] * (-2.0 * height)), name


def test_decay_is_of_masked_weights_alone() -> None:
    """It rises evenly over the first quarter of 8 steps, and stays."""
    check_pull((0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5))


@pytest.mark.parametrize("pulled", [torch.ones_like, torch.logical_not])
def test_decay_of_kept_weights_is_seen(monkeypatch: pytest.MonkeyPatch, pulled: Any) -> None:
    """Planted: all weights decay, or the kept ones."""
    right = Mask.pull

    def pull(mask: Mask, weight: Tensor, decay: float) -> None:
        other = copy.deepcopy(mask)
        other.empty = pulled(mask.empty)
        right(other, weight, decay)

    monkeypatch.setattr(Mask, "pull", pull)
    with pytest.raises(AssertionError, match="weight"):
        check_pull((0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5))


def test_decay_leads_to_zero() -> None:
    model, empty = sparse()
    with moving(model, empty, 40, decay=1.0, every=NEVER):
        with torch.no_grad():
            for weight, mask in seen(model).values():
                weight[mask.empty] = 0.1
        optimizer = AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        for _ in range(40):
            optimizer.zero_grad()
            (0 * loss(model)).backward()
            optimizer.step()
        assert all(bool((w[m.empty].abs() < 0.05).all()) for w, m in seen(model).values())
    assert torch.equal(weights(model)["lm_head.weight"], weights(tiny())["lm_head.weight"])


# --- a run


@pytest.mark.parametrize(("pattern", "run"), [("2:4", 4), ("50%", None), ("2:8", 8)])
def test_counts_stay_and_zeros_move(pattern: str, run: int | None, tmp_path: Path) -> None:
    model, empty = sparse(pattern)
    before = weights(model)
    with moving(model, empty, 6, every=2):
        result = train(model, patterns(), settings(), folder=tmp_path)
    assert result.steps == 6
    check_counts(model, empty)
    moved = masks.lost(model, empty)
    assert sum(moved.values()) > 100
    for name, weight in inside(model).items():
        zeros, shared = weight.detach() == 0, run or weight.shape[1]
        assert torch.equal(zeros.view(-1, shared).sum(1), empty[name].view(-1, shared).sum(1)), name
        assert not bool(weight[zeros].signbit().any()), name
    assert {name: (w.shape, w.dtype) for name, w in weights(model).items()} == {
        name: (w.shape, w.dtype) for name, w in before.items()
    }
    assert all(not torch.equal(w, before[name]) for name, w in weights(model).items()), "all weights train"
    assert {type(m) for m in model.modules() if hasattr(m, "weight") and m.weight.dim() == 2} == {
        nn.Linear,
        nn.Embedding,
    }


def test_zeros_move_every_so_many_steps_but_the_last(tmp_path: Path) -> None:
    """Of 6 steps with a choice after every second: after 2 and 4."""
    model, empty = sparse()
    found: list[list[Tensor]] = []

    def note(*_: Any) -> None:
        found.append([mask.empty.clone() for _, mask in seen(model).values()])

    with moving(model, empty, 6, every=2):
        note()
        train(model, patterns(), settings(), folder=tmp_path, progress=note)
    changed = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(found)]
    assert changed == [False, True, False, True, False, False]


@pytest.mark.parametrize("after", [2, 3, 4])
def test_resume_is_bit_exact(after: int, tmp_path: Path) -> None:
    """Stopped before, at and after the checkpoint of step 3, with a choice between it and the start, and one after."""
    (whole, empty), (cut, _), (again, _) = (sparse(dropout=0.2) for _ in range(3))
    with moving(whole, empty, 6, decay=0.1, every=2):
        expected = train(whole, patterns(), settings(), folder=tmp_path / "whole", heldout=patterns(3))
    with pytest.raises(Stop), moving(cut, empty, 6, decay=0.1, every=2):
        train(cut, patterns(), settings(), folder=tmp_path / "cut", progress=pull_plug(after), heldout=patterns(3))
    assert set(weights(cut)) == set(weights(whole)), "given back as it was, whatever happened"
    with moving(again, empty, 6, decay=0.1, every=2):
        result = train(again, patterns(), settings(), folder=tmp_path / "cut", heldout=patterns(3))
    assert same(weights(whole), weights(again))
    assert result.losses == expected.losses
    assert masks.lost(whole, empty)


def test_decay_and_choices_change_where_it_ends(tmp_path: Path) -> None:
    """The test above would be blind if a resumed run could forget either."""
    ends = []
    for decay, every in ((0.1, 2), (0.0, 2), (0.1, NEVER)):
        model, empty = sparse()
        with moving(model, empty, 6, decay=decay, every=every):
            train(model, patterns(), settings(), folder=tmp_path / f"{decay} {every}")
        ends.append(weights(model))
    assert not same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_decay_joins_after_clipping(tmp_path: Path) -> None:
    """Gradients are clipped to almost nothing; what masked weights are pulled by is not."""
    model, empty = sparse()
    pulls: list[float] = []
    with moving(model, empty, 6, decay=0.5, every=NEVER):
        with torch.no_grad():
            for weight, mask in seen(model).values():
                weight[mask.empty] = 1.0

        def see(*_: Any) -> None:
            pulls.extend(float(weight.grad[mask.empty].mean()) for weight, mask in seen(model).values())

        handle = register_optimizer_step_post_hook(see)
        try:
            train(model, patterns(), settings(clip=1e-6, learning_rate=1e-9), folder=tmp_path)
        finally:
            handle.remove()
    matrices = len(empty)
    assert pulls[:matrices] == pytest.approx([0.0] * matrices, abs=1e-5)  # in the first step it has not begun to rise
    assert pulls[-matrices:] == pytest.approx([0.5] * matrices, abs=1e-5)


def test_accumulated_and_recomputed_it_is_the_same(tmp_path: Path) -> None:
    """Decay goes into the gradient of a step once, however many passes it has."""
    ends = []
    for name, changes in (("one", {"micro_batch": 4}), ("four", {"micro_batch": 1}), ("re", {"checkpointing": True})):
        model, empty = sparse()
        with moving(model, empty, 6, decay=0.1, every=NEVER):
            train(model, patterns(), settings(learning_rate=1e-3, **changes), folder=tmp_path / name)
        ends.append(weights(model))
    for name, weight in ends[0].items():
        assert torch.allclose(weight, ends[1][name], atol=1e-5), name
        assert torch.allclose(weight, ends[2][name], atol=1e-5), name


def test_other_optimisers_are_left_alone() -> None:
    model, empty = sparse()
    other = tiny()
    with moving(model, empty, 9, every=1):
        with torch.no_grad():
            for weight, mask in seen(model).values():
                weight[mask.empty] = 9.0
        optimizer = AdamW(other.parameters(), lr=RATE)
        step(other, optimizer)
        step(other, optimizer)
        assert all(torch.equal(mask.empty, empty[name]) for name, (_, mask) in seen(model).items())


@pytest.mark.parametrize("inside_too", [True, False])
def test_zeros_of_a_tied_weight_stay_while_others_move(tmp_path: Path, inside_too: bool) -> None:
    """Through checkpoints and a teacher, to which a head in a disguise would be no head."""
    model = LlamaForCausalLM(LlamaConfig(**{**tiny().config.to_dict(), "tie_word_embeddings": True})).eval()
    names = ["model.embed_tokens.weight", *(["model.layers.0.mlp.up_proj.weight"] if inside_too else [])]
    empty = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_parameter(name)
            empty[name] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.5
            weight[empty[name]] = 0.0
    loss = FromTeacher(tiny(), DIVERGENCES.get("forward-kl"))
    with moving(model, empty, 6, every=1):
        train(model, patterns(), settings(learning_rate=0.1, save_every=2), folder=tmp_path, loss=loss)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight == 0, empty[names[0]])
    if inside_too:
        found = model.get_parameter(names[1]) == 0
        assert int(found.sum()) == int(empty[names[1]].sum())
        assert not torch.equal(found, empty[names[1]])


def test_a_sparse_head_of_its_own_under_a_teacher(tmp_path: Path) -> None:
    model = tiny()
    name = "lm_head.weight"
    with torch.no_grad():
        empty = {name: torch.rand(VOCAB, 32, generator=torch.Generator().manual_seed(0)) < 0.5}
        model.get_parameter(name)[empty[name]] = 0.0
    loss = FromTeacher(tiny(), DIVERGENCES.get("forward-kl"))
    with moving(model, empty, 6, every=1):
        train(model, patterns(), settings(learning_rate=0.1), folder=tmp_path, loss=loss)
    assert int((model.get_parameter(name) == 0).sum()) == int(empty[name].sum())
    assert not torch.equal(model.get_parameter(name) == 0, empty[name])


def test_stacked_experts() -> None:
    """A stack is one tensor, its rows those of all experts; the router has no mask."""
    model = make("mixtral")
    with torch.no_grad():
        for name, weight in inside(model).items():
            if "gate.weight" not in name:
                flat = weight.view(-1, weight.shape[-1])
                flat[lowest(flat.abs(), Pattern.parse("50%"), "row")] = 0.0
    empty = needed(masks.masks_of(model, bind(model.config, model)))
    stacks = [name for name in empty if "experts" in name]
    assert len(stacks) == 2 * 3
    assert not any(name.endswith("gate.weight") for name in empty)
    with moving(model, empty, 4, every=1):
        optimizer = AdamW(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(input_ids=ids(), labels=ids()).loss.backward()
            optimizer.step()
    check_counts(model, empty)
    moved = masks.lost(model, empty)
    assert all(moved.get(name) for name in stacks)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in make("mixtral").named_parameters()}


# --- what is refused


def test_a_dense_model_has_nothing_to_move() -> None:
    model = tiny()
    with pytest.raises(SettingsError, match="no zeros to move") as caught:
        needed(masks.masks_of(model, bind(model.config, model)))
    assert "5 % zeros" in str(caught.value)
    assert "regrow sparsify" in str(caught.value)


def test_a_zero_may_move_inside_its_group_alone() -> None:
    model, empty = sparse()
    check_counts(model, empty)
    name, weight = next(iter(inside(model).items()))
    lost, kept = (int(part.nonzero()[0]) for part in (empty[name][0, :4], ~empty[name][0, :4]))
    with torch.no_grad():
        weight[0, lost], weight[0, kept] = 1.0, 0.0
        check_counts(model, empty)
        weight[0, 4 + int((~empty[name][0, 4:8]).nonzero()[0])] = 0.0
        check_counts(model, empty)  # one more is no loss
        weight[0, kept] = 1.0
    with pytest.raises(IdentityError, match=rf"1 runs of 4 weights in {name} have fewer zeros"):
        check_counts(model, empty)


def test_numbers_are_those_of_the_paper() -> None:
    assert (moving_masks.EVERY, moving_masks.DECAY, moving_masks.RISE) == (10, 6e-5, 10_000 / 40_000)
