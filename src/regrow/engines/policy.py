"""Which units stay, learned from losses of drawn masks alone: no gradient, no backward pass, no weight that moves.

Each unit has a chance to stay. In every step a few masks are drawn, each is tried on the same text, and chances move
towards masks that did better (arXiv:2406.10576); then as many units as are to stay are expected to stay, of each kind.
What this gives up: weights that learn meanwhile; several processes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow.artifacts.family import Unit
from regrow.artifacts.shape import Anatomy
from regrow.engines.chance import stream
from regrow.engines.gates import gated
from regrow.engines.learnable import Values, opened, show
from regrow.engines.packed import Packed, order
from regrow.engines.resume import fingerprint, mark_complete, newest, open_run, weights_fingerprint
from regrow.engines.text_loss import text_loss
from regrow.errors import BrokenModel, OutputError

STATE, RECORDS = "policy.safetensors", "records.json"
LOG = 20  # steps between two records, which are saved too
LEAST = 1e-6  # of a unit's spread, so that what is certain stays finite

Chances = Mapping[Unit, Tensor]


@dataclass(frozen=True, slots=True)
class Tries:
    """`masks` in each of `steps` of `batch` sequences; chances move at `rate`, which falls along a cosine; the usual
    loss is a mean over `window` steps; of `seed`."""

    steps: int
    batch: int
    masks: int = 2
    rate: float = 6e-3
    window: int = 5
    seed: int = 0


def begin(scores: Tensor, share: float) -> Tensor:
    """Chances of units with these scores, (layers, n) or (n,): in each row the sigmoid of how far a score is from the
    mean, in standard deviations, moved so that `share` of all is expected to stay."""
    rows = scores.double()
    spread = rows.std(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return project(torch.sigmoid((rows - rows.mean(-1, keepdim=True)) / spread), share * rows.numel()).float()


def project(chances: Tensor, total: float) -> Tensor:
    """The nearest chances within 0..1 that add up to `total`: all moved by one number, and clipped."""
    values = chances.double()
    low, high = float(values.min()) - 1, float(values.max())  # all at 1, all at 0
    for _ in range(80):
        move = (low + high) / 2
        low, high = (move, high) if float((values - move).clamp(0, 1).sum()) > total else (low, move)
    return (values - (low + high) / 2).clamp(0, 1).to(chances.dtype)


def slope(losses: Sequence[float], usual: float, masks: Sequence[Tensor], chances: Tensor) -> Tensor:
    """Where the expected loss rises, times each unit's spread sqrt(s (1 - s)): 1 / (K - 1) of the sum over K masks of
    (loss - usual) (mask - s) / sqrt(s (1 - s)). Unbiased where the usual loss is the mean of these."""
    spread = (chances * (1 - chances)).sqrt().clamp_min(LEAST)
    total = torch.zeros_like(chances)
    for loss, mask in zip(losses, masks, strict=True):
        total += (loss - usual) * (mask - chances) / spread
    return total / (len(masks) - 1)


class Search:
    """Chances on their way, and the losses that the usual one is a mean of."""

    def __init__(self, chances: Chances, tries: Tries) -> None:
        self.chances = {unit: value.clone() for unit, value in chances.items()}
        self.totals = {unit: float(value.double().sum()) for unit, value in chances.items()}
        self.tries, self.step = tries, 0
        self.past: list[float] = []

    def move(self, measure: Callable[[Values], float]) -> float:
        """One step: draw masks, measure each, move; the mean of what was measured."""
        source = stream(self.tries.seed, self.step, torch.device("cpu"))
        masks = [
            {unit: torch.bernoulli(value, generator=source) for unit, value in self.chances.items()}
            for _ in range(self.tries.masks)
        ]
        losses = [measure(mask) for mask in masks]
        mean = sum(losses) / len(losses)
        self.past = [*self.past, mean][-self.tries.window :]
        usual = sum(self.past) / len(self.past)
        rate = self.tries.rate * 0.5 * (1 + math.cos(math.pi * self.step / self.tries.steps))
        for unit, value in self.chances.items():
            found = slope(losses, usual, [mask[unit] for mask in masks], value)
            self.chances[unit] = project(value - rate * found, self.totals[unit])
        self.step += 1
        return mean

    def save(self, path: Path) -> None:
        facts = {"step": torch.tensor(self.step), "past": torch.tensor(self.past, dtype=torch.float64)}
        save_file({**{str(unit): value for unit, value in self.chances.items()}, **facts}, path)

    def load(self, path: Path) -> None:
        found = load_file(path)
        self.step, self.past = int(found["step"]), found["past"].tolist()
        self.chances = {unit: found[unit] for unit in self.chances}


def _checkpoint(folder: Path, search: Search, records: Sequence[Mapping[str, float]]) -> None:
    """Write one, and then remove those before. Raises `OutputError`."""
    old, place = newest(folder), folder / f"checkpoint-{search.step}"
    try:
        place.mkdir(exist_ok=True)
        search.save(place / STATE)
        (place / RECORDS).write_text(json.dumps(records), encoding="utf-8")
        mark_complete(place)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the chances of step {search.step} cannot be written: {error}",
            "a few bytes for every unit",
            "free some, and give the same command again: it goes on from the checkpoint before",
        ) from error
    if old is not None and old != place:
        shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def learn_masks(
    model: Any,
    anatomy: Anatomy,
    text: Packed,
    begun: Chances,
    tries: Tries,
    *,
    folder: Path,
    resume: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Chances, tuple[dict[str, float], ...]]:
    """Chances after all steps, and a record every `LOG` of them. `folder` receives checkpoints: one that was
    interrupted goes on.

    Raises `BrokenModel` when a loss is not finite, and what `open_run` raises.
    """
    search, each = Search(begun, tries), tries.batch * text.ids.shape[1]
    run = {"tries": repr(tries), "blocks": fingerprint(text.ids), "weights": weights_fingerprint(model)}
    begin_at = {unit: fingerprint(value) for unit, value in begun.items()}
    start, records = open_run(folder, {**run, "begun": begin_at}, resume=resume), list[dict[str, float]]()
    if start is not None:
        search.load(start / STATE)
        records = json.loads((start / RECORDS).read_text(encoding="utf-8"))
    rows = order(len(text.ids), tries.steps * tries.batch, tries.seed).view(tries.steps, tries.batch)
    loss, live = text_loss(model), opened(anatomy, search.chances)
    with gated(model, anatomy, live):
        while search.step < tries.steps:
            batch = {name: x.to(model.device) for name, x in text[rows[search.step]].batch(slice(None)).items()}

            def measure(mask: Values, batch: dict[str, Tensor] = batch) -> float:
                show(live, {unit: value.to(model.device) for unit, value in mask.items()})
                answer = loss(model, batch)
                return float(answer[0] if isinstance(answer, tuple) else answer)

            mean = search.move(measure)
            if not math.isfinite(mean):
                raise BrokenModel(
                    f"a loss of masks is {mean} in step {search.step} of {tries.steps}",
                    "finite losses",
                    f"lower what goes, or start from other scores; what was learned lies in {folder}",
                )
            if search.step % LOG == 0 or search.step == tries.steps:
                records.append(
                    {"step": search.step, "tokens": search.step * each, "loss": sum(search.past) / len(search.past)}
                )
                _checkpoint(folder, search, records)
            if progress is not None:
                progress(search.step * each, tries.steps * each, f"loss {mean:.3f}")
    return search.chances, tuple(records)
