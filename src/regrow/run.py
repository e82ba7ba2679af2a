"""The stages in order: load, score, plan, apply, recover, evaluate, export; each kept under a key of its inputs.

Another ratio on the same scores costs no second calibration; an interrupted recovery goes on where it stopped; the
dense model is measured once. What this gives up: distributed runs of the whole road (the recovery alone can be).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.artifacts.ask import SPREADS
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Measure, Report
from regrow.artifacts.scores import Scores
from regrow.cache import cache_dir, key
from regrow.engines import checkpoint, tokens
from regrow.engines.bind import Subject
from regrow.engines.clock import machine
from regrow.engines.texts import Part, documents, fingerprint
from regrow.errors import SettingsError
from regrow.settings import Recipe, dump
from regrow.stages.apply import apply
from regrow.stages.evaluate import check_asked, check_length, evaluate, sizes, write_samples
from regrow.stages.export import export
from regrow.stages.load import load
from regrow.stages.plan import Wish, check_wish, loss_by_axis, make_plan, meet
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
        notes=_notes(subject, cut.holder.note, cut.difference),
        stages=clock.stages,
        training=training,
    )
    files = {"recipe.yaml": dump(recipe), "report.json": json.dumps(report.to_json(), indent=1)}
    base = {**subject.source, "id": out.name, "base_model": subject.source.get("asked", subject.source["id"])}
    base["note"] = subject.source["note"]
    export(subject, cut.holder, plan, out, {**files, **page(report, plan, scores, files["recipe.yaml"])}, base)
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
    path = cache_dir("scores") / f"{key(made_by)}.safetensors"
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
    partial = path.with_suffix(".partial")
    found.save(partial)
    partial.replace(path)
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
        "text": None if asked.text is None else fingerprint(asked.text),
        "versions": machine()["versions"],
    }
    path = cache_dir("measures") / f"{key(inputs)}.json"
    record["cached"] = path.exists()
    if path.exists():
        data = json.loads(path.read_text())
        found, said = {k: Measure.from_json(v) for k, v in data["measures"].items()}, data["samples"]
    else:
        found = evaluate(
            subject.model,
            subject.tokenizer,
            asked.model_copy(update={"speed": False}),
            progress=progress,
        )
        said = write_samples(subject.model, subject.tokenizer, asked.samples)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"measures": {k: v.to_json() for k, v in found.items()}, "samples": said}))
        partial.replace(path)
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
        "recover": asked.model_dump(),
        "seed": recipe.seed,
    }
    work = cache_dir("recover", key({**inputs, "text": fingerprint(asked.text)}))
    blocks = tokens.blocks(
        documents(asked.text, "recovery"), subject.tokenizer, block=asked.block, tokens=asked.tokens, seed=recipe.seed
    )
    heldout = tokens.blocks(
        documents(asked.text, "heldout"), subject.tokenizer, block=asked.block, tokens=HELDOUT_TOKENS, seed=0
    )
    say = None if progress is None else lambda done, total, _note: progress("recovery", done, total)
    result = recover(subject, blocks, asked, folder=work, seed=recipe.seed, heldout=heldout, progress=say)
    return result.losses, work


def _notes(subject: Subject, holder: str, difference: float) -> tuple[str, ...]:
    first = [f"dense: {subject.source['note']}"] if subject.source.get("note") else []
    return (*first, holder, f"masked and sliced logits differ by {difference:.0e} of their scale")
