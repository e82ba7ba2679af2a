"""The training after a cut, with its texts, its teacher and the folder that it can go on from.

What this gives up: nothing but the folder's key says what a checkpoint is of; whatever moves the weights is in it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from regrow import cache
from regrow.artifacts.plan import Plan
from regrow.engines import processes
from regrow.engines.bind import Subject
from regrow.engines.distil import Teacher
from regrow.engines.packed import Packed
from regrow.engines.resume import weights_fingerprint
from regrow.engines.texts import fingerprint, unanswered
from regrow.engines.train_settings import FREE
from regrow.kept import Progress, read_by
from regrow.prepare import calibrates, recovery_text, training_parts
from regrow.recovery import Recover
from regrow.references import notes_of_text, with_references
from regrow.settings import Recipe
from regrow.stages.load import read_teacher
from regrow.stages.recover import Recovered, recover, stage_of


@dataclass(frozen=True, slots=True)
class Trained:
    """How a recovery went, and the folder of its checkpoints."""

    found: Recovered
    work: Path


@dataclass(frozen=True, slots=True)
class Turn:
    """Which of how many equal parts of a recovery's text is read."""

    index: int = 0
    of: int = 1


ALL = Turn()


def recovered(
    subject: Subject,
    recipe: Recipe,
    plan: Plan,
    progress: Progress | None,
    *,
    teacher: Teacher | None = None,
    turn: Turn = ALL,
) -> Trained:
    """Train the cut model, in a folder that nobody else trains in. `teacher`: in place of the recipe's."""
    asked = recipe.recover
    assert asked is not None
    teacher = teacher or read_teacher(recipe)
    inputs = {
        "model": subject.source["fingerprint"],
        "weights": weights_fingerprint(subject.model),
        "teacher": None if teacher is None else teacher.source["fingerprint"],
        "plan": plan.to_json(),
        "recover": asked.model_dump(exclude=set(FREE) - ({"evaluate_every"} if asked.patience else set())),
        "turn": [turn.index, turn.of],
        "sparsify": None if recipe.sparsify is None else recipe.sparsify.model_dump(mode="json"),
        "calibration": read_by(recipe) if recipe.sparsify and calibrates(recipe) else None,
        "code": cache.code(),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    work = cache.cache_dir("recover", cache.key({**inputs, "text": [*map(fingerprint, asked.sources)]}))
    blocks, heldout = (
        recovery_text(subject, asked, part, count=count, seed=seed)
        for part, count, seed in training_parts(asked, recipe.seed)
    )
    empty = sum(map(unanswered, asked.sources))  # now, while the text is surely there
    recipe = with_references(recipe, subject, teacher)
    asked, blocks = part_of(recipe.recover or asked, blocks, turn)
    say = None if progress is None else lambda done, total, what: progress(stage_of(what), done, total)
    with cache.held(work, "this recovery") if processes.first() else nullcontext():
        found = recover(
            subject, blocks, asked, folder=work, seed=recipe.seed, teacher=teacher, heldout=heldout, progress=say
        )
    if notes := notes_of_text(asked, blocks, empty, found):
        found = replace(found, notes=(*found.notes, *notes))
    return Trained(found, work)


def part_of(asked: Recover, text: Packed, turn: Turn) -> tuple[Recover, Packed]:
    """A turn's share of the tokens, and every so many of the blocks (n, T): all turns together read each once."""
    if turn.of == 1:
        return asked, text
    rows = torch.arange(turn.index, len(text.ids), turn.of)
    return asked.model_copy(update={"tokens": asked.tokens // turn.of}), text[rows]
