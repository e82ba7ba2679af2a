"""A student that writes: what it learns from is its own text, drawn fairly, and drawn again after an interruption."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import Stop, patterns, pull_plug, same, settings, tiny, weights

from models import ids, make, randomise
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines import on_policy
from regrow.engines.adapters import add_adapters
from regrow.engines.chance import stream
from regrow.engines.distil import FromTeacher
from regrow.engines.loop import BESIDE
from regrow.engines.match import Match, Matcher
from regrow.engines.objective import Answer, Objective, next_token
from regrow.engines.on_policy import OnPolicy, Policy, written
from regrow.engines.resume import newest
from regrow.engines.sampling import prompt_of
from regrow.engines.train import train
from regrow.errors import SettingsError
from regrow.losses.jsd import jsd
from regrow.recovery import Recover
from regrow.stages.recover import learning_from

HERE = torch.device("cpu")


def policy(share: float = 1.0, prompt: float = 0.5, temperature: float = 0.9, tokens: int = 64) -> Policy:
    return Policy(share, prompt, temperature, tokens)


def pair(kind: str = "llama", **changes: Any) -> tuple[Any, Any]:
    """A student, and a teacher of other weights."""
    student, teacher = make(kind, **changes), make(kind)
    randomise(teacher, gains=1.0, seed=9)
    return student, teacher


def goal_of(teacher: Any, asked: Policy | None = None, seed: int = 0, **changes: Any) -> OnPolicy:
    return OnPolicy(FromTeacher(teacher, DIVERGENCES.get("jsd"), **changes).objective, asked or policy(), seed)


def told(answer: Answer) -> tuple[Tensor, Any]:
    assert isinstance(answer, tuple)
    return answer


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def draw(model: Any, tokens: Tensor, asked: Policy, seed: int = 0) -> Tensor:
    return written(model, tokens, asked, torch.Generator().manual_seed(seed))["input_ids"]


# --- what is written


@pytest.mark.parametrize(("block", "prompt", "given"), [(16, 0.5, 8), (16, 0.3, 5), (2, 0.01, 1), (16, 0.999, 15)])
def test_something_is_given_and_something_is_left(block: int, prompt: float, given: int) -> None:
    assert prompt_of(prompt, block) == given


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_when_cold_it_writes_what_is_likeliest(kind: str) -> None:
    """Token by token from whole passes, with no cache; sliding windows are shorter than what is written."""
    model, tokens = make(kind), ids()
    expected = tokens[:, :5]
    with torch.no_grad():
        while expected.shape[1] < tokens.shape[1]:
            logits = model(input_ids=expected, use_cache=False).logits[:, -1]
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], 1)
    batch = written(model, tokens, policy(prompt=0.25, temperature=1e-6), torch.Generator())
    assert torch.equal(batch["input_ids"], expected)
    assert not torch.equal(expected, tokens)
    assert batch["learn"].dtype == torch.bool
    assert batch["learn"].tolist() == [[False] * 5 + [True] * 15] * len(tokens)


def test_what_it_writes_is_drawn_at_its_temperature() -> None:
    """Of many equal prompts, each token comes as often as it is likely; at another temperature it does not."""
    model = make("llama")
    prompt = ids()[:1, :4]
    drawn = draw(model, prompt.repeat(4000, 1), policy(prompt=0.75, temperature=0.7))
    seen = drawn[:, -1].bincount(minlength=64) / 4000
    assert torch.equal(drawn[:, :3], prompt[:, :3].expand(4000, 3))
    with torch.no_grad():
        logits = model(input_ids=prompt[:, :3]).logits[0, -1]
    off = [float((seen - (logits / t).softmax(-1)).abs().sum()) for t in (0.7, 1.0)]
    assert off[0] < 0.12
    assert off[1] > 2 * off[0]


def test_tokens_that_a_teacher_lacks_are_not_written() -> None:
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[5:] *= 30
    drawn = draw(model, ids(), policy(tokens=5))
    assert int(drawn[:, 10:].max()) < 5
    assert int(draw(model, ids(), policy())[:, 10:].max()) >= 5


def test_it_writes_without_dropout_and_draws_from_its_own_chance() -> None:
    calm, model = tiny(), tiny(dropout=0.5).train()
    tokens = patterns(4)
    before = torch.random.get_rng_state()
    found = draw(model, tokens, policy(tokens=24))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found, draw(calm, tokens, policy(tokens=24)))
    assert not torch.equal(found, draw(calm, tokens, policy(tokens=24), seed=1))
    assert all(module.training for module in model.modules())
    draw(calm, tokens, policy(tokens=24))
    assert not calm.training


def test_every_pass_has_its_own_chance() -> None:
    def first(seed: int, count: int) -> float:
        return float(torch.rand((), generator=stream(seed, count, HERE)))

    alone = [first(seed, count) for seed in range(3) for count in range(50)]
    assert len(set(alone)) == 150
    assert [first(seed, count) for seed in range(3) for count in range(50)] == alone


def test_two_processes_draw_what_one_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take passes in turns, and one that goes on alone after both goes on where they were."""
    student, teacher = pair()
    real, numbers = on_policy.stream, list[int]()
    monkeypatch.setattr(on_policy, "stream", lambda s, n, d: (numbers.append(n), real(s, n, d))[1])
    monkeypatch.setenv("WORLD_SIZE", "2")
    both = [goal_of(teacher) for _ in range(2)]
    for _ in range(3):
        for rank, goal in enumerate(both):
            monkeypatch.setenv("RANK", str(rank))
            goal(student, {"input_ids": ids()})
    assert numbers == list(range(6))
    assert int(both[0].passes) == int(both[1].passes) == 6
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    both[1](student, {"input_ids": ids()})
    assert numbers[-1] == 6


# --- what is learnt from it


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_only_what_was_written_is_learnt(kind: str) -> None:
    """From whole logits: the mean over positions before tokens that the student wrote, the text taken as given."""
    student, teacher = pair(kind)
    source = stream(3, 0, HERE)
    torch.rand((), generator=source)  # whether it writes
    text = written(student, ids(), policy(), source)["input_ids"]
    ours = student(input_ids=text, use_cache=False).logits.float()  # (b, 20, V)
    with torch.no_grad():
        theirs = teacher(input_ids=text, use_cache=False).logits.float()
    expected = jsd(theirs[:, 9:19], ours[:, 9:19]).mean()
    expected.backward()
    plain = gradients(student)
    student.zero_grad()
    loss, parts = told(goal_of(teacher, seed=3)(student, {"input_ids": ids()}))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["on_policy"] == 1.0
    for name, grad in gradients(student).items():
        assert torch.allclose(grad, plain[name], rtol=1e-3, atol=1e-5 * float(plain[name].abs().max())), name


def test_the_prompt_teaches_nothing() -> None:
    """Logits of the student: the slope of the loss is 0 wherever the next token was given."""
    student, teacher = pair()
    slopes: list[Tensor] = []

    def hook(_: Any, __: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(slopes.append)

    student.model.norm.register_forward_hook(hook)
    told(goal_of(teacher)(student, {"input_ids": ids()}))[0].backward()
    (slope,) = slopes  # (b, 20, C)
    assert not slope[:, :9].any()
    assert bool(slope[:, 9:19].abs().sum(-1).gt(0).all())
    assert not slope[:, 19].any()


def test_from_itself_it_learns_nothing() -> None:
    student = make("llama")
    loss, _ = told(goal_of(make("llama"))(student, {"input_ids": ids()}))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert max(float(grad.abs().max()) for grad in gradients(student).values()) < 1e-4


def test_text_that_is_read_is_read_as_it_is() -> None:
    """What is learnt of it stays too; in half of many passes it writes."""
    student, teacher = pair()
    learn = torch.zeros_like(ids(), dtype=torch.bool)
    learn[:, 3:7] = True
    batch = {"input_ids": ids(), "learn": learn}
    plain = FromTeacher(teacher, DIVERGENCES.get("jsd"))(student, batch)
    loss, parts = told(goal_of(teacher, policy(share=0.0))(student, batch))
    assert torch.equal(loss, plain)
    assert parts == {"on_policy": 0.0}
    seen: list[bool] = []
    counted = OnPolicy(Objective(lambda _, b: seen.append("learn" in b) or torch.zeros(())), policy(share=0.5), 0)
    for _ in range(200):
        told(counted(student, {"input_ids": ids()[:1, :2]}))
    assert 80 <= sum(seen) <= 120
    assert int(counted.passes) == 200


def test_held_out_text_is_neither_written_nor_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = pair()
    goal = goal_of(teacher)
    monkeypatch.setattr(on_policy, "written", lambda *_: pytest.fail("it wrote"))
    with torch.no_grad():
        found = goal(student, {"input_ids": ids()})
        assert isinstance(found, Tensor)
        assert torch.equal(found, FromTeacher(teacher, DIVERGENCES.get("jsd"))(student, {"input_ids": ids()}))
    assert int(goal.passes) == 0


def test_what_a_loss_says_of_its_weights_stays() -> None:
    groups, apart = [{"params": [], "lr": 1.0}], [{"params": [], "lr": 2.0}]
    goal = OnPolicy(Objective(next_token, groups, apart=apart), policy(), 0).objective
    assert (goal.groups, goal.apart) == (groups, apart)
    assert goal.beside is goal.loss


def test_states_are_compared_where_it_wrote() -> None:
    student, teacher = pair(hidden_size=12)
    match = Match(LIKENESSES.get("cosine"), (1,), 1.0)
    goal = goal_of(teacher, matcher=Matcher(match, student, teacher))
    loss, parts = told(goal(student, {"input_ids": ids()}))
    assert loss.item() == pytest.approx(float(parts["divergence"] + parts["states"]), rel=1e-5)
    assert parts.keys() == {"divergence", "states", "on_policy"}


# --- through the loop


def run(folder: Path, *, after: int | None = None, share: float = 0.5, **changes: Any) -> tuple[Any, OnPolicy]:
    """A student with dropout and half the width, whose states go through a projection."""
    config = tiny(dropout=0.1).config
    config.hidden_size = 16
    torch.manual_seed(1)
    student, teacher = type(tiny())(config).eval(), tiny()
    randomise(teacher, gains=1.0, seed=9)
    matcher = Matcher(Match(LIKENESSES.get("cosine"), (0, 1), None), student, teacher)
    goal = goal_of(teacher, policy(share, tokens=24), matcher=matcher)
    say = None if after is None else pull_plug(after)
    with contextlib.suppress(Stop):
        train(student, patterns(), settings(**changes), folder=folder, loss=goal.objective, progress=say)
    return student, goal


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_it_resumes_bit_for_bit(tmp_path: Path, after: int) -> None:
    whole, goal = run(tmp_path / "whole", save_every=1)
    assert int(goal.passes) == 12
    assert isinstance(goal.beside, Matcher)
    assert goal.beside.projection is not None
    assert not torch.equal(goal.beside.projection.weight, torch.eye(32, 16)), "what was beside the loss still learns"
    run(tmp_path / "cut", after=after + 1, save_every=1)
    found = newest(tmp_path / "cut")
    assert found is not None
    assert found.name == f"checkpoint-{after}"
    again, resumed = run(tmp_path / "cut", save_every=1)
    assert same(weights(again), weights(whole))
    assert same(weights(resumed), weights(goal))


def test_a_count_that_is_lost_is_missed(tmp_path: Path) -> None:
    """Planted: a resumed run that counts anew ends elsewhere."""
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "cut", after=4)
    found = newest(tmp_path / "cut")
    assert found is not None
    kept = load_file(found / BESIDE)
    assert int(kept["passes"]) == 6
    save_file({**kept, "passes": torch.zeros((), dtype=torch.int64)}, found / BESIDE)
    again, _ = run(tmp_path / "cut")
    assert not same(weights(again), weights(whole))


def test_equal_seeds_write_alike_and_looking_changes_nothing(tmp_path: Path) -> None:
    one, _ = run(tmp_path / "one")
    two, _ = run(tmp_path / "two")
    assert same(weights(one), weights(two))
    never, _ = run(tmp_path / "never", share=1e-9)
    assert not same(weights(one), weights(never))

    def student(name: str, **changes: Any) -> Any:
        model, teacher = tiny(), make("llama", vocab_size=24)
        train(model, patterns(), settings(), folder=tmp_path / name, loss=goal_of(teacher, **changes).objective)
        return weights(model)

    tokens = policy(0.5, tokens=24)
    usual = student("a", asked=tokens)
    assert same(usual, student("b", asked=tokens))
    assert not same(usual, student("c", asked=tokens, seed=1))
    model = tiny()
    looked = goal_of(make("llama", vocab_size=24), tokens).objective
    asked = settings(evaluate_every=1)
    train(model, patterns(), asked, folder=tmp_path / "looked", loss=looked, heldout=patterns(3))
    assert same(weights(model), usual)


def test_a_student_that_never_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe's words: without a share nothing new is there at all, and a share of 0 ends where it did."""
    monkeypatch.setattr(on_policy, "written", lambda *_: pytest.fail("it wrote"))
    ends = []
    for name, share in (("plain", None), ("never", 0.0)):
        student, teacher = tiny(), tiny()
        randomise(teacher, gains=1.0, seed=9)
        goal = learning_from(teacher, student, Recover(teacher="there"), 0)
        assert isinstance(goal.loss, FromTeacher)
        assert goal.beside is None
        if share is not None:
            goal = OnPolicy(goal, policy(share, tokens=24), 0).objective
        train(student, patterns(), settings(), folder=tmp_path / name, loss=goal)
        ends.append(weights(student))
    assert same(*ends)


def test_the_words_of_a_recipe_reach_it() -> None:
    student, teacher = make("llama"), make("llama", vocab_size=50)
    asked = Recover(teacher="there", distil={"on_policy": 0.25, "prompt": 0.75, "sampling": 1.5})
    goal = learning_from(teacher, student, asked, 7).loss
    assert isinstance(goal, OnPolicy)
    assert (goal.policy, goal.seed) == (Policy(0.25, 0.75, 1.5, 50), 7)


@pytest.mark.parametrize("kind", ["lora", "checkpointing"])
def test_students_of_every_kind(tmp_path: Path, kind: str) -> None:
    student, teacher = tiny(), tiny()
    randomise(teacher, gains=1.0, seed=9)
    model = add_adapters(student, rank=2, dropout=0.1) if kind == "lora" else student
    goal = goal_of(teacher, policy(0.5, tokens=24)).objective

    def distance() -> float:
        with torch.no_grad():
            answer = goal.loss(model.eval(), {"input_ids": patterns()})
        return float(answer[0] if isinstance(answer, tuple) else answer)

    before = distance()
    found = train(model, patterns(), settings(checkpointing=kind != "lora"), folder=tmp_path, loss=goal)
    assert 0 < sum(x["on_policy"] for x in found.losses) / 6 < 1
    assert distance() < before


@pytest.mark.parametrize(
    "change", [{"share": 0.6}, {"prompt": 0.25}, {"temperature": 1.0}, {"micro_batch": 4}], ids=str
)
def test_another_policy_is_another_run(tmp_path: Path, change: dict[str, Any]) -> None:
    teacher = tiny()
    size = {name: value for name, value in change.items() if name == "micro_batch"}
    asked = [policy(**{"share": 0.5, "tokens": 24, **more}) for more in ({}, {} if size else change)]
    train(tiny(), patterns(), settings(), folder=tmp_path, loss=goal_of(teacher, asked[0]).objective)
    with pytest.raises(SettingsError, match="micro_batch" if size else "on policy"):
        train(tiny(), patterns(), settings(**size), folder=tmp_path, loss=goal_of(teacher, asked[1]).objective)
