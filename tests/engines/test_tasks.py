"""Answers equal the stock harness's and a direct computation; gold, chance and errors are what they say."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regrow.artifacts.report import Measure
from regrow.engines import tasks
from regrow.engines.likelihood import log_likelihoods
from regrow.engines.tasks import TASKS, Items, answer_tasks, evaluate_tasks, measures, task_names
from regrow.errors import BrokenModel, SettingsError, UnknownName

NAMES = ["piqa", "winogrande", "boolq", "mmlu"]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256, initializer_range=0.3))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; byte 0 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="\u0100")


@pytest.fixture(scope="module")
def answers(model: Any, tokenizer: Any) -> dict[str, Items]:
    return answer_tasks(model, tokenizer, NAMES, limit=4, batch=3)


def rows_of(name: str, limit: int | None = 4) -> list[dict[str, Any]]:
    return list(tasks._rows(TASKS[name], limit)[1])


def nats(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """-log likelihood of `continuation` after `context`, straight from the model."""
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    length = len(tokenizer(continuation)["input_ids"])
    with torch.no_grad():
        logs = model.eval()(ids).logits[0, :-1].double().log_softmax(-1)
    return -logs.gather(1, ids[0, 1:, None])[-length:].sum().item()


def test_equals_the_stock_evaluation(model: Any, tokenizer: Any, answers: dict[str, Items]) -> None:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    names = ["piqa", "winogrande", "boolq"]
    built = {n: tasks._stock_task(TASKS[n], tasks._rows(TASKS[n], 4)[1]) for n in names}
    for task in built.values():
        task.set_config(key="num_fewshot", value=0)
    harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, max_length=2048)
    stock = evaluate(harness, {"tasks": built}, bootstrap_iters=0)
    for name in names:
        ours = measures(name, answers[name])
        for metric in ("acc", "acc_norm") if name == "piqa" else ("acc",):
            assert ours[f"task/{name}/{metric}"].value == stock["results"][name][f"{metric},none"]
        assert [bool(sample["acc"]) for sample in stock["samples"][name]] == list(answers[name].correct)


def test_plain_choices_by_hand(model: Any, tokenizer: Any, answers: dict[str, Items]) -> None:
    items = answers["piqa"]
    for i, row in enumerate(rows_of("piqa")):
        context, choices = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
        costs = [nats(model, tokenizer, context, f" {choice}") for choice in choices]
        gold = int(row["label"])
        assert items.gold_bits[i] == pytest.approx(costs[gold] / math.log(2), rel=1e-5)
        assert items.gold_bytes[i] == len(f" {choices[gold]}".encode())
        assert items.correct[i] == (costs.index(min(costs)) == gold)
        by_length = [cost / len(choice) for cost, choice in zip(costs, choices, strict=True)]
        assert items.correct_norm is not None
        assert items.correct_norm[i] == (by_length.index(min(by_length)) == gold)


def test_choices_in_the_context_by_hand(model: Any, tokenizer: Any, answers: dict[str, Items]) -> None:
    items = answers["winogrande"]
    for i, row in enumerate(rows_of("winogrande")):
        before, after = row["sentence"].split("_")
        options = [row["option1"], row["option2"]]
        costs = [nats(model, tokenizer, before + option, " " + after.strip()) for option in options]
        gold = int(row["answer"]) - 1
        assert items.gold_bits[i] == pytest.approx(costs[gold] / math.log(2), rel=1e-5)
        assert items.gold_bytes[i] == len(" " + after.strip())
        assert items.correct[i] == (costs.index(min(costs)) == gold)
    assert items.correct_norm is None


def test_gold_of_boolq(answers: dict[str, Items]) -> None:
    said = [" yes" if row["answer"] else " no" for row in rows_of("boolq")]
    assert len(set(said)) == 2
    assert list(answers["boolq"].gold_bytes) == [len(word) for word in said]


def test_mmlu_asks_every_subject_with_its_own_description() -> None:
    import lm_eval.tasks as stock

    assert len({row["subject"] for row in rows_of("mmlu", None)}) == 57
    task = tasks._stock_task(TASKS["mmlu"], tasks._rows(TASKS["mmlu"], 4)[1])
    for doc in task.eval_docs:
        path = Path(stock.__file__).parent / f"mmlu/default/mmlu_{doc['subject']}.yaml"
        description = yaml.safe_load(path.read_text())["description"]
        assert task.fewshot_context(doc=doc, num_fewshot=0).startswith(description + doc["question"].strip())


@pytest.mark.parametrize("name", task_names())
def test_every_task_builds_and_its_chance_is_true(name: str) -> None:
    task = tasks._stock_task(TASKS[name], tasks._rows(TASKS[name], 200)[1])
    chances = [1 / len(task.doc_to_choice(doc)) for doc in task.eval_docs]
    assert len(chances) == 200
    assert sum(chances) / 200 == pytest.approx(TASKS[name].chance, abs=0.005)


def test_measures_by_hand() -> None:
    items = Items(
        ids=(3, 5, 8, 9),
        correct=(True, False, True, True),
        correct_norm=None,
        gold_bits=(8.0, 12.0, 4.0, 6.0),
        gold_bytes=(4, 4, 1, 1),
        choices=(2, 4, 4, 4),
        how={"split": "val"},
    )
    found = measures("toy", items)
    stderr = math.sqrt(0.75 * 0.25 / 3)
    right = (1.0, 0.0, 1.0, 1.0)
    accuracy = Measure(0.75, "share", "higher", pytest.approx(stderr), 4, 0.3125, {"split": "val"}, right)
    assert found["task/toy/acc"] == accuracy
    gold = found["task/toy/gold_bits_per_byte"]
    assert (gold.value, gold.unit, gold.better, gold.chance) == (3.0, "bits/byte", "lower", None)
    assert gold.stderr == pytest.approx(math.sqrt(4 / 3 * (4**2 + 0 + 1 + 3**2)) / 10)
    assert gold.each == items.gold_bits
    assert set(found) == {"task/toy/acc", "task/toy/gold_bits_per_byte"}


def test_record(answers: dict[str, Items]) -> None:
    how = dict(answers["piqa"].how)
    assert how.pop("harness").startswith("lm_eval 0.")
    assert how == {"split": "val", "shots": 0, "context": 2048, "limit": 4}
    assert answers["piqa"].ids == tuple(sorted(answers["piqa"].ids))
    assert set(measures("piqa", answers["piqa"])) == {
        f"task/piqa/{m}" for m in ("acc", "acc_norm", "gold_bits_per_byte")
    }


def test_another_gold_index_changes_the_bits(
    model: Any, tokenizer: Any, answers: dict[str, Items], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(TASKS["piqa"], change={"doc_to_target": "{{1 - label}}"})
    monkeypatch.setattr(tasks, "TASKS", {**TASKS, "piqa": wrong})
    shifted = answer_tasks(model, tokenizer, ["piqa"], limit=4)["piqa"]
    assert shifted.ids == answers["piqa"].ids
    assert all(a != b for a, b in zip(shifted.gold_bits, answers["piqa"].gold_bits, strict=True))
    assert shifted.correct == tuple(not right for right in answers["piqa"].correct)


def test_silent_and_leaves_no_trace(
    model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_TURN", 4)  # 2 x 4 choices a turn: two items
    model.train()
    level, done = logging.getLogger("lm_eval").level, []
    found = evaluate_tasks(model, tokenizer, ["arc_easy"], limit=5, batch=2, progress=lambda *x: done.append(x))
    evaluate_tasks(model, tokenizer, ["hellaswag"], limit=1)
    assert capfd.readouterr() == ("", "")
    assert done == [("arc_easy", 0, 5), ("arc_easy", 2, 5), ("arc_easy", 4, 5), ("arc_easy", 5, 5)]
    assert found["task/arc_easy/acc_norm"].samples == 5
    assert model.training
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level


def test_long_prompts_make_small_batches(
    model: Any, tokenizer: Any, answers: dict[str, Items], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "log_likelihoods", partial(log_likelihoods, numbers=256 * 500))
    shapes: list[torch.Size] = []
    hook = model.register_forward_hook(lambda _, __, out: shapes.append(out.logits.shape))
    same = answer_tasks(model, tokenizer, ["piqa"], limit=4, batch=64)["piqa"]
    hook.remove()
    assert 250 < max(shape[0] * shape[1] for shape in shapes) <= 500
    assert same.gold_bits == pytest.approx(answers["piqa"].gold_bits, rel=1e-5)


def test_bad_input(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UnknownName, match=r"unknown task 'hellaswog', did you mean 'hellaswag'\?"):
        evaluate_tasks(model, tokenizer, ["piqa", "hellaswog"])
    with pytest.raises(SettingsError, match="a limit of 0 items"):
        evaluate_tasks(model, tokenizer, ["piqa"], limit=0)
    assert evaluate_tasks(model, tokenizer, []) == {}


def test_nan_is_a_broken_model(model: Any, tokenizer: Any) -> None:
    kept = model.model.norm.weight.data.clone()
    model.model.norm.weight.data[0] = math.nan
    try:
        with pytest.raises(BrokenModel, match="task 'piqa' is NaN"):
            answer_tasks(model, tokenizer, ["piqa"], limit=1)
    finally:
        model.model.norm.weight.data.copy_(kept)


def test_first_rows_come_from_each_part_in_turn() -> None:
    assert tasks.first_rows([5], 3) == [0, 1, 2]  # as the harness's limit
    assert tasks.first_rows([2, 1, 3], 4) == [0, 2, 3, 1]  # parts start at 0, 2, 3
    assert sorted(tasks.first_rows([2, 1, 3], None)) == list(range(6))
