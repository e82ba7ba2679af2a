"""What strangers may read of where a model came from: a hub id, or a folder's name without the way to it.

Folders travel; a path of the machine that made one says nothing elsewhere, and may say too much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name


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


def _on_hub(name: str) -> bool:
    return _HUB.fullmatch(name) is not None and not Path(name).is_dir()
