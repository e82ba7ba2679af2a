"""What can be refused of a cut from the recipe alone: shapes said twice, steps, tasks that would choose and measure.

What this gives up: what only the model tells; that is `prepare.check_subject`.
"""

from __future__ import annotations

from regrow.artifacts.budget import Budget, Latency
from regrow.artifacts.family import Unit
from regrow.engines import processes
from regrow.engines.tasks import check_tasks
from regrow.errors import SettingsError
from regrow.settings import Recipe
from regrow.stages.score import Choice, choose


def chosen_criteria(recipe: Recipe) -> dict[Unit, Choice]:
    return choose(recipe.criterion, recipe.axes, recipe.criteria, recipe.options)


def check_asked_shape(recipe: Recipe) -> None:
    """Refuse two ways at once to say what is to be left. Raises `SettingsError`, `BudgetError`."""
    if recipe.shape and recipe.keep is not None:
        raise SettingsError(f"shape and keep = {recipe.keep}", "one of them", "leave keep out: the shape says all")
    asked = recipe.search
    if recipe.cuts and recipe.stages > 1:
        _check_stages(recipe)
    if asked is None:
        return
    if recipe.keep is None:
        raise SettingsError(
            "a search without a budget", "keep, such as 80% or 113M, and no shape", "say what the shapes must fit into"
        )
    for text in asked.also:
        Budget.parse(text)
    if asked.latency is not None:
        Latency.parse(asked.latency)
    if processes.count() > 1:
        raise SettingsError(
            f"a search in {processes.count()} processes that train as one",
            "processes that share its study: each is a command of its own",
            "search with `regrow search` and as many `regrow search --worker` as you like, then recover the folder",
        )


def _check_stages(recipe: Recipe) -> None:
    """Raise `SettingsError` where a cut cannot go in steps."""
    if recipe.search is not None:
        raise SettingsError(
            f"stages = {recipe.stages} in a search, which cuts every shape at once",
            "one of them",
            "search first, then cut to the `shape` that it chose in stages",
        )
    if any(choice.criterion.sees == "task" for choice in chosen_criteria(recipe).values()):
        raise SettingsError(
            f"stages = {recipe.stages} with layers that a task chooses, which are asked for once",
            "one of them",
            "use stages=1, or another criterion for layers",
        )
    inside = {"group", "head", "neuron"} & set(recipe.axes)
    if inside and not recipe.uniform:
        raise SettingsError(
            f"stages = {recipe.stages} of a cut whose layers may differ in width",
            "the same widths in every layer, so that what lies between two steps can be scored",
            "use --uniform, or stages=1",
        )


def check_chosen_by(recipe: Recipe) -> None:
    """Refuse layers that are chosen by a task which nobody knows, or which is to measure the result as well. Raises
    `SettingsError`, `UnknownName`, `MissingDemo`."""
    for choice in chosen_criteria(recipe).values() if recipe.cuts else ():
        if choice.criterion.sees != "task":
            continue
        task, limit = choice.asked["task"], choice.asked["limit"]
        check_tasks([task])
        if limit < 1:
            raise SettingsError(f"option limit={limit} of criterion {choice.criterion.name!r}", "1 or more", "raise it")
        if task in recipe.evaluate.tasks:
            raise SettingsError(
                f"task {task} is to choose which layers go, and to measure what is left",
                "a task that has chosen nothing",
                f"leave {task} out of evaluate.tasks, or choose by another: options.task",
            )
