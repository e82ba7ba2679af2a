"""What strangers may read of where a model came from: a hub id, or a folder's name without the way to it.

Folders travel; a path of the machine that made one says nothing elsewhere, and may say too much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
_PATH = re.compile(r"(?:/|~|\.{1,2}[\\/]|[A-Za-z]:[\\/]|\\\\|file:).*")  # what says something on one machine alone
_MODELS = ("id", "asked", "model", "base_model", "teacher")  # entries of a record that name a model


def hub_id(model: Mapping[str, Any]) -> str | None:
    """The hub id of a report's `model`; None when a folder was cut."""
    name = str(model.get("asked") or model.get("id"))
    return name if _on_hub(name) else None


def title(model: Mapping[str, Any]) -> str:
    """What a report's `model` is called."""
    return hub_id(model) or shown(str(model.get("id", "a model")))


def shown(name: str) -> str:
    """A hub id or a word as it is; of a path its last part."""
    return name if _on_hub(name) else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with models called by their names, and everything else that is a path by its last part."""

    def short(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_paths(value)
        if isinstance(value, list | tuple) and key != "samples":  # those are prompts
            return [short("", one) for one in value]
        return shown(value) if isinstance(value, str) and (key in _MODELS or _PATH.fullmatch(value)) else value

    return {key: short(key, value) for key, value in record.items()}


def recipe_without_paths(recipe: str) -> str:
    """The same of a recipe as YAML; text that is none stays as it is."""
    try:
        found = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return recipe
    if not isinstance(found, Mapping):
        return recipe
    return yaml.safe_dump(without_paths(found), sort_keys=False, allow_unicode=True)


def _on_hub(name: str) -> bool:
    return _HUB.fullmatch(name) is not None and not Path(name).is_dir()
