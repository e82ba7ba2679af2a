"""Stage recover: a short training puts back some of what the cut took; weights end rounded to the storage type.

What this gives up: any goal but the next token; a teacher is another stage's business.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.engines import checkpoint
from regrow.engines.adapters import add_lora, merge
from regrow.engines.bind import Subject
from regrow.engines.train import TrainResult, train
from regrow.engines.train_settings import TrainSettings
from regrow.settings import Recover

Progress = Callable[[int, int, str], None]


def recover(
    subject: Subject,
    blocks: Tensor,
    settings: Recover,
    *,
    folder: Path,
    seed: int,
    heldout: Tensor | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train `subject.model` on `blocks` (n, T) by next-token loss, all weights or LoRA that is merged afterwards.

    `folder` holds checkpoints: an interrupted recovery goes on where it stopped.
    """
    model: Any = subject.model
    device, dtype = model.device, model.dtype
    lora = settings.method == "lora"
    if lora:
        model = add_lora(model, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=seed)
    result = train(model, blocks, as_train(settings, seed), folder=folder, heldout=heldout, progress=progress)
    subject.model = merge(model) if lora else model.eval()
    checkpoint.round_to(subject.model, subject.store)
    subject.model.to(device=device, dtype=dtype)  # the trainer moves models, and adapters are merged in fp32
    return result


def as_train(settings: Recover, seed: int) -> TrainSettings:
    """The training loop's settings behind a recipe's `recover`. Raises `SettingsError`."""
    return TrainSettings(
        tokens=settings.tokens,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        batch=settings.batch,
        micro_batch=min(settings.micro_batch, settings.batch),
        checkpointing=settings.checkpointing,
        seed=seed,
        save_every=max(25, settings.tokens // (settings.batch * settings.block) // 10),
    )
