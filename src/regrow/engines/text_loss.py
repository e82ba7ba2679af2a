"""The loss of the text's next token without whole logits: what is lowered where nobody teaches, and by a teacher.

It is `objective.next_token`, to rounding, taken through the head a few tokens at a time, so that batch and vocabulary
do not multiply. What this gives up: models whose head is not known have the plain form, and need its memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regrow.engines.distil import counting, known_head, read, targets
from regrow.engines.head import sum_over_tokens
from regrow.engines.objective import Loss, next_token
from regrow.engines.packed import learnt


def text_loss(model: Any) -> Loss:
    """The loss of a causal model, before anything is wrapped around it: in pieces where that gives what it says."""
    states_alone = "logits_to_keep" in inspect.signature(model.forward).parameters
    return by_pieces if states_alone and known_head(model) is not None else next_token


def by_pieces(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:  # () fp32
    """`next_token` of a model in its wrappers, whose head is a plain linear."""
    states, head = read(model, batch["input_ids"], "model")
    following = targets(batch)  # (n,)
    told = following >= 0
    return sum_over_tokens(
        head,
        counting(states, learnt(batch)),
        lambda logits, piece: cross_entropy(logits, following[piece], ignore_index=-100, reduction="none"),
        told / told.sum().clamp_min(1),
    )
