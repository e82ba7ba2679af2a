"""A model small enough to train in a test, text easy enough to learn, and a plug to pull."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from regrow.engines.train_settings import TrainSettings

T, VOCAB = 16, 24
STEP = 4 * T  # tokens a step with a batch of 4


def tiny(dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config).eval()


def patterns(count: int = 12, seed: int = 0) -> Tensor:  # (count, T) int64
    """Four tokens over and over: easy to learn."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (count, 4), generator=source).repeat(1, T // 4)


def settings(**changes: Any) -> TrainSettings:
    usual = {"tokens": 6 * STEP, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "save_every": 3, "log_every": 1}
    return TrainSettings(**{**usual, **changes})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop(Exception):
    """The plug is pulled."""


def pull_plug(after: int) -> Any:
    def progress(done: int, total: int, note: str) -> None:  # noqa: ARG001
        if done >= after * STEP:
            raise Stop

    return progress
