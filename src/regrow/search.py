"""Which shape inside a budget: many are scored as cut, the best are trained a little, the best of these goes on.

Shapes have the same widths in every layer. How one is measured, `trials` knows; here is which are tried, who goes on,
and when their order is settled. What this gives up: layers of different widths, and a training long enough that no
order can change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regrow.artifacts.budget import Budget, Latency
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy, count
from regrow.artifacts.space import Space, Widths, drawn, full, inside, shape_of, space_of, unbeaten
from regrow.engines.bind import Subject
from regrow.errors import BrokenModel, BudgetError, SettingsError
from regrow.foretold import first_units
from regrow.kept import Progress
from regrow.plan_checks import check_left, warn_of_smaller
from regrow.prepare import as_trained, ranking, recovery_text
from regrow.settings import Recipe
from regrow.stages.plan import Wish, meet
from regrow.study import check_storage
from regrow.trials import Trials, judges, judges_asked

TWICE = 2  # times in a row that an order must be stable
Row = dict[str, Any]
"""A shape that was measured, as JSON."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The shapes that are scored, of how many inside the budget, of which space."""

    points: Sequence[Widths]
    inside: int
    space: Space
    unbeaten: int | None = None  # of a grid, how many no other exceeds: those are scored
    unfit: int = 0  # how many are left out, since what is to follow cannot
    why: str | None = None  # of the first of them


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan of the best shape, and how it was found, as JSON."""

    plan: Plan
    record: dict[str, Any]

    @property
    def notes(self) -> tuple[str, ...]:
        found = self.record
        first = "" if found["unbeaten"] is None else f", of which no other exceeds {found['unbeaten']:,}"
        spent = (
            f"search: {found['inside']:,} shapes inside the budget{first}; {len(found['scored'])} were scored as cut"
        )
        if slow := sum("slow" in row for row in found["scored"]):
            spent += f" ({slow} of them are too slow)"
        unfit = found["unfit"]
        out = f"search: {unfit['shapes']:,} of them were left out, for what is to follow cannot: {unfit['why']}"
        read = found["judged_on"]
        little = f"search: {read['tokens']:,} of the {read['asked']:,} tokens to judge shapes by were left of the text"
        left = [said for said, needed in ((out, unfit["shapes"]), (little, read["tokens"] < read["asked"])) if needed]
        if not found["ranked"]:
            return (spent, *left)
        other = "" if found["scored"][0]["widths"] == found["chosen"] else " (as cut, another was best)"
        trained = f"{len(found['ranked'])} of them trained, with {found['tokens']:,} tokens in all{other}"
        return (f"{spent}, {trained}; {found['end']}", *left)


def search(
    subject: Subject, recipe: Recipe, scores: Scores, wish: Wish, record: dict[str, Any], progress: Progress | None
) -> Chosen:
    """The best shape. Raises `BudgetError` when none is inside the budgets, `BrokenModel` when none gives a loss; the
    model stays as it is."""
    assert recipe.search is not None
    pool = candidates(subject, recipe)
    trials = Trials(subject, recipe, scores, replace(wish, uniform=True))
    rows = trials.as_cut(pool.points, progress)
    if all("failed" in row for row in rows):
        raise BrokenModel(
            f"{len(rows)} shapes, and none of them gives a loss: {rows[0]['failed']}",
            "finite losses",
            "look at the model with `regrow doctor`, or ask for a larger budget",
        )
    if recipe.search.latency is not None:
        rows = timed(rows, recipe.search.latency, trials.dense_ms)
    rows.sort(key=lambda row: ("failed" in row, "slow" in row, _loss(row)))
    fit = [row for row in rows if "loss" in row and "slow" not in row]
    ranked, end = rank(trials, [row["widths"] for row in fit[: recipe.search.top]], progress)
    trials.forget()
    record["tokens"] = sum(spent(row["losses"]) for row in ranked)
    best = _best(ranked) if ranked else fit[0]["widths"]
    found = {
        "method": recipe.search.method,
        "space": {unit: list(values) for unit, values in pool.space.choices.items()},
        "size": pool.space.size,
        "inside": pool.inside,
        "unbeaten": pool.unbeaten,
        "unfit": {"shapes": pool.unfit, "why": pool.why},
        "judged_on": {"tokens": trials.text.numel(), "asked": judges_asked(recipe)},
        "scored": rows,
        "ranked": ranked,
        "tau": taus([row["losses"] for row in ranked]),
        "tokens": record["tokens"],
        "end": end,
        "chosen": best,
    }
    return Chosen(trials.plan(best), found)


def timed(rows: Sequence[Row], asked: str, dense_ms: Callable[[], float]) -> list[Row]:
    """The rows, with `slow` where a token takes longer than asked. Raises `BudgetError` when all are slow."""
    limit = Latency.parse(asked)
    most = limit.limit * (dense_ms() if limit.relative else 1)
    found = [{**row, "slow": True} if row.get("latency_ms", 0) > most else row for row in rows]
    times = [row["latency_ms"] for row in found if "latency_ms" in row]
    if min(times) > most:
        raise BudgetError(
            f"latency {asked} ({most:.1f} ms a token): none of {len(rows)} shapes is so fast",
            f"at least {min(times):.1f} ms",
            "ask for more time, lower the budget, or let layers go, which saves the most",
        )
    return found


def rank(trials: Trials, points: Sequence[Widths], progress: Progress | None) -> tuple[list[Row], str]:
    """Losses of each shape at every checkpoint of its training, and how that ended."""
    asked, marks = trials.asked, trials.marks()
    if not asked.rank_tokens or len(points) < 2:
        return [], "not trained"
    rows: list[Row] = [{"widths": dict(point), "parameters": trials.size(point), "losses": []} for point in points]
    left, stable = rows, 0
    for part, mark in enumerate(marks, 1):
        for row, result in zip(left, trials.after([row["widths"] for row in left], mark, progress), strict=True):
            row["losses"].append({"tokens": mark, **result})
        order = taus([row["losses"] for row in left])
        stable = stable + 1 if order and order[-1] is not None and order[-1] >= asked.stable else 0
        if stable == TWICE and part < len(marks):
            return rows, f"their order was stable after {mark:,} tokens each"
        alive = sorted((row for row in left if "loss" in row["losses"][-1]), key=lambda row: _loss(row["losses"][-1]))
        left = alive[: max(1, len(alive) // 2) if asked.halving else None]
        if len(left) < 2:
            break
    end = f"the best was trained on {mark:,}"
    if len(marks) < asked.checkpoints:
        end += f"; steps of {marks[0]:,} leave {len(marks)} of {asked.checkpoints} checkpoints"
    return rows, end


def spent(losses: Sequence[Mapping[str, Any]]) -> int:
    """Tokens that a candidate was trained on, by its rows: what one took up counts once, what it began anew twice.

    A training that broke counts as if it had taken up all and come to its end. What an interrupted worker did that
    nobody took up is not known.
    """
    parts = zip((0, *(row["tokens"] for row in losses)), losses, strict=False)
    return sum(row["tokens"] - min(row.get("resumed", before), before) for before, row in parts)


def _best(ranked: Sequence[Row]) -> Widths:
    """Of those that were trained the longest, the one with the lowest loss. Raises `BrokenModel` when all diverged."""
    alive = [row for row in ranked if "loss" in row["losses"][-1]]
    if not alive:
        raise BrokenModel(
            f"{len(ranked)} shapes were trained, and none of them to a loss: {ranked[0]['losses'][-1]['failed']}",
            "finite losses",
            "lower recover.learning_rate, or take the best as cut with search.rank_tokens=0",
        )
    longest = max(len(row["losses"]) for row in alive)
    best = min((row for row in alive if len(row["losses"]) == longest), key=lambda row: _loss(row["losses"][-1]))
    widths: Widths = best["widths"]
    return widths


def check_search(subject: Subject, recipe: Recipe) -> None:
    """Refuse before anything long begins what cannot be searched: budgets out of reach, no text left to judge by; warn
    of a teacher that is smaller than what it teaches.

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
    taught = as_trained(recipe).recover
    if taught is not None and taught.tokens and taught.teacher is not None:
        most = max(count(subject.anatomy, shape_of(subject.anatomy, point)) for point in pool.points)
        warn_of_smaller(taught.teacher, most, "the largest student")


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
    """What is to be scored: inside the budgets, and fit for what follows. Raises `BudgetError`, `SettingsError`."""
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
    found = inside(anatomy, space, [Budget.parse(text) for text in (recipe.keep, *asked.also)], asked.band)
    points, why = able(anatomy, found, recipe)
    unfit = len(found) - len(points)
    best = unbeaten(points) if asked.method == "grid" else None
    left = drawn(points if best is None else best, asked.candidates, recipe.seed)
    return Pool(left, len(found), space, None if best is None else len(best), unfit, why)


def able(anatomy: Anatomy, points: Sequence[Widths], recipe: Recipe) -> tuple[list[Widths], str | None]:
    """Those that can be refitted and trained as the recipe says, and what is wrong with the first of the others.

    Raises `SettingsError` when none is left.
    """
    trained, left = as_trained(recipe), list[Widths]()
    why: SettingsError | None = None
    for point in points:
        try:
            check_left(anatomy, first_units(anatomy, point), trained)
        except SettingsError as error:
            why = why or error
        else:
            left.append(point)
    if why is not None and not left:
        came = f"a search in which none of {len(points):,} shapes inside the budget can go on: {why.came}"
        raise SettingsError(came, why.allowed, why.todo) from why
    return left, None if why is None else why.came


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


def taus(losses: Sequence[Sequence[Mapping[str, Any]]]) -> list[float | None]:
    """Kendall's tau between the orders at consecutive checkpoints, among those that reached the later one.

    `losses`: of each candidate, a row a checkpoint. 1 = the same order; fewer than two candidates have none, and where
    all are equal there is no order: None.
    """
    from scipy.stats import kendalltau

    found: list[float | None] = []
    for part in range(1, max(map(len, losses), default=0)):
        alive = [rows for rows in losses if len(rows) > part]
        if len(alive) > 1:
            before, after = ([_loss(rows[at]) for rows in alive] for at in (part - 1, part))
            tau = float(kendalltau(before, after).statistic)
            found.append(None if math.isnan(tau) else round(tau, 4))
    return found


def _loss(row: Mapping[str, Any]) -> float:
    return float(row.get("loss", math.inf))
