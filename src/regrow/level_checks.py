"""What can be refused of levels of sparsity from the recipe alone.

What this gives up: what only the model tells; that is `prepare`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from regrow.artifacts.pattern import Pattern
from regrow.errors import SettingsError
from regrow.settings import Recipe, Sparsify


def check_levels(recipe: Recipe) -> None:
    """Refuse levels that do not nest, or that nothing learns between. Raises `SettingsError`."""
    asked, training = recipe.sparsify, recipe.recover
    lag = None if training is None else training.distil.lag
    if asked is None or not asked.levels:
        if lag is not None:
            raise SettingsError(
                f"recover.distil.lag = {lag} of a model that does not grow sparse in levels",
                "sparsify.levels, such as [50%, 60%]",
                "name levels, or leave it out",
            )
        return
    patterns = [Pattern.parse(text) for text in (*asked.levels, asked.pattern)]
    for first, second in pairwise(patterns):
        if first.of != second.of or first.zeros >= second.zeros:
            raise SettingsError(
                f"sparsify.levels = {', '.join(asked.levels)} on the way to {asked.pattern}: {second.written} cannot "
                f"follow {first.written}",
                "percentages that rise, or fewer and fewer kept of as many neighbours",
                "correct the levels",
            )
    steps = 0 if training is None else training.tokens // len(patterns) // (training.block * training.batch)
    if training is None or not steps:
        raise SettingsError(
            f"{len(patterns)} levels and {0 if training is None else training.tokens:,} tokens of recovery",
            "at least one step of recovery after each",
            "raise recover.tokens, or leave levels out",
        )
    for name, value in _apart(asked, recipe).items():
        raise SettingsError(f"{name} = {value} beside sparsify.levels", "one of them", "leave one of the two out")


def _apart(asked: Sparsify, recipe: Recipe) -> dict[str, Any]:
    """What does not go with levels: zeros that move or fill, and what is known or ends only once."""
    training = recipe.recover
    assert training is not None
    found: dict[str, Any] = {}
    if training.method in ("lora", "ast"):
        found["recover.method"] = training.method
    if asked.keep_statistics:
        found["sparsify.keep_statistics"] = True
    found |= {f"recover.{name}": value for name in ("until", "patience") if (value := getattr(training, name))}
    if training.distil.lag is not None:
        several = ("cache", "preferences", "teacher_tokens", "online_rate")
        found |= {f"recover.distil.{x}": value for x in several if (value := getattr(training.distil, x))}
    return found
