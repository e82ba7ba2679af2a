"""What a task says of the model without each run of layers of given lengths; nothing is trained, nothing is copied.

What this gives up: time, since layers that are shut still compute, and the task is asked anew for every run; and that
task as a measure of the result, for it has chosen among cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regrow.artifacts.plan import Plan
from regrow.engines.bind import Subject
from regrow.engines.gates import from_plan, gated
from regrow.engines.tasks import answer_tasks


def wrong_without(
    subject: Subject,
    lengths: Sequence[int],
    *,
    task: str,
    limit: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:  # (2, L, L+1) fp64
    """[0, i, j]: of the first `limit` items how many go wrong without layers i..j-1; [1, i, j]: bits a byte of the
    right answers. NaN where j - i is none of `lengths`, which are from 1 to L-1.

    Raises as `answer_tasks` does.
    """
    anatomy = subject.anatomy
    layers, whole = anatomy.sizes["L"], Plan.everything(anatomy)
    found = torch.full((2, layers, layers + 1), torch.nan, dtype=torch.float64)
    runs = [(first, first + length) for length in lengths for first in range(layers - length + 1)]
    for done, (first, after) in enumerate(runs, 1):
        left = replace(whole, layers=whole.layers[:first] + whole.layers[after:])
        with gated(subject.model, anatomy, from_plan(anatomy, left)):
            items = answer_tasks(subject.model, subject.tokenizer, [task], limit=limit)[task]
        found[0, first, after] = items.correct.count(False)
        found[1, first, after] = sum(items.gold_bits) / sum(items.gold_bytes)
        if progress is not None:
            progress(done, len(runs))
    return found
