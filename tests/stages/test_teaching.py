"""What a teacher gives before the training: resumed where it stopped, kept by what it hangs on, told to the user."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.engines import zeros
from regrow.engines.bind import Subject
from regrow.engines.packed import Packed
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.errors import SettingsError
from regrow.recovery import RATES, Recover
from regrow.settings import Recipe
from regrow.stages import recover as recovering
from regrow.stages.load import load, read_teacher
from regrow.stages.recover import recover, stage_of

BLOCK, TOKENS = 16, 512
SPROUT = Path(__file__).parents[1] / "sprout"
PAIRS: dict[str, Any] = {"preferences": 2.0}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))


@cache
def loaded() -> Subject:
    return load(str(SPROUT), device="cpu")


def dense() -> Subject:
    return replace(loaded(), model=copy.deepcopy(loaded().model))


def sparse() -> Subject:
    """sprout, 2:4 by magnitude."""
    subject = dense()
    parameters = dict(subject.model.named_parameters())
    with torch.no_grad():
        for name in zeros.prunable(subject.anatomy):
            weight = parameters[name]
            weight[lowest(weight.abs(), Pattern.parse("2:4"), "matrix")] = 0.0
    return subject


@cache
def text(part: Any = "recovery") -> Tensor:  # (n, BLOCK) int64
    return blocks(documents("demo", part), loaded().tokenizer, block=BLOCK, tokens=TOKENS, seed=0)


def run(folder: Path, distil: dict[str, Any], **changes: Any) -> tuple[Subject, Any]:
    """A sparse student of its dense self."""
    progress, student, seed = changes.pop("progress", None), sparse(), changes.pop("seed", 0)
    usual = {"method": "full", "tokens": TOKENS, "block": BLOCK, "batch": 4, "learning_rate": 1e-3}
    settings = Recover.model_validate({**usual, "distil": distil, **changes})
    held = text("heldout")[:8]
    how: dict[str, Any] = {"teacher": dense(), "heldout": held, "progress": progress, "seed": seed}
    return student, recover(student, text(), settings, folder=folder, **how)


def weights(subject: Subject) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


class Stop(Exception):
    """The plug is pulled."""


def pull_plug(stage: str, share: float) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, said: str) -> None:
        if stage_of(said) == stage and done >= share * total:
            raise Stop

    return progress


@pytest.mark.parametrize("stage", ["correcting the teacher", "asking the teacher", "recovery"])
def test_resumed_equals_uninterrupted(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stops; zeros stay zeros."""
    distil = {"teacher_tokens": TOKENS, "cache": 150}
    whole, found = run(tmp_path / "whole", distil)
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "other"))
    with pytest.raises(Stop):
        run(tmp_path / "again", distil, progress=pull_plug(stage, 0.6))
    again, then = run(tmp_path / "again", distil)
    ours, theirs = weights(whole), weights(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.notes == then.notes
    assert [x["loss"] for x in found.training.losses] == [x["loss"] for x in then.training.losses]


@pytest.mark.parametrize(
    "distil", [{}, {"states": (1,)}, {"states": (1,), "weight": 1.0}, {"on_policy": 0.5}, {"online_rate": 1e-3}]
)
def test_what_hangs_on_the_pass(distil: dict[str, Any]) -> None:
    """The recipe knows it as the loss does; without a teacher nothing of it is read."""
    asked = Recover.model_validate({"method": "full", "teacher": str(SPROUT), "distil": distil})
    goal = recovering.learning_from(dense().model, dense().model, asked, 0)
    assert asked.by_pass is getattr(goal.loss, "by_pass", False)
    assert asked.by_pass is (distil in ({"states": (1,)}, {"on_policy": 0.5}))
    assert not asked.model_copy(update={"teacher": None}).by_pass


def test_without_a_teacher_no_whole_logits_are_held(tmp_path: Path) -> None:
    """Of the text's next token alone, and of what is held out of it."""
    student, seen = dense(), list[int]()
    student.model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    asked = Recover(method="full", tokens=TOKENS, block=BLOCK, batch=4, learning_rate=1e-3)
    found = recover(student, text(), asked, folder=tmp_path, seed=0, heldout=text("heldout")[:8])
    assert found.training.losses[-1]["loss"] > 0
    assert max(seen) < BLOCK


def test_pairs_are_of_the_blocks_that_are_seen(tmp_path: Path) -> None:
    """Half as many as there is text for, and no more are written."""
    told: list[tuple[int, int, str]] = []
    student, found = run(tmp_path, PAIRS, progress=lambda *step: told.append(step))
    assert found.training.tokens == TOKENS
    assert found.training.steps == TOKENS // (4 * 2 * BLOCK)
    written = [total for _, total, said in told if said == "writing pairs"]
    assert set(written) == {8 * BLOCK, TOKENS // 2}  # held-out blocks, and the training's
    assert {stage_of(said) for _, _, said in told} == {"writing pairs", "recovery"}
    assert found.training.losses[-1]["lead"] > found.training.losses[0]["lead"]
    again, _ = run(tmp_path / "again", PAIRS)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(student).items())
    other, _ = run(tmp_path / "other", {**PAIRS, "sampling": 0.5})
    assert not all(torch.equal(value, weights(other)[name]) for name, value in weights(student).items())
    assert len(list((tmp_path / "cache" / "pairs").iterdir())) == 4  # two of each temperature


def test_summed_nats_may_rise(tmp_path: Path) -> None:
    """Losses of whole continuations differ by more than the loop lets a mean over tokens rise."""
    _, found = run(tmp_path, {"preferences": 0.0}, batch=1, micro_batch=1, learning_rate=1e-6)
    assert found.training.steps == TOKENS // (2 * BLOCK)
    assert recovering.as_train(Recover(), 0).divergence == 3


def test_rates_of_a_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the student's; where adapters learn, whose rates are others, a fifth of that of all weights."""
    seen: list[Any] = []
    monkeypatch.setattr(recovering, "correct", lambda *given, **_: seen.append(given[2]) or recovering_none())
    for number, changes in enumerate(({}, {"method": "spp", "learning_rate": 0.1}, {"patience": 2, "until": 128})):
        run(tmp_path / str(number), {"teacher_tokens": 1024, "teacher_share": 0.2}, **changes)
    assert [round(x.learning_rate, 9) for x in seen] == [2e-4, round(0.2 * RATES["full"], 9), 2e-4]
    assert {(x.tokens, x.batch, x.schedule) for x in seen} == {(1024, 4, "cosine")}
    assert {(x.patience, x.until) for x in seen} == {(None, None)}, "it learns all of it"


def recovering_none() -> Any:
    from regrow.engines.correction import Corrected

    return Corrected(None, None)


def test_answers_are_not_preferred(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="preferences and learn: answers"):
        run(tmp_path, PAIRS, learn="answers")


# ---- the teacher's type


@pytest.mark.parametrize(
    ("dtype", "distil", "expected"),
    [
        ("fp32", {}, torch.float32),
        ("bf16", {}, torch.bfloat16),
        ("fp32", {"teacher_dtype": "bf16"}, torch.bfloat16),
        ("fp32", {"teacher_dtype": "fp16"}, torch.float16),
        ("bf16", {"teacher_dtype": "fp32"}, torch.float32),
        ("bf16", {"teacher_tokens": 100}, torch.float32),
    ],
)
def test_what_a_teacher_computes_in(dtype: str, distil: dict[str, Any], expected: torch.dtype) -> None:
    asked = {"dtype": dtype, "device": "cpu", "recover": {"teacher": str(SPROUT), "distil": distil}}
    teacher = read_teacher(Recipe.model_validate(asked))
    assert teacher is not None
    assert teacher.model.dtype == expected
    assert read_teacher(Recipe.model_validate({"recover": {}})) is None


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_teacher_in_16_bits_says_nearly_the_same(kind: str) -> None:
    """Frozen, its logits turned to fp32; the student's gradients stay in its own type."""
    found = []
    for name in ("fp32", kind):
        asked = {"device": "cpu", "recover": {"teacher": str(SPROUT), "distil": {"teacher_dtype": name}}}
        teacher, student = read_teacher(Recipe.model_validate(asked)), sparse().model
        assert teacher is not None
        goal = recovering.learning_from(teacher.model, student, Recover(teacher=str(SPROUT)), 0)
        value = goal.loss(student, Packed(text()[:4]).batch(slice(None)))
        assert isinstance(value, Tensor)
        assert value.dtype == torch.float32
        value.backward()
        assert all(p.grad is None for p in teacher.model.parameters())
        found.append((value.item(), student.model.layers[0].mlp.up_proj.weight.grad))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)
    assert found[1][0] != found[0][0]
    assert torch.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0) > 0.99
