"""Writes the tables of docs/recipes.md from the settings themselves: `python scripts/recipe_docs.py`.

A test holds the page against `tables()`, so the two cannot drift apart.
"""

from __future__ import annotations

import inspect
import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from regrow.settings import PARTS, Axis, Recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- keys: written by scripts/recipe_docs.py -->", "<!-- end of keys -->"
TABLES: dict[str, type[BaseModel]] = {"": Recipe, **PARTS}
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}


def kind(annotation: Any) -> str:
    """What may stand there, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation == Axis:
        return "axis"
    if origin is Annotated:
        return kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is tuple:
        return f"list of {'axes' if inner[0] == Axis else f'{kind(inner[0])}s'}"
    if origin is dict:
        return f"{kind(inner[0])}: {kind(inner[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if i is type(None) else kind(i) for i in inner)
    return PLAIN.get(annotation, "keys, below")


def default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{json.dumps(value)}`"


def tables() -> str:
    """Every key with its kind, default and meaning, as Markdown."""
    lines: list[str] = []
    for name, part in TABLES.items():
        title = f"`{name}`" if name else "The run"
        lines += ["", f"## {title}", "", inspect.cleandoc(part.__doc__ or ""), ""]
        lines += ["| key | what | default | meaning |", "|---|---|---|---|"]
        for key, field in part.model_fields.items():
            path = f"{name}.{key}" if name else key
            what = kind(field.annotation)
            lines.append(f"| `{path}` | {what} | {default(field)} | {field.description} |")
    return "\n".join(lines).strip()


def main() -> None:
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
