"""A student learns from a teacher's predictions: a loss for the training loop, its logits made a few tokens at a time.

The teacher runs without gradients and shares the student's tokenizer. What this gives up: teachers whose vocabulary is
another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from regrow.artifacts.goal import Divergence
from regrow.engines.head import (
    PROBE,
    Head,
    Measure,
    final_states,
    head_of,
    mean_over_tokens,
    tied_weight,
    trusted_head,
)
from regrow.engines.match import Heard, Matcher, listening
from regrow.engines.objective import Answer, Objective
from regrow.engines.packed import learnt
from regrow.engines.resume import weights_fingerprint
from regrow.errors import SettingsError, UnsupportedModel

SAME = 4 * torch.finfo(torch.float32).eps  # of their size: states that are nearer to each other differ by rounding
PROBES = (
    "The quick brown fox, naïve façade!\n",
    "Съешь ещё этих мягких французских булок",
    "敏捷的棕色狐狸，跳过了懒狗。",
    "def f(x):\n\tif x:\n        return  x ** 2  # done\n\n",
    "0123456789 3.14159 1,000,000 2026-05-31",
    "👩\u200d🚀 🎉🇩🇪",
)
"""Texts that tokenizers of one vocabulary may still cut in different places: scripts, white space, digits, emoji."""


class Teacher(NamedTuple):
    """What a student learns from, and what is known of it."""

    model: Any
    tokenizer: Any
    source: dict[str, Any]


class Pass(NamedTuple):
    """What a model gave for a batch."""

    states: Tensor  # (n, C), what the head receives where it counts
    head: Head
    heard: Heard


def needed_head(model: Any, who: str) -> Head:
    """The head of a model in its wrappers. Raises `UnsupportedModel` when it is no plain linear."""
    head = head_of(bare(model), model)
    if head is None:
        raise UnsupportedModel(
            f"a {who} whose head is a {type(bare(model).get_output_embeddings()).__name__}",
            "a linear from states to logits",
            "train without a teacher",
        )
    return head


def read(model: Any, ids: Tensor, who: str) -> tuple[Tensor, Head]:
    """The states (b, T, C) that a model in its wrappers has for `ids` (b, T) int64, and the head to take them to.

    Raises `UnsupportedModel` as `needed_head` does.
    """
    with tied_weight(bare(model)) as weight:
        states = final_states(model, ids)
    head = needed_head(model, who)
    return states, head if weight is None else replace(head, weight=weight)


def known_head(model: Any) -> Head | None:
    """The head, once it has given the model's own loss: some families do more to logits than this house knows of."""
    return trusted_head(model, torch.arange(PROBE, device=model.device)[None] % model.config.vocab_size)


def checked_head(model: Any, who: str) -> Head:
    """The same, which is needed. Raises `UnsupportedModel`."""
    head = needed_head(model, who)
    if known_head(model) is None:
        raise UnsupportedModel(
            f"a {who} ({model.config.model_type}) whose logits are not those of its last states and its head",
            "a linear from states to logits, scaled or capped as in Cohere, Granite and Gemma",
            "train without a teacher, and report the model type",
        )
    return head


class FromTeacher:
    """The loss (model, batch) of the training loop: mean divergence from the teacher over all positions.

    Where only some tokens are learnt: over the positions before them; 0 where there are none. `text` is the weight of
    the text's next token beside it; `match` says which states are compared too. All are on one device.
    """

    def __init__(
        self,
        teacher: Any,
        divergence: Divergence,
        options: Mapping[str, Any] | None = None,
        *,
        text: float = 0.0,
        matcher: Matcher | None = None,
    ) -> None:
        self.teacher = teacher.eval()
        checked_head(teacher, "teacher")
        self.divergence, self.options = divergence, dict(options or {})
        self.text, self.matcher = text, matcher
        self.by_pass = matcher is not None and matcher.match.weight is None  # what it weighs hangs on the micro-batch
        how = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        also = (f" + {text:g} next token" if text else "") + (f" + {matcher.match}" if matcher else "")
        # what a resumed run must share
        self.__name__ = f"{divergence.name}{how}{also} from {weights_fingerprint(teacher)}"

    @property
    def objective(self) -> Objective:
        return Objective(self, beside=self.matcher)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Answer:
        ids, mask = batch["input_ids"], learnt(batch)  # (b, T), (b, T - 1)
        with torch.no_grad():
            told = self.run(self.teacher, ids, mask, "teacher")
        return self.compare(told, self.run(model, ids, mask, "student"), batch)

    def compare(self, told: Pass, own: Pass, batch: Mapping[str, Tensor]) -> Answer:
        """What the student lowers, from what the teacher and itself gave."""
        loss, parts = self.predictions(
            told.head,
            own.head,
            told.states,
            own.states,
            following=targets(batch),
            text=self.text,
        )
        if self.matcher is not None:
            states = self.matcher(told.heard, own.heard, learnt(batch))
            weight: float | Tensor | None = self.matcher.match.weight
            parts["states"] = apart = states.detach()
            if weight is None:
                differs = apart > SAME * self.matcher.size(told.heard, learnt(batch))
                weight = torch.where(differs, parts["divergence"] / apart, 0.0)
            loss = loss + states * weight
        return (loss, parts) if len(parts) > 1 else loss

    def run(self, model: Any, ids: Tensor, mask: Tensor | None, who: str) -> Pass:
        """A forward pass over `ids` (b, T); `mask` (b, T - 1) says where states count."""
        with ExitStack() as stack:
            heard = stack.enter_context(listening(bare(model), self.matcher.match)) if self.matcher else {}
            final, head = read(model, ids, who)  # (b, T, C)
        return Pass(counting(final, mask), head, heard)

    def predictions(
        self,
        known: Head,
        head: Head,
        theirs: Tensor,
        ours: Tensor,
        *,
        following: Tensor,
        text: float,
        weight: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`weight` times the divergence of who learns (`head` of `ours`) from who is learnt from (`known` of `theirs`),
        and so much of the next token beside it, in one go through the vocabulary; states are (n, C), tokens that are
        `following` (n,). Gradients go to who learns alone.
        """
        rows = min(len(head.weight), len(known.weight))
        head, known = head.first(rows), known.first(rows)

        def measure(logits: Tensor, piece: slice) -> Tensor:  # (p,)
            if not weight:
                return logits.new_zeros(len(logits))
            with torch.no_grad():
                expected = known.logits(theirs[piece].to(known.weight.dtype))
            return weight * self.divergence.measure(expected, logits, **self.options)

        return predictions(head, ours, following, measure, text)


def predictions(
    head: Head, ours: Tensor, following: Tensor, measure: Measure, text: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of `measure` over states (n, C) and `text` times the next token, in one go through the vocabulary.

    `following` (n,) int64 is the next token, -100 where none is. Returns the loss () fp32 and its parts.
    """
    sums = {"divergence": torch.zeros((), device=ours.device)}
    told = (following >= 0).sum().clamp_min(1)

    def both(logits: Tensor, piece: slice) -> Tensor:
        each = measure(logits, piece)  # (p,)
        sums["divergence"] += each.detach().sum() / len(ours)
        if not text:
            return each
        next_one = cross_entropy(logits, following[piece], ignore_index=-100, reduction="none")
        sums["next_token"] = sums.get("next_token", 0.0) + next_one.detach().sum() / told
        return each + text * next_one * (len(ours) / told)

    return mean_over_tokens(head, ours, both), sums


def counting(values: Tensor, mask: Tensor | None) -> Tensor:
    """Of `values` (b, T, ...) those at positions that count, (n, ...); `mask` (b, T - 1) bool, None: all."""
    return values.flatten(0, 1) if mask is None else values[:, :-1][mask]


def targets(batch: Mapping[str, Tensor]) -> Tensor:  # (n,) int64
    """The token that follows each position that counts; -100 where none does."""
    ids, mask = batch["input_ids"], learnt(batch)
    return pad(ids[:, 1:], (0, 1), value=-100).flatten() if mask is None else ids[:, 1:][mask]


def bare(model: Any) -> Any:
    """The causal model under the wrappers of peft and of a distributed run."""
    while not hasattr(model, "lm_head") and hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_teacher(student: Any, teacher: Any, ours: Any, theirs: Any) -> None:
    """Raise `SettingsError` unless a token means the same to both configurations and both tokenizers."""
    why = _difference(student, teacher, ours, theirs)
    if why is not None:
        raise SettingsError(
            f"a teacher whose tokens are others ({why})",
            "the student's tokenizer and a row of the embedding for each token, as the model has that it was cut from",
            "choose another teacher, or train without one",
        )


def _difference(student: Any, teacher: Any, ours: Any, theirs: Any) -> str | None:
    """The first thing that sets two tokenizers apart: sizes, ids of tokens, special tokens, how text is cut."""
    here, there = ours.get_vocab(), theirs.get_vocab()
    most = max(here.values(), default=0)  # rows behind the last token only pad
    if student.vocab_size != teacher.vocab_size and min(student.vocab_size, teacher.vocab_size) <= most:
        return f"embeddings of {teacher.vocab_size:,} rows there and {student.vocab_size:,} here"
    odd = min(here.items() ^ there.items(), default=None)
    if odd is not None:
        return f"token {odd[0]!r} is {there.get(odd[0], 'none')} there and {here.get(odd[0], 'none')} here"
    for role in ("bos_token", "eos_token"):
        if getattr(ours, role) != getattr(theirs, role):
            return f"{role} is {getattr(theirs, role)!r} there and {getattr(ours, role)!r} here"
    for text in PROBES:
        cut = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for tokenizer in (ours, theirs)]
        if cut[0] != cut[1]:
            return f"it cuts {text!r} in other places"
    return None
