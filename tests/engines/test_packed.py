"""Training on some of the tokens: the loss is the mean over those alone, whatever blocks and passes they fall into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import STEP, VOCAB, Stop, T, patterns, pull_plug, same, settings, tiny, weights

from regrow.artifacts.goal import DIVERGENCES
from regrow.engines import loop
from regrow.engines.distil import FromTeacher
from regrow.engines.objective import next_token
from regrow.engines.packed import Packed, Stream, as_packed, order, share
from regrow.engines.train import train
from regrow.errors import SettingsError, TextError

Batch = dict[str, Tensor]


def uneven(count: int = 4, seed: int = 0) -> Packed:
    """Random text, of which block i learns i + 1 tokens, all random."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (count, T), generator=source)
    learn = torch.zeros(count, T, dtype=torch.bool)
    for i, row in enumerate(learn):
        row[1 + torch.randperm(T - 1, generator=source)[: i % (T - 1) + 1]] = True
    return Packed(ids, learn)


def everything(ids: Tensor) -> Packed:
    return Packed(ids, torch.ones_like(ids, dtype=torch.bool))


def batch_of(packed: Packed) -> Batch:
    return packed.batch(slice(None))


def other() -> Any:
    """A teacher of other weights."""
    teacher = tiny()
    with torch.no_grad():
        for index, parameter in enumerate(teacher.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return teacher


def learner(kind: str) -> Any:
    return next_token if kind == "text" else FromTeacher(other(), DIVERGENCES.get("forward-kl"))


@torch.no_grad()
def by_hand(kind: str, packed: Packed) -> float:
    """In fp64, target after target."""
    ours = tiny()(input_ids=packed.ids).logits.double().log_softmax(-1)
    theirs = other()(input_ids=packed.ids).logits.double().log_softmax(-1)
    assert packed.learn is not None
    found = []
    for b, t in packed.learn.nonzero().tolist():
        if t == 0:
            continue
        if kind == "text":
            found.append(-ours[b, t - 1, packed.ids[b, t]])
        else:
            found.append((theirs[b, t - 1].exp() * (theirs[b, t - 1] - ours[b, t - 1])).sum())
    return float(torch.stack(found).mean())


# ---- the loss of a batch


@pytest.mark.parametrize("kind", ["text", "teacher"])
def test_the_loss_by_hand(kind: str) -> None:
    """A token counts where the one before it predicts; a mask that is shifted by one gives another loss."""
    packed, loss = uneven(), learner(kind)
    found = loss(tiny(), batch_of(packed)).item()
    assert found == pytest.approx(by_hand(kind, packed), rel=1e-5)
    assert packed.learn is not None
    for shift in (-1, 1):
        shifted = Packed(packed.ids, packed.learn.roll(shift, 1))
        assert loss(tiny(), batch_of(shifted)).item() != pytest.approx(found, rel=1e-3)


def test_all_of_it_is_the_plain_loss_bit_for_bit() -> None:
    ids = patterns()
    plain, masked = tiny(), tiny()
    first, second = next_token(plain, {"input_ids": ids}), next_token(masked, batch_of(everything(ids)))
    first.backward()
    second.backward()
    assert torch.equal(first, second)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), masked.parameters(), strict=True))


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    loss, model = FromTeacher(tiny(), DIVERGENCES.get("forward-kl")), tiny()
    found = loss(model, batch_of(uneven()))
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert all(float(p.grad.abs().max()) < 1e-5 for p in model.parameters())


@pytest.mark.parametrize("kind", ["text", "teacher"])
@pytest.mark.parametrize("first", [False, True], ids=["none", "the first of a block"])
def test_nothing_learnt_is_no_loss_and_no_gradient(kind: str, first: bool) -> None:
    learn = torch.zeros(4, T, dtype=torch.bool)
    learn[:, 0] = first
    model = tiny()
    found = learner(kind)(model, {"input_ids": patterns(4), "learn": learn})
    found.backward()
    assert found.item() == 0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in model.parameters())


# ---- steps


def test_a_stream_knows_what_is_usual() -> None:
    packed = uneven(4)
    stream = Stream(packed, torch.tensor([0, 1, 3, 2, 2, 3]), 2)
    assert [int(n) for n in packed.targets()] == [1, 2, 3, 4]
    assert [stream[i]["usual"].item() for i in range(6)] == [1.5, 1.5, 3.5, 3.5, 3.5, 3.5]
    few = {name: torch.stack([stream[i][name] for i in (2,)]) for name in ("learn", "usual")}
    assert float(share(few)) == pytest.approx(4 / 3.5)
    assert share({"input_ids": packed.ids}) == 1


@pytest.mark.parametrize("kind", ["text", "teacher"])
def test_a_step_is_the_mean_over_all_its_targets(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever passes it is made in; were passes equal, other weights would come of it."""
    packed, loss = uneven(), learner(kind)

    def run(size: int) -> tuple[dict[str, Tensor], float]:
        model = tiny()
        options = settings(warmup=0, micro_batch=size, evaluate_every=1)
        result = train(model, packed, options, folder=tmp_path / str(size), loss=loss, heldout=packed, resume=False)
        after = loss(model, batch_of(packed)).item()
        assert result.losses[-1]["heldout_loss"] == pytest.approx(after, rel=1e-5)
        return weights(model), result.losses[0]["loss"]

    def near(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
        return all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)

    whole, start = run(4)
    assert start == pytest.approx(by_hand(kind, packed), rel=1e-5)
    for size in (1, 2):
        found, value = run(size)
        assert value == pytest.approx(start, rel=1e-5)
        assert near(found, whole)
    monkeypatch.setattr(loop, "share", lambda _: 1.0)
    assert not near(run(1)[0], whole)


def test_learning_all_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    plain, masked = tiny(), tiny()
    train(plain, patterns(), settings(), folder=tmp_path / "plain")
    train(masked, everything(patterns()), settings(), folder=tmp_path / "masked")
    assert same(weights(plain), weights(masked))


def test_only_what_is_learnt_gets_better(tmp_path: Path) -> None:
    """Each text ends in 7 after its first half; nothing of that half is learnt."""
    ids = torch.randint(VOCAB, (12, T), generator=torch.Generator().manual_seed(0))
    ids[:, T // 2 :] = 7
    learn = torch.zeros_like(ids, dtype=torch.bool)
    learn[:, T // 2 :] = True
    model = tiny()
    before = next_token(model, {"input_ids": ids, "learn": ~learn}).item()
    result = train(model, Packed(ids, learn), settings(tokens=20 * STEP), folder=tmp_path)
    assert result.losses[-1]["loss"] < 0.1
    assert next_token(model, {"input_ids": ids, "learn": ~learn}).item() > before - 0.1


# ---- a run that goes on


def test_resume_is_bit_exact_with_the_same_mask_alone(tmp_path: Path) -> None:
    packed = uneven(12)
    whole = tiny()
    train(whole, packed, settings(), folder=tmp_path / "whole")
    model = tiny()
    with pytest.raises(Stop):
        train(model, packed, settings(), folder=tmp_path / "cut", progress=pull_plug(4))
    for different in (packed.ids, everything(packed.ids), Packed(packed.ids, packed.learn.roll(1, 1))):  # type: ignore[union-attr]
        with pytest.raises(SettingsError, match="learnt: "):
            train(tiny(), different, settings(), folder=tmp_path / "cut")
    again = tiny()
    train(again, packed, settings(), folder=tmp_path / "cut")
    assert same(weights(again), weights(whole))


# ---- what cannot be learnt


def test_blocks_of_which_nothing_is_learnt_are_left_out() -> None:
    packed = uneven(4)
    assert packed.learn is not None
    packed.learn[1] = False
    packed.learn[2] = False
    packed.learn[2, 0] = True  # nothing comes before it
    left = as_packed(packed)
    assert left.learn is not None
    assert torch.equal(left.ids, packed.ids[[0, 3]])
    assert torch.equal(left.learn, packed.learn[[0, 3]])
    packed.learn[:] = False
    with pytest.raises(TextError, match="64 tokens, and none of them is learnt"):
        as_packed(packed)


def test_a_tensor_is_learnt_whole() -> None:
    assert as_packed(patterns()).learn is None
    assert as_packed(patterns(3)).targets().tolist() == [T - 1] * 3
    assert len(order(3, 7, 0)) == 7
