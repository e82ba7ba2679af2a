"""Pairs: who writes what, what of it counts, and a loss that raises the teacher's and lowers the student's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import VOCAB, Stop, T, patterns, pull_plug, same, settings, tiny, weights

from models import make, randomise
from regrow.engines import head as heads
from regrow.engines import pairs
from regrow.engines.pairs import Draw, Preferred, written
from regrow.engines.sampling import prompt_of
from regrow.engines.train import train

PROMPT, END = 6, 0
DRAW = Draw(PROMPT, 0.9, 0, VOCAB)


def other() -> Any:
    teacher = tiny()
    randomise(teacher, gains=1.0, seed=9)
    return teacher


def rows(count: int = 6) -> Tensor:  # (count, 2 T) int64
    """Pairs with one prompt, whose continuations end at different places."""
    source = torch.Generator().manual_seed(4)
    halves = torch.randint(1, VOCAB, (2, count, T), generator=source)
    halves[1, :, :PROMPT] = halves[0, :, :PROMPT]
    for index in range(count):
        halves[index % 2, index, PROMPT + index :] = END
    return torch.cat([halves[0], halves[1]], 1)


def chance(model: Any, ids: Tensor, by_length: bool) -> Tensor:  # ()
    """Log-probability of what follows the prompt in ids (T,), up to the first end, from whole logits."""
    logs = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)  # (T, V)
    found = []
    for place in range(PROMPT, T):
        found.append(logs[place - 1, ids[place]])
        if ids[place] == END:
            break
    return torch.stack(found).mean() if by_length else torch.stack(found).sum()


def plain(model: Any, both: Tensor, margin: float, by_length: bool = False) -> Tensor:
    """The loss, pair after pair."""
    each = [chance(model, row[:T], by_length) - chance(model, row[T:], by_length) for row in both]
    return torch.stack([(margin - lead).clamp_min(0) for lead in each]).mean()


def loss_of(model: Any, both: Tensor, margin: float, **how: Any) -> tuple[Tensor, dict[str, Any]]:
    found = Preferred(margin, PROMPT, (END,), **how)(model, {"input_ids": both})
    assert isinstance(found, tuple)
    return found[0], dict(found[1])


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the loss


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("pieces", [1, 5, 10**6], ids=["a token", "five", "all"])
def test_equal_to_whole_logits(monkeypatch: pytest.MonkeyPatch, pieces: int, by_length: bool) -> None:
    """Value and gradients, with pairs whose margin is met beside others where it is not."""
    monkeypatch.setattr(heads, "NUMBERS", pieces * VOCAB)
    margin, student, again = 0.05 if by_length else 1.0, other(), other()
    expected = plain(again, rows(), margin, by_length)
    expected.backward()
    found, parts = loss_of(student, rows(), margin, by_length=by_length)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < float(parts["ranked"]) < 1
    ours, theirs = gradients(student), gradients(again)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5 * float(theirs[name].abs().max())), name
    with torch.no_grad():
        assert loss_of(other(), rows(), margin, by_length=by_length)[0].item() == pytest.approx(expected.item())


def test_by_hand() -> None:
    """A model to which all tokens are alike: one token against three of chance 1/V each, so y+ leads by 2 log V."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    both = torch.ones(1, 2 * T, dtype=torch.int64)
    both[0, PROMPT] = END
    both[0, T + PROMPT + 2] = END
    lead = 2 * torch.log(torch.tensor(float(VOCAB))).item()
    assert loss_of(model, both, 10.0)[0].item() == pytest.approx(10 - lead, abs=1e-5)
    swapped = torch.cat([both[:, T:], both[:, :T]], 1)
    assert loss_of(model, swapped, 10.0)[0].item() == pytest.approx(10 + lead, abs=1e-5)
    assert loss_of(model, both, 10.0, by_length=True)[0].item() == pytest.approx(10, abs=1e-5)


def test_nothing_is_lost_once_the_margin_is_met() -> None:
    student = other()
    lead = chance(student, rows()[0][:T], False) - chance(student, rows()[0][T:], False)
    better = rows()[:1] if lead > 0 else torch.cat([rows()[:1, T:], rows()[:1, :T]], 1)
    found, parts = loss_of(student, better, abs(lead.item()) / 2)
    found.backward()
    assert found.item() == 0
    assert float(parts["ranked"]) == 1
    assert not any(bool(grad.any()) for grad in gradients(student).values())


def test_a_step_raises_the_teachers_and_lowers_the_own() -> None:
    student = other()
    first = [chance(student, half, False).item() for half in rows()[0].view(2, T)]
    found, _ = loss_of(student, rows()[:1], 1e3)
    found.backward()
    with torch.no_grad():
        for weight in student.parameters():
            weight.sub_(1e-3 * weight.grad)
    then = [chance(student, half, False).item() for half in rows()[0].view(2, T)]
    assert then[0] > first[0]
    assert then[1] < first[1]


def test_swapping_a_pair_turns_the_sign() -> None:
    """Far from the margin the gradient is that of the lead alone."""
    student, again = other(), other()
    loss_of(student, rows(), 1e3)[0].backward()
    loss_of(again, torch.cat([rows()[:, T:], rows()[:, :T]], 1), 1e3)[0].backward()
    ours, theirs = gradients(student), gradients(again)
    for name in ours:
        assert torch.allclose(ours[name], -theirs[name], rtol=1e-3, atol=1e-5 * float(theirs[name].abs().max())), name


def test_what_lies_behind_the_end_does_not_count() -> None:
    """Planted: other tokens behind the end; one that is before it shows."""
    both = rows()
    behind = both.clone()
    for half in (behind[:, :T], behind[:, T:]):
        ended = (half[:, PROMPT:] == END).cumsum(1)
        half[:, PROMPT:][(ended - (half[:, PROMPT:] == END).long()) > 0] = 7
    assert not torch.equal(both, behind)
    student, again = other(), other()
    found, same_again = loss_of(student, both, 5.0)[0], loss_of(again, behind, 5.0)[0]
    found.backward()
    same_again.backward()
    assert same_again.item() == pytest.approx(found.item(), rel=1e-6)
    for name, grad in gradients(student).items():
        assert torch.allclose(grad, gradients(again)[name], rtol=1e-4, atol=1e-6 * float(grad.abs().max())), name
    before = both.clone()
    before[1, PROMPT] = 7 if int(both[1, PROMPT]) != 7 else 8
    assert loss_of(other(), before, 5.0)[0].item() != pytest.approx(found.item(), rel=1e-4)


def test_a_prompt_is_not_learnt() -> None:
    counts = Preferred(1.0, PROMPT, (END,)).counting(rows().view(-1, T))  # (2 n, T - 1)
    assert not counts[:, : PROMPT - 1].any()
    assert bool(counts[:, PROMPT - 1].all())
    prompts = rows().view(-1, T).clone()
    prompts[:, :PROMPT] = END  # a separator in a prompt ends nothing
    assert torch.equal(Preferred(1.0, PROMPT, (END,)).counting(prompts), counts)
    assert Preferred(1.0, PROMPT, ()).counting(prompts).sum() == len(prompts) * (T - PROMPT)


def test_prompts_leave_something_to_write() -> None:
    assert [prompt_of(share, 16) for share in (0.001, 0.5, 0.999)] == [1, 8, 15]


# ---- training


def test_pairs_count_alike_in_every_pass(tmp_path: Path) -> None:
    """Pairs of very different lengths: a step of four passes is a step of one."""
    steps = [tiny() for _ in range(2)]
    goal = Preferred(3.0, PROMPT, (END,))
    with torch.no_grad():
        expected = plain(tiny(), rows(4), 3.0).item()
    for model, micro in zip(steps, (1, 4), strict=True):
        numbers = settings(tokens=8 * T, micro_batch=micro, clip=0.0, learning_rate=1e-3)
        found = train(model, rows(4), numbers, folder=tmp_path / str(micro), loss=goal, heldout=rows(4))
        assert found.steps == 1
        assert found.losses[0]["loss"] == pytest.approx(expected, rel=1e-5)
        assert found.losses[0]["heldout_loss"] == pytest.approx(plain(model, rows(4), 3.0).detach().item(), rel=1e-4)
    one, four = (weights(model) for model in steps)
    for name in one:
        assert torch.allclose(one[name], four[name], atol=1e-5), name


def test_training_ranks_them(tmp_path: Path) -> None:
    both, student = written(other(), tiny(), patterns(), DRAW, tmp_path, batch=4), tiny()
    goal, numbers = Preferred(2.0, PROMPT, (END,)), settings(tokens=60 * 4 * T, divergence=float("inf"))
    found = train(student, both, numbers, folder=tmp_path / "run", loss=goal)
    assert found.losses[-1]["loss"] < 0.5 * found.losses[0]["loss"]
    assert found.losses[-1]["lead"] > found.losses[0]["lead"]


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    goal, whole, again = Preferred(2.0, PROMPT, (END,)), tiny(), tiny()
    train(whole, rows(), settings(), folder=tmp_path / "whole", loss=goal)
    with pytest.raises(Stop):
        train(again, rows(), settings(), folder=tmp_path / "again", loss=goal, progress=pull_plug(4))
    again = tiny()
    train(again, rows(), settings(), folder=tmp_path / "again", loss=goal)
    assert same(weights(whole), weights(again))


# ---- writing


def test_who_writes_what(tmp_path: Path) -> None:
    """One prompt, two hands, and other numbers for each; text in one place does not hang on how many go in a pass."""
    teacher, student, ids = other(), tiny(), patterns()
    found = written(teacher, student, ids, DRAW, tmp_path, batch=5)
    assert found.shape == (12, 2 * T)
    for half in (found[:, :T], found[:, T:]):
        assert torch.equal(half[:, :PROMPT], ids[:, :PROMPT])
    for name, batch in (("three", 3), ("all", 12)):
        (tmp_path / name).mkdir()
        assert torch.equal(written(teacher, student, ids, DRAW, tmp_path / name, batch=batch), found)
    (tmp_path / "one").mkdir()
    alone = written(teacher, teacher, ids, DRAW, tmp_path / "one", batch=5)
    assert torch.equal(alone[:, :T], found[:, :T])
    assert not torch.equal(alone[:, T:], found[:, T:])
    assert not torch.equal(alone[:, T:], alone[:, :T])
    (tmp_path / "seed").mkdir()
    assert not torch.equal(
        written(teacher, student, ids, Draw(PROMPT, 0.9, 1, VOCAB), tmp_path / "seed", batch=5), found
    )


def test_what_is_written_is_not_written_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pairs, "CHUNK", 4)
    first = written(other(), tiny(), patterns(), DRAW, tmp_path, batch=4)
    (tmp_path / "1.safetensors").unlink()
    asked: list[int] = []
    write = pairs.continued

    def counted(*given: Any, **how: Any) -> Tensor:
        asked.append(len(given[1]))
        return write(*given, **how)

    monkeypatch.setattr(pairs, "continued", counted)
    done: list[int] = []
    assert torch.equal(written(other(), tiny(), patterns(), DRAW, tmp_path, batch=4, say=done.append), first)
    assert asked == [4, 4]
    assert done == [4, 8, 12]


def test_a_teacher_without_logits_will_do(tmp_path: Path) -> None:
    """Its pairs are tokens; a head of any kind may have drawn them."""
    odd = make("llama", vocab_size=VOCAB)
    odd.lm_head = torch.nn.Sequential(odd.lm_head)
    found = written(odd, tiny(), patterns(), DRAW, tmp_path, batch=12)
    loss, _ = loss_of(tiny(), found, 1.0)
    assert bool(loss.isfinite())
