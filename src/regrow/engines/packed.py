"""Packed text as a training reads it: blocks of token ids, which of the tokens are learnt, in which order blocks come.

A token is learnt from those before it, so the first of a block never is. Where only some are, a micro-batch counts in
its step by the number that it has, and a step's gradient is of the mean over all of them.
What this gives up: tokens that count more or less than others; padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import Dataset

from regrow.errors import TextError


@dataclass(frozen=True, slots=True)
class Packed:
    """Token ids in blocks without gaps, and which of them are learnt."""

    ids: Tensor  # (n, T) int64
    learn: Tensor | None = None  # (n, T) bool; None: all
    domain: Tensor | None = None  # (n,) int64, which domain of a mixture each block is of; None: there is one

    def __getitem__(self, rows: Tensor) -> Packed:
        """Some of the blocks: `rows` (n,) bool or (m,) int64."""
        learn, domain = (part if part is None else part[rows] for part in (self.learn, self.domain))
        return Packed(self.ids[rows], learn, domain)

    def batch(self, rows: int | slice) -> dict[str, Tensor]:
        """`input_ids`, and `learn` where only some tokens are."""
        mask = {} if self.learn is None else {"learn": self.learn[rows]}
        return {"input_ids": self.ids[rows].long(), **mask}

    def targets(self) -> Tensor:  # (n,) int64
        """How many tokens of each block are learnt."""
        if self.learn is None:
            return torch.full((len(self.ids),), self.ids.shape[1] - 1)
        return self.learn[:, 1:].sum(1)


def nothing_learnt(what: str, tokens: int) -> tuple[str, str, str]:
    """What came, what is allowed and what to do next, of text in which no block reaches into an answer."""
    return (
        f"{what}: {tokens:,} tokens, and none of them is learnt",
        "blocks that reach into an answer",
        "lengthen the block, give more text, or learn all of it",
    )


def as_packed(blocks: Tensor | Packed, what: str = "training text") -> Packed:
    """Checked; of a tensor (n, T) all is learnt. Blocks of which nothing is learnt are left out.

    Raises `TextError` when no block is left; `what` it is that was read.
    """
    packed = blocks if isinstance(blocks, Packed) else Packed(blocks)
    shape = tuple(packed.ids.shape)
    if len(shape) != 2 or not shape[0] or shape[1] < 2:
        raise TextError(f"{what}: blocks of shape {shape}", "(n, T) with n >= 1, T >= 2", "give more text to train on")
    if packed.learn is None:
        return packed
    useful = packed.targets() > 0  # (n,)
    if not useful.any():
        raise TextError(*nothing_learnt(what, packed.ids.numel()))
    return packed[useful]


def learnt(batch: Mapping[str, Tensor]) -> Tensor | None:  # (b, T - 1) bool
    """Which positions of a batch come before a token that is learnt; None: all."""
    return batch["learn"][:, 1:] if "learn" in batch else None


def order(blocks: int, total: int, seed: int) -> Tensor:  # (total,) int64
    """Which block is seen when: every block once in a random order, then again in another. Never depends on `total`."""
    return torch.tensor(list(islice(rounds(blocks, seed), total)))


def rounds(blocks: int, seed: int) -> Iterator[int]:
    """The same without an end."""
    source = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(blocks, generator=source).tolist()


class Stream(Dataset[dict[str, Tensor]]):
    """All sequences of a run, in order, `batch` of them a step; `usual` is the mean number of targets in their step."""

    def __init__(self, packed: Packed, sequence: Tensor, batch: int) -> None:
        self.packed, self.batch = packed, batch
        self.sequence: list[int] = sequence.tolist()
        self.usual: Tensor | list[Tensor] = packed.targets()[sequence].view(-1, batch).float().mean(1)  # (steps,)

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.packed.batch(self.sequence[index]), "usual": self.usual[index // self.batch]}  # (T,), (T,), ()


def share(batch: Mapping[str, Tensor]) -> Tensor | float:
    """What the mean over a micro-batch of a `Stream` counts in its step, where 1 is the usual."""
    mask = learnt(batch)
    return 1.0 if mask is None else mask.sum() / batch["usual"].sum()
