"""Zeros in what stays: at once, or in levels with a share of the recovery after each, taught by what the model was.

A model that grows sparse in levels is, some levels back, a teacher that its student can still follow, as NutePrune's
are to gates that learn (arXiv:2402.09773, 3.2). Levels nest: what was zero stays zero.
What this gives up: teachers within a level; each is a file, and one model in memory speaks for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow import cache
from regrow.artifacts.plan import Plan
from regrow.engines import processes
from regrow.engines.bind import Subject
from regrow.engines.distil import Teacher
from regrow.engines.resume import weights_fingerprint
from regrow.errors import OutputError
from regrow.kept import Progress, calibration, statistics
from regrow.prepare import calibrates
from regrow.settings import Calibration, Recipe
from regrow.stages import sparsify
from regrow.stages.load import read_teacher
from regrow.trained import ALL, Trained, Turn, recovered

Say = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Levels:
    """What the last pruning did, the trainings before it, and who teaches the one after it."""

    last: sparsify.Sparsified
    notes: tuple[str, ...]
    trained: tuple[Trained, ...] = ()
    teacher: Teacher | None = None
    turn: Turn = ALL


def sparse(subject: Subject, recipe: Recipe, record: dict[str, Any], progress: Progress | None) -> Levels:
    """Zeros at once, in place."""
    asked = recipe.sparsify
    assert asked is not None
    blocks = calibration(subject, recipe) if calibrates(recipe) else None
    kept = statistics(subject, recipe) if calibrates(recipe) and asked.keep_statistics else None
    record["cached"] = kept is not None and sparsify.reads_kept(asked, kept)
    record["tokens"] = record.get("tokens", 0) + (0 if blocks is None else blocks.numel())
    found = sparsify.apply(subject, asked, blocks, seed=recipe.seed, kept=kept, progress=progress)
    spread = " on average over the layers" if len(set(found.patterns)) > 1 else ""
    notes = (
        f"{found.asked}{spread}; {100 * found.sparsity.share:.2f} % of the weights inside decoder layers are zero",
        "zeros are stored as zeros: dense kernels gain nothing by them, and neither does the file",
        *found.notes,
        *_short(recipe.calibration, blocks),
    )
    return Levels(found, notes)


def in_levels(
    subject: Subject, recipe: Recipe, plan: Plan, record: dict[str, Any], progress: Progress | None
) -> Levels:
    """All levels but the training of the last, in place; one level where no more are asked for."""
    asked, training = recipe.sparsify, recipe.recover
    assert asked is not None
    if not asked.levels:
        return sparse(subject, recipe, record, progress)
    assert training is not None
    patterns, trained, teacher = (*asked.levels, asked.pattern), list[Trained](), None
    folder = cache.cache_dir("levels", f"{_key(subject, recipe)}-{processes.rank()}")
    with cache.held(folder, "these levels"):
        past = None if training.distil.lag is None else Past(recipe, training.distil.lag, folder)
        for turn, pattern in enumerate(patterns):
            own, say = at_level(recipe, turn), None if progress is None else saying(pattern, progress)
            found = sparse(subject, own, record, say)
            teacher = None if past is None else past.teacher()
            if turn < len(asked.levels):
                trained.append(recovered(subject, own, plan, say, teacher=teacher, turn=Turn(turn, len(patterns))))
                if past is not None:
                    past.remember(subject.model)
    cache.drop(folder)
    who = f", taught by what it was {past.lag} before" if past else ""
    said = f"zeros came in {len(patterns)} levels ({', '.join(patterns)}), each with as much of the recovery{who}"
    return replace(
        found,
        notes=(said, *found.notes),
        trained=tuple(trained),
        teacher=teacher,
        turn=Turn(len(patterns) - 1, len(patterns)),
    )


def _key(subject: Subject, recipe: Recipe) -> str:
    """Of a folder that what was interrupted leaves, and what goes on takes over."""
    return cache.key({"model": subject.source["fingerprint"], "recipe": recipe.model_dump(mode="json")})


def at_level(recipe: Recipe, turn: int) -> Recipe:
    """The recipe of one level; zeros of those before it stay."""
    asked = recipe.sparsify
    assert asked is not None
    pattern = (*asked.levels, asked.pattern)[turn]
    changes = {"pattern": pattern, "levels": (), "existing": "keep" if turn else asked.existing}
    return recipe.model_copy(update={"sparsify": asked.model_copy(update=changes)})


@dataclass(slots=True)
class Past:
    """What the model was at each level, on disk, and one teacher who is any of them; at first he is who he is."""

    recipe: Recipe
    lag: int
    folder: Path
    levels: int = 0
    known: Teacher | None = field(default=None)

    def teacher(self) -> Teacher | None:
        """As it was `lag` levels before the one that begins; the recipe's own as long as there is none."""
        self.known = self.known or read_teacher(self.recipe)
        if self.known is None or self.levels < self.lag:
            return self.known
        _put(self.known.model, load_file(self._file(self.levels - self.lag)))
        source = {**self.known.source, "fingerprint": weights_fingerprint(self.known.model)}
        self.known = Teacher(self.known.model, self.known.tokenizer, source)
        return self.known

    def remember(self, model: Any) -> None:
        """Raises `OutputError` when it cannot be written."""
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
        try:
            save_file(weights, self._file(self.levels))
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"what the model is after level {self.levels + 1} cannot be written to {self.folder}: {error}",
                f"room for {self.lag + 1} copies of its weights",
                "free some, and give the same command again; trainings that were whole are not done again",
            ) from error
        if self.levels >= self.lag:
            self._file(self.levels - self.lag).unlink()
        self.levels += 1

    def _file(self, level: int) -> Path:
        return self.folder / f"level-{level}.safetensors"


@torch.no_grad()
def _put(model: Any, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def one_track(trainings: Sequence[Trained]) -> tuple[dict[str, float], ...]:
    """The records of trainings one after the other, as of one."""
    rows, step, tokens = list[dict[str, float]](), 0.0, 0.0
    for training in trainings:
        result = training.found.training
        rows += [{**row, "step": row["step"] + step, "tokens": row["tokens"] + tokens} for row in result.losses]
        step, tokens = step + result.steps, tokens + result.tokens
    return tuple(rows)


def saying(pattern: str, progress: Progress) -> Say:
    """Tells of which level it is."""
    return lambda what, done, total: progress(f"{pattern}: {what}", done, total)


def _short(asked: Calibration, blocks: Tensor | None) -> tuple[str, ...]:
    """A note where the text had fewer blocks (n, T) than were asked for, or none were read."""
    if blocks is None:
        unread = asked.text != Calibration().text
        return ("the calibration text was not read: the method looks at weights alone",) if unread else ()
    if blocks.numel() > asked.tokens - asked.block:
        return ()
    return (f"the text's calibration part filled {blocks.numel():,} of the {asked.tokens:,} tokens asked for",)
