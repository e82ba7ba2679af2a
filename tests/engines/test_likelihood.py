"""Answers that share a beginning score as they do alone: every family, sliding windows, MoE, models without a cache."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models import VOCAB, config_of, make, randomise
from regrow.artifacts.family import FAMILIES
from regrow.engines import likelihood
from regrow.engines.likelihood import Answer, Question, log_likelihoods

KINDS = sorted({kind for _, family in FAMILIES.items() for kind in family.model_types})


def words(count: int, draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.randrange(3, VOCAB) for _ in range(count))


def questions(seed: int = 0) -> list[list[Answer]]:
    """Choices behind one context, one word behind contexts that differ in the middle, nothing in common, one answer."""
    draw = random.Random(seed)
    asked = []
    for length in (9, 12, 12, 1):
        context = words(length, draw)
        asked.append([Answer.of(context, words(size, draw), 64) for size in (3, 1, 5, 2)[: draw.randint(2, 4)]])
    begin, end = words(7, draw), words(4, draw)
    asked.append([Answer.of((*begin, *words(2, draw)), end, 64) for _ in range(2)])
    asked.append([Answer.of(words(5, draw), words(3, draw), 64) for _ in range(2)])
    asked.append([Answer.of(words(6, draw), words(2, draw), 64)])
    asked.append([Answer.of(words(30, draw), words(4, draw), 20)])
    return asked


@torch.no_grad()
def alone(model: Any, answer: Answer) -> tuple[float, bool]:
    logs = model(torch.tensor([answer.read])).logits[0].double().log_softmax(-1)[-len(answer.said) :]
    said = torch.tensor(answer.said)
    return float(logs.gather(1, said[:, None]).sum()), bool((logs.argmax(-1) == said).all())


def close(found: list[tuple[float, bool]], model: Any, asked: list[list[Answer]]) -> bool:
    wanted = [alone(model, answer) for answers in asked for answer in answers]
    assert len(found) == len(wanted)
    return all(a[0] == pytest.approx(b[0], rel=1e-4) and a[1] == b[1] for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_shared_is_alone(kind: str) -> None:
    model, asked = make(kind), questions()
    assert close(log_likelihoods(model, asked, batch=8), model, asked)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_next"])
def test_shared_is_alone_where_layers_keep_a_state(kind: str) -> None:
    """In place of keys and values, in some layers or beside them."""
    more = {
        "qwen3_next": {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
    }.get(kind, {})
    config = config_of(kind, num_hidden_layers=2, **more)
    config.layer_types = ["conv" if kind == "lfm2" else "linear_attention", "full_attention"]
    model, asked = AutoModelForCausalLM.from_config(config).eval(), questions()
    randomise(model, gains=1.0)
    assert close(log_likelihoods(model, asked, batch=8), model, asked)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_change_nothing(batch: int) -> None:
    model, asked = make("llama"), questions(1)
    assert close(log_likelihoods(model, asked, batch=batch), model, asked)
    assert close(log_likelihoods(model, asked, batch=batch, numbers=VOCAB * 11), model, asked)


def test_what_the_model_would_say_is_told() -> None:
    model = make("llama")
    context = (5, 6, 7)
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    found = log_likelihoods(model, [[Answer.of(context, (best,), 64), Answer.of(context, (best ^ 1,), 64)]], batch=2)
    assert [greedy for _, greedy in found] == [True, False]


def test_answers_by_hand() -> None:
    answer = Answer.of((1, 2, 3), (4, 5), 64)
    assert (answer.read, answer.said) == ((1, 2, 3, 4), (4, 5))
    cut = Answer.of((1, 2, 3), (4, 5), 3)  # the harness reads the last three
    assert (cut.read, cut.said) == ((2, 3, 4), (4, 5))
    behind = [Answer.of((1, 2, 3), said, 64) for said in ((4, 5), (4, 6, 7))]
    assert Question(tuple(behind), 0).shared == 2, "the last token of the context is read for the first that is said"
    middle = [Answer.of((1, 2, odd, 3), (4,), 64) for odd in (8, 9)]
    assert Question(tuple(middle), 0).shared == 2


class Counter:
    """What goes through a model: rows and width of each run."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, _: nn.Module, __: Any, given: dict[str, Any]) -> None:
        ids: Tensor = given["input_ids"]
        self.shapes.append((ids.shape[0], ids.shape[1]))


def test_what_is_common_is_read_once() -> None:
    model = make("llama")
    seen = Counter(model)
    context = tuple(range(3, 33))
    log_likelihoods(model, [[Answer.of(context, (i, i + 1), 64) for i in range(10, 14)]], batch=8)
    assert seen.shapes == [(1, 29), (4, 2)]


def test_rows_have_a_bound() -> None:
    model = make("llama")
    seen = Counter(model)
    log_likelihoods(model, questions(), batch=3)
    assert max(rows for rows, _ in seen.shapes) <= 3
    seen.shapes.clear()
    log_likelihoods(model, questions(), batch=8)
    most = max(len(answers) for answers in questions())
    assert most < max(rows for rows, _ in seen.shapes) <= 8, "questions are read together"


def test_logits_have_a_bound() -> None:
    model = make("llama")
    seen = Counter(model)
    draw = random.Random(0)
    log_likelihoods(model, [[Answer.of((5,), words(9, draw), 64) for _ in range(6)]], batch=100, numbers=VOCAB * 20)
    assert max(rows * width for rows, width in seen.shapes) <= 20
    assert sum(rows for rows, _ in seen.shapes) == 6


def test_a_model_without_a_cache_is_asked_whole() -> None:
    model, asked = make("llama"), questions(2)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def get_input_embeddings(self) -> Any:
            return model.get_input_embeddings()

        @property
        def device(self) -> torch.device:
            return torch.device("cpu")

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=model(input_ids, use_cache=False).logits)

    bare: Any = Bare()
    assert close(log_likelihoods(bare, asked, batch=4), model, asked)


def test_a_cache_of_the_wrong_rows_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make("llama"), questions()
    true = likelihood._cache

    def swapped(model: Any, group: Any, start: int) -> Any:
        cache = true(model, group, start)
        cache.reorder_cache(torch.arange(len(cache.layers[0].keys)).flip(0))
        return cache

    monkeypatch.setattr(likelihood, "_cache", swapped)
    assert not close(log_likelihoods(model, asked, batch=8), model, asked)
