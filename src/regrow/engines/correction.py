"""Teacher correction: before it teaches, a teacher learns the text that its student will see (Minitron in practice).

A teacher that never saw this text predicts it less well than it could. All its weights train by next token; the result
is kept by itself, so that the next student of the same teacher finds it. What this gives up: weights in 16 bits, and
what the teacher knew and this text does not say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from regrow.engines.chunks import save
from regrow.engines.domains import mean_loss
from regrow.engines.packed import Packed
from regrow.engines.text_loss import text_loss
from regrow.engines.train import train
from regrow.engines.train_settings import TrainSettings
from regrow.engines.watch import Progress
from regrow.errors import SettingsError


class Corrected(NamedTuple):
    """Mean nats a token on held-out text before and after; None where there was no such text."""

    before: float | None
    after: float | None


def correct(
    teacher: Any,
    text: Packed,
    settings: TrainSettings,
    *,
    folder: Path,
    kept: Path,
    heldout: Packed | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Corrected:
    """Train `teacher` (fp32) in place on `text`, or take the weights that the file `kept` holds of the same training.

    `folder` holds checkpoints, so an interrupted training goes on. Weights end frozen, in `kept` too. Raises what
    `train` raises, and `SettingsError` for settings that may end it early. arXiv:2408.11796.
    """
    ends = {name: value for name in ("patience", "until", "minutes") if (value := getattr(settings, name)) is not None}
    if ends:
        raise SettingsError(
            f"a correction that may end early: {ends}", "one that sees all its tokens", "leave them out"
        )
    teacher.requires_grad_(False).eval()
    if kept.exists():
        with safe_open(kept, "pt") as file, torch.no_grad():
            for name, weight in teacher.named_parameters():
                weight.copy_(file.get_tensor(name))
            return Corrected(*json.loads(file.metadata()["losses"]))
    device = teacher.device
    before = heldout_loss(teacher, heldout, settings.micro_batch)
    teacher.requires_grad_(True)
    how: dict[str, Any] = {"loss": text_loss(teacher), "heldout": heldout, "resume": resume, "progress": progress}
    train(teacher, text, settings, folder=folder, **how)
    teacher.requires_grad_(False).eval().to(device)
    found = Corrected(before, heldout_loss(teacher, heldout, settings.micro_batch))
    weights = dict(teacher.named_parameters())  # only now: sharded ones were whole again as others
    save({name: weight.detach() for name, weight in weights.items()}, kept, {"losses": json.dumps(found)})
    return found


def heldout_loss(model: Any, text: Packed | None, size: int) -> float | None:
    """Mean nats of what is learnt of `text`, `size` blocks in a pass; None of no text."""
    return None if text is None else mean_loss(model, text_loss(model), text, size, model.device)
