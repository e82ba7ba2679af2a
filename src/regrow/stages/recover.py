"""Stage recover: a short training puts back some of what the cut took; weights end rounded to the storage type.

The goal is the text's next token, or a teacher's predictions. Of a sparse model every zero stays, except under plain
LoRA, which says so. What this gives up: training that moves the zeros about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.artifacts.goal import DIVERGENCES
from regrow.engines import checkpoint, masks
from regrow.engines.adapters import add_adapters, merge, moved
from regrow.engines.bind import Subject
from regrow.engines.distil import FromTeacher, check_teacher
from regrow.engines.train import Loss, TrainResult, next_token, train
from regrow.engines.train_settings import TrainSettings
from regrow.settings import Recover

Progress = Callable[[int, int, str], None]

FILLS = "zeros are filled by plain LoRA; spp, hira, ia3, full and lora-masked keep them"
FEW = 0.01  # of the weights under adapters; fewer that change were hardly worth the training


@dataclass(frozen=True, slots=True)
class Recovered:
    """How the training went, and what of it is left in the weights as they are stored."""

    training: TrainResult
    notes: tuple[str, ...] = ()


def recover(
    subject: Subject,
    blocks: Tensor,
    settings: Recover,
    *,
    folder: Path,
    seed: int,
    teacher: Subject | None = None,
    heldout: Tensor | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Train `subject.model` on `blocks` (n, T): all weights, or adapters that are merged afterwards.

    `folder` holds checkpoints: an interrupted recovery goes on where it stopped. Raises `IdentityError` when a zero of
    a sparse model was filled by a method that keeps them.
    """
    model: Any = subject.model
    device, dtype = model.device, model.dtype
    goal: Loss = next_token
    if teacher is not None:
        check_teacher(model.config, teacher.model.config, subject.tokenizer, teacher.tokenizer)
        goal = FromTeacher(teacher.model, DIVERGENCES.get(settings.loss))
    empty = masks.masks_of(model, subject.anatomy)
    adapted = settings.method != "full"
    if adapted:
        kind = settings.method.removesuffix("-masked")
        model = add_adapters(model, kind, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, seed=seed)
    with masks.held(model, None if adapted else empty):
        result = train(
            model, blocks, as_train(settings, seed), folder=folder, loss=goal, heldout=heldout, progress=progress
        )
    notes = _little(moved(model, subject.store), subject) if adapted else ()
    subject.model = merge(model) if adapted else model.eval()
    if empty is not None and settings.method != "lora":
        if settings.method != "lora-masked":
            masks.check_kept(subject.model, empty)
        masks.put_back(subject.model, empty)
    checkpoint.round_to(subject.model, subject.store)
    subject.model.to(device=device, dtype=dtype)  # the trainer moves models, and adapters are merged in fp32
    return Recovered(result, notes)


def _little(share: float, subject: Subject) -> tuple[str, ...]:
    """A note when rounding took nearly all that adapters had learnt."""
    if share >= FEW:
        return ()
    bits = 8 * subject.store.itemsize
    what = f"only {100 * share:.2g} % of the weights under adapters changed after rounding to {bits} bits"
    return (f"{what}: raise learning_rate or tokens",)


def warning(subject: Subject, settings: Recover) -> str | None:
    """What a user must know before the training begins."""
    sparse = settings.method == "lora" and masks.masks_of(subject.model, subject.anatomy) is not None
    return FILLS if sparse else None


def as_train(settings: Recover, seed: int) -> TrainSettings:
    """The training loop's settings behind a recipe's `recover`. Raises `SettingsError`."""
    assert settings.learning_rate is not None  # the method's own where none was named
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
