"""Recipes as files: how YAML is read, where those of the wheel lie, how flags are laid on top, how one is written.

What this gives up: expressions, includes and environment variables in recipes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from regrow.errors import SettingsError, UnknownName
from regrow.recovery import ADAPTED, WHOLE
from regrow.settings import Recipe


class _Yaml(yaml.SafeLoader):
    """YAML 1.1 without numbers to the base of sixty: 2:4 is a pattern, not two minutes and four seconds."""


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, re.compile(f"(?!.*:){form.pattern}", re.X) if tag.endswith((":int", ":float")) else form)
            for tag, form in forms]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip


def read_yaml(text: str) -> Any:
    """What a recipe, or a value in one, says. Raises `yaml.YAMLError`."""
    return yaml.load(text, _Yaml)


def read_recipe(path: Path) -> dict[str, Any]:
    """The data of a YAML recipe. Raises `SettingsError` when it is not a mapping."""
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(
            f"recipe {path} cannot be read: {error}", "a YAML file", "check the path and the file"
        ) from error
    if not isinstance(data, dict):
        raise SettingsError(
            f"recipe {path} holds {type(data).__name__}", "a mapping of keys to values", "see docs/recipes.md"
        )
    return data


RECIPES = Path(__file__).with_name("recipes")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe by name or by path. Raises `UnknownName`."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in recipe_names():
        raise UnknownName("recipe", name, recipe_names(), "name one of them, or a path that ends in .yaml")
    return RECIPES / f"{name}.yaml"


def overlay(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with `changes` on top, mappings merged; None is a value, as null is in a recipe."""
    merged = dict(data)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = overlay(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def exact(data: Mapping[str, Any], said: Collection[str]) -> dict[str, Any]:
    """`data` without the budget of its recipe, where a shape was `said` on top and no budget beside it."""
    return {**data, "keep": None} if data.get("shape") and "shape" in said and "keep" not in said else dict(data)


def of_method(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what it says of its own way to recover, where another is among the `changes` on top of it."""
    own, asked = (part if isinstance(part := given.get("recover"), Mapping) else {} for given in (recipe, changes))
    method = asked.get("method")
    if method in (None, own.get("method")):
        return dict(recipe)
    stale = {"learning_rate", "dropout", *(ADAPTED if method in WHOLE else ())}
    return {**recipe, "recover": {name: value for name, value in own.items() if name not in stale}}


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every value spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
