"""Preferences instead of predictions (PLaD): a student finds likelier what its teacher wrote than what it wrote itself.

Both go on from the head of every block of text, once, before the training; then the teacher is not needed any more, and
its logits never are. A row of the training is a pair: the teacher's block, then the student's, 2 T tokens, of which the
model reads each half for itself. A step's gradient is of the mean over pairs, however long the continuations are.
What this gives up: what a student would write later on; and the end of what does not fit into a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regrow.engines.chunks import in_chunks
from regrow.engines.distil import read
from regrow.engines.head import Head, sum_over_tokens
from regrow.engines.objective import Answer
from regrow.engines.sampling import continued

CHUNK = 64  # blocks in a file

Say = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Draw:
    """How continuations are drawn."""

    prompt: int  # tokens of a block that are given
    temperature: float
    seed: int
    rows: int  # tokens of the vocabulary that both models know


def written(
    teacher: Any, student: Any, blocks: Tensor, draw: Draw, folder: Path, *, batch: int, say: Say = lambda _: None
) -> Tensor:  # (n, 2 T) int64
    """Pairs for `blocks` (n, T) int64: the head of each and what the teacher writes after it, then the student's.

    Pairs are kept in `folder` and not drawn again; `batch` blocks go in one pass, which does not change what is drawn.
    """
    most = blocks.shape[1] - draw.prompt

    luck = torch.rand(2, len(blocks), most, generator=torch.Generator().manual_seed(draw.seed))

    def make(rows: slice) -> dict[str, Tensor]:
        prompts = blocks[rows, : draw.prompt].long()  # (c, P)
        halves = []
        for model, own in ((teacher, luck[0, rows]), (student, luck[1, rows])):
            passes = zip(torch.split(prompts.to(model.device), batch), torch.split(own, batch), strict=True)
            how: Any = {"temperature": draw.temperature, "rows": draw.rows}
            halves.append(torch.cat([continued(model.eval(), given, lot, **how).cpu() for given, lot in passes]))
        return {"pairs": torch.cat(halves, 1).int()}

    files = in_chunks(folder, len(blocks), CHUNK, make, say=say)
    return torch.cat([load_file(path)["pairs"] for path in files]).long()


class Preferred:
    """The loss (model, batch) of the training loop: mean over pairs of max(0, margin - log P(y+ | x) + log P(y- | x)).

    Of a continuation all counts up to the first of the tokens `ends`, with it; nothing behind it does, nor the prompt.
    `by_length`: of log-probabilities a token. arXiv:2406.02886.
    """

    def __init__(self, margin: float, prompt: int, ends: Sequence[int], *, by_length: bool = False) -> None:
        self.margin, self.prompt, self.ends, self.by_length = margin, prompt, tuple(ends), by_length
        what = "nats a token" if by_length else "nats"
        self.__name__ = f"preferred by {margin:g} {what} after {prompt} tokens"  # what a resumed run must share

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Answer:
        ids = batch["input_ids"].reshape(2 * len(batch["input_ids"]), -1)  # (2 b, T), teacher's and student's in turn
        counts = self.counting(ids)  # (2 b, T - 1)
        every, head = read(model, ids, "student")
        states, following = every[:, :-1][counts], ids[:, 1:][counts]  # (n, C), (n,)
        sequence = counts.nonzero()[:, 0]  # (n,) int64, which of them a token is of
        weight = 1 / counts.sum(1) if self.by_length else torch.ones(len(ids), device=ids.device)  # (2 b,)
        chances = -token_losses(head, states.detach(), following)  # (n,)
        whole = torch.zeros_like(weight).index_add(0, sequence, chances) * weight  # (2 b,)
        lead = whole[::2] - whole[1::2]  # (b,)
        parts = {"lead": lead.mean(), "ranked": (lead > 0).float().mean()}
        if not torch.is_grad_enabled():
            return (self.margin - lead).clamp_min(0).mean(), parts
        unmet = (lead < self.margin).float() / len(lead)  # (b,) the hinge's slope: what each pair counts
        shares = (torch.stack([unmet, -unmet], 1).flatten() * weight)[sequence]  # (n,)
        loss = sum_over_tokens(head, states, _nats(following), shares)
        return loss + self.margin * unmet.sum(), parts

    def counting(self, ids: Tensor) -> Tensor:  # (m, T - 1) bool
        """Which positions of sequences (m, T) come before a token that counts."""
        end = torch.isin(ids[:, self.prompt :], torch.tensor(self.ends, dtype=ids.dtype, device=ids.device))
        over = end.cumsum(1) - end.long()  # (m, T - P) ends before each
        found = torch.zeros_like(ids[:, 1:], dtype=torch.bool)
        found[:, self.prompt - 1 :] = over == 0
        return found


@torch.no_grad()
def token_losses(head: Head, states: Tensor, following: Tensor) -> Tensor:  # (n,) fp32
    """Cross-entropy of the token that follows each of the states (n, C), in nats; not all logits at a time."""
    found, nats = torch.empty(len(states), device=states.device), _nats(following)

    def note(logits: Tensor, piece: slice) -> Tensor:
        found[piece] = nats(logits, piece)
        return found[piece]

    sum_over_tokens(head, states, note, torch.ones(len(states), device=states.device))
    return found


def _nats(following: Tensor) -> Callable[[Tensor, slice], Tensor]:
    return lambda logits, piece: cross_entropy(logits, following[piece], reduction="none")
