"""What a training folder holds: which run it belongs to, and which of its checkpoints are whole.

A checkpoint counts only once its mark is there, and the mark is written last. A folder is never continued by a run that
would end elsewhere. What this gives up: continuing with more tokens or another rate; that is a new run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.cache import replacing, settle
from regrow.errors import OutputError, SettingsError

COMPLETE = "complete"  # the mark
RUN = "run.json"
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    return max((mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE}")), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The steps that were done when it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path) -> None:
    """The mark comes after everything else is on disk."""
    settle(checkpoint)
    (checkpoint / COMPLETE).touch()


def fingerprint(blocks: Tensor) -> str:
    """16 hex digits of shape, dtype and content."""
    digest = hashlib.sha256(f"{tuple(blocks.shape)} {blocks.dtype}".encode())
    digest.update(blocks.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits of every parameter's name, shape, dtype and bits; the bits are added up as integers, which is fast
    and exact in any order. Weights that differ only by moving values about inside one tensor look the same.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(WORDS[parameter.element_size()])
        digest.update(f"{name} {tuple(bits.shape)} {parameter.dtype} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()[:16]


def open_run(folder: Path, run: Mapping[str, Any], *, resume: bool) -> Path | None:
    """Make `folder` ready for the run described by `run` (plain JSON); the checkpoint to start from, if any.

    Checkpoints that are not whole go; without `resume` all of them go. Raises `SettingsError` when the checkpoints are
    of another run, naming what differs, or of one that nobody knows, and `OutputError` when the folder cannot be
    written.
    """
    now = json.loads(json.dumps(run))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = newest(folder) if resume else None
        if start is not None:
            _same(folder, _known(folder), now)
        for path in folder.glob("checkpoint-*"):
            if start is None or not (path / COMPLETE).exists():
                shutil.rmtree(path, ignore_errors=True)  # another process may be at it
                if path.exists():
                    raise OutputError(f"{path} cannot be removed", "a folder you may write to", "name another folder")
        with replacing(folder / RUN) as partial:
            partial.write_text(json.dumps(now, indent=1), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"the training folder {folder} cannot be written: {error}",
            "a folder you may write to",
            "name another folder",
        ) from error
    return start


def _known(folder: Path) -> dict[str, Any]:
    """The run that the checkpoints in `folder` belong to. Raises `SettingsError` when its record is gone."""
    try:
        found: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise SettingsError(
            f"{folder} holds checkpoints, but {RUN}, which says of which run, is missing or no JSON",
            "the file as it was written",
            "put it back, name another folder, or start over with resume off",
        ) from error
    return found


def _same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    different = [
        f"{name}: {before.get(name)!r} there, {now.get(name)!r} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if different:
        raise SettingsError(
            f"{folder} holds checkpoints of another run ({'; '.join(different)})",
            "the same settings, text and weights as when it began",
            "change them back, name another folder, or start over with resume off",
        )
