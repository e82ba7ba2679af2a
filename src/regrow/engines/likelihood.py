"""Log-likelihoods of answers to a question: what its answers have in common is read once, the rest in one batch.

Questions of like lengths go together, and no row is padded but at its end, where nothing looks back at it; so the
results are those of a run over each answer alone, to rounding. What this gives up: models without a cache of keys and
values, which read everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

SPARED = 32  # tokens that cost about what two runs more cost beside their tokens: every weight is read once a run
LOGITS = 2**28  # most numbers a batch's logits may have (1 GiB in fp32)


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens that a model reads, and those that it should say behind the last of them, one position each."""

    read: tuple[int, ...]
    said: tuple[int, ...]

    @staticmethod
    def of(context: Sequence[int], said: Sequence[int], longest: int) -> Answer:
        """`said` behind `context`, of which the beginning is left out when more than `longest` tokens would be read."""
        whole = (*context, *said)[-(longest + 1) :]
        return Answer(whole[:-1], whole[1:][-len(said) :])


@dataclass(frozen=True)
class Question:
    answers: tuple[Answer, ...]
    place: int  # of its first answer among all

    @cached_property
    def shared(self) -> int:
        """How many tokens all answers begin with, of those behind which nothing is scored."""
        least = min(len(answer.read) - len(answer.said) for answer in self.answers)
        columns = zip(*(answer.read[:least] for answer in self.answers), strict=True)
        return next((i for i, tokens in enumerate(columns) if len(set(tokens)) > 1), least)

    @property
    def longest(self) -> int:
        return max(len(answer.read) for answer in self.answers)


@torch.no_grad()
def log_likelihoods(
    model: Any, questions: Sequence[Sequence[Answer]], *, batch: int, numbers: int = LOGITS
) -> list[tuple[float, bool]]:
    """For every answer in turn: log-likelihood of what is said, in nats, and whether it is what the model would say.

    About `batch` answers are read at a time, fewer when they are long: their logits have at most `numbers` numbers,
    unless one answer alone has more.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    found: dict[int, tuple[float, bool]] = {}
    for group in _groups(questions, batch, numbers // vocabulary):
        start = min(question.shared for question in group)
        answers = [answer for question in group for answer in question.answers]
        places = [question.place + i for question in group for i in range(len(question.answers))]
        cache = _cache(model, group, start) if start else None
        tails = [answer.read[start if cache else 0 :] for answer in answers]
        width = max(map(len, tails))
        ids = torch.tensor([(*tail, *[0] * (width - len(tail))) for tail in tails], device=model.device)  # (a, width)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits  # (a, width, V)
        for place, answer, tail, row in zip(places, answers, tails, logits, strict=True):
            found[place] = _scored(row[len(tail) - len(answer.said) : len(tail)], answer)
    return [found[place] for place in sorted(found)]


def _groups(questions: Sequence[Sequence[Answer]], batch: int, room: int) -> Iterator[list[Question]]:
    """Questions in the order of what their answers share, as many as `batch` answers and `room` tokens of logits allow,
    and as long as reading them together is cheaper than apart."""
    asked, place = [], 0
    for answers in questions:
        size = max(1, min(batch, room // Question(tuple(answers), place).longest))
        asked += [Question(tuple(answers[i : i + size]), place + i) for i in range(0, len(answers), size)]
        place += len(answers)
    group: list[Question] = []
    for question in sorted(asked, key=lambda question: (question.shared, question.longest)):
        wider = [*group, question]
        rows, width = _tails(wider)
        dear = _tokens(wider) > _tokens(group) + _tokens([question]) + SPARED
        if group and (rows > batch or rows * width > room or dear):
            yield group
            wider = [question]
        group = wider
    if group:
        yield group


def _tails(group: Sequence[Question]) -> tuple[int, int]:
    """Rows, and tokens of the longest, of what is left of the answers behind what all questions share."""
    longest = max(question.longest for question in group)
    return sum(len(question.answers) for question in group), longest - min(question.shared for question in group)


def _tokens(group: Sequence[Question]) -> int:
    """How many are read for a group, padding among them."""
    if not group:
        return 0
    rows, width = _tails(group)
    return len(group) * min(question.shared for question in group) + rows * width


def _cache(model: Any, group: Sequence[Question], start: int) -> Any:
    """Keys and values of what each question's answers share, once for each answer; None when the model keeps none."""
    first = torch.tensor([question.answers[0].read[:start] for question in group], device=model.device)  # (q, start)
    cache: Any = getattr(model(input_ids=first, use_cache=True, logits_to_keep=1), "past_key_values", None)
    if not hasattr(cache, "reorder_cache"):
        return None
    rows = torch.tensor([i for i, question in enumerate(group) for _ in question.answers], device=model.device)
    cache.reorder_cache(rows)  # of every kind of layer, those that keep a state in place of keys too
    return cache


def _scored(logits: Tensor, answer: Answer) -> tuple[float, bool]:
    """`logits` (t, V), one row a token that is said."""
    logits = logits.float()
    said = torch.tensor(answer.said, device=logits.device)  # (t,)
    return -float(cross_entropy(logits, said, reduction="sum")), bool((logits.argmax(-1) == said).all())
