"""States inside a student, compared with its teacher's where both do the same work."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import Stop, patterns, pull_plug, same, settings, tiny, weights

from models import ids, make, randomise
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines.adapters import add_adapters
from regrow.engines.distil import FromTeacher
from regrow.engines.loop import BESIDE
from regrow.engines.match import Match, Matcher, listening
from regrow.engines.resume import newest
from regrow.engines.train import train
from regrow.errors import SettingsError, UnsupportedModel

KINDS = ["cosine", "mse", "relations"]


def match(kind: str = "cosine", *places: int, weight: float | None = 1.0, **options: Any) -> Match:
    return Match(LIKENESSES.get(kind), places or (1,), weight, options)


def goal_of(student: Any, teacher: Any, asked: Match, **changes: Any) -> FromTeacher:
    return FromTeacher(teacher, DIVERGENCES.get("forward-kl"), matcher=Matcher(asked, student, teacher), **changes)


def pair(**changes: Any) -> tuple[Any, Any]:
    """A student, perhaps of another shape, and a teacher of other weights."""
    student, teacher = make("llama", **changes), make("llama")
    randomise(teacher, gains=1.0, seed=9)
    return student, teacher


def told(goal: FromTeacher, student: Any, **batch: Tensor) -> tuple[Tensor, Any]:
    answer = goal(student, {"input_ids": ids(), **batch})
    assert isinstance(answer, tuple)
    return answer


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- what is heard


def test_places_are_counted_from_the_end() -> None:
    model = make("llama")
    with listening(model, match("cosine", 0, 1, 2, 3)) as heard:
        states = model(input_ids=ids(), use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(heard["0"], states[0])
    assert torch.equal(heard["3"], states[1])
    assert torch.equal(heard["2"], states[2])
    assert torch.equal(model.model.norm(heard["1"]), states[3]), "the last one is given through the final norm"


def test_the_embedding_is_what_the_first_block_receives() -> None:
    """Gemma multiplies it."""
    model = make("gemma2")
    with listening(model, match("cosine", 0)) as heard:
        model(input_ids=ids(), use_cache=False)
    plain = model.get_input_embeddings().weight[ids()]
    assert not torch.allclose(heard["0"], plain, rtol=0.1)


def test_queries_keys_and_values() -> None:
    model = make("llama")
    with listening(model, match("relations", 2)) as heard:
        model(input_ids=ids(), use_cache=False)
    assert [(key.split(".")[-1], heard[key].shape[-1]) for key in heard] == [
        ("q_proj", 36),
        ("k_proj", 18),
        ("v_proj", 18),
    ]
    for hooks in (module._forward_hooks for module in model.modules()):
        assert not hooks


# --- what it costs


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_like_itself(kind: str) -> None:
    student, teacher = make("llama"), make("llama")
    loss, parts = told(goal_of(student, teacher, match(kind, 1, 2)), student)
    assert float(parts["states"]) == pytest.approx(0, abs=1e-6)
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_by_hand() -> None:
    """The mean over two places and all positions, beside the divergence."""
    student, teacher = pair()
    alone = FromTeacher(teacher, DIVERGENCES.get("forward-kl"))(student, {"input_ids": ids()})
    assert isinstance(alone, Tensor)
    with torch.no_grad():
        theirs, ours = (m(input_ids=ids(), output_hidden_states=True).hidden_states for m in (teacher, student))
    expected = sum((1 - torch.cosine_similarity(theirs[i], ours[i], -1)).mean() / 2 for i in (0, 2))
    loss, parts = told(goal_of(student, teacher, match("cosine", 0, 2, weight=3.0)), student)
    assert float(parts["states"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(parts["divergence"]) == pytest.approx(alone.item(), rel=1e-5)
    assert loss.item() == pytest.approx(alone.item() + 3 * float(expected), rel=1e-4)


def test_depths_may_differ() -> None:
    """The student's second of two is compared with the teacher's third of three, not with its second."""
    student, teacher = pair(num_hidden_layers=2)
    _, parts = told(goal_of(student, teacher, match("mse", 1)), student)
    with listening(teacher, match("mse", 1)) as theirs, listening(student, match("mse", 1)) as ours, torch.no_grad():
        for model in (teacher, student):
            model(input_ids=ids())
    assert float(parts["states"]) == pytest.approx((theirs["1"] - ours["1"]).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_widths_may_differ(kind: str) -> None:
    """One projection, near the identity at first; it has a gradient, and the teacher none."""
    student, teacher = pair(hidden_size=12)
    asked = match(kind, 0, 1, 2)
    goal = goal_of(student, teacher, asked)
    assert goal.matcher is not None
    projection = goal.matcher.projection
    assert projection is not None
    assert torch.equal(projection.weight, torch.eye(24, 12))
    assert [name for name, _ in goal.matcher.named_parameters()] == ["projection.weight"]
    loss, parts = told(goal, student)
    loss.backward()
    assert projection.weight.grad is not None
    assert bool(projection.weight.grad.any())
    assert gradients(teacher) == {}
    with listening(teacher, asked) as theirs, listening(student, asked) as ours, torch.no_grad():
        for model in (teacher, student):
            model(input_ids=ids())
    measure = LIKENESSES.get(kind).measure
    padded = {key: torch.cat([mine, torch.zeros_like(mine)], -1) for key, mine in ours.items()}
    expected = sum(float(measure(theirs[key], padded[key]).mean()) for key in padded) / 3
    assert float(parts["states"]) == pytest.approx(expected, rel=1e-4)
    assert Matcher(asked, *pair()).projection is None, "equal widths need none"


def test_relations_need_no_projection() -> None:
    student, teacher = pair(hidden_size=12, num_attention_heads=3, num_key_value_heads=1)
    goal = goal_of(student, teacher, match("relations", 1, heads=3))
    assert goal.matcher is not None
    assert not list(goal.matcher.parameters())
    loss, _ = told(goal, student)
    loss.backward()
    grads = gradients(student)
    assert all(bool(grads[f"model.layers.2.self_attn.{x}_proj.weight"].any()) for x in "qkv")


def test_both_terms_weigh_the_same() -> None:
    """The weight is found in every step anew, and has no gradient of its own."""
    student, teacher = pair()
    loss, parts = told(goal_of(student, teacher, match("cosine", 1, 2, weight=None)), student)
    assert loss.item() == pytest.approx(2 * float(parts["divergence"]), rel=1e-5)
    loss.backward()
    balanced = gradients(student)
    student.zero_grad()
    fixed = float(parts["divergence"]) / float(parts["states"])
    told(goal_of(student, teacher, match("cosine", 1, 2, weight=fixed)), student)[0].backward()
    for name, grad in gradients(student).items():
        assert torch.allclose(grad, balanced[name], rtol=1e-4, atol=1e-6), name


def test_three_terms_balanced() -> None:
    """The states weigh as much as the divergence does, whatever the next token weighs beside it."""
    student, teacher = pair()
    loss, parts = told(goal_of(student, teacher, match("cosine", 1, weight=None), text=0.5), student)
    assert loss.item() == pytest.approx(2 * float(parts["divergence"]) + 0.5 * float(parts["next_token"]), rel=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_states_that_agree_have_no_say(kind: str) -> None:
    """What rounding leaves between them is not weighed up to the loss of logits."""
    student, teacher = pair(intermediate_size=8)
    student.model.embed_tokens.load_state_dict(teacher.model.embed_tokens.state_dict())
    loss, parts = told(goal_of(student, teacher, match(kind, 0, weight=None)), student)
    assert loss.item() == pytest.approx(float(parts["divergence"]), rel=1e-6)
    loss.backward()
    balanced = gradients(student)
    student.zero_grad()
    plain = FromTeacher(teacher, DIVERGENCES.get("forward-kl"))(student, {"input_ids": ids()})
    assert isinstance(plain, Tensor)
    plain.backward()
    assert same(gradients(student), balanced)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_small_states_are_not_taken_for_the_same(kind: str) -> None:
    """What embeddings of a deviation of 0.001 differ by is far below one, and above what rounding leaves."""
    student, teacher = pair(intermediate_size=8)
    table = teacher.model.embed_tokens.weight
    with torch.no_grad():
        table.copy_(1e-3 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        student.model.embed_tokens.weight.copy_(1.03 * table + 1e-5)
    loss, parts = told(goal_of(student, teacher, match(kind, 0, weight=None)), student)
    assert 0 < float(parts["states"]) < 1e-4
    assert loss.item() == pytest.approx(2 * float(parts["divergence"]), rel=1e-4)


def test_where_nothing_is_learnt_states_say_nothing() -> None:
    student, teacher = pair()
    learn = torch.zeros_like(ids(), dtype=torch.bool)
    matcher = goal_of(student, teacher, match("mse", 1)).matcher
    assert matcher is not None
    states = {"1": torch.randn(*ids().shape, 8)}
    assert float(matcher({"1": torch.zeros_like(states["1"])}, states, learn[:, 1:])) == 0
    loss, parts = told(goal_of(student, teacher, match("mse", 1)), student, learn=learn)
    assert loss.item() == float(parts["divergence"]) == float(parts["states"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_learnt_has_no_say(kind: str) -> None:
    """Positions before tokens that are not learnt: neither value nor gradient hangs on how like they are."""
    student, teacher = pair()
    learn = torch.ones_like(ids(), dtype=torch.bool)
    learn[:, 12:] = False
    short, long = ids(), ids().clone()
    long[:, 12:] = long[:, 12:].flip(-1)
    found = []
    for tokens in (short, long):
        student.zero_grad()
        goal = goal_of(student, teacher, match(kind, 1))
        answer = goal(student, {"input_ids": tokens, "learn": learn})
        assert isinstance(answer, tuple)
        answer[0].backward()
        found.append((answer[0].item(), gradients(student)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name in found[0][1]:
        assert torch.allclose(found[0][1][name], found[1][1][name], rtol=1e-3, atol=1e-5), name


def test_the_next_token_beside_it() -> None:
    student, teacher = pair()
    own = student(input_ids=ids(), labels=ids()).loss.item()
    plain = FromTeacher(teacher, DIVERGENCES.get("forward-kl"))(student, {"input_ids": ids()})
    assert isinstance(plain, Tensor)
    loss, parts = told(FromTeacher(teacher, DIVERGENCES.get("forward-kl"), text=0.5), student)
    assert float(parts["next_token"]) == pytest.approx(own, rel=1e-5)
    assert loss.item() == pytest.approx(plain.item() + 0.5 * own, rel=1e-5)
    learn = torch.zeros_like(ids(), dtype=torch.bool)
    learn[:, 5:8] = True
    _, parts = told(FromTeacher(teacher, DIVERGENCES.get("forward-kl"), text=0.5), student, learn=learn)
    asked = student(input_ids=ids(), labels=ids().masked_fill(~learn, -100)).loss.item()
    assert float(parts["next_token"]) == pytest.approx(asked, rel=1e-5)


def test_a_vocabulary_may_be_padded() -> None:
    """Rows behind the shorter of the two are nobody's tokens."""
    student, teacher = make("llama"), make("llama", vocab_size=80)
    randomise(teacher, gains=1.0, seed=9)
    goal = FromTeacher(teacher, DIVERGENCES.get("forward-kl"))
    found = goal(student, {"input_ids": ids()})
    assert isinstance(found, Tensor)
    with torch.no_grad():
        p = teacher(input_ids=ids()).logits[..., :64].log_softmax(-1)
        q = student(input_ids=ids()).logits.log_softmax(-1)
    assert found.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


# --- through the loop


def test_recomputed_activations_are_heard_once(tmp_path: Path) -> None:
    def run(name: str, checkpointing: bool) -> Any:
        student, teacher = tiny(), tiny()
        randomise(teacher, gains=1.0, seed=9)
        goal = goal_of(student, teacher, match("cosine", 0, 1, 2))
        train(student, patterns(), settings(checkpointing=checkpointing), folder=tmp_path / name, loss=goal.objective)
        return weights(student)

    plain, less = run("plain", False), run("less", True)
    assert all(torch.allclose(plain[name], less[name], atol=1e-6) for name in plain)


def test_adapters_of_the_student(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny()
    randomise(teacher, gains=1.0, seed=9)
    adapted = add_adapters(student, rank=2, dropout=0)
    goal = goal_of(student, teacher, match("cosine", 1))
    found = train(adapted, patterns(), settings(), folder=tmp_path, loss=goal.objective)
    assert {"loss", "divergence", "states"} <= found.losses[0].keys()


def narrow() -> Any:
    """A student of half the width."""
    torch.manual_seed(1)
    config = tiny().config
    config.hidden_size = 16
    return type(tiny())(config).eval()


def distilled(folder: Path, *, after: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student, teacher = narrow(), tiny()
    goal = goal_of(student, teacher, match("cosine", 0, 1, weight=None))
    assert goal.matcher is not None
    say = None if after is None else pull_plug(after)
    with contextlib.suppress(Stop):
        train(student, patterns(), settings(), folder=folder, loss=goal.objective, progress=say)
    return weights(student), weights(goal.matcher)


def test_the_projection_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = distilled(tmp_path / "whole")
    assert not torch.equal(whole[1]["projection.weight"], torch.eye(32, 16))
    distilled(tmp_path / "cut", after=4)
    stopped = newest(tmp_path / "cut")
    assert stopped is not None
    assert (stopped / BESIDE).exists()
    again = distilled(tmp_path / "cut")
    assert same(again[0], whole[0])
    assert same(again[1], whole[1])


def test_a_projection_that_is_lost_is_missed(tmp_path: Path) -> None:
    """Planted: without what was saved beside the model a resumed run ends elsewhere, or says so."""
    distilled(tmp_path, after=4)
    stopped = newest(tmp_path)
    assert stopped is not None
    (stopped / BESIDE).unlink()
    with pytest.raises(FileNotFoundError):
        distilled(tmp_path)


def test_another_match_is_another_run(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny()
    train(student, patterns(), settings(), folder=tmp_path, loss=goal_of(student, teacher, match()).objective)
    other = goal_of(tiny(), teacher, match("mse", 1, 2, weight=None)).objective
    with pytest.raises(SettingsError, match=r"cosine at 1, times 1 from.*mse at 1, 2, balanced from"):
        train(tiny(), patterns(), settings(), folder=tmp_path, loss=other)


def test_a_balance_found_in_every_pass_hangs_on_its_size(tmp_path: Path) -> None:
    student, teacher = tiny(), tiny()
    for weight, fits in ((1.0, True), (None, False)):
        folder = tmp_path / str(weight)
        train(
            tiny(),
            patterns(),
            settings(),
            folder=folder,
            loss=goal_of(student, teacher, match(weight=weight)).objective,
        )
        again = goal_of(student, teacher, match(weight=weight)).objective
        if fits:
            train(tiny(), patterns(), settings(micro_batch=4), folder=folder, loss=again)
        else:
            with pytest.raises(SettingsError, match="micro_batch: 2 there, 4 now"):
                train(tiny(), patterns(), settings(micro_batch=4), folder=folder, loss=again)


# --- what is refused


@pytest.mark.parametrize(
    ("kind", "place", "allowed"),
    [("cosine", 3, r"0 \(what the first block receives\), or 1 \(the last block\) to 2"), ("relations", 0, "1 .*to 2")],
)
def test_places_that_a_model_lacks(kind: str, place: int, allowed: str) -> None:
    with pytest.raises(SettingsError, match=rf"(?s)states at place {place}\n.*{allowed}"):
        Matcher(match(kind, place), *pair(num_hidden_layers=2))


def test_layouts_that_keep_queries_keys_and_values_together() -> None:
    with pytest.raises(UnsupportedModel, match=r"phi3 whose block 1 from the end has no self_attn\.q_proj"):
        Matcher(match("relations", 1), make("phi3"), make("phi3"))


def test_a_block_without_attention() -> None:
    """Looked for in every place, not in the last block alone."""
    student, teacher = pair(num_hidden_layers=2)
    student.model.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(UnsupportedModel, match="block 2 from the end"):
        Matcher(match("relations", 1, 2), student, teacher)
    Matcher(match("relations", 1), student, teacher)
