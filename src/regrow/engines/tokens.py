"""Documents in, blocks of token ids out: the only two ways text reaches a model.

`blocks` is for calibration and recovery: shuffled with a seed, documents apart by a separator, packed without gaps.
`text_blocks` is for evaluation: the text as it is, tokenised once, as the papers do.
What this gives up: the tail that does not fill a block, and attention masks between packed documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.engines.texts import Document
from regrow.errors import BrokenModel, TextError

_BATCH = 64  # documents tokenised at a time; reading stops once there are enough tokens


def blocks(
    documents: Sequence[Document], tokenizer: Any, *, block: int, tokens: int | None, seed: int
) -> Tensor:  # (n, block) int64
    """Shuffle, tokenise, pack: `n = tokens // block` blocks (at least one), or all there are when `tokens` is None.

    Every document is followed by the tokenizer's EOS (else its BOS, else nothing); no other special token is added.
    Fewer blocks come back when the documents run out. Raises `TextError` when not even one block is full.
    """
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = None if tokens is None else max(tokens // block, 1) * block
    stream: list[int] = []
    for ids in _encoded([documents[i].text for i in order], tokenizer):
        stream += ids
        if wanted is not None and len(stream) >= wanted:
            break
    return _cut(stream[:wanted], block)


def text_blocks(
    text: str, tokenizer: Any, *, seqlen: int, max_tokens: int | None = None
) -> Tensor:  # (n, seqlen) int64
    """The evaluation convention: tokenise `text` once with no special token, cut it, drop the tail.

    Only the first `max_tokens` tokens are used (None: all). Raises `TextError` when not even one block is full.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return _cut(ids[:max_tokens], seqlen)


def separator(tokenizer: Any) -> list[int]:
    """The ids that end a document: EOS, else BOS, else none."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [token]
    return []


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise `BrokenModel` when text could become an id that the model's `vocab_size` embeddings lack.

    Added tokens that no text reaches (Gemma 3's image token) may lie outside, the separator may not.
    """
    added = set(tokenizer.added_tokens_decoder)
    largest = max([i for i in tokenizer.get_vocab().values() if i not in added] + separator(tokenizer), default=-1)
    if largest >= vocab_size:
        raise BrokenModel(
            f"a tokenizer that does not fit the model: it makes token id {largest}",
            f"ids below {vocab_size}, the rows of the model's embedding",
            "load the tokenizer that came with the model",
        )


def _encoded(texts: list[str], tokenizer: Any) -> Iterator[list[int]]:
    end = separator(tokenizer)
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(texts[start : start + _BATCH], add_special_tokens=False, verbose=False)["input_ids"]
        yield from (ids + end for ids in batch)


def _cut(ids: list[int], block: int) -> Tensor:  # (n, block) int64
    count = len(ids) // block
    if count == 0:
        raise TextError(
            f"the text gives {len(ids)} tokens", f"at least {block}, one block", "give more text or shorten the block"
        )
    return torch.tensor(ids[: count * block], dtype=torch.int64).view(count, block)
