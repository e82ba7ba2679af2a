"""A teacher that was asked once teaches what it would have taught: all of it where nearly all is kept, never more."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import VOCAB, Stop, T, patterns, pull_plug, same, settings, tiny, weights

from models import randomise
from regrow.artifacts.goal import DIVERGENCES
from regrow.engines import kept_teacher
from regrow.engines.distil import FromTeacher
from regrow.engines.kept_teacher import FromKept, Kept, coarse, keep
from regrow.engines.packed import Packed
from regrow.engines.resume import weights_fingerprint
from regrow.engines.train import train
from regrow.errors import SettingsError

LOSSES = ("forward-kl", "reverse-kl", "jsd")


def other() -> Any:
    teacher = tiny()
    randomise(teacher, gains=1.0, seed=9)
    return teacher


def asked(folder: Path, *blocks: Tensor, k: int = VOCAB - 1, batch: int = 3) -> Kept:
    teacher = other()
    kept = Kept(k, VOCAB, weights_fingerprint(teacher))
    for index, ids in enumerate(blocks):
        where = folder / str(index)
        where.mkdir(parents=True, exist_ok=True)
        keep(teacher, ids, kept, where, batch=batch)
    return kept


def some(rows: int = 6) -> Packed:
    """Random text of which each block learns another number of tokens."""
    source = torch.Generator().manual_seed(3)
    learn = torch.rand(rows, T, generator=source) < 0.4
    return Packed(torch.randint(VOCAB, (rows, T), generator=source), learn)


def batch_of(packed: Packed) -> dict[str, Tensor]:
    return packed.batch(slice(None))


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- what is kept


def test_by_hand() -> None:
    """Of chances 1/2, 1/4, 1/8, 1/8 the two largest are kept; a student of even chances has 1/2 for the rest."""
    teacher = torch.tensor([[1 / 8, 1 / 2, 1 / 8, 1 / 4]]).log() + 3  # logits may be shifted
    ids = teacher.topk(2).indices
    theirs, ours = coarse(teacher, ids), coarse(torch.zeros(1, 4), ids)
    assert ids.tolist() == [[1, 3]]
    assert torch.allclose(theirs.exp(), torch.tensor([[1 / 2, 1 / 4, 1 / 4]]))
    assert torch.allclose(ours.exp(), torch.tensor([[1 / 4, 1 / 4, 1 / 2]]))
    found = DIVERGENCES.get("forward-kl").measure(theirs, ours)
    assert found.item() == pytest.approx(1 / 2 * math.log(2) - 1 / 4 * math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("learn", ["all", "some"])
def test_nearly_all_that_is_kept_is_all(name: str, learn: str, tmp_path: Path) -> None:
    """With k = V - 1 the rest is one token: value and gradients are those of the teacher itself."""
    text = some() if learn == "some" else Packed(some().ids)
    student, again, loss = tiny(), tiny(), DIVERGENCES.get(name)
    expected = FromTeacher(other(), loss, text=0.3)(student, batch_of(text))
    found = FromKept(asked(tmp_path, text.ids), loss, text=0.3)(again, batch_of(text))
    assert isinstance(expected, tuple)
    assert isinstance(found, tuple)
    assert found[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    assert found[1].keys() == expected[1].keys()
    expected[0].backward()
    found[0].backward()
    theirs, ours = gradients(student), gradients(again)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("name", LOSSES)
def test_fewer_classes_never_differ_more(name: str, tmp_path: Path) -> None:
    """The less is kept, the nearer the two seem; forgetting the rest would break this."""
    text, loss = some(), DIVERGENCES.get(name)
    full = FromTeacher(other(), loss)(tiny(), batch_of(text))
    seen = [FromKept(asked(tmp_path / f"{k}", text.ids, k=k), loss)(tiny(), batch_of(text)) for k in (1, 4, 12, 20)]
    values = [x.item() for x in (*seen, full) if isinstance(x, Tensor)]
    assert len(values) == 5
    assert all(a < b + 1e-6 for a, b in pairwise(values))
    assert values[0] > 0
    assert values[0] < 0.9 * values[-1]


def test_a_model_is_at_no_distance_from_what_it_said(tmp_path: Path) -> None:
    student = other()
    found = FromKept(asked(tmp_path, some().ids, k=5), DIVERGENCES.get("forward-kl"))(student, batch_of(some()))
    assert isinstance(found, Tensor)
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert max(float(grad.abs().max()) for grad in gradients(student).values()) < 1e-5


def test_what_is_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chances of k + 1 classes that add up to one, of every position, however many blocks go in a pass or file."""
    ids = some(7).ids
    kept, again = asked(tmp_path / "a", ids, k=4), asked(tmp_path / "b", ids, k=4, batch=7)
    monkeypatch.setattr(kept_teacher, "CHUNK", 2)
    third = asked(tmp_path / "c", ids, k=4)
    assert [path.name for path in sorted((tmp_path / "c" / "0").iterdir())] == [f"{i}.safetensors" for i in range(4)]
    tokens, logs = kept.of(ids)
    with torch.no_grad():
        chances = other()(input_ids=ids).logits.softmax(-1)  # (n, T, V)
    assert tokens.shape == (7, T, 4)
    assert logs.dtype == torch.float32
    assert torch.allclose(logs[..., :4].exp(), chances.gather(-1, tokens), atol=1e-6)
    assert torch.allclose(logs.exp().sum(-1), torch.ones(7, T), atol=1e-5)
    for others in (again, third):
        assert torch.equal(others.of(ids)[0], tokens)
        assert torch.allclose(others.of(ids)[1], logs, atol=1e-5)
    mixed = ids[[5, 0, 5]]
    assert torch.equal(kept.of(mixed)[0], tokens[[5, 0, 5]])


def test_what_is_there_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that stopped in the middle asks for what is missing; a file that was begun does not count."""
    monkeypatch.setattr(kept_teacher, "CHUNK", 2)
    ids = some(6).ids
    first = asked(tmp_path, ids, k=4).of(ids)
    folder = tmp_path / "0"
    (folder / "1.safetensors").unlink()
    read: list[int] = []
    states = kept_teacher.final_states

    def counted(model: Any, blocks: Tensor) -> Tensor:
        read.append(len(blocks))
        return states(model, blocks)

    monkeypatch.setattr(kept_teacher, "final_states", counted)
    second = asked(tmp_path, ids, k=4).of(ids)
    assert read == [2]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- training


def test_training_brings_the_student_near(tmp_path: Path) -> None:
    """Held-out blocks are found as well as the training's, and the teacher is gone by then."""
    heldout = patterns(4, seed=5)
    goal = FromKept(asked(tmp_path / "kept", patterns(), heldout, k=12), DIVERGENCES.get("forward-kl"))
    student = tiny()
    found = train(student, patterns(), settings(tokens=30 * 64), folder=tmp_path / "run", loss=goal, heldout=heldout)
    assert found.losses[-1]["loss"] < 0.6 * found.losses[0]["loss"]
    assert found.losses[-1]["heldout_loss"] > 0


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    def goal() -> FromKept:
        return FromKept(asked(tmp_path / "kept", some().ids, k=6), DIVERGENCES.get("forward-kl"))

    whole, again = tiny(), tiny()
    train(whole, some(), settings(), folder=tmp_path / "whole", loss=goal())
    with pytest.raises(Stop):
        train(again, some(), settings(), folder=tmp_path / "again", loss=goal(), progress=pull_plug(4))
    again = tiny()
    train(again, some(), settings(), folder=tmp_path / "again", loss=goal())
    assert same(weights(whole), weights(again))
    fewer = FromKept(asked(tmp_path / "fewer", some().ids, k=5), DIVERGENCES.get("forward-kl"))
    with pytest.raises(SettingsError, match="the 6 likeliest tokens"):
        train(tiny(), some(), settings(), folder=tmp_path / "again", loss=fewer)


# ---- what is refused


def test_a_block_that_was_not_read(tmp_path: Path) -> None:
    goal = FromKept(asked(tmp_path, patterns(), k=4), DIVERGENCES.get("forward-kl"))
    with pytest.raises(SettingsError, match="a block of text that the teacher has not read"):
        goal(tiny(), {"input_ids": patterns() + 1})


def test_a_rest_must_be_left(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"cache = {VOCAB} of a vocabulary of {VOCAB} tokens"):
        asked(tmp_path, patterns(), k=VOCAB)


def test_no_temperature(tmp_path: Path) -> None:
    kept = asked(tmp_path, patterns(), k=4)
    assert FromKept(kept, DIVERGENCES.get("jsd"), {"beta": 0.1, "temperature": 1.0}).__name__.startswith("jsd beta=0.1")
    with pytest.raises(SettingsError, match=r"temperature 2\.0 of predictions that are kept"):
        FromKept(kept, DIVERGENCES.get("jsd"), {"temperature": 2.0})
