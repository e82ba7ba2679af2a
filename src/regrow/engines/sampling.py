"""What a model goes on to write, drawn with random numbers that are given: the same however many rows go in one pass.

What this gives up: top-k, top-p, and an early end; what follows a separator is for the reader to leave out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def prompt_of(share: float, block: int) -> int:
    """Tokens of a block that are the prompt: at least one, and at least one is left to write."""
    return min(max(round(share * block), 1), block - 1)


@torch.no_grad()
def continued(
    model: Any, prompts: Tensor, luck: Tensor, *, temperature: float, rows: int
) -> Tensor:  # (b, P + n) int64
    """`prompts` (b, P) int64 and n tokens more, each drawn from the model's own prediction after all before it.

    `luck` (b, n) from 0 to 1, below 1, says which: the token in whose part of the chances it falls. Only the first
    `rows` tokens of the vocabulary are drawn.
    """
    ids, fresh, cache = prompts, prompts, None
    for here in torch.split(luck.to(prompts.device), 1, 1):  # (b, 1)
        out = model(input_ids=fresh, past_key_values=cache, use_cache=True, logits_to_keep=1)
        fresh, cache = drawn(out.logits[:, -1, :rows].float() / temperature, here), out.past_key_values
        ids = torch.cat([ids, fresh], 1)
    return ids


def drawn(logits: Tensor, luck: Tensor) -> Tensor:  # (b, 1) int64
    """Tokens of `logits` (b, V) in whose part of the chances `luck` (b, 1) falls."""
    sums = logits.softmax(-1).cumsum(-1)  # (b, V)
    found = torch.searchsorted(sums, luck.to(sums) * sums[:, -1:], right=True)
    return found.clamp_max(logits.shape[1] - 1)
