"""What comes back from a command at a prompt, and what a folder holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


Command = Callable[..., Done]
Refused = Callable[..., Done]
Sparsifier = Callable[..., tuple[Path, Done]]
FEW = ("--tokens", 2048, "--set", "recover.block=64", "--set", "recover.batch=4", "--text", "none",
       "--set", "evaluate.speed=false")  # fmt: skip
"""A short training, and nothing measured."""
NARROW = ("--keep", "70%", "--axes", "neuron", "--uniform", "--criterion", "magnitude", "--divisors", "neuron=8")
WORDS = ("--calibration-tokens", 256, "--calibration-block", 64, "--text", "none")


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder, with what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }
