"""How much each unit matters: one number a unit, with a record of who measured it on what.

On disk: safetensors with the record as JSON in its header; never pickle. What this gives up: nothing is kept per
tensor, so another way to add tensors up needs another walk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.artifacts.family import Unit
from regrow.errors import BrokenModel, OutputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Scores:
    """Higher stays. Rows are layers of the intact model."""

    table: Mapping[Unit, torch.Tensor]  # group (L,K) head (L,H) neuron (L,F) channel (C,) layer (L,) or (L,L+1); fp32
    made_by: Mapping[str, Any]  # criterion, options and comparability by unit; tokens, block, seed, model, text

    def comparable(self, unit: Unit) -> bool:
        return bool(self.made_by["criteria"][unit]["comparable"])

    def save(self, path: Path) -> None:
        """Raises `OutputError` when the file cannot be written."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: value.contiguous() for name, value in self.table.items()}
        try:
            save_file(tensors, path, metadata={"made_by": json.dumps(dict(self.made_by))})
        except (SafetensorError, OSError) as error:
            raise OutputError(
                f"scores cannot be written to {path}: {error}", "a writable folder with room", "make room there"
            ) from error

    @staticmethod
    def load(path: Path) -> Scores:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                made_by = json.loads(file.metadata()["made_by"])
                return Scores({name: file.get_tensor(name) for name in file.keys()}, made_by)  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise BrokenModel(
                f"scores at {path} cannot be read: {error}",
                "a file that regrow wrote",
                "delete it; the next run scores again",
            ) from error
