"""What a run reads and keeps for the next one: calibration blocks, scores, readings of dense inputs.

The dense model's measures too.
Each is kept under a key of everything that it hangs on. What this gives up: eviction; the cache can be deleted at any
time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from regrow import cache
from regrow.artifacts.report import Measure
from regrow.artifacts.scores import Scores
from regrow.cut_checks import chosen_criteria
from regrow.engines import products, tokens
from regrow.engines.bind import Subject
from regrow.engines.clock import machine
from regrow.engines.readings import Readings
from regrow.engines.texts import documents, fingerprint
from regrow.settings import Recipe
from regrow.stages.evaluate import evaluate, read_text, write_samples
from regrow.stages.score import reads_text, score

Progress = Callable[[str, int, int], None]  # (what, done, total)


def calibration(subject: Subject, recipe: Recipe, count: int | None = None) -> Tensor:  # (n, T) int64
    """The calibration blocks of a recipe: seeded, from the calibration part of its text only; of `count` tokens."""
    asked = recipe.calibration
    return tokens.blocks(
        documents(asked.text, "calibration"),
        subject.tokenizer,
        block=asked.block,
        tokens=asked.tokens if count is None else count,
        seed=recipe.seed,
    )


def read_by(recipe: Recipe) -> dict[str, Any]:
    """What decides the calibration blocks of a model: the text by its content, wherever it lies."""
    asked = recipe.calibration
    return {"calibration": asked.model_dump(exclude={"text"}), "text": fingerprint(asked.text)}


def statistics(subject: Subject, recipe: Recipe) -> Readings:
    """Where readings of this model's dense inputs on this calibration text are kept."""
    made_by = {
        "model": subject.source["fingerprint"],
        "seed": recipe.seed,
        "dtype": recipe.dtype,
        "code": cache.code(),
        **read_by(recipe),
    }
    return Readings(cache.cache_dir("statistics", cache.key(made_by)), subject.anatomy.sizes["L"])


def scored(
    subject: Subject, recipe: Recipe, record: dict[str, Any], progress: Progress | None, depths: Sequence[int] = ()
) -> Scores:
    """Scores of every axis of the recipe, from the cache when the same were measured before.

    `depths`: how many layers may go, where a task decides which.
    """
    chosen = chosen_criteria(recipe)
    made_by: dict[str, Any] = {
        "model": subject.source["fingerprint"],
        "seed": recipe.seed,
        "reduce": recipe.reduce,
        "dtype": recipe.dtype,
        "criteria": {u: [c.criterion.name, dict(c.criterion.options) | dict(c.options)] for u, c in chosen.items()},
    }
    reads = reads_text(chosen)
    if reads:
        made_by |= read_by(recipe)
    if any(c.criterion.sees == "task" for c in chosen.values()):
        made_by |= {"depths": list(depths), "versions": machine()["versions"]}
    code = {"code": cache.code(), "criteria_code": {u: c.criterion.code for u, c in chosen.items()}}
    path = cache.cache_dir("scores") / f"{cache.key({**made_by, **code})}.safetensors"
    record["cached"] = path.exists()
    if path.exists():
        return Scores.load(path)
    blocks = calibration(subject, recipe) if reads else None
    record["tokens"] = 0 if blocks is None else blocks.numel()
    found = score(
        subject,
        chosen,
        blocks,
        seed=recipe.seed,
        reduce=recipe.reduce,
        depths=depths,
        progress=progress,
        made_by={k: v for k, v in made_by.items() if k != "criteria"},
    )
    with cache.replacing(path) as partial:
        found.save(partial)
    return found


def measured(
    subject: Subject, recipe: Recipe, record: dict[str, Any], progress: Progress | None
) -> tuple[dict[str, Measure], list[str]]:
    """The dense model's measures and samples; kept, except for speed, which belongs to this run alone."""
    asked = recipe.evaluate
    inputs = {
        "model": subject.source["fingerprint"],
        "evaluate": asked.model_dump(mode="json", exclude={"speed", "repeats"}),
        "dtype": recipe.dtype,
        "text": None if asked.text is None else read_text(asked.text)[1],
        "versions": machine()["versions"],
        "fp32_products": products.library(),
        "code": cache.code(),
    }
    path = cache.cache_dir("measures") / f"{cache.key(inputs)}.json"
    record["cached"] = path.exists()
    if path.exists():
        data = json.loads(path.read_text(encoding="utf-8"))
        found, said = {k: Measure.from_json(v) for k, v in data["measures"].items()}, data["samples"]
    else:
        found = evaluate(
            subject.model,
            subject.tokenizer,
            asked.model_copy(update={"speed": False}),
            progress=progress,
        )
        said = write_samples(subject.model, subject.tokenizer, asked.samples)
        with cache.replacing(path) as partial:
            partial.write_text(
                json.dumps({"measures": {k: v.to_json() for k, v in found.items()}, "samples": said}), encoding="utf-8"
            )
    if asked.speed:
        quick = asked.model_copy(update={"text": None, "tasks": ()})
        found |= evaluate(subject.model, subject.tokenizer, quick, progress=progress)
    return found, said
