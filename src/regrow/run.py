"""The stages in order: load, score, plan, apply, recover, evaluate, export; each kept under a key of its inputs.

Another ratio on the same scores costs no second calibration; an interrupted recovery goes on where it stopped; the
dense model is measured once. What this gives up: distributed runs of the whole road (the recovery alone can be).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow import cache
from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Measure, Report
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.sparsity import Sparsity
from regrow.engines import checkpoint, processes, products
from regrow.engines.bind import Subject
from regrow.engines.clock import machine
from regrow.engines.hetero import Holder, holder
from regrow.engines.refit import refit, said
from regrow.engines.resume import weights_fingerprint
from regrow.engines.texts import fingerprint, unanswered
from regrow.engines.trackers import keep_runs
from regrow.engines.train_settings import FREE
from regrow.engines.watch import TRACK, line
from regrow.errors import RegrowWarning, SettingsError
from regrow.kept import Progress, calibration, read_by, scored, statistics
from regrow.plan_checks import check_planned
from regrow.prepare import (
    as_wish,
    calibrates,
    check,
    check_subject,
    fitted,
    recovery_parts,
    recovery_text,
    settled,
    with_method,
)
from regrow.recipe_files import dump
from regrow.record import by_layer, made_by, notes_of_folder, origin_of, sparse_sizes, uneven, zeros_of
from regrow.recovery import Recover
from regrow.references import notes_of_text, with_references
from regrow.search import Chosen, check_search, depths, search
from regrow.settings import Calibration, Recipe
from regrow.staged import left_by, staged
from regrow.stages import sparsify
from regrow.stages.apply import apply
from regrow.stages.evaluate import evaluate, read_text, sizes, write_samples
from regrow.stages.export import export
from regrow.stages.load import load, read_teacher
from regrow.stages.plan import Wish, unprotected
from regrow.stages.recover import Recovered, recover, stage_of, warning

Page = Callable[[Report, Plan | None, Scores | None, str], Mapping[str, str]]  # files to lie beside the model


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


@products.faster()
def run(recipe: Recipe, out: Path, *, page: Page, progress: Progress | None = None) -> Report:
    """Walk the whole road and leave a finished folder at `out`. Raises errors of `errors.py`; leaves nothing then.

    Of several processes all train, and the first does the rest.
    """
    recipe, clock = settled(recipe), _Clock()
    check(recipe)
    if processes.first():
        checkpoint.check_out(out)
    subject, recipe, wish, zeros = _ready(recipe, clock)
    plan, scores, chosen = _planned(subject, recipe, wish, clock, progress)
    with clock.stage("evaluate before") as record:
        before, said = measured(subject, recipe, record, progress) if processes.first() else ({}, [])
    done, aimed = _Done(holder(subject.model.config, subject.anatomy, plan)), with_references(recipe, subject)
    if wish is not None:
        notes = _refitted(subject, recipe, plan, clock, progress)
        with clock.stage("apply"):
            done = _cut(subject, plan, wish, chosen, notes)
    if recipe.sparsify is not None:
        with clock.stage("sparsify") as record:
            done = _sparse(subject, recipe, done.holder, record, progress)
    training: tuple[dict[str, float], ...] = ()
    if recipe.recover and recipe.recover.tokens:
        done = _warned(subject, recipe, done)
        with clock.stage("recover") as record:
            recovered, work = _recovered(subject, aimed, plan, progress)
            record["tokens"] = recovered.training.tokens
        training, done = recovered.training.losses, replace(done, notes=(*done.notes, *recovered.notes))
    if not processes.first():
        return _by_the_first(out)
    with clock.stage("evaluate after"):
        after = _measure(subject, recipe, progress)
        now = write_samples(subject.model, subject.tokenizer, recipe.evaluate.samples)
    kept = None if zeros is None else zeros_of(subject, recipe, always=True)
    before = sizes(subject.anatomy, subject.anatomy.dense) | sparse_sizes(subject, zeros) | before
    after = sizes(subject.anatomy, plan.shape()) | sparse_sizes(subject, kept) | after
    report = Report(
        model=origin_of(subject, done.holder),
        made_by=made_by(recipe, subject, plan),
        shape={"before": subject.anatomy.dense.to_json(), "after": plan.shape().to_json()},
        before=before,
        after=after,
        samples=_side_by_side(recipe.evaluate.samples, said, now),
        machine=machine(),
        notes=(*_known(subject), *done.notes, *uneven(before, after)),
        stages=clock.stages,
        training=training,
        search=None if chosen is None else chosen.record,
        sparsity=by_layer(subject, kept, done.sparsified.errors if done.sparsified else {}),
    )
    files = {"recipe.yaml": dump(recipe), "report.json": json.dumps(report.to_json(), indent=1), **done.papers(kept)}
    if training:
        files[TRACK] = "".join(map(line, training))
    pages = page(report, plan if wish else None, scores, files["recipe.yaml"])
    export(subject, done.holder, out, {**files, **pages}, notes_of_folder(subject, out, recipe, kept))
    if training and not (recipe.recover and _left(recipe.recover, recovered)):
        keep_runs(work, out)
        cache.drop(work)
    processes.wait()
    return report


def _ready(recipe: Recipe, clock: _Clock) -> tuple[Subject, Recipe, Wish | None, Sparsity | None]:
    """The model, what is asked of it, and the zeros it has; all is refused here that only a model can tell."""
    with clock.stage("load"):
        subject = load(
            recipe.model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code
        )
    zeros = zeros_of(subject, recipe, always=not recipe.cuts)
    recipe = with_method(fitted(recipe, subject.anatomy), zeros)
    wish = as_wish(recipe)
    check_subject(subject, recipe, wish)
    check_search(subject, recipe)
    return subject, recipe, wish, zeros


@products.faster()
def help_search(recipe: Recipe, *, progress: Progress | None = None) -> Chosen:
    """Work along with other processes or machines that search the same, to the end; writes nothing but their study."""
    recipe = settled(recipe)
    check(recipe)
    subject, recipe, wish, _ = _ready(recipe, _Clock())
    if recipe.search is None or wish is None:
        raise SettingsError("a worker of a run that does not search", "a recipe with search", "name one, as minitron")
    scores = scored(subject, recipe, {}, progress, depths(subject, recipe, wish))
    return search(subject, recipe, scores, wish, {}, progress)


def _by_the_first(out: Path) -> Report:
    """What the first of several processes has written, once it has."""
    processes.wait()
    return Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))


def _planned(
    subject: Subject, recipe: Recipe, wish: Wish | None, clock: _Clock, progress: Progress | None
) -> tuple[Plan, Scores | None, Chosen | None]:
    """What stays, the scores that say so, the search that chose; everything, and none, where no unit is to go."""
    if wish is None:
        return Plan.everything(subject.anatomy), None, None
    with clock.stage("score") as record:
        scores = scored(subject, recipe, record, progress, depths(subject, recipe, wish))
    if recipe.search is None:
        chosen = None
        with clock.stage("plan") as record:
            plan = _in_steps(subject, recipe, scores, wish, record, progress)
    else:
        with clock.stage("search") as record:
            chosen = search(subject, recipe, scores, wish, record, progress)
        plan = chosen.plan
    check_planned(subject, plan, recipe)
    return plan, scores, chosen


def _in_steps(
    subject: Subject, recipe: Recipe, scores: Scores, wish: Wish, record: dict[str, Any], progress: Progress | None
) -> Plan:
    """The plan of a cut in as many steps as the recipe has; the tokens that those after the first are scored on."""

    def between(plan: Plan) -> tuple[Anatomy, Scores]:
        small, own = left_by(subject, plan), dict[str, Any]()
        found = scored(small, recipe, own, progress)
        record["tokens"] = record.get("tokens", 0) + own.get("tokens", 0)
        return small.anatomy, found

    return staged(subject.anatomy, scores, wish, recipe.stages, between)


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of the model: the class that holds it, what a reader must know, files that say more."""

    holder: Holder
    notes: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    sparsified: sparsify.Sparsified | None = None

    def papers(self, kept: Sparsity | None) -> dict[str, str]:
        """The files; where zeros lie is what was `kept` in the end, since training may have moved them."""
        if self.sparsified is None or kept is None:
            return dict(self.files)
        found = replace(self.sparsified, sparsity=kept)
        return {**self.files, "sparsity.json": json.dumps(found.to_json(), indent=1)}


def _side_by_side(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> tuple[dict[str, str], ...]:
    return tuple({"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True))


def _known(subject: Subject) -> tuple[str, ...]:
    """What a reader must know of the model that all began with."""
    note = subject.source.get("note")
    return (f"dense: {note}",) if note else ()


def _left(asked: Recover, found: Recovered) -> bool:
    """Whether the training was left on purpose before its end, to be gone on with."""
    return asked.until is not None and asked.until <= found.training.tokens < asked.tokens


def _warned(subject: Subject, recipe: Recipe, done: _Done) -> _Done:
    """What a user must hear before a training begins is said now, and noted."""
    assert recipe.recover is not None
    said = warning(subject, recipe.recover)
    if said is None:
        return done
    warnings.warn(said, RegrowWarning, stacklevel=2)
    return replace(done, notes=(*done.notes, said))


def _refitted(
    subject: Subject, recipe: Recipe, plan: Plan, clock: _Clock, progress: Progress | None
) -> tuple[str, ...]:
    """Mend what will read fewer units, where that is asked; what is to be known of it."""
    if recipe.refit is None:
        return ()
    blocks, say = calibration(subject, recipe, recipe.refit.tokens), None
    if progress is not None:
        say = partial(progress, "refit")
    with clock.stage("refit", tokens=blocks.numel()):
        return said(refit(subject.model, subject.anatomy, plan, blocks, damping=recipe.refit.damping, progress=say))


def _cut(subject: Subject, plan: Plan, wish: Wish, chosen: Chosen | None, refitted: Sequence[str]) -> _Done:
    cut = apply(subject, plan)
    found = () if chosen is None else chosen.notes
    notes = [
        cut.holder.note,
        *found,
        *refitted,
        f"masked and sliced logits differ by {cut.difference:.0e} of their scale",
    ]
    lost = " and ".join(f"{unit}s" for unit in unprotected(subject.anatomy, plan, wish))
    if lost:
        notes.append(f"the budget is too small to leave the end layers whole: they lost {lost} too")
    files = {"plan.json": json.dumps(plan.to_json())}
    if chosen is not None:
        files["search.json"] = json.dumps(chosen.record, indent=1)
    return _Done(cut.holder, tuple(notes), files)


def _sparse(subject: Subject, recipe: Recipe, held: Holder, record: dict[str, Any], progress: Progress | None) -> _Done:
    assert recipe.sparsify is not None
    blocks = calibration(subject, recipe) if calibrates(recipe) else None
    kept = statistics(subject, recipe) if calibrates(recipe) and recipe.sparsify.keep_statistics else None
    record["cached"] = kept is not None and sparsify.reads_kept(recipe.sparsify, kept)
    record["tokens"] = 0 if blocks is None else blocks.numel()
    found = sparsify.apply(subject, recipe.sparsify, blocks, seed=recipe.seed, kept=kept, progress=progress)
    spread = " on average over the layers" if len(set(found.patterns)) > 1 else ""
    notes = (
        f"{found.asked}{spread}; {100 * found.sparsity.share:.2f} % of the weights inside decoder layers are zero",
        "zeros are stored as zeros: dense kernels gain nothing by them, and neither does the file",
        *found.notes,
        *_short(recipe.calibration, blocks),
    )
    return _Done(held, notes, sparsified=found)


def _short(asked: Calibration, blocks: Tensor | None) -> tuple[str, ...]:
    """A note where the text had fewer blocks (n, T) than were asked for, or none were read."""
    if blocks is None:
        unread = asked.text != Calibration().text
        return ("the calibration text was not read: the method looks at weights alone",) if unread else ()
    if blocks.numel() > asked.tokens - asked.block:
        return ()
    return (f"the text's calibration part filled {blocks.numel():,} of the {asked.tokens:,} tokens asked for",)


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


def _measure(subject: Subject, recipe: Recipe, progress: Progress | None) -> dict[str, Measure]:
    return evaluate(subject.model, subject.tokenizer, recipe.evaluate, progress=progress)


def _recovered(subject: Subject, recipe: Recipe, plan: Plan, progress: Progress | None) -> tuple[Recovered, Path]:
    """Train the cut model; returns how it went and the folder of its checkpoints, which nobody else trains in."""
    asked = recipe.recover
    assert asked is not None
    teacher = read_teacher(recipe)
    inputs = {
        "model": subject.source["fingerprint"],
        "weights": weights_fingerprint(subject.model),
        "teacher": None if teacher is None else teacher.source["fingerprint"],
        "plan": plan.to_json(),
        "recover": asked.model_dump(exclude=set(FREE) - ({"evaluate_every"} if asked.patience else set())),
        "sparsify": None if recipe.sparsify is None else recipe.sparsify.model_dump(mode="json"),
        "calibration": read_by(recipe) if recipe.sparsify and calibrates(recipe) else None,
        "code": cache.code(),
        "seed": recipe.seed,
        "dtype": recipe.dtype,
    }
    work = cache.cache_dir("recover", cache.key({**inputs, "text": [*map(fingerprint, asked.sources)]}))
    blocks, heldout = (
        recovery_text(subject, asked, part, count=count, seed=seed) for part, count, seed in recovery_parts(recipe)
    )
    empty = sum(map(unanswered, asked.sources))  # now, while the text is surely there
    recipe = with_references(recipe, subject, teacher)
    asked = recipe.recover or asked
    say = None if progress is None else lambda done, total, what: progress(stage_of(what), done, total)
    with cache.held(work, "this recovery") if processes.first() else nullcontext():
        found = recover(
            subject, blocks, asked, folder=work, seed=recipe.seed, teacher=teacher, heldout=heldout, progress=say
        )
    if notes := notes_of_text(asked, blocks, empty, found):
        found = replace(found, notes=(*found.notes, *notes))
    return found, work
