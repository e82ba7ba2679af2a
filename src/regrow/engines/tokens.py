"""Documents in, blocks of token ids out: the only ways text reaches a model.

`blocks` is for calibration and recovery: shuffled with a seed, documents apart by a separator, packed without gaps.
`lessons` packs instructions in the same way, as a template writes them, and knows which tokens are answers.
`text_blocks` is for evaluation: the text as it is, tokenised once, as the papers do.
What this gives up: the tail that does not fill a block, and attention masks between packed documents. A lesson may
begin in one block and end in the next, where its answer goes on without what was asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from regrow.engines.instructions import Piece, Template, alpaca, chat, chosen_template
from regrow.engines.packed import Packed, nothing_learnt
from regrow.engines.texts import Document
from regrow.errors import BrokenModel, SettingsError, TextError

Learn = Literal["all", "answers"]
Encoded = tuple[list[int], list[bool]]
"""Ids, and which of them are answers."""

_BATCH = 64  # documents tokenised at a time; reading stops once there are enough tokens


def blocks(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    block: int,
    tokens: int | None,
    seed: int,
    what: str = "the text",
) -> Tensor:  # (n, block) int64
    """Shuffle, tokenise, pack: `n = tokens // block` blocks (at least one), or all there are when `tokens` is None.

    Every document is followed by the tokenizer's EOS (else its BOS, else nothing); no other special token is added.
    Fewer blocks come back when the documents run out. Raises `TextError` when not even one block is full; `what` was
    read.
    """
    scripts = ([(document.text, True)] for document in _shuffled(documents, seed))
    return _pack(_encoded(scripts, tokenizer), block, tokens, what).ids


def lessons(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    block: int,
    tokens: int | None,
    seed: int,
    template: Template | None = None,
    learn: Learn = "all",
    what: str = "the text",
) -> Packed:  # (n, block)
    """Blocks for a training. Plain text gives those of `blocks`, and all of it is learnt.

    Lessons are written by `template` (None: the tokenizer's chat template where it has one, else Alpaca's), and every
    one is followed by the separator unless a chat template has written it. `learn` answers: of every turn, with what
    ends it; blocks without any are left out, and others read in their stead. Raises `SettingsError` (words about
    lessons and none there, no chat template) and `TextError`; `what` was read.
    """
    check_lessons(documents, template, learn)
    told = [document.lesson for document in _shuffled(documents, seed) if document.lesson is not None]
    if len(told) < len(documents):
        return Packed(blocks(documents, tokenizer, block=block, tokens=tokens, seed=seed, what=what))
    chosen = chosen_template(tokenizer, template)
    scripts = (alpaca(lesson) if chosen == "alpaca" else chat(lesson, tokenizer) for lesson in told)
    some = learn == "answers"
    found = _pack(_encoded(scripts, tokenizer, ends=chosen == "chat"), block, tokens, what, useful=some)
    return found if some else Packed(found.ids)


def check_lessons(documents: Sequence[Document], template: Template | None, learn: Learn) -> None:
    """Raise `SettingsError` when a template or answers are asked for of plain text."""
    asked = f"template {template}" if template else "learn answers" if learn == "answers" else None
    if asked and any(document.lesson is None for document in documents):
        raise SettingsError(
            f"{asked} of plain text",
            "a source whose rows are instructions and answers",
            "give such a source, or leave template and learn out",
        )


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


def _shuffled(documents: Sequence[Document], seed: int) -> Iterator[Document]:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return (documents[i] for i in order)


def _encoded(scripts: Iterator[list[Piece]], tokenizer: Any, *, ends: bool = False) -> Iterator[Encoded]:
    """Each script with a separator behind it; not where it `ends` itself by one in its last piece."""
    end = separator(tokenizer)
    while batch := list(islice(scripts, _BATCH)):
        texts = [text for script in batch for text, _ in script]
        encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        for script in batch:
            parts = [(next(encoded), answer) for _, answer in script]
            last, answer = parts[-1]
            parts.append(([] if ends and set(end) & set(last) else end, answer))
            yield [i for ids, _ in parts for i in ids], [answer for ids, answer in parts for _ in ids]


def _pack(
    encoded: Iterable[Encoded], block: int, tokens: int | None, what: str, *, useful: bool = False
) -> Packed:  # (n, block)
    """Blocks without gaps, and which tokens are answers; `useful`: only blocks in which one is learnt."""
    wanted = math.inf if tokens is None else max(tokens // block, 1)
    ids: list[list[int]] = []
    answers: list[list[bool]] = []
    stream: list[int] = []
    flags: list[bool] = []
    read = 0
    for more, which in encoded:
        stream += more
        flags += which
        read += len(more)
        start = 0
        while len(stream) >= start + block and len(ids) < wanted:
            here = slice(start, start + block)
            if not useful or any(flags[here][1:]):
                ids.append(stream[here])
                answers.append(flags[here])
            start += block
        del stream[:start], flags[:start]
        if len(ids) >= wanted:
            break
    if read < block:
        raise _short(what, read, block)
    if not ids:
        raise TextError(*nothing_learnt(what, read))
    return Packed(torch.tensor(ids, dtype=torch.int64), torch.tensor(answers))


def _short(what: str, tokens: int, block: int) -> TextError:
    return TextError(
        f"{what} gives {tokens} tokens", f"at least {block}, one block", "give more text or shorten the block"
    )


def _cut(ids: Sequence[int], block: int) -> Tensor:  # (n, block) int64
    count = len(ids) // block
    if count == 0:
        raise _short("the text", len(ids), block)
    return torch.tensor(ids[: count * block], dtype=torch.int64).view(count, block)
