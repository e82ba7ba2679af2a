"""A teacher that learns beside its student: each lowers its own loss and no other's, and only adapters move in it."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from training import STEP, Stop, patterns, pull_plug, same, settings, tiny, weights

from models import ids, make, randomise
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines import head as heads
from regrow.engines.adapters import add_adapters
from regrow.engines.distil import FromTeacher
from regrow.engines.head import Head
from regrow.engines.loop import BESIDE
from regrow.engines.match import Match, Matcher
from regrow.engines.objective import Answer
from regrow.engines.online_teacher import FromOnlineTeacher, Online
from regrow.engines.resume import newest
from regrow.engines.train import train
from regrow.errors import SettingsError
from regrow.recovery import Recover
from regrow.stages.recover import learning_from


def kl() -> Any:
    return DIVERGENCES.get("forward-kl")


def pair(kind: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """A student, and a teacher of other weights."""
    student, teacher = make(kind, **changes), make(kind)
    randomise(teacher, gains=1.0, seed=9)
    return student, teacher


def online(teacher: Any, rate: float = 1e-2, **changes: Any) -> FromOnlineTeacher:
    way = Online(rate, changes.pop("rank", 2), changes.pop("seed", 0), changes.pop("pull", 1.0))
    return FromOnlineTeacher(teacher, kl(), online=way, **changes)


def stirred(goal: FromOnlineTeacher) -> FromOnlineTeacher:
    """Adapters that have learnt something; fresh ones change nothing."""
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in goal.adapters:
            adapter.copy_(0.1 * torch.randn(adapter.shape, generator=source))
    return goal


def told(answer: Answer) -> tuple[Tensor, Any]:
    assert isinstance(answer, tuple)
    return answer


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max())), name


# --- who lowers what


def test_by_hand() -> None:
    """One token, p = (3/4, 1/8, 1/8) there and q = (1/4, 1/4, 1/2) here, and the first token follows."""
    p, q = torch.tensor([[3 / 4, 1 / 8, 1 / 8]]).log(), torch.tensor([[1 / 4, 1 / 4, 1 / 2]]).log()
    head, following = Head(torch.eye(3), None, lambda logits: logits), torch.tensor([0])
    goal = FromTeacher(make("llama"), kl())
    ours, _ = goal.predictions(head, head, p, q.requires_grad_(), following=following, text=0.0)
    theirs, parts = goal.predictions(head, head, q.detach(), p.requires_grad_(), following=following, text=1.0)
    there = 3 / 4 * math.log(3) - 3 / 8 * math.log(2)
    back = 5 / 4 * math.log(2) - 1 / 4 * math.log(3)
    assert ours.item() == pytest.approx(there, abs=1e-6)
    assert float(parts["divergence"]) == pytest.approx(back, abs=1e-6)
    assert float(parts["next_token"]) == pytest.approx(-math.log(3 / 4), abs=1e-6)
    assert theirs.item() == pytest.approx(back - math.log(3 / 4), abs=1e-6)
    ours.backward()
    assert p.grad is None
    assert q.grad is not None
    assert torch.allclose(q.grad, torch.tensor([[-1 / 2, 1 / 8, 3 / 8]]), atol=1e-6), "what it says less what it should"
    theirs.backward()
    assert p.grad is not None
    assert torch.allclose(p.grad, torch.tensor([[1 / 2 - 1 / 4, -1 / 8 + 1 / 8, -3 / 8 + 1 / 8]]), atol=1e-6)


@pytest.mark.parametrize("rows", [3, 10**6], ids=["pieces", "whole"])
@pytest.mark.parametrize(("kind", "pull"), [("llama", 1.0), ("gemma2", 1.0), ("llama", 0.5), ("llama", 0.0)])
def test_each_has_its_own_gradient(monkeypatch: pytest.MonkeyPatch, kind: str, pull: float, rows: int) -> None:
    """From whole logits: the student's loss moves the student alone, the teacher's its adapters alone; without a pull
    the teacher learns the text alone."""
    student, teacher = pair(kind)
    goal = stirred(online(teacher, pull=pull))
    monkeypatch.setattr(heads, "NUMBERS", rows * student.config.vocab_size)
    ours = student(input_ids=ids(), use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    theirs = teacher(input_ids=ids(), use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
    lowered = kl_div(ours, theirs.detach(), log_target=True, reduction="batchmean")
    taught = pull * kl_div(theirs, ours.detach(), log_target=True, reduction="batchmean")
    said = cross_entropy(theirs.view(*ids().shape, -1)[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    (lowered + taught + said).backward()
    mine, others = gradients(student), gradients(teacher)
    student.zero_grad()
    teacher.zero_grad()
    loss, parts = told(goal(student, {"input_ids": ids()}))
    loss.backward()
    assert loss.item() == pytest.approx(lowered.item(), rel=1e-5), "on record is the student's loss"
    assert float(parts["teacher_divergence"]) == pytest.approx(taught.item(), rel=1e-4)
    assert float(parts["teacher_next_token"]) == pytest.approx(said.item(), rel=1e-4)
    alike(gradients(student), mine)
    alike(gradients(teacher), others)
    assert len(others) == len(goal.adapters) == 2 * 3 * 7
    assert all("lora_" in name for name in others)
    assert all(bool(grad.any()) for grad in others.values())


def test_where_only_some_tokens_are_learnt() -> None:
    """By both: what comes after them changes nothing."""
    learn = torch.zeros_like(ids(), dtype=torch.bool)
    learn[:, 3:9] = True
    later = ids().clone()
    later[:, 9:] = later[:, 9:].flip(-1)
    found = []
    for tokens in (ids(), later):
        student, teacher = pair()
        loss, parts = told(stirred(online(teacher))(student, {"input_ids": tokens, "learn": learn}))
        loss.backward()
        found.append((parts, {**gradients(student), **{f"teacher {n}": g for n, g in gradients(teacher).items()}}))
    assert float(found[0][0]["teacher_next_token"]) == pytest.approx(float(found[1][0]["teacher_next_token"]))
    alike(found[0][1], found[1][1])


def test_states_of_the_teacher_stay_where_they_are() -> None:
    """What they cost is the student's alone."""
    student, teacher = pair(hidden_size=12)
    match = Match(LIKENESSES.get("cosine"), (0, 1), 5.0)
    grads = []
    for matcher in (None, Matcher(match, student, teacher)):
        goal = stirred(online(pair()[1], matcher=matcher))
        loss, parts = told(goal(student, {"input_ids": ids()}))
        loss.backward()
        grads.append([adapter.grad for adapter in goal.adapters])
    assert float(parts["states"]) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_without_gradients_it_is_the_students_loss() -> None:
    student, teacher = pair()
    goal = stirred(online(teacher))
    with torch.no_grad():
        found = goal(student, {"input_ids": ids()})
    assert isinstance(found, Tensor)
    assert found.item() == pytest.approx(told(goal(student, {"input_ids": ids()}))[0].item(), rel=1e-6)


# --- through the loop


def run(folder: Path, rate: float | None, *, after: int | None = None, **changes: Any) -> tuple[Any, Any, Any]:
    """Student, teacher and goal of a run whose student drops out, is half as wide and is compared inside."""
    config = tiny(dropout=0.1).config
    config.hidden_size = 16
    torch.manual_seed(1)
    student, teacher = type(tiny())(config).eval(), tiny()
    randomise(teacher, gains=1.0, seed=9)
    also: dict[str, Any] = {"matcher": Matcher(Match(LIKENESSES.get("cosine"), (0, 1), None), student, teacher)}
    goal = FromTeacher(teacher, kl(), **also) if rate is None else online(teacher, rate, **also)
    say = None if after is None else pull_plug(after)
    asked, held = settings(**changes), patterns(3)
    with contextlib.suppress(Stop):
        train(student, patterns(), asked, folder=folder, loss=goal.objective, heldout=held, progress=say)
    return student, teacher, goal


def body(teacher: Any) -> dict[str, Tensor]:
    return {name.replace(".base_layer", ""): w for name, w in weights(teacher).items() if "lora_" not in name}


def test_at_rate_zero_it_is_a_teacher_that_stays(tmp_path: Path) -> None:
    plain, _, _ = run(tmp_path / "plain", None, evaluate_every=2)
    still, _, goal = run(tmp_path / "still", 0.0, evaluate_every=2)
    moving, _, _ = run(tmp_path / "moving", 1e-2, evaluate_every=2)
    assert same(weights(still), weights(plain))
    assert not same(weights(moving), weights(plain))
    assert sum(bool(adapter.any()) for adapter in goal.adapters) == len(goal.adapters) / 2, "B is 0 as at the start"


def test_its_own_weights_stay(tmp_path: Path) -> None:
    _, teacher, goal = run(tmp_path, 1e-2)
    untouched = tiny()
    randomise(untouched, gains=1.0, seed=9)
    assert same(body(teacher), weights(untouched))
    assert all(bool(adapter.any()) for adapter in goal.adapters)
    assert not teacher.training


def test_it_learns_the_text_and_its_student(tmp_path: Path) -> None:
    """Before the first step it is the teacher that it was."""
    found = {}
    for name, rate in (("still", 0.0), ("moving", 1e-2)):
        student, teacher = tiny(), tiny()
        randomise(teacher, gains=1.0, seed=9)
        goal = online(teacher, rate).objective
        found[name] = train(student, patterns(), settings(tokens=20 * STEP), folder=tmp_path / name, loss=goal).losses
    assert found["moving"][0] == found["still"][0]
    for part, most in (("teacher_next_token", 0.8), ("teacher_divergence", 0.95)):
        assert found["moving"][-1][part] < most * found["still"][-1][part]


def test_the_rate_is_its_own(tmp_path: Path) -> None:
    """By hand: AdamW's first step is the rate, where there is a gradient; what begins at 0 is there then."""
    student, teacher = tiny(), tiny()
    randomise(teacher, gains=1.0, seed=9)
    goal, before = online(teacher, 3e-3), weights(student)
    asked = settings(tokens=STEP, warmup=0, schedule="constant", learning_rate=1e-4)
    train(student, patterns(), asked, folder=tmp_path, loss=goal.objective)
    gone = [adapter.abs().max().item() for adapter in goal.adapters if adapter.shape[1] == 2]
    assert len(gone) == 2 * 7
    assert gone == pytest.approx([3e-3] * 14, rel=1e-2)
    assert max(float((w - before[n]).abs().max()) for n, w in weights(student).items()) == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_it_resumes_bit_for_bit(tmp_path: Path, after: int) -> None:
    whole = run(tmp_path / "whole", 1e-2, save_every=1)
    run(tmp_path / "cut", 1e-2, after=after + 1, save_every=1)
    found = newest(tmp_path / "cut")
    assert found is not None
    assert found.name == f"checkpoint-{after}"
    again = run(tmp_path / "cut", 1e-2, save_every=1)
    assert same(weights(again[0]), weights(whole[0]))
    assert same(weights(again[1]), weights(whole[1]))
    assert same(weights(again[2].matcher), weights(whole[2].matcher))


def test_adapters_that_are_lost_are_missed(tmp_path: Path) -> None:
    """Planted: a resumed run whose teacher has forgotten ends elsewhere."""
    whole = run(tmp_path / "whole", 1e-2)
    run(tmp_path / "cut", 1e-2, after=4)
    found = newest(tmp_path / "cut")
    assert found is not None
    kept = load_file(found / BESIDE)
    assert len(kept) == 2 * 2 * 7 + 1, "adapters of two layers, and the projection"
    emptied = {name: torch.zeros_like(w) if name.startswith("teacher") else w for name, w in kept.items()}
    save_file(emptied, found / BESIDE)
    again = run(tmp_path / "cut", 1e-2)
    assert not same(weights(again[0]), weights(whole[0]))


@pytest.mark.parametrize("change", [{"rate": 2e-2}, {"rank": 4}, {"seed": 1}, {"pull": 0.0}], ids=str)
def test_another_way_is_another_run(tmp_path: Path, change: dict[str, Any]) -> None:
    train(tiny(), patterns(), settings(), folder=tmp_path, loss=online(tiny()).objective)
    with pytest.raises(SettingsError, match=r"who learns too: rank 2 at 0\.01 from seed 0"):
        train(tiny(), patterns(), settings(), folder=tmp_path, loss=online(tiny(), **change).objective)


def test_the_words_of_a_recipe_reach_it() -> None:
    student, teacher = make("llama"), make("llama")
    asked = Recover(
        teacher="there", distil={"online_rate": 0.002, "online_rank": 3, "online_pull": 0.5, "text": 0.5, "states": [1]}
    )
    goal = learning_from(teacher, student, asked, 7)
    assert isinstance(goal.loss, FromOnlineTeacher)
    assert {min(adapter.shape) for adapter in goal.loss.adapters} == {3}
    assert (goal.loss.rate, goal.loss.pull, goal.loss.text) == (0.002, 0.5, 0.5)
    assert goal.loss.matcher is not None
    assert [group["lr"] for group in goal.apart] == [0.002]
    drawn = [next(iter(learning_from(make("llama"), student, asked, seed).loss.adapters)) for seed in (7, 7, 8)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_teacher_in_half_precision_and_a_student_with_adapters(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny()
    randomise(teacher, gains=1.0, seed=9)
    goal = online(teacher.bfloat16())
    found = train(add_adapters(student, rank=2), patterns(), settings(), folder=tmp_path, loss=goal.objective)
    assert {adapter.dtype for adapter in goal.adapters} == {torch.float32}
    assert found.losses[-1]["teacher_next_token"] < found.losses[0]["teacher_next_token"]
