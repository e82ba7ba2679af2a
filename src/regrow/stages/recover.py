"""Stage recover: a short training puts back some of what the cut took; weights end rounded to the storage type.

The goal is the text's next token, or a teacher's predictions. Of a sparse model every zero stays, except under plain
LoRA, which says so, and AST, which moves them and says how many. What this gives up: a mixture of both goals.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines import checkpoint, masks, moving_masks
from regrow.engines.adapters import add_adapters, merge, moved
from regrow.engines.bind import Subject
from regrow.engines.distil import FromTeacher, Teacher, check_teacher, checked_head
from regrow.engines.match import Match, Matcher
from regrow.engines.mixture import Mixture
from regrow.engines.objective import Loss, Objective, next_token
from regrow.engines.packed import Packed, as_packed
from regrow.engines.train import TrainResult, train
from regrow.engines.train_settings import TrainSettings
from regrow.engines.trained import Shapes, cut_and_norms, only
from regrow.errors import SettingsError
from regrow.settings import Recover

Progress = Callable[[int, int, str], None]

FILLS = "zeros are filled by plain LoRA; spp, hira, ia3, full and lora-masked keep them, ast moves them"
WHOLE = ("full", "ast", "cut")  # methods that train weights themselves
OFTEN = 50  # steps between two updates of a mixture's weights, where nothing else is asked (Sheared LLaMA)
FEW = 0.01  # of the weights under adapters; fewer that change were hardly worth the training


@dataclass(frozen=True, slots=True)
class Recovered:
    """How the training went, and what a reader of the model must know of it."""

    training: TrainResult
    notes: tuple[str, ...] = ()


def recover(
    subject: Subject,
    blocks: Tensor | Packed,
    settings: Recover,
    *,
    folder: Path,
    seed: int,
    teacher: Teacher | Subject | None = None,
    heldout: Tensor | Packed | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Train `subject.model` on `blocks` (n, T) int64: all weights, or adapters that are merged afterwards.

    `folder` holds checkpoints: an interrupted recovery goes on where it stopped. Raises `IdentityError` when a zero of
    a sparse model was filled by a method that keeps them, and `SettingsError` when there is none for `ast` to move.
    """
    model: Any = subject.model
    device, dtype = model.device, model.dtype
    goal: Loss | Objective = next_token
    if teacher is not None:
        check_teacher(model.config, teacher.model.config, subject.tokenizer, teacher.tokenizer)
        checked_head(model, "student")
        goal = learning_from(teacher.model, model, settings)
    empty, numbers = masks.masks_of(model, subject.anatomy), as_train(settings, seed)
    text = as_packed(blocks)
    zeros = _while_training(model, empty, settings.method, numbers.steps(text.ids.shape[1]))
    adapted = settings.method not in WHOLE
    if adapted:
        kind, alpha = settings.method.removesuffix("-masked"), settings.alpha
        assert alpha is not None  # twice the rank where none was named
        model = add_adapters(model, kind, rank=settings.rank, alpha=alpha, dropout=settings.dropout or 0.0, seed=seed)
    chosen = cut_and_norms(model, _before(subject, teacher)) if settings.method == "cut" else None
    with zeros, only(model, chosen):
        result = train(
            model, text, numbers, folder=folder, loss=goal, heldout=heldout, resume=settings.resume, progress=progress
        )
    stopped = (f"recovery: {result.stopped}",) if result.stopped else ()
    notes = _little(moved(model, subject.store), subject) if adapted else ()
    subject.model = merge(model) if adapted else model.eval()
    if empty is not None:
        _settle(subject.model, empty, settings.method)
    checkpoint.round_to(subject.model, subject.store)
    subject.model.to(device=device, dtype=dtype)  # the trainer moves models, and adapters are merged in fp32
    if settings.method == "ast" and empty is not None:
        notes = _elsewhere(subject.model, empty)
    return Recovered(result, (*stopped, *notes))


def _before(subject: Subject, teacher: Teacher | Subject | None) -> Shapes:
    """Shapes of the model before it was cut: its teacher's, or what the run began with."""
    if teacher is not None:
        return {name: tuple(weight.shape) for name, weight in teacher.model.named_parameters()}
    return {tensor.name: tensor.shape for tensor in subject.anatomy.tensors}


def learning_from(teacher: Any, student: Any, settings: Recover) -> Objective:
    """What a student lowers: a divergence from the teacher, the text beside it, likeness of states."""
    asked, matcher = settings.distil, None
    if asked.states:
        match = Match(LIKENESSES.get(asked.likeness), asked.states, asked.weight, asked.likeness_options)
        matcher = Matcher(match, student, teacher)
    loss = DIVERGENCES.get(settings.loss)
    return FromTeacher(teacher, loss, asked.options, text=asked.text, matcher=matcher).objective


def _while_training(model: Any, empty: masks.Masks | None, method: str, steps: int) -> AbstractContextManager[None]:
    """What becomes of the zeros meanwhile. Adapters leave the weights alone until they are merged."""
    if method == "ast":
        return moving_masks.moving(model, moving_masks.needed(empty), steps)
    return masks.held(model, empty if method in WHOLE else None)


def _settle(model: Any, empty: masks.Masks, method: str) -> None:
    """Prove of the zeros what the method promises. Raises `IdentityError`."""
    if method == "ast":
        moving_masks.check_counts(model, empty)
    elif method != "lora":
        if method != "lora-masked":
            masks.check_kept(model, empty)
        masks.put_back(model, empty)


def _elsewhere(model: Any, empty: masks.Masks) -> tuple[str, ...]:
    """A note on how many zeros have moved."""
    gone, zeros = sum(masks.lost(model, empty).values()), sum(int(mask.sum()) for mask in empty.values())
    return (f"{100 * gone / zeros:.1f} % of the zeros lie elsewhere now",)


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
        floor=settings.floor,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        autocast=settings.autocast,
        patience=settings.patience,
        report_to=settings.report_to,
        mixture=mixture_of(settings),
        evaluate_every=max(1, (settings.evaluate_every or settings.tokens // 20) // (settings.batch * settings.block)),
        save_every=max(25, settings.tokens // (settings.batch * settings.block) // 10),
    )


def mixture_of(settings: Recover) -> Mixture | None:
    """Of several sources, or of one that is to be balanced, which is refused. Raises `SettingsError`."""
    dynamic = settings.balance == "dynamic"
    if not settings.mixture and not dynamic:
        return None
    names, told = settings.sources, settings.references
    if told and set(told) != set(names):
        raise SettingsError(
            f"references for {', '.join(sorted(told))}",
            f"one loss for each source of the mixture: {', '.join(names)}",
            "name each of them, or none and have them measured",
        )
    step = settings.batch * settings.block
    return Mixture(
        names=names,
        weights=tuple(settings.mixture.get(name, 1.0) for name in names),
        every=max(1, round((settings.balance_every or OFTEN * step) / step)) if dynamic else 0,
        references=tuple(told[name] for name in names) if told and dynamic else (),
        signed=settings.excess == "signed",
    )
