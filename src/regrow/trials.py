"""Candidates of a search, measured: cut from one model in memory, judged and timed as cut, trained a little.

They are cut by the scores of one pass, and judged by the loss on calibration text that no score has seen. Every
measurement is a piece of a `Study` under a key of what it hangs on, by content and not by name, so a search goes on
after an interruption, and several processes share one. What this gives up: times that hold on another machine.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow import cache
from regrow.artifacts.family import UNITS, Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import count
from regrow.artifacts.space import Widths, full, said, shape_of, totals_of
from regrow.cut_checks import chosen_criteria
from regrow.engines import checkpoint, provenance, tokens
from regrow.engines.bind import Subject
from regrow.engines.clock import machine, measure_speed
from regrow.engines.distil import Teacher
from regrow.engines.perplexity import block_losses
from regrow.engines.resume import newest, step_of
from regrow.engines.texts import documents, fingerprint
from regrow.engines.train_settings import FREE as FREE_OF_ALL
from regrow.engines.trained import only
from regrow.engines.walk import check_finite
from regrow.errors import BrokenModel, TextError
from regrow.kept import Progress, read_by
from regrow.prepare import ranking, recovery_text
from regrow.recovery import Recover
from regrow.settings import Recipe
from regrow.stages.apply import cut_copy
from regrow.stages.load import read_teacher
from regrow.stages.plan import Wish, realise
from regrow.stages.recover import recover
from regrow.study import Point, Study

DECODED: Mapping[str, Any] = {
    "prompt": 32,
    "decode": 32,
    "batches": (1,),
    "repeats": 3,
}  # what a latency is measured on
PLAIN: Mapping[str, Any] = {"cache": None, "teacher_tokens": 0, "preferences": None, "online_rate": None}
"""Candidates learn from the teacher itself, as it is."""
FREE = {*FREE_OF_ALL, "teacher", "text", "mixture", "references", "excess", "balance", "balance_every"}
"""Of a recovery: what does not decide where candidates end, and names, whose contents do."""
SPEED = "speed/decode_ms_per_token/batch1"


class Trials:
    """Measures candidates, each in a study under everything that its result hangs on."""

    def __init__(self, subject: Subject, recipe: Recipe, scores: Scores, wish: Wish) -> None:
        assert recipe.search is not None
        self.subject, self.recipe, self.scores, self.wish, self.asked = subject, recipe, scores, wish, recipe.search
        self.text = judges(subject, recipe)
        self.folders: set[Path] = set()  # of trainings
        self.begun: set[Path] = set()  # of those, by this process: what it has done itself it goes on with
        self.about = {
            "model": subject.source["fingerprint"],
            "dtype": recipe.dtype,
            "seed": recipe.seed,
            "scores": dict(scores.made_by),
            "criteria_code": {unit: choice.criterion.code for unit, choice in chosen_criteria(recipe).items()},
            "rescale_norms": wish.rescale_norms,
            "protect": wish.protect,
            "merge": wish.merge,
            "judges": self.asked.tokens,
            "code": cache.code(),
            **read_by(recipe),
        }

    def plan(self, widths: Widths) -> Plan:
        anatomy = self.subject.anatomy
        return realise(anatomy, self.scores, replace(self.wish, axes=tuple(widths)), totals_of(anatomy, widths))

    def as_cut(self, points: Sequence[Widths], progress: Progress | None) -> list[dict[str, Any]]:
        """Loss, and latency where one is asked for, of each shape without any training."""
        study = Study(self.asked.storage, f"{self.timed if self.asked.latency else cache.key(self.about)} as cut")

        def measure(point: Point) -> dict[str, Any]:
            return self.judged(cut_copy(self.subject, self.plan(_widths(point))))

        results = study.measure([dict(point) for point in points], measure, say=_said(progress, "shapes"))
        return [
            {"widths": dict(point), "parameters": self.size(point), **result}
            for point, result in zip(points, results, strict=True)
        ]

    def dense_ms(self) -> float:
        """What a token takes in the dense model; measured once, as candidates are. Raises `BrokenModel`."""
        study = Study(self.asked.storage, f"{self.timed} dense")
        (result,) = study.measure([full(self.subject.anatomy)], lambda _: self.judged(self.subject))
        if "failed" in result:
            raise BrokenModel(
                f"latency {self.asked.latency} of a dense model that gives no loss: {result['failed']}",
                "a finite loss, or milliseconds, such as 12ms",
                "look at the model with `regrow doctor`, or name milliseconds",
            )
        return float(result["latency_ms"])

    @property
    def timed(self) -> str:
        """Times belong to a machine, and to a device of it."""
        return cache.key({**self.about, "machine": machine(), "device": str(self.subject.model.device)})

    def judged(self, model: Subject) -> dict[str, Any]:
        return {"loss": self.loss(model)} | ({"latency_ms": latency(model)} if self.asked.latency else {})

    def marks(self) -> list[int]:
        """Tokens after which candidates are compared: equal parts, in whole steps of the training."""
        own, asked = self.training(1), self.asked
        step = own.batch * own.block
        parts = (-(-asked.rank_tokens * part // (asked.checkpoints * step)) for part in range(1, asked.checkpoints + 1))
        return [step * steps for steps in dict.fromkeys(parts)]

    def after(self, points: Sequence[Widths], mark: int, progress: Progress | None) -> list[dict[str, Any]]:
        """Loss of each shape once it was trained on `mark` tokens."""
        train = self.training(mark)
        about = cache.key({**self.about, "training": self.deciding(train)})
        study = Study(self.asked.storage, f"{about} after {mark}")
        place = cache.key({"about": about, "names": train.sources})  # a training's checkpoints know its texts by name
        folders = {said(point): cache.cache_dir("search", f"{place} {said(point)}") for point in points}
        self.folders |= set(folders.values())
        teacher = self.teacher(train)
        blocks = recovery_text(self.subject, train, "recovery", count=self.marks()[-1], seed=self.recipe.seed)

        def measure(point: Point) -> dict[str, Any]:
            widths = _widths(point)
            gc.collect()  # a trainer holds the candidate before
            small, folder = cut_copy(self.subject, self.plan(widths)), folders[said(widths)]
            began = time.perf_counter()
            goes_on = (train.resume or folder in self.begun) and _seen(folder, train) <= mark
            own = train.model_copy(update={"resume": goes_on})
            self.begun.add(folder)
            with cache.held(folder, "this candidate"), only(self.subject.model, None):  # the teacher is frozen
                found = recover(small, blocks, own, folder=folder, seed=self.recipe.seed, teacher=teacher)
            seconds = round(time.perf_counter() - began, 1)
            trained = found.training
            return {"loss": self.loss(small), "seconds": seconds, "tokens": trained.tokens, "resumed": trained.resumed}

        near = sorted(points, key=lambda point: not _seen(folders[said(point)], train))  # checkpoints may lie elsewhere
        found = study.measure([dict(point) for point in near], measure, say=_said(progress, f"trained to {mark:,}"))
        results = dict(zip(map(said, near), found, strict=True))
        return [results[said(point)] for point in points]

    def deciding(self, train: Recover) -> dict[str, Any]:
        """What decides where a candidate's training ends, whatever its teacher and its texts are called."""
        taught_by = self.taught_by if train.teacher else None
        texts = [[fingerprint(source), train.mixture.get(source)] for source in train.sources]
        free = FREE - ({"micro_batch"} if train.by_pass else set())
        return {**train.model_dump(mode="json", exclude=free), "teacher": taught_by, "texts": texts}

    @cached_property
    def taught_by(self) -> str:
        """The fingerprint of the teacher."""
        named = self.training(1).teacher
        if named == self.recipe.model:
            return str(self.subject.source["fingerprint"])
        return provenance.fingerprint(checkpoint.locate(str(named)))

    def forget(self) -> None:
        """Drop checkpoints: what they led to is in the study."""
        for folder in self.folders:
            cache.drop(folder)

    def training(self, mark: int) -> Recover:
        """The recovery of the recipe, shortened; its rate stays as it is after warm-up, so that parts are alike."""
        own = ranking(self.recipe)
        short = {"tokens": self.asked.rank_tokens, "schedule": "constant", "until": mark, "patience": None}
        plain = own.distil.model_copy(update=PLAIN)
        return own.model_copy(update={**short, "report_to": (), "balance": "fixed", "distil": plain})

    def teacher(self, train: Recover) -> Teacher | Subject | None:
        """The model itself, where it is the one that is named."""
        if train.teacher is None:
            return None
        if self.taught_by == self.subject.source["fingerprint"]:
            return self.subject
        return read_teacher(self.recipe.model_copy(update={"recover": train}))

    def loss(self, small: Subject) -> float:
        """Nats a token. Raises `BrokenModel` when it is not finite."""
        found = block_losses(small.model, self.text).mean()
        check_finite("the loss of this shape", found)
        return round(float(found), 6)

    def size(self, widths: Widths) -> int:
        return count(self.subject.anatomy, shape_of(self.subject.anatomy, widths))


def judges(subject: Subject, recipe: Recipe) -> Tensor:  # (n, T) int64
    """Calibration text that no score has seen. Raises `TextError` when there is none."""
    read = recipe.calibration
    seen = max(read.tokens // read.block, 1)
    found = tokens.blocks(
        documents(read.text, "calibration"),
        subject.tokenizer,
        block=read.block,
        tokens=seen * read.block + judges_asked(recipe),
        seed=recipe.seed,
    )[seen:]
    if not len(found):
        raise TextError(
            f"the calibration part of {read.text} is used up by {seen * read.block:,} tokens for the scores",
            "some more, which shapes are judged by",
            "lower calibration.tokens, or give more text",
        )
    return found


def judges_asked(recipe: Recipe) -> int:
    """Tokens that shapes are to be judged by: whole blocks, one at least."""
    assert recipe.search is not None
    block = recipe.calibration.block
    return max(recipe.search.tokens // block, 1) * block


def _seen(folder: Path, train: Recover) -> int:
    """Tokens that the newest checkpoint in `folder` has seen: of an earlier study it may lie beyond this one's mark."""
    found = newest(folder)
    return 0 if found is None else step_of(found) * train.batch * train.block


def latency(subject: Subject) -> float:
    """Milliseconds a token, written alone, on this machine."""
    return round(measure_speed(subject.model, **DECODED)[SPEED].value, 3)


def _widths(point: Point) -> dict[Unit, int]:
    return {unit: point[unit] for unit in UNITS if unit in point}


def _said(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
