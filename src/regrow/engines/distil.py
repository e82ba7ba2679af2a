"""A student learns from a teacher's predictions: a loss for the training loop, its logits made a few tokens at a time.

The teacher runs without gradients and shares the student's tokenizer. What this gives up: teachers whose vocabulary is
another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.artifacts.goal import Divergence
from regrow.engines.head import Head, final_states, head_of, mean_over_tokens
from regrow.engines.packed import learnt
from regrow.engines.resume import weights_fingerprint
from regrow.errors import SettingsError, UnsupportedModel


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


class FromTeacher:
    """The loss (model, batch) -> () of the training loop: mean divergence from the teacher over all positions.

    Where only some tokens are learnt: over the positions before them; 0 where there are none.
    """

    def __init__(self, teacher: Any, divergence: Divergence, options: Mapping[str, Any] | None = None) -> None:
        self.teacher, self.head = teacher.eval(), needed_head(teacher, "teacher")
        self.divergence, self.options = divergence, dict(options or {})
        self.__name__ = f"{divergence.name} from {weights_fingerprint(teacher)}"  # what a resumed run must share

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
    """Raise `SettingsError` unless both tokenizers give the same ids."""
    sizes = student.config.vocab_size, teacher.config.vocab_size
    probe = "The quick brown fox, 1234 times: naïve façade!\n"
    if sizes[0] != sizes[1] or ours(probe).input_ids != theirs(probe).input_ids:
        raise SettingsError(
            f"a teacher whose tokenizer is another one (vocabularies of {sizes[1]:,} and {sizes[0]:,})",
            "a teacher with the student's tokenizer, such as the model it was cut from",
            "choose another teacher, or train without one",
        )
