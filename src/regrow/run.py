"""The stages in order: load, score, plan, apply, recover, evaluate, export; each kept under a key of its inputs.

Another ratio on the same scores costs no second calibration; an interrupted recovery goes on where it stopped; the
dense model is measured once. What this gives up: distributed runs of the whole road (the recovery alone can be).
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from regrow import cache
from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Measure, Report
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.sparsity import Sparsity
from regrow.engines import checkpoint, processes, products
from regrow.engines.bind import Subject
from regrow.engines.clock import machine
from regrow.engines.gates import Gates
from regrow.engines.hetero import Holder, holder
from regrow.engines.refit import refit, said
from regrow.engines.trackers import keep_runs
from regrow.engines.watch import TRACK, line
from regrow.errors import RegrowWarning, SettingsError
from regrow.kept import Progress, calibration, measured, scored
from regrow.learned import learned
from regrow.levels import Levels, in_levels, one_track
from regrow.plan_checks import check_planned
from regrow.prepare import (
    as_wish,
    check,
    check_subject,
    fitted,
    settled,
    with_method,
)
from regrow.recipe_files import dump
from regrow.record import by_layer, known, made_by, notes_of_folder, origin_of, sparse_sizes, uneven, zeros_of
from regrow.recovery import Recover
from regrow.references import with_references
from regrow.search import Chosen, check_search, depths, search
from regrow.settings import Recipe
from regrow.staged import left_by, staged
from regrow.stages.apply import apply
from regrow.stages.evaluate import evaluate, sizes, write_samples
from regrow.stages.export import export
from regrow.stages.load import load
from regrow.stages.plan import Wish, unprotected
from regrow.stages.recover import Recovered, warning
from regrow.trained import ALL, Trained, recovered

LEARN_TRACK = "learn.jsonl"

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
    stays = _planned(subject, recipe, wish, clock, progress)
    with clock.stage("evaluate before") as record:
        before, said = measured(subject, recipe, record, progress) if processes.first() else ({}, [])
    aimed = with_references(recipe, subject)  # while it is as it was read
    if recipe.learn is not None and wish is not None:
        with clock.stage("learn") as record:
            stays = _learnt(subject, aimed, wish, record, progress)
    done = _Done(holder(subject.model.config, subject.anatomy, plan := stays.plan))
    if wish is not None:
        notes = _refitted(subject, recipe, plan, clock, progress)
        with clock.stage("apply"):
            done = _cut(subject, stays, wish, notes)
    if recipe.sparsify is not None:
        with clock.stage("sparsify") as record:
            levels = in_levels(subject, aimed, plan, record, progress)
        done = _Done(done.holder, levels.notes, levels=levels)
    trained: tuple[Trained, ...] = ()
    if recipe.recover and recipe.recover.tokens:
        done = _warned(subject, recipe, done)
        with clock.stage("recover") as record:
            trained = _recovered(subject, aimed, plan, done.levels, record, progress)
        done = replace(done, notes=(*done.notes, *trained[-1].found.notes))
    if not processes.first():
        return _by_the_first(out)
    with clock.stage("evaluate after"):
        after, now = _after(subject, recipe, progress)
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
        notes=(*known(subject), *done.notes, *uneven(before, after)),
        stages=clock.stages,
        training=one_track(trained),
        learning=stays.learning,
        search=None if stays.chosen is None else stays.chosen.record,
        sparsity=by_layer(subject, kept, done.levels.last.errors if done.levels else {}),
    )
    files = {"recipe.yaml": dump(recipe), "report.json": json.dumps(report.to_json(), indent=1)}
    files |= {**_tracks(report), **done.papers(kept)}
    files |= page(report, plan if wish else None, stays.scores, files["recipe.yaml"])
    export(subject, done.holder, out, files, notes_of_folder(subject, out, recipe, kept))
    _tidy(recipe, stays, trained, out)
    return report


def _after(subject: Subject, recipe: Recipe, progress: Progress | None) -> tuple[dict[str, Measure], list[str]]:
    """Measures of what is in memory now, and what it writes."""
    asked = recipe.evaluate
    found = evaluate(subject.model, subject.tokenizer, asked, progress=progress)
    return found, write_samples(subject.model, subject.tokenizer, asked.samples)


def _tracks(report: Report) -> dict[str, str]:
    """The records of the trainings, a line each."""
    tracks = {LEARN_TRACK: report.learning, TRACK: report.training}
    return {name: "".join(map(line, rows)) for name, rows in tracks.items() if rows}


def _recovered(
    subject: Subject,
    recipe: Recipe,
    plan: Plan,
    levels: Levels | None,
    record: dict[str, Any],
    progress: Progress | None,
) -> tuple[Trained, ...]:
    """The training that is left to do, after those between levels."""
    before, teacher, turn = (levels.trained, levels.teacher, levels.turn) if levels else ((), None, ALL)
    found = (*before, recovered(subject, recipe, plan, progress, teacher=teacher, turn=turn))
    record["tokens"] = sum(training.found.training.tokens for training in found)
    return found


def _tidy(recipe: Recipe, stays: _Stays, trained: Sequence[Trained], out: Path) -> None:
    """Checkpoints go once the folder is whole, unless the training was left to be gone on with; trackers' runs stay."""
    left = bool(trained) and recipe.recover is not None and _left(recipe.recover, trained[-1].found)
    for work in (stays.work, *(None if left else training.work for training in trained)):
        if work is not None:
            keep_runs(work, out)
            cache.drop(work)
    processes.wait()


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


@dataclass(frozen=True, slots=True)
class _Stays:
    """What stays; the scores, the search or the gates that say so."""

    plan: Plan
    scores: Scores | None = None
    chosen: Chosen | None = None
    gates: Gates | None = None
    learning: tuple[dict[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    work: Path | None = None  # checkpoints of the gates' training


def _planned(subject: Subject, recipe: Recipe, wish: Wish | None, clock: _Clock, progress: Progress | None) -> _Stays:
    """What stays by scores or by search; everything where no unit is to go, or gates have yet to learn which."""
    if wish is None or recipe.learn is not None:
        return _Stays(Plan.everything(subject.anatomy))
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
    return _Stays(plan, scores, chosen)


def _learnt(subject: Subject, recipe: Recipe, wish: Wish, record: dict[str, Any], progress: Progress | None) -> _Stays:
    """What stays by gates that learn; the model's weights have learned beside them."""
    found, work = learned(subject, recipe, wish, progress)
    record["tokens"] = found.training.tokens
    check_planned(subject, found.plan, recipe)
    return _Stays(
        found.plan, found.scores, None, found.gates, learning=found.training.losses, notes=found.notes, work=work
    )


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
    levels: Levels | None = None

    def papers(self, kept: Sparsity | None) -> dict[str, str]:
        """The files; where zeros lie is what was `kept` in the end, since training may have moved them."""
        if self.levels is None or kept is None:
            return dict(self.files)
        found = replace(self.levels.last, sparsity=kept)
        return {**self.files, "sparsity.json": json.dumps(found.to_json(), indent=1)}


def _side_by_side(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> tuple[dict[str, str], ...]:
    return tuple({"prompt": p, "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True))


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


def _cut(subject: Subject, stays: _Stays, wish: Wish, said: Sequence[str]) -> _Done:
    cut = apply(subject, stays.plan, stays.gates)
    found = stays.notes if stays.chosen is None else stays.chosen.notes
    notes = [
        cut.holder.note,
        *found,
        *said,
        f"masked and sliced logits differ by {cut.difference:.0e} of their scale",
    ]
    lost = "" if stays.gates else " and ".join(f"{unit}s" for unit in unprotected(subject.anatomy, stays.plan, wish))
    if lost:
        notes.append(f"the budget is too small to leave the end layers whole: they lost {lost} too")
    files = {"plan.json": json.dumps(stays.plan.to_json())}
    if stays.chosen is not None:
        files["search.json"] = json.dumps(stays.chosen.record, indent=1)
    return _Done(cut.holder, tuple(notes), files)
