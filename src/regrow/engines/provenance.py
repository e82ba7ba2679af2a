"""What a model is and where it is from: a fingerprint of its files, and what regrow noted beside them.

Steps that come later need it: scores belong to a fingerprint, a teacher is what all steps began with. What this gives
up: folders that were moved after something was made of them; they are named anew.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from regrow.engines import checkpoint
from regrow.errors import ModelError

NOTES = "regrow.json"  # what regrow knows of a folder: id, licence, note on the checkpoint, base model
DECIDING = (
    *("config.json", "generation_config.json", "*.safetensors", "*.py"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model", "*.tiktoken"),
    *("*.jinja", "chat_template*"),
)
"""Files that decide what a model says."""


def root(model: str) -> str:
    """What `model` was made from in the beginning; itself when regrow did not make it.

    Raises `ModelError` when what lies there now is another model.
    """
    path = checkpoint.locate(model, weights=False) / NOTES
    known = checkpoint.read_json(path) if path.exists() else {}
    found: str = known.get("base_model", model)
    then = known.get("base", {}).get("fingerprint")
    if "base_model" in known and then not in (None, fingerprint(checkpoint.locate(found))):
        raise ModelError(
            f"{found}, which {model} was made from, holds another model now",
            f"the model whose fingerprint is {then}",
            "name the teacher yourself",
        )
    return found


def lasting(model: str) -> str:
    """A model's name that means the same from every folder: a path in full."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if model != "demo" and folder.is_dir() else model


def fingerprint(folder: Path) -> str:
    """16 hex digits over every file that decides what the model says: weights, configurations, tokenizer, template."""
    digest = hashlib.sha256()
    for path in sorted({path for kind in DECIDING for path in folder.glob(kind)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def notes(folder: Path, asked: str = "") -> dict[str, Any]:
    """What is known of a model: id (what was asked for, when that is a hub id), licence, a note on the checkpoint."""
    path, card = folder / NOTES, folder / "README.md"
    found = checkpoint.read_json(path) if path.exists() else {}
    licence = _licence(card.read_text(encoding="utf-8", errors="replace")) if card.exists() else "unknown"
    name = folder.resolve().name if not asked or Path(asked).expanduser().is_dir() else asked
    return {"id": name, "licence": licence, "note": "", **found}


def _licence(card: str) -> str:
    """What the front matter of a model card says: an id of the hub's, or the name that stands for `other`."""
    front = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        said = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        said = None
    found = said.get("license") if isinstance(said, Mapping) else None
    if found == "other" and isinstance(said, Mapping):
        found = said.get("license_name") or found
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found or "unknown")
