"""Perplexity the way the pruning papers count it, with a record that says exactly how.

A text is tokenised once as it is and cut into blocks that do not overlap; every block is scored on its own
(Wanda and SparseGPT: 2048 tokens, no BOS, tail dropped). Logits are made for a slice of the vocabulary at a time and
stay in the processor's cache: all of them would outweigh a small model, and writing them takes longer than making them.
What this gives up: no sliding window, so the first tokens of a block are judged with little context.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from regrow.engines.head import shaping
from regrow.engines.tokens import text_blocks
from regrow.errors import BrokenModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]  # (what is measured, steps done, steps in all)

CHUNK, SLICE = 512, 2048  # tokens and words whose logits exist at the same time
_PROBE = 8  # tokens on which the sliced head must agree with the model's own forward
_CLOSE = 1e-3  # largest difference of losses, relative to the largest logit, that rounding may make

MOST = 700  # nats a token
BYTES_RULE = "decoded blocks less their first tokens"


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well a model predicts a text. Standard errors are over blocks, None when there is only one."""

    perplexity: float  # exp of the mean loss over scored tokens
    bits_per_byte: float  # survives a change of tokenizer
    tokens: int  # targets scored
    perplexity_stderr: float | None
    bits_per_byte_stderr: float | None
    losses: tuple[float, ...]  # mean nats a target of each block
    record: dict[str, Any]


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    name: str,
    seqlen: int,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> TextScore:
    """Perplexity and bits per byte of `text` in blocks of `seqlen` tokens (the first `max_tokens` tokens only).

    The first token of a block is context, so a block has seqlen - 1 targets. The bytes of the targets are those of
    the decoded block less those of its decoded first token; a character that is cut in two by a block's edge decodes
    to a replacement mark, which misses the true count by a few bytes a block at most.
    Raises `TextError` when no block is full and `BrokenModel` when a loss is not finite.
    """
    blocks = text_blocks(text, tokenizer, seqlen=seqlen, max_tokens=max_tokens)  # (n, seqlen)
    count = len(blocks)
    losses = block_losses(model, blocks, progress=progress and partial(progress, name)).tolist()  # nats a target
    for index, loss in enumerate(losses):
        if not loss <= MOST:
            raise BrokenModel(
                f"the loss on block {index} of {name!r} is {loss:g}",
                f"finite losses, at most {MOST} nats: exp of more is no number",
                "look for NaN or infinite weights; a model in fp16 may need bf16 or fp32",
            )
    mean, spread = ratio(losses, [1] * count)
    perplexity = math.exp(mean)
    bits, bits_stderr = ratio(
        [loss * (seqlen - 1) / math.log(2) for loss in losses],
        [_target_bytes(tokenizer, ids) for ids in blocks.tolist()],
    )
    return TextScore(
        perplexity=perplexity,
        bits_per_byte=bits,
        tokens=count * (seqlen - 1),
        perplexity_stderr=None if spread is None else perplexity * spread,
        bits_per_byte_stderr=bits_stderr,
        losses=tuple(round(loss, 7) for loss in losses),
        record={
            "text": name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "seqlen": seqlen,
            "stride": seqlen,
            "bos": False,
            "blocks": count,
            "tokens": count * (seqlen - 1),
            "bytes": BYTES_RULE,
        },
    )


def block_losses(
    model: PreTrainedModel, blocks: Tensor, *, batch: int = 1, progress: Callable[[int, int], None] | None = None
) -> Tensor:  # (n,) fp64
    """Mean next-token cross entropy (nats) of each block over its T-1 targets.

    `blocks` (n, T) int64 token ids. The body runs once per `batch` blocks; the head runs on `CHUNK` tokens and `SLICE`
    words at a time where that gives the model's own losses (tried on a few tokens first), else on whole blocks.
    `progress` is told how many blocks of how many are done.
    """
    losses: list[Tensor] = []
    with evaluating(model):
        sliced = _slices_agree(model, blocks[:1, :_PROBE].to(model.device))
        for part in torch.split(blocks, batch):
            ids = part.to(model.device)  # (b, T)
            if sliced:
                losses.append(head_losses(model, _states(model, ids), ids))
            else:
                each = _nats(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])
                losses.append(each.double().mean(1).cpu())
            if progress is not None:
                progress(sum(map(len, losses)), len(blocks))
    return torch.cat(losses)


def head_losses(model: PreTrainedModel, states: Tensor, ids: Tensor) -> Tensor:  # (b,) fp64
    """Mean loss (nats) of each sequence from the states the head receives: `states` (b, T, C), `ids` (b, T)."""
    inputs, targets = states[:, :-1].flatten(0, 1), ids[:, 1:].flatten()  # (b*(T-1), C), (b*(T-1),)
    pieces = zip(torch.split(inputs, CHUNK), torch.split(targets, CHUNK), strict=True)
    each = torch.cat([_sliced_nats(model, h, y) for h, y in pieces])  # (b*(T-1),)
    return each.view(len(ids), -1).double().mean(1).cpu()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without autograd; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float | None]:
    """sum(tops) / sum(bottoms) and its standard error over the pairs, by the delta method (None for one pair).

    With every bottom equal to 1 this is the mean and its usual standard error.
    """
    count, value = len(tops), sum(tops) / sum(bottoms)
    if count < 2:
        return value, None
    squares = sum((top - value * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    return value, math.sqrt(count / (count - 1) * squares) / sum(bottoms)


def _states(model: PreTrainedModel, ids: Tensor) -> Tensor:  # (b, T, C), what the head receives
    states: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return states


def _sliced_nats(model: PreTrainedModel, states: Tensor, targets: Tensor) -> Tensor:  # (n,) fp32
    """-log p of `targets` (n,) from `states` (n, C): log of the sum of all exponentials, less the target's logit."""
    head: Any = model.get_output_embeddings()
    sums: list[Tensor] = []  # (n,) each, of one slice
    gold = torch.zeros(len(targets), device=states.device)
    for start in range(0, len(head.weight), SLICE):
        words = slice(start, start + SLICE)
        logits = _shaped(model, linear(states, head.weight[words], None if head.bias is None else head.bias[words]))
        logits = logits.float()  # (n, words)
        here = (targets >= start) & (targets < start + logits.shape[1])
        gold[here] = logits[here, targets[here] - start]
        sums.append(logits.logsumexp(1))
    return torch.stack(sums).logsumexp(0) - gold


def _shaped(model: PreTrainedModel, logits: Tensor) -> Tensor:
    return shaping(model.config)(logits)


def _nats(logits: Tensor, targets: Tensor) -> Tensor:  # (b, t) fp32
    """-log p of `targets` (b, t) under `logits` (b, t, V)."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)


def _slices_agree(model: PreTrainedModel, ids: Tensor) -> bool:
    """True when body, slices of the head and `_shaped` give the losses of the model's own forward on `ids` (1, t)."""
    if type(model.get_output_embeddings()) is not nn.Linear:
        return False
    logits = model(input_ids=ids, use_cache=False).logits
    ours = _sliced_nats(model, _states(model, ids)[0, :-1], ids[0, 1:])
    off = (ours - _nats(logits[:, :-1], ids[:, 1:])[0]).abs().max()
    return bool(off <= _CLOSE * logits.float().abs().max())


def _target_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    whole, first = (
        len(tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False).encode())
        for part in (ids, ids[:1])
    )
    return whole - first
