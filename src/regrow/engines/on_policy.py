"""A student learns on text that it writes itself, where it will later have to know what to do: GKD.

In some passes, drawn by chance, the student writes the rest of every block, and the loss is of what it wrote alone.
Chance hangs on the seed and a count of passes, those of all processes, that is saved with the model, and draws from
nobody else's.
What this gives up: stopping before a block is full; students whose weights are spread over processes; questions that
are not learnt, among what the student writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.engines import processes
from regrow.engines.chance import stream
from regrow.engines.distil import bare
from regrow.engines.objective import Answer, Objective
from regrow.engines.sampling import continued, prompt_of


@dataclass(frozen=True, slots=True)
class Policy:
    """`share` of the passes are written, after the first `prompt` of every block, at a `temperature`; ids from `tokens`
    on are never drawn, since one of the models may not know them."""

    share: float  # 0 to 1
    prompt: float  # between 0 and 1
    temperature: float  # above 0
    tokens: int

    def __str__(self) -> str:
        return f"{self.share:g} on policy after {self.prompt:g} of a block at {self.temperature:g}"


class OnPolicy(nn.Module):
    """A loss (model, batch) that another one is read by, on text as it is or as the student writes it.

    Without gradients, as where held-out text is measured, text stays as it is and nothing is counted.
    From arXiv:2306.13649.
    """

    passes: Tensor  # () int64

    def __init__(self, goal: Objective, policy: Policy, seed: int) -> None:
        super().__init__()
        self.goal, self.policy, self.seed = goal, policy, seed
        self.beside = goal.beside
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.by_pass = True  # how many passes there are, and what is drawn for each
        self.__name__ = f"{getattr(goal.loss, '__name__', type(goal.loss).__name__)}, {policy}"

    @property
    def objective(self) -> Objective:
        return Objective(self, self.goal.groups, self, self.goal.apart)

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Answer:
        if not torch.is_grad_enabled():
            return self.goal.loss(model, batch)
        ids = batch["input_ids"]  # (b, T) int64
        source = stream(self.seed, int(self.passes) + processes.rank(), ids.device)
        self.passes += processes.count()  # they take passes in turns
        writes = bool(torch.rand((), generator=source, device=ids.device) < self.policy.share)
        answer = self.goal.loss(model, written(bare(model), ids, self.policy, source) if writes else batch)
        loss, parts = answer if isinstance(answer, tuple) else (answer, {})
        return loss, {**parts, "on_policy": float(writes)}


@torch.no_grad()
def written(model: Any, ids: Tensor, policy: Policy, source: torch.Generator) -> dict[str, Tensor]:
    """A batch of blocks (b, T) int64 that begin as `ids` do and that a causal model has gone on with; that is learnt.

    It samples without dropout, and is left in the mode it is found in.
    """
    block, mode = ids.shape[1], model.training
    given = prompt_of(policy.prompt, block)
    learn = (torch.arange(block, device=ids.device) >= given).expand_as(ids)  # (b, T) bool
    luck = torch.rand(len(ids), block - given, generator=source, device=ids.device)  # (b, T - P)
    model.eval()
    try:
        ids = continued(model, ids[:, :given], luck, temperature=policy.temperature, rows=policy.tokens)
    finally:
        model.train(mode)
    return {"input_ids": ids, "learn": learn}
