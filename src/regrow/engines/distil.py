"""A student learns from a teacher's predictions: a loss for the training loop, its logits made a few tokens at a time.

The teacher runs without gradients and shares the student's tokenizer. What this gives up: teachers whose vocabulary is
another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow.artifacts.goal import Divergence
from regrow.engines.head import PROBE, Head, final_states, head_of, mean_over_tokens, trusted_head
from regrow.engines.packed import learnt
from regrow.engines.resume import weights_fingerprint
from regrow.errors import SettingsError, UnsupportedModel

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


def needed_head(model: Any, who: str) -> Head:
    """Raises `UnsupportedModel` when the model has no plain linear for a head."""
    head = head_of(model)
    if head is None:
        raise UnsupportedModel(
            f"a {who} whose head is a {type(model.get_output_embeddings()).__name__}",
            "a linear from states to logits",
            "train without a teacher",
        )
    return head


def checked_head(model: Any, who: str) -> Head:
    """The same, once it has given the model's own loss: some families do more to logits than this house knows of."""
    head = needed_head(model, who)
    if trusted_head(model, torch.arange(PROBE, device=model.device)[None] % model.config.vocab_size) is None:
        raise UnsupportedModel(
            f"a {who} ({model.config.model_type}) whose logits are not those of its last states and its head",
            "a linear from states to logits, scaled or capped as in Cohere, Granite and Gemma",
            "train without a teacher, and report the model type",
        )
    return head


class FromTeacher:
    """The loss (model, batch) -> () of the training loop: mean divergence from the teacher over all positions.

    Where only some tokens are learnt: over the positions before them; 0 where there are none.
    """

    def __init__(self, teacher: Any, divergence: Divergence, options: Mapping[str, Any] | None = None) -> None:
        self.teacher, self.head = teacher.eval(), checked_head(teacher, "teacher")
        self.divergence, self.options = divergence, dict(options or {})
        how = "".join(f" {name}={value}" for name, value in sorted(self.options.items()))
        self.__name__ = f"{divergence.name}{how} from {weights_fingerprint(teacher)}"  # what a resumed run must share

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        ids, mask = batch["input_ids"], learnt(batch)  # (b, T), (b, T - 1)

        def states(of: Any, where: Any) -> Tensor:  # (positions, C)
            found = final_states(of, ids.to(where)).to(ids.device)  # (b, T, C)
            return found.flatten(0, 1) if mask is None else found[:, :-1][mask]

        with torch.no_grad():
            theirs = states(self.teacher, self.teacher.device)
        ours = states(model, ids.device)
        head = needed_head(bare(model), "student")

        def measure(logits: Tensor, piece: slice) -> Tensor:
            with torch.no_grad():
                expected = self.head.logits(theirs[piece])
            return self.divergence.measure(expected, logits, **self.options)

        return mean_over_tokens(head, ours, measure)


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
            "a teacher with the student's tokenizer and as many rows of embedding, such as the model it was cut from",
            "choose another teacher, or train without one",
        )


def _difference(student: Any, teacher: Any, ours: Any, theirs: Any) -> str | None:
    """The first thing that sets two tokenizers apart: sizes, ids of tokens, special tokens, how text is cut."""
    if student.vocab_size != teacher.vocab_size:
        return f"embeddings of {teacher.vocab_size:,} rows there and {student.vocab_size:,} here"
    here, there = ours.get_vocab(), theirs.get_vocab()
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
