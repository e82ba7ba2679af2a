"""The stages in order: load, score, plan, apply, recover, evaluate, export; each kept under a key of its inputs.

Another ratio on the same scores costs no second calibration; an interrupted recovery goes on where it stopped; the
dense model is measured once. What this gives up: distributed runs of the whole road (the recovery alone can be).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow import cache
from regrow.artifacts.ask import SPREADS
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Measure, Report
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import loss_by_axis
from regrow.engines import checkpoint, tokens
from regrow.engines.bind import Subject
from regrow.engines.clock import machine
from regrow.engines.texts import Part, documents, fingerprint, shared
from regrow.engines.train_settings import FREE
from regrow.errors import SettingsError, TextError
from regrow.settings import Recipe, dump
from regrow.stages.apply import Cut, apply
from regrow.stages.evaluate import check_asked, check_length, evaluate, read_text, sizes, write_samples
from regrow.stages.export import export
from regrow.stages.load import load
from regrow.stages.plan import Wish, check_wish, make_plan, meet, unprotected
from regrow.stages.recover import as_train, recover
from regrow.stages.score import Choice, choose, reads_text, score

Progress = Callable[[str, int, int], None]  # (what, done, total)
Page = Callable[[Report, Plan, Scores, str], Mapping[str, str]]  # files to lie beside the model

HELDOUT_TOKENS = 4096  # for the loss shown while recovering
RECOVERY_PARTS: tuple[Part, ...] = ("recovery", "heldout")  # what it trains on, and what its curve is measured on


@dataclass(slots=True)
class _Clock:
    """Seconds and tokens of each stage, for the report."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
        began = time.perf_counter()
        record: dict[str, Any] = dict(facts)
        yield record
        self.stages[name] = {"seconds": round(time.perf_counter() - began, 2), **record}


def run(recipe: Recipe, out: Path, *, page: Page, progress: Progress | None = None) -> Report:
    """Walk the whole road and leave a finished folder at `out`. Raises errors of `errors.py`; leaves nothing then."""
    wish, clock = check(recipe), _Clock()
    checkpoint.check_out(out)
    with clock.stage("load"):
        subject = load(
            recipe.model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
        )
    check_wish(subject.anatomy, wish)
    meet(subject.anatomy, wish, wish.budget.target(subject.anatomy))
    check_texts(subject, recipe)
    with clock.stage("score") as record:
        scores = scored(subject, recipe, record, progress)
    with clock.stage("plan"):
        plan = make_plan(subject.anatomy, scores, wish)
    with clock.stage("evaluate before") as record:
        before, said = measured(subject, recipe, record, progress)
    with clock.stage("apply"):
        cut = apply(subject, plan)
    training: tuple[dict[str, float], ...] = ()
    if recipe.recover and recipe.recover.tokens:
        with clock.stage("recover", tokens=recipe.recover.tokens):
            training, work = _recovered(subject, recipe, plan, progress)
    with clock.stage("evaluate after"):
        after = {**sizes(subject.anatomy, plan.shape()), **_measure(subject, recipe, progress)}
        now = write_samples(subject.model, subject.tokenizer, recipe.evaluate.samples)
    report = Report(
        model={
            **{k: v for k, v in subject.source.items() if k != "path"},
            "holder": cut.holder.kind,
            "holder_note": cut.holder.note,
        },
        made_by={
            **recipe.model_dump(mode="json"),
            "recipe": recipe.name,
            "budget": recipe.keep,
            "split_realised": loss_by_axis(subject.anatomy, plan.shape()),
        },
        shape={"before": subject.anatomy.dense.to_json(), "after": plan.shape().to_json()},
        before={**sizes(subject.anatomy, subject.anatomy.dense), **before},
        after=after,
        samples=tuple(
            {"prompt": p, "before": b, "after": a} for p, b, a in zip(recipe.evaluate.samples, said, now, strict=True)
        ),
        machine=machine(),
        notes=_notes(subject, cut, unprotected(subject.anatomy, plan, wish)),
        stages=clock.stages,
        training=training,
    )
    files = {"recipe.yaml": dump(recipe), "report.json": json.dumps(report.to_json(), indent=1)}
    pages = page(report, plan, scores, files["recipe.yaml"])
    export(subject, cut.holder, plan, out, {**files, **pages}, _notes_of_folder(subject, out))
    if training:
        shutil.rmtree(work, ignore_errors=True)
    return report


def check(recipe: Recipe) -> Wish:
    """Refuse what can be refused before a model is read. Raises `InputError`; returns what is asked of the planner."""
    wish = as_wish(recipe)
    SPREADS.get(recipe.spread)
    if reads_text(chosen_criteria(recipe)):
        documents(recipe.calibration.text, "calibration")
    check_asked(recipe.evaluate)
    _check_apart(recipe)
    asked = recipe.recover
    if asked is not None and asked.tokens:
        as_train(asked, recipe.seed)
        documents(asked.text, "recovery")
        if asked.method == "full" and recipe.dtype != "fp32":
            raise SettingsError(
                f"recovery of all weights in {recipe.dtype}",
                "fp32, where small updates are not rounded away",
                "use --dtype fp32, or recover.method=lora",
            )
    return wish


def _check_apart(recipe: Recipe) -> None:
    """Raise `TextError` when the file to measure on holds documents that are calibrated or trained on."""
    file = recipe.evaluate.text
    if file is None or not Path(file).is_file():
        return  # other sources give their held-out part
    used: list[tuple[str, Part]] = []
    if reads_text(chosen_criteria(recipe)):
        used.append((recipe.calibration.text, "calibration"))
    if recipe.recover is not None and recipe.recover.tokens:
        used.append((recipe.recover.text, "recovery"))
    for source, part in used:
        common = shared(read_text(file)[1], documents(source, part))
        if common:
            raise TextError(
                f"{file} is to be measured on, and {common} of its paragraphs are {part} text from {source}",
                "a text that is neither calibrated nor trained on",
                "measure on another file, or on the held-out part of a source such as demo",
            )


def check_texts(subject: Subject, recipe: Recipe) -> None:
    """Refuse text that does not fill one block before anything long begins. Raises `TextError`."""
    check_length(subject.model, subject.tokenizer, recipe.evaluate)
    asked = recipe.recover
    if asked is not None and asked.tokens:
        for part in RECOVERY_PARTS:
            text = documents(asked.text, part)
            tokens.blocks(text, subject.tokenizer, block=asked.block, tokens=asked.block, seed=recipe.seed)


def as_wish(recipe: Recipe) -> Wish:
    """What a recipe asks of the planner."""
    return Wish(
        budget=Budget.parse(recipe.keep),
        axes=recipe.axes,
        split=recipe.split,
        spread=recipe.spread,
        uniform=recipe.uniform,
        divisors=recipe.divisors,
        rescale_norms=recipe.rescale_norms,
    )


def chosen_criteria(recipe: Recipe) -> dict[Unit, Choice]:
    return choose(recipe.criterion, recipe.axes, recipe.criteria, recipe.options)


def calibration(subject: Subject, recipe: Recipe) -> Tensor:  # (n, T) int64
    """The calibration blocks of a recipe: seeded, from the calibration part of its text only."""
    asked = recipe.calibration
    return tokens.blocks(
        documents(asked.text, "calibration"),
        subject.tokenizer,
        block=asked.block,
        tokens=asked.tokens,
        seed=recipe.seed,
    )


def scored(subject: Subject, recipe: Recipe, record: dict[str, Any], progress: Progress | None) -> Scores:
    """Scores of every axis of the recipe, from the cache when the same were measured before."""
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
        made_by |= {"calibration": recipe.calibration.model_dump(), "text": fingerprint(recipe.calibration.text)}
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


def _measure(subject: Subject, recipe: Recipe, progress: Progress | None) -> dict[str, Measure]:
    return evaluate(subject.model, subject.tokenizer, recipe.evaluate, progress=progress)


def _recovered(
    subject: Subject, recipe: Recipe, plan: Plan, progress: Progress | None
) -> tuple[tuple[dict[str, float], ...], Path]:
    """Train the cut model; returns the curve and the folder of its checkpoints."""
    asked = recipe.recover
    assert asked is not None
    inputs = {
        "model": subject.source["fingerprint"],
        "plan": plan.to_json(),
        "recover": asked.model_dump(exclude=set(FREE)),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    work = cache.cache_dir("recover", cache.key({**inputs, "text": fingerprint(asked.text)}))
    blocks = tokens.blocks(
        documents(asked.text, "recovery"), subject.tokenizer, block=asked.block, tokens=asked.tokens, seed=recipe.seed
    )
    heldout = tokens.blocks(
        documents(asked.text, "heldout"), subject.tokenizer, block=asked.block, tokens=HELDOUT_TOKENS, seed=0
    )
    say = None if progress is None else lambda done, total, _note: progress("recovery", done, total)
    result = recover(subject, blocks, asked, folder=work, seed=recipe.seed, heldout=heldout, progress=say)
    return result.losses, work


def _notes_of_folder(subject: Subject, out: Path) -> dict[str, Any]:
    """What later steps need of where a cut model is from: `base_model` loads the base, their default teacher."""
    source = subject.source
    return {
        "id": out.name,
        "licence": source["licence"],
        "note": source["note"],
        "base_model": source.get("asked", "demo"),
        "base": {k: v for k, v in source.items() if k not in ("path", "asked")},
    }


def _notes(subject: Subject, cut: Cut, unprotected: Sequence[Unit]) -> tuple[str, ...]:
    notes = [f"dense: {subject.source['note']}"] if subject.source.get("note") else []
    notes += [cut.holder.note, f"masked and sliced logits differ by {cut.difference:.0e} of their scale"]
    if unprotected:
        lost = " and ".join(f"{unit}s" for unit in unprotected)
        notes.append(f"the budget is too small to leave the end layers whole: they lost {lost} too")
    return tuple(notes)
