"""Which shape inside a budget: many are scored as cut, the best are trained a little, the best of these goes on.

Shapes have the same widths in every layer. All candidates are cut from one model in memory, by the scores of one pass,
and judged by the loss on calibration text that no score has seen. Every measurement is a piece of a `Study`, so a
search goes on after an interruption, and several processes share one.
What this gives up: layers of different widths, and a training long enough that no order can change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow import cache
from regrow.artifacts.budget import Budget, Latency
from regrow.artifacts.family import UNITS, Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import count
from regrow.artifacts.space import Space, Widths, drawn, full, inside, said, shape_of, space_of, totals_of, unbeaten
from regrow.engines import tokens
from regrow.engines.bind import Subject
from regrow.engines.clock import measure_speed
from regrow.engines.distil import Teacher
from regrow.engines.perplexity import block_losses
from regrow.engines.texts import documents, fingerprint
from regrow.engines.walk import check_finite
from regrow.errors import BrokenModel, BudgetError, SettingsError, TextError
from regrow.kept import Progress, read_by
from regrow.prepare import ranking, recovery_text
from regrow.recovery import Recover
from regrow.settings import Recipe
from regrow.stages.apply import cut_copy
from regrow.stages.load import read_teacher
from regrow.stages.plan import Wish, meet, realise
from regrow.stages.recover import recover
from regrow.study import Point, Study, check_storage

TWICE = 2  # times in a row that an order must be stable
DECODED: Mapping[str, Any] = {
    "prompt": 32,
    "decode": 32,
    "batches": (1,),
    "repeats": 3,
}  # what a latency is measured on
PLAIN: Mapping[str, Any] = {"cache": None, "teacher_tokens": 0, "preferences": None, "online_rate": None}
"""Candidates learn from the teacher itself, as it is."""
SPEED = "speed/decode_ms_per_token/batch1"


@dataclass(frozen=True, slots=True)
class Pool:
    """The shapes that are scored, of how many inside the budget, of which space."""

    points: Sequence[Widths]
    inside: int
    space: Space


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan of the best shape, and how it was found, as JSON."""

    plan: Plan
    record: dict[str, Any]

    @property
    def notes(self) -> tuple[str, ...]:
        found = self.record
        spent = f"search: {len(found['scored'])} of {found['inside']} shapes inside the budget were scored as cut"
        if not found["ranked"]:
            return (spent,)
        other = "" if found["scored"][0]["widths"] == found["chosen"] else " (as cut, another was best)"
        trained = f"{len(found['ranked'])} of them trained, with {found['tokens']:,} tokens in all{other}"
        return (f"{spent}, {trained}; {found['end']}",)


def search(
    subject: Subject, recipe: Recipe, scores: Scores, wish: Wish, record: dict[str, Any], progress: Progress | None
) -> Chosen:
    """The best shape. Raises `BudgetError` when none is inside the budgets; the model stays as it is."""
    assert recipe.search is not None
    pool = candidates(subject, recipe)
    work = _Work(subject, recipe, scores, replace(wish, uniform=True))
    rows = work.as_cut(pool.points, progress)
    if recipe.search.latency is not None:
        rows = work.fast_enough(rows, recipe.search.latency)
    rows.sort(key=_loss)
    if "failed" in rows[0]:
        raise BrokenModel(
            f"{len(rows)} shapes, and none of them gives a loss: {rows[0]['failed']}",
            "finite losses",
            "look at the model with `regrow doctor`, or ask for a larger budget",
        )
    ranked, end = work.ranked([row["widths"] for row in rows[: recipe.search.top]], progress)
    left = [row for row in ranked if len(row["losses"]) == max(len(other["losses"]) for other in ranked)]
    best = min(left, key=lambda row: _loss(row["losses"][-1]))["widths"] if left else rows[0]["widths"]
    record["tokens"] = sum(row["losses"][-1]["tokens"] for row in ranked)
    found = {
        "method": recipe.search.method,
        "space": {unit: list(values) for unit, values in pool.space.choices.items()},
        "size": pool.space.size,
        "inside": pool.inside,
        "scored": rows,
        "ranked": ranked,
        "tau": taus([row["losses"] for row in ranked]),
        "tokens": record["tokens"],
        "end": end,
        "chosen": best,
    }
    work.forget()
    return Chosen(work.plan(best), found)


def check_search(subject: Subject, recipe: Recipe) -> None:
    """Refuse before anything long begins what cannot be searched: budgets out of reach, no text left to judge by.

    Raises `BudgetError`, `SettingsError`, `TextError`.
    """
    if recipe.search is None:
        return
    check_storage(recipe.search.storage)
    pool = candidates(subject, recipe)
    if recipe.merge_heads != "off":
        check_merged(subject, pool)
    judges(subject, recipe)
    if recipe.search.rank_tokens:
        train = ranking(recipe)
        recovery_text(subject, train, "recovery", count=train.block, seed=recipe.seed)


def check_merged(subject: Subject, pool: Pool) -> None:
    """Raise `SettingsError` for a shape in which fewer heads stay than go, of a search that merges heads."""
    heads: Unit = "group" if subject.anatomy.sizes["G"] == 1 else "head"
    whole = full(subject.anatomy)[heads]
    few = min(point[heads] for point in pool.points)
    if 2 * few < whole:
        raise SettingsError(
            f"merge_heads in a search among shapes that keep {few} of {whole} {heads}s",
            f"at least {-(-whole // 2)}: each that goes is merged into one that stays",
            f"name search.choices of {heads}s, or leave merge_heads out",
        )


def candidates(subject: Subject, recipe: Recipe) -> Pool:
    """What is to be scored. Raises `BudgetError`, `SettingsError`."""
    asked, anatomy = recipe.search, subject.anatomy
    assert asked is not None
    assert recipe.keep is not None
    space = space_of(anatomy, recipe.axes, asked.choices, recipe.divisors)
    if min(space.choices.get("layer", (anatomy.sizes["L"],))) < sum(recipe.protect):
        raise SettingsError(
            f"shapes of fewer layers than protect = {list(recipe.protect)} has",
            f"choices of layers from {sum(recipe.protect)}",
            "name search.choices of layers, or protect fewer",
        )
    points: list[Widths] = list(
        inside(anatomy, space, [Budget.parse(text) for text in (recipe.keep, *asked.also)], asked.band)
    )
    if asked.method == "grid":
        points = unbeaten(points)
    return Pool(drawn(points, asked.candidates, recipe.seed), len(points), space)


def depths(subject: Subject, recipe: Recipe, wish: Wish) -> list[int]:
    """How many layers a plan may drop: those of every shape that is tried, or of what meets the budget best."""
    if "layer" not in wish.axes:
        return []
    if recipe.search is not None:
        kept = {point["layer"] for point in candidates(subject, recipe).points}
    elif wish.widths is not None:
        kept = {wish.widths["layer"]}
    else:
        kept = {meet(subject.anatomy, wish, wish.budget.target(subject.anatomy))["layer"]}
    return sorted({subject.anatomy.sizes["L"] - left for left in kept} - {0})


def judges(subject: Subject, recipe: Recipe) -> Tensor:  # (n, T) int64
    """Calibration text that no score has seen. Raises `TextError` when there is none."""
    read, asked = recipe.calibration, recipe.search
    assert asked is not None
    seen = max(read.tokens // read.block, 1)
    found = tokens.blocks(
        documents(read.text, "calibration"),
        subject.tokenizer,
        block=read.block,
        tokens=(seen + max(asked.tokens // read.block, 1)) * read.block,
        seed=recipe.seed,
    )[seen:]
    if not len(found):
        raise TextError(
            f"the calibration part of {read.text} is used up by {seen * read.block:,} tokens for the scores",
            "some more, which shapes are judged by",
            "lower calibration.tokens, or give more text",
        )
    return found


class _Work:
    """Measures candidates, each in a study under everything that its result hangs on."""

    def __init__(self, subject: Subject, recipe: Recipe, scores: Scores, wish: Wish) -> None:
        assert recipe.search is not None
        self.subject, self.recipe, self.scores, self.wish, self.asked = subject, recipe, scores, wish, recipe.search
        self.text = judges(subject, recipe)
        self.folders: set[Path] = set()  # of trainings
        self.about = {
            "model": subject.source["fingerprint"],
            "dtype": recipe.dtype,
            "seed": recipe.seed,
            "scores": dict(scores.made_by),
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
        timed = self.asked.latency is not None

        def measure(point: Point) -> dict[str, Any]:
            small = cut_copy(self.subject, self.plan(_widths(point)))
            return {"loss": self.loss(small)} | ({"latency_ms": latency(small)} if timed else {})

        study = Study(self.asked.storage, f"{cache.key({**self.about, 'timed': timed})} as cut")
        results = study.measure([dict(point) for point in points], measure, say=_said(progress, "shapes"))
        return [
            {"widths": dict(point), "parameters": self.size(point), **result}
            for point, result in zip(points, results, strict=True)
        ]

    def fast_enough(self, rows: list[dict[str, Any]], asked: str) -> list[dict[str, Any]]:
        """Those that write a token in time. Raises `BudgetError` when none does."""
        limit = Latency.parse(asked)
        most = limit.limit * (latency(self.subject) if limit.relative else 1)
        fast = [row for row in rows if row.get("latency_ms", most + 1) <= most]
        if not fast:
            best = min(row["latency_ms"] for row in rows if "latency_ms" in row)
            raise BudgetError(
                f"latency {asked} ({most:.1f} ms a token): none of {len(rows)} shapes is so fast",
                f"at least {best:.1f} ms",
                "ask for more time, lower the budget, or let layers go, which saves the most",
            )
        return fast

    def ranked(self, points: Sequence[Widths], progress: Progress | None) -> tuple[list[dict[str, Any]], str]:
        """Losses of each shape at every checkpoint of its training, and how that ended."""
        asked, left = self.asked, list(points)
        if not asked.rank_tokens or len(points) < 2:
            return [], "not trained"
        rows: list[dict[str, Any]] = [
            {"widths": dict(point), "parameters": self.size(point), "losses": []} for point in points
        ]
        stable = 0
        for part in range(1, asked.checkpoints + 1):
            mark = -(-asked.rank_tokens * part // asked.checkpoints)
            for point, result in zip(left, self.after(left, mark, progress), strict=True):
                next(row for row in rows if row["widths"] == dict(point))["losses"].append({"tokens": mark, **result})
            alive = [row for row in rows if len(row["losses"]) == part]
            order = taus([row["losses"] for row in alive])
            stable = stable + 1 if order and order[-1] >= asked.stable else 0
            if stable == TWICE and part < asked.checkpoints:
                return rows, f"their order was stable after {mark:,} tokens each"
            alive = sorted(
                (row for row in alive if "loss" in row["losses"][-1]), key=lambda row: _loss(row["losses"][-1])
            )
            left = [row["widths"] for row in alive[: max(1, len(alive) // 2) if asked.halving else None]]
            if len(left) < 2:
                break
        return rows, f"the best was trained on {mark:,}"

    def after(self, points: Sequence[Widths], mark: int, progress: Progress | None) -> list[dict[str, Any]]:
        """Loss of each shape once it was trained on `mark` tokens."""
        train = self.training(mark)
        deciding = train.model_dump(mode="json", exclude={"until", "resume", "micro_batch", "checkpointing"})
        about = {**self.about, "training": deciding, "text": {source: fingerprint(source) for source in train.sources}}
        study = Study(self.asked.storage, f"{cache.key(about)} after {mark}")
        folders = {said(point): cache.cache_dir("search", f"{cache.key(about)} {said(point)}") for point in points}
        self.folders |= set(folders.values())
        teacher = self.teacher(train)
        blocks = recovery_text(self.subject, train, "recovery", count=train.tokens, seed=self.recipe.seed)

        def measure(point: Point) -> dict[str, Any]:
            widths = _widths(point)
            small, folder = cut_copy(self.subject, self.plan(widths)), folders[said(widths)]
            began = time.perf_counter()
            with cache.held(folder, "this candidate"):
                recover(small, blocks, train, folder=folder, seed=self.recipe.seed, teacher=teacher)
            return {"loss": self.loss(small), "seconds": round(time.perf_counter() - began, 1)}

        return study.measure([dict(point) for point in points], measure, say=_said(progress, f"trained to {mark:,}"))

    def forget(self) -> None:
        """Drop checkpoints: what they led to is in the study."""
        for folder in self.folders:
            cache.drop(folder)

    def training(self, mark: int) -> Recover:
        """The recovery of the recipe, shortened; its rate stays as it is after warm-up, so that parts are alike."""
        own = ranking(self.recipe)
        short = {"tokens": self.asked.rank_tokens, "schedule": "constant", "until": mark, "patience": None}
        plain = own.distil.model_copy(update=PLAIN)
        return own.model_copy(update={**short, "report_to": (), "resume": True, "balance": "fixed", "distil": plain})

    def teacher(self, train: Recover) -> Teacher | Subject | None:
        """The model itself, where it is the one that is named."""
        if train.teacher is None:
            return None
        recipe = self.recipe
        if train.teacher == recipe.model:
            return self.subject
        return read_teacher(recipe.model_copy(update={"recover": train}))

    def loss(self, small: Subject) -> float:
        """Nats a token. Raises `BrokenModel` when it is not finite."""
        found = block_losses(small.model, self.text).mean()
        check_finite("the loss of this shape", found)
        return round(float(found), 6)

    def size(self, widths: Widths) -> int:
        return count(self.subject.anatomy, shape_of(self.subject.anatomy, widths))


def latency(subject: Subject) -> float:
    """Milliseconds a token, written alone, on this machine."""
    return round(measure_speed(subject.model, **DECODED)[SPEED].value, 3)


def taus(losses: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    """Kendall's tau between the orders at consecutive checkpoints, among those that reached the later one.

    `losses`: of each candidate, a row a checkpoint. 1 = the same order; fewer than two candidates have none.
    """
    from scipy.stats import kendalltau

    found = []
    for part in range(1, max(map(len, losses), default=0)):
        alive = [rows for rows in losses if len(rows) > part]
        if len(alive) > 1:
            before, after = ([_loss(rows[at]) for rows in alive] for at in (part - 1, part))
            found.append(round(float(kendalltau(before, after).statistic), 4))
    return found


def _loss(row: Mapping[str, Any]) -> float:
    return float(row.get("loss", math.inf))


def _widths(point: Point) -> dict[Unit, int]:
    return {unit: point[unit] for unit in UNITS if unit in point}


def _said(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)
