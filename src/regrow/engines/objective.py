"""What a training lowers and by which weights: a loss, and the groups of its optimiser.

A loss is a function of (model, batch). What learns is every weight of the model that requires a gradient, or what the
groups name; a loss may have parameters of its own beside the model. What this gives up: weights kept in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from regrow.engines.packed import learnt
from regrow.errors import SettingsError

Answer = Tensor | tuple[Tensor, Mapping[str, Tensor | float]]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Answer]
"""(model, batch) -> mean loss, () fp32, alone or with named parts to record. `batch["input_ids"]`: (b, T) int64;
`batch["learn"]`: (b, T) bool, which of them are learnt, where not all are."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with optimiser groups of its own, in AdamW's words: `params`, and perhaps `lr`, `maximize`, `betas` ...

    The schedule scales the rate of every group but of those that say `constant`; weight decay is 0 where a group does
    not say. Every tensor must be a
    parameter of the model or of `beside`. What is in no group stays as it is. No groups: all that can be trained, and
    `apart` says of tensors beside the model what is not as usual, a rate of their own.

    `beside` holds what learns with the model and is no part of it, a projection or gates, and what the loss must
    remember. It is moved, averaged over processes, saved and restored as the model is; its gradients are not clipped.
    """

    loss: Loss
    groups: Sequence[Mapping[str, Any]] | None = None
    beside: nn.Module | None = None
    apart: Sequence[Mapping[str, Any]] = ()


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token in nats, () fp32: the usual loss of a causal model.

    `input_ids` (b, T) int64, no padding; 0 where none of them is learnt. Logits are brought to fp32 once and shifted by
    moving the targets.
    """
    ids, mask = batch["input_ids"], learnt(batch)
    logits = model(input_ids=ids, use_cache=False).logits  # (b, T, V)
    following = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~mask, -100)
    targets = F.pad(following, (0, 1), value=-100)  # (b, T) nothing follows the last
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / (targets >= 0).sum().clamp_min(1)


def as_objective(loss: Loss | Objective) -> Objective:
    return loss if isinstance(loss, Objective) else Objective(loss)


def groups_of(model: nn.Module, objective: Objective, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups; matrices of the model decay where the objective names no groups.

    Raises `SettingsError` unless all are fp32 parameters of the model or beside it that require gradients.
    """
    own = [p for p in model.parameters() if p.requires_grad]
    beside = [] if objective.beside is None else list(objective.beside.parameters())
    if objective.groups is None:
        own_way = [{**group, "params": list(group["params"])} for group in objective.apart]
        others = {id(p) for group in own_way for p in group["params"]}
        matrices, vectors = [p for p in own if p.ndim > 1], [p for p in own if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors},
            {"params": [p for p in beside if id(p) not in others]},
            *own_way,
        ]
    else:
        groups = [{**group, "params": list(group["params"])} for group in objective.groups]
    groups = [group for group in groups if group["params"]]
    tensors = [p for group in groups for p in group["params"]]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
    if not own:
        came = "nothing to train: no weight requires a gradient"
    elif not {id(p) for p in tensors} <= {id(p) for p in (*own, *beside)}:
        came = "an optimiser group holds a tensor that is not a trainable parameter of the model, nor beside it"
    elif dtypes != ["float32"]:
        came = f"weights to train in {', '.join(dtypes)}, where small updates are rounded away"
    else:
        return groups
    raise SettingsError(
        came, "float32 parameters of the model that require gradients", "cast the model, or add adapters"
    )
