"""A run in plain words: what a recipe file may say, checked key by key before anything is loaded.

A recipe is complete: the same file gives the same run. Flags override it. What this gives up: expressions, includes
and environment variables in recipes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regrow.errors import InputError, SettingsError, UnknownName, guess

Axis = Literal["layer", "group", "head", "neuron", "channel"]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Step = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Part):
    """Text that scores are measured on. Only the calibration part of a source is used."""

    text: str = "demo"
    tokens: int = Field(default=4096, ge=1)
    block: int = Field(default=128, ge=8)


class Recover(_Part):
    """Training after the cut. Only the recovery part of a source is used."""

    method: Literal["lora", "full"] = "lora"
    tokens: int = Field(default=100_000, ge=0)
    text: str = "demo"
    block: int = Field(default=256, ge=8)
    learning_rate: float = Field(default=3e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    batch: int = Field(default=8, ge=1)
    micro_batch: int = Field(default=4, ge=1)
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    checkpointing: bool = False


class Evaluate(_Part):
    """What is measured before and after. `text` is a file, or `demo` for the held-out part of the demo texts."""

    text: str | None = "demo"
    seqlen: int = Field(default=1024, ge=8)
    max_tokens: int | None = Field(default=8192, ge=8)
    tasks: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)
    batch: int = Field(default=8, ge=1)
    speed: bool = True
    repeats: int = Field(default=3, ge=1)
    samples: tuple[str, ...] = ("The largest river of the continent", "Why does bread rise?", "She opened the door and")


class Recipe(_Part):
    """A complete run. `keep` is a budget; see `artifacts.budget`."""

    name: str = "prune"
    about: str = ""
    paper: str = ""
    model: str = "demo"
    keep: str = "80%"
    axes: tuple[Axis, ...] = Field(default=("neuron", "group"), min_length=1)
    split: dict[Axis, Share] = Field(default_factory=dict)
    criterion: str = "taylor-second"  # this, the spread and the calibration: bench/defaults.py
    criteria: dict[Axis, str] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    reduce: Literal["sum", "mean", "max", "prod", "first"] = "sum"
    spread: str = "ends"
    uniform: bool = False
    divisors: dict[Axis, Step] = Field(default_factory=dict)
    rescale_norms: bool = False
    calibration: Calibration = Calibration()
    recover: Recover | None = None
    evaluate: Evaluate = Evaluate()
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    trust_remote_code: bool = False


def parse(data: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data. Raises `UnknownName` for a key nobody knows and `SettingsError` for a bad value."""
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise _explained(error, where) from error


def _explained(error: ValidationError, where: str) -> InputError:
    """The first complaint in our words."""
    first = error.errors()[0]
    path, came = [str(part) for part in first["loc"] if part != "[key]"], first["input"]
    if first["type"] == "extra_forbidden":
        return UnknownName("recipe key", ".".join(path), _keys(path[:-1]), f"correct the key in {where}")
    if first["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        what = "axis" if path[0] in ("axes", "split", "criteria", "divisors") else ".".join(path)
        return SettingsError(
            f"{where}: unknown {what} {came!r}{guess(str(came), known)}", ", ".join(known), "name one of them"
        )
    return SettingsError(f"{where}: {'.'.join(path)} = {came!r}", first["msg"], "correct the value")


def _keys(path: list[str]) -> list[str]:
    """The keys allowed at a place in a recipe, as paths."""
    part: Any = {"calibration": Calibration, "recover": Recover, "evaluate": Evaluate}.get(path[0]) if path else Recipe
    return [".".join([*path, name]) for name in (part or Recipe).model_fields]


def read_recipe(path: Path) -> dict[str, Any]:
    """The data of a YAML recipe. Raises `SettingsError` when it is not a mapping."""
    try:
        data = yaml.safe_load(path.read_text())
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
    """`data` with `changes` on top, mappings merged; None in `changes` leaves what was there."""
    merged = dict(data)
    for key, value in changes.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = overlay(below if isinstance(below, Mapping) else {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every value spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
