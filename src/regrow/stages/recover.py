"""Stage recover: a short training puts back some of what the cut took; weights end rounded to the storage type.

The goal is the text's next token, or a teacher's predictions, of the text or of what the student writes. Of a sparse
model every zero stays, except under plain LoRA, which says so, and AST, which moves them and says how many. What this
gives up: more than one teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow import cache
from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines import checkpoint, masks, moving_masks
from regrow.engines.adapters import add_adapters, merge, moved
from regrow.engines.asked import as_train
from regrow.engines.bind import Subject
from regrow.engines.correction import correct
from regrow.engines.distil import FromTeacher, Teacher, check_teacher, checked_head
from regrow.engines.kept_teacher import FromKept, Kept, keep
from regrow.engines.match import Match, Matcher
from regrow.engines.objective import Loss, Objective
from regrow.engines.on_policy import OnPolicy, Policy
from regrow.engines.online_teacher import FromOnlineTeacher, Online
from regrow.engines.packed import Packed, as_packed
from regrow.engines.pairs import Draw, Preferred, written
from regrow.engines.resume import fingerprint, weights_fingerprint
from regrow.engines.room import give_back
from regrow.engines.sampling import prompt_of
from regrow.engines.text_loss import text_loss
from regrow.engines.tokens import separator
from regrow.engines.train import TrainResult, train
from regrow.engines.train_settings import TrainSettings
from regrow.engines.trained import Shapes, cut_and_norms, only
from regrow.errors import SettingsError
from regrow.recovery import RATES, WHOLE, Recover

Progress = Callable[[int, int, str], None]

FILLS = "zeros are filled by plain LoRA; spp, hira, ia3, full and lora-masked keep them, ast moves them"
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

    `folder` holds checkpoints: an interrupted recovery goes on where it stopped. A teacher is corrected in place, and
    emptied (its weights become "meta") where what it said is kept. Raises `IdentityError` when a zero of
    a sparse model was filled by a method that keeps them, and `SettingsError` when there is none for `ast` to move.
    """
    model: Any = subject.model
    device, dtype = model.device, model.dtype
    before = _before(subject, teacher)  # a teacher that learns too is given adapters
    held = None if heldout is None else as_packed(heldout, "held-out text")
    lesson = _Lesson(text_loss(model), as_packed(blocks), held, as_train(settings, seed))
    chosen = cut_and_norms(model, before) if settings.method == "cut" else None
    if teacher is not None:
        lesson = _taught(subject, teacher, lesson, settings, folder, progress)
    empty = masks.masks_of(model, subject.anatomy)
    zeros = _while_training(model, empty, settings.method, lesson.numbers.steps(lesson.text.ids.shape[1]))
    adapted = settings.method not in WHOLE
    if adapted:
        kind, alpha = settings.method.removesuffix("-masked"), settings.alpha
        assert alpha is not None  # twice the rank where none was named
        model = add_adapters(model, kind, rank=settings.rank, alpha=alpha, dropout=settings.dropout or 0.0, seed=seed)
    with zeros, only(model, chosen):
        result = train(
            model,
            lesson.text,
            lesson.numbers,
            folder=folder,
            loss=lesson.goal,
            heldout=lesson.heldout,
            resume=settings.resume,
            progress=progress,
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
    return Recovered(result, (*lesson.notes, *stopped, *notes))


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What is lowered on which blocks, by which numbers; what a reader must know of it."""

    goal: Loss | Objective
    text: Packed
    heldout: Packed | None
    numbers: TrainSettings
    notes: tuple[str, ...] = ()


def _taught(
    subject: Subject,
    teacher: Teacher | Subject,
    lesson: _Lesson,
    settings: Recover,
    folder: Path,
    progress: Progress | None,
) -> _Lesson:
    """The lesson that a teacher gives, who is corrected first where that is asked, and emptied once he has said all."""
    student, asked = subject.model, settings.distil
    check_teacher(student.config, teacher.model.config, subject.tokenizer, teacher.tokenizer)
    checked_head(student, "student")
    check_lesson(settings)
    teacher.model.eval().requires_grad_(False)
    if asked.teacher_tokens:
        lesson = _corrected(teacher.model, lesson, settings, folder / "teacher", progress)
    if asked.preferences is not None:
        lesson = _by_pairs(subject, teacher.model, lesson, settings, progress)
    elif asked.cache is not None:
        lesson = _by_kept(student, teacher.model, lesson, settings, progress)
    else:
        return replace(lesson, goal=learning_from(teacher.model, student, settings, lesson.numbers.seed))
    teacher.model.to("meta")
    give_back()
    return lesson


def _corrected(teacher: Any, lesson: _Lesson, settings: Recover, folder: Path, progress: Progress | None) -> _Lesson:
    """The teacher is trained on the lesson's text, or was before."""
    asked = settings.distil
    peak = (settings.learning_rate if settings.method in WHOLE else None) or RATES["full"]
    whole = dict.fromkeys(("patience", "until"))  # it learns all of it
    own = {"tokens": asked.teacher_tokens, "learning_rate": asked.teacher_share * peak, **whole}
    numbers = as_train(settings.model_copy(update={**own, "report_to": ()}), lesson.numbers.seed)
    made_by = {"teacher": weights_fingerprint(teacher), "texts": _texts_of(lesson), "numbers": numbers.decisive()}
    found = correct(
        teacher,
        lesson.text,
        numbers,
        folder=folder,
        kept=cache.cache_dir("teachers") / f"{_key(made_by)}.safetensors",
        heldout=lesson.heldout,
        resume=settings.resume,
        progress=_saying("correcting the teacher", progress),
    )
    fell = "" if found.before is None else f": its held-out loss went from {found.before:.3f} to {found.after:.3f} nats"
    note = f"the teacher was trained on {asked.teacher_tokens:,} tokens of the recovery text{fell}"
    return replace(lesson, notes=(*lesson.notes, note))


def _by_kept(student: Any, teacher: Any, lesson: _Lesson, settings: Recover, progress: Progress | None) -> _Lesson:
    """What the teacher predicts for all blocks is on disk."""
    asked, rows = settings.distil, _shared(student, teacher)
    assert asked.cache is not None
    kept = Kept(asked.cache, rows, weights_fingerprint(teacher))
    for text in (lesson.text, lesson.heldout):
        if text is not None:
            made_by = {"teacher": kept.teacher, "blocks": fingerprint(text.ids), "k": kept.k, "rows": rows}
            say = _counting("asking the teacher", text, progress)
            keep(teacher, text.ids, kept, _folder("predictions", made_by), batch=settings.micro_batch, say=say)
    goal = FromKept(kept, DIVERGENCES.get(settings.loss), asked.options, text=asked.text)
    return replace(lesson, goal=goal)


def _by_pairs(subject: Subject, teacher: Any, lesson: _Lesson, settings: Recover, progress: Progress | None) -> _Lesson:
    """Both have gone on from as many blocks as the training sees; its rows are pairs, of two blocks each."""
    student, asked, block = subject.model, settings.distil, lesson.text.ids.shape[1]
    assert asked.preferences is not None
    prompt, rows = prompt_of(asked.prompt, block), _shared(student, teacher)
    draw = Draw(prompt, asked.sampling, lesson.numbers.seed, rows)

    def pairs(text: Packed) -> Packed:
        made_by = {
            "teacher": weights_fingerprint(teacher),
            "student": weights_fingerprint(student),
            "blocks": fingerprint(text.ids),
            "draw": asdict(draw),
        }
        say = _counting("writing pairs", text, progress)
        where = _folder("pairs", made_by)
        return Packed(written(teacher, student, text.ids, draw, where, batch=settings.micro_batch, say=say))

    goal = Preferred(asked.preferences, prompt, separator(subject.tokenizer), by_length=asked.by_length)
    seen = lesson.numbers.steps(2 * block) * lesson.numbers.batch
    heldout = None if lesson.heldout is None else pairs(lesson.heldout)
    numbers = replace(lesson.numbers, divergence=math.inf)  # nats of whole continuations rise and fall by dozens
    return replace(lesson, goal=goal, text=pairs(Packed(lesson.text.ids[:seen])), heldout=heldout, numbers=numbers)


def check_lesson(settings: Recover) -> None:
    """Raise `SettingsError` for ways to learn from a teacher that do not go together."""
    asked = settings.distil
    pairs, kept = asked.preferences is not None, asked.cache is not None
    why = None
    if kept and asked.options.get("temperature", 1) != 1:
        why = "recover.distil.cache at another temperature", "temperature 1: tokens kept as one cannot be tempered"
    elif (kept or pairs) and asked.states:
        what = "preferences" if pairs else "cache"
        why = (
            f"recover.distil.{what} and states",
            "one of them: states need the teacher itself while the student learns",
        )
    elif pairs and (settings.mixture or settings.balance == "dynamic"):
        what = "recover.mixture" if settings.mixture else "balance: dynamic"
        why = f"recover.distil.preferences and {what}", "one text, whose blocks models go on from"
    elif asked.on_policy and settings.learn != "all":
        why = "recover.distil.on_policy and learn: answers", "learn: all; what the student writes is learnt whole"
    elif pairs and kept:
        why = "recover.distil.preferences and cache", "one of them: preferences need no predictions"
    elif pairs and (asked.text or settings.learn != "all"):
        what = "recover.distil.text" if asked.text else "learn: answers"
        why = f"recover.distil.preferences and {what}", "preferences alone: what is learnt is what models wrote"
    elif (pairs or kept) and (asked.on_policy or asked.online_rate is not None):
        what, other = "preferences" if pairs else "cache", "on_policy" if asked.on_policy else "online_rate"
        why = f"recover.distil.{what} and {other}", "one of them: the other asks the teacher while the student learns"
    elif asked.teacher_tokens and asked.teacher_dtype in ("bf16", "fp16"):
        why = f"a teacher in {asked.teacher_dtype} that is to be trained", "fp32, where small updates are not rounded"
    elif asked.online_rate is not None and asked.teacher_dtype == "fp16":
        why = "recover.distil.online_rate of a teacher in fp16, whose gradients vanish", "fp32, or bf16"
    if why is not None:
        raise SettingsError(*why, "leave one of the two out")


def stage_of(said: str) -> str:
    """What a step of the progress is of: a training says its loss, what comes before it what it is."""
    return "recovery" if said.startswith("loss ") else said


def _saying(what: str, progress: Progress | None) -> Progress | None:
    return None if progress is None else lambda done, total, _: progress(done, total, what)


def _counting(what: str, text: Packed, progress: Progress | None) -> Callable[[int], None]:
    """Tells blocks as tokens."""
    count, block = text.ids.shape
    return lambda done: None if progress is None else progress(done * block, count * block, what)


def _key(made_by: Mapping[str, Any]) -> str:
    return cache.key({**made_by, "code": cache.code()})


def _folder(kind: str, made_by: Mapping[str, Any]) -> Path:
    return cache.cache_dir(kind, _key(made_by))


def _texts_of(lesson: _Lesson) -> list[str | None]:
    """Fingerprints of what is read, of what of it is learnt, and of where it comes from; trained on, then held out."""
    packed = [text for text in (lesson.text, lesson.heldout) if text is not None]
    return [x if x is None else fingerprint(x) for text in packed for x in (text.ids, text.learn, text.domain)]


def _shared(student: Any, teacher: Any) -> int:
    """Tokens of the vocabulary that both know; what lies behind them pads it."""
    return min(len(model.get_output_embeddings().weight) for model in (student, teacher))


def _before(subject: Subject, teacher: Teacher | Subject | None) -> Shapes:
    """Shapes of the model before it was cut: its teacher's, or what the run began with."""
    if teacher is not None:
        return {name: tuple(weight.shape) for name, weight in teacher.model.named_parameters()}
    return {tensor.name: tensor.shape for tensor in subject.anatomy.tensors}


def learning_from(teacher: Any, student: Any, settings: Recover, seed: int) -> Objective:
    """What a student lowers: a divergence from the teacher, the text beside it, likeness of states; of the text, or of
    what it writes itself."""
    asked, matcher = settings.distil, None
    if asked.states:
        match = Match(LIKENESSES.get(asked.likeness), asked.states, asked.weight, asked.likeness_options)
        matcher = Matcher(match, student, teacher)
    loss = DIVERGENCES.get(settings.loss)
    also: dict[str, Any] = {"text": asked.text, "matcher": matcher}
    if asked.online_rate is None:
        goal = FromTeacher(teacher, loss, asked.options, **also).objective
    else:
        online = Online(asked.online_rate, asked.online_rank, seed, asked.online_pull)
        goal = FromOnlineTeacher(teacher, loss, asked.options, online=online, **also).objective
    if not asked.on_policy:
        return goal
    tokens = min(len(model.get_input_embeddings().weight) for model in (teacher, student))
    return OnPolicy(goal, Policy(asked.on_policy, asked.prompt, asked.sampling, tokens), seed).objective


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
