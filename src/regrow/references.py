"""What a recovery from several sources compares its losses with, and what a reader must know of the text it read.

The references are the held-out losses of the teacher, or of the model that the run begins with, before anything is
taken from it. What this gives up: losses foretold for a size by a scaling law; those can be given as numbers.
"""

from __future__ import annotations

import json

from regrow import cache
from regrow.engines.bind import Subject
from regrow.engines.distil import Teacher
from regrow.engines.domains import by_domain
from regrow.engines.packed import Packed
from regrow.engines.text_loss import text_loss
from regrow.engines.texts import fingerprint
from regrow.prepare import recovery_text, training_parts, trainings
from regrow.recovery import Recover
from regrow.settings import Recipe
from regrow.stages.recover import Recovered


def with_references(recipe: Recipe, subject: Subject, teacher: Teacher | None = None) -> Recipe:
    """With the references in it that weights of its trainings are balanced by: the losses of `teacher`, else of
    `subject`, as it was read.

    As it is when there is nothing to measure, or when its teacher's are wanted and it is not here. Measured once for a
    model and a text, and kept.
    """
    found = {name: _measured(asked, recipe.seed, subject, teacher) for name, asked in trainings(recipe).items()}
    update = {
        name: asked.model_copy(update={"references": losses})
        for name, asked in trainings(recipe).items()
        if (losses := found[name])
    }
    return recipe.model_copy(update=update) if update else recipe


def _measured(asked: Recover, seed: int, subject: Subject, teacher: Teacher | None) -> dict[str, float] | None:
    if asked.balance == "fixed" or asked.references or (asked.teacher is not None and teacher is None):
        return None
    who = subject if teacher is None else teacher
    inputs = {
        "model": who.source["fingerprint"],
        "read by": subject.source["fingerprint"],
        "text": {source: fingerprint(source) for source in asked.sources},
        "how": asked.model_dump(include={"block", "template", "learn"}),
        "dtype": str(who.model.dtype),
        "code": cache.code(),
    }
    path = cache.cache_dir("references") / f"{cache.key(inputs)}.json"
    if path.exists():
        losses = json.loads(path.read_text(encoding="utf-8"))
    else:
        part, count, drawn = training_parts(asked, seed)[1]
        heldout = recovery_text(subject, asked, part, count=count, seed=drawn)
        losses = by_domain(who.model, text_loss(who.model), heldout, asked.micro_batch, who.model.device)
        with cache.replacing(path) as partial:
            partial.write_text(json.dumps(losses), encoding="utf-8")
    return dict(zip(asked.sources, losses, strict=True))


def notes_of_text(asked: Recover, blocks: Packed, empty: int, found: Recovered) -> tuple[str, ...]:
    """What was read more than once, what each source was compared with, and how many answers are missing."""
    notes = []
    for number, source in enumerate(asked.sources):
        own = blocks if blocks.domain is None else blocks[blocks.domain == number]
        text, read = own.ids.numel(), found.training.tokens * (_share(asked, source, found) if asked.mixture else 1.0)
        if text <= read - asked.block:
            of = f" of {source}" if asked.mixture else ""
            notes.append(f"trained {read / text:.1f} times over a recovery text{of} of {text:,} tokens")
    if asked.references and asked.balance == "dynamic":
        said = ", ".join(f"{source} {asked.references[source]:.3f}" for source in asked.sources)
        notes.append(f"sources were weighed by how far their held-out losses are above: {said}")
    if empty:
        notes.append(f"{empty:,} rows of the recovery text have no answer: left out")
    return tuple(notes)


def _share(asked: Recover, source: str, found: Recovered) -> float:
    """Which share of what was read is of one source, by the weights on record."""
    known = [row[f"weight {source}"] for row in found.training.losses if f"weight {source}" in row]
    return sum(known) / len(known) if known else asked.mixture[source] / sum(asked.mixture.values())
