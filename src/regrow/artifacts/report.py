"""Measured numbers with unit, spread, samples, seed, machine and versions: the honest part of every run.

A `Report` is plain JSON. `before` and `after` hold measures under the same names, so that retention is a division
and never a memory; measures that keep one value a sample can be compared in pairs, which sees smaller differences.
What this gives up: texts and answers; only numbers travel.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from regrow.errors import SettingsError

CHANCE_MARGIN = 2.0  # a task counts as above chance when dense beats it by this many standard errors


@dataclass(frozen=True, slots=True)
class Measure:
    """One number. `better` says which way is good; `chance` is what guessing scores, where guessing is possible."""

    value: float
    unit: str
    better: str  # "higher", "lower" or "" when neither
    stderr: float | None = None
    samples: int | None = None
    chance: float | None = None
    how: Mapping[str, Any] = field(default_factory=dict)  # the record of how it was measured
    each: tuple[float, ...] = ()  # one value a sample, monotone in `value`, in the same order for every model

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Measure:
        return Measure(**{**data, "each": tuple(data.get("each", ()))})


@dataclass(frozen=True, slots=True)
class Report:
    """A run's measured results. Names of measures are paths: `text/perplexity`, `task/piqa/acc_norm`, `size/...`."""

    model: Mapping[str, Any]  # id, note on the checkpoint (dequantised ...), licence, fingerprint
    made_by: Mapping[str, Any]  # recipe, budget, criteria, spread, seed
    shape: Mapping[str, Any]  # {"before": Shape json, "after": Shape json}
    before: Mapping[str, Measure]
    after: Mapping[str, Measure]
    samples: tuple[Mapping[str, str], ...] = ()  # {"prompt", "before", "after"}
    machine: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader must know: carrier, chance-level tasks ...
    stages: Mapping[str, Any] = field(default_factory=dict)  # seconds and tokens each stage took
    sparsity: tuple[Mapping[str, float], ...] = ()  # of a sparse model, a layer each: {"weights", "zeros", "error"}
    training: tuple[Mapping[str, float], ...] = ()  # {"step", "tokens", "loss", ...} of the recovery
    learning: tuple[Mapping[str, float], ...] = ()  # the same of gates that learned, with "sparsity", "teacher" ...
    search: Mapping[str, Any] | None = None  # of a chosen shape: the candidates, their losses, what it took

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["format"] = 1
        data["retention"] = retention(self.before, self.after)
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """Raises `SettingsError` when `data` is no report."""

        def measures(rows: Mapping[str, Any]) -> dict[str, Measure]:
            return {name: Measure.from_json(row) for name, row in rows.items()}

        try:
            rest = {k: v for k, v in data.items() if k in Report.__slots__}
            rest |= {k: tuple(data.get(k, ())) for k in ("samples", "notes", "training", "learning", "sparsity")}
            return Report(**{**rest, "before": measures(data["before"]), "after": measures(data["after"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"not a report: {error!r}", "a report.json that regrow wrote", "check the path"
            ) from error


def retention(before: Mapping[str, Measure], after: Mapping[str, Measure]) -> dict[str, float | None]:
    """Share of the zero-shot score that is left, in three views.

    raw: mean of after / mean of before, as the papers do. above_chance: mean over tasks of (after - chance) /
    (before - chance), only over tasks where the dense model beats chance by `CHANCE_MARGIN` standard errors;
    tasks left out are counted. gold_bits: dense bits per byte of the gold answers over the cut model's.
    """

    def choose(name: str) -> str | None:
        for metric in ("acc_norm", "acc"):
            if f"task/{name}/{metric}" in before and f"task/{name}/{metric}" in after:
                return f"task/{name}/{metric}"
        return None

    tasks = sorted({key.split("/")[1] for key in before if key.startswith("task/")})
    keys = [key for key in map(choose, tasks) if key]
    gold = [k for k in before if k.startswith("task/") and k.endswith("/gold_bits_per_byte") and k in after]
    above = [k for k in keys if _above_chance(before[k])]

    def ratio(top: list[float], bottom: list[float]) -> float | None:
        return sum(top) / sum(bottom) if bottom and sum(bottom) else None

    corrected = [_lift(after[k], before[k].chance or 0.0) / _lift(before[k], before[k].chance or 0.0) for k in above]
    return {
        "raw": ratio([after[k].value for k in keys], [before[k].value for k in keys]),
        "above_chance": sum(corrected) / len(corrected) if corrected else None,
        "tasks": len(keys),
        "tasks_above_chance": len(above),
        "gold_bits": ratio([before[k].value for k in gold], [after[k].value for k in gold]),
    }


def errors_apart(before: Measure, after: Measure) -> float:
    """How many standard errors the two lie apart, never negative; infinite for counts that differ.

    In pairs, sample by sample, where both kept their samples; else as if they were independent.
    """
    if len(before.each) == len(after.each) > 1:
        changes = [b - a for a, b in zip(before.each, after.each, strict=True)]
        change, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
    else:
        change, error = after.value - before.value, math.hypot(before.stderr or 0.0, after.stderr or 0.0)
    return abs(change) / error if error else (math.inf if change else 0.0)


def _above_chance(measure: Measure) -> bool:
    if measure.chance is None:
        return True
    return measure.value - measure.chance > CHANCE_MARGIN * (measure.stderr or 0.0)


def _lift(measure: Measure, chance: float) -> float:
    return measure.value - chance
