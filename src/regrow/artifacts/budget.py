"""What must be reached, in the user's terms: `80%`, `108M`, `220MB`, `kv=12KB`, `flops=75%`.

A budget names a count of the shape (`measure`) and the most it may be (`limit`), so every kind is met by the same
planner. What this gives up: budgets that need a stopwatch (latency) are met by search: `Latency`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from regrow.artifacts.shape import MEASURES, Anatomy, Shape
from regrow.errors import BudgetError

Measure = Literal["decoder_weights", "parameters", "file_bytes", "kv_bytes_per_token", "flops_per_token"]

_FORMS = "80% (of the decoder weights), 108M (parameters), 220MB (file), kv=75% or kv=12KB (per token), flops=75%"
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_PATTERN = re.compile(
    r"^(?:(?P<kind>kv|flops|params|file|decoder)=)?(?P<number>\d+(?:\.\d+)?)(?P<unit>%|[KMGT]?B|[KMGT])?$",
    re.IGNORECASE,
)
_KINDS: dict[str, Measure] = {
    "kv": "kv_bytes_per_token",
    "flops": "flops_per_token",
    "params": "parameters",
    "file": "file_bytes",
    "decoder": "decoder_weights",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """`limit` is a share of the dense model when `relative`, else an absolute count."""

    measure: Measure
    limit: float
    relative: bool
    text: str

    @staticmethod
    def parse(text: str) -> Budget:
        """Read a budget. Raises `BudgetError` when `text` is none of the forms in the module's first line."""
        match = _PATTERN.match(text.strip().replace(" ", ""))
        if match is None:
            raise BudgetError(f"budget {text!r} is not understood", _FORMS, "write the budget in one of these forms")
        kind, unit = (match["kind"] or "").lower(), (match["unit"] or "").upper()
        number = float(match["number"])
        if unit == "%":
            if not 0 < number <= 100:
                raise BudgetError(f"budget {text!r} is outside 0..100 %", _FORMS, "name the share to keep, such as 80%")
            return Budget(_KINDS[kind] if kind else "decoder_weights", number / 100, True, text)
        in_bytes = (unit.endswith("B") and unit != "B") or kind in ("kv", "file")
        measure: Measure = _KINDS[kind] if kind else "file_bytes" if in_bytes else "parameters"
        if not unit and number <= 1:
            raise BudgetError(
                f"budget {text!r} could be a share or a count", _FORMS, f"write {number * 100:g}% if a share is meant"
            )
        scale = _SCALE[unit[0] if unit and unit != "B" else "B" if unit == "B" and not in_bytes else ""]
        return Budget(measure, number * scale, False, text)

    def target(self, anatomy: Anatomy) -> int:
        """The largest count that meets the budget for this model."""
        if self.relative:
            return int(self.count(anatomy, anatomy.dense) * self.limit + 1e-6)
        return int(self.limit)

    def count(self, anatomy: Anatomy, shape: Shape) -> int:
        """What the budget counts, of a shape."""
        return MEASURES[self.measure](anatomy, shape)

    def __str__(self) -> str:
        what = self.measure.replace("_", " ")
        return f"{self.limit * 100:g} % of {what}" if self.relative else f"{self.limit:,.0f} {what}"


@dataclass(frozen=True, slots=True)
class Latency:
    """The most milliseconds that one token may take: `limit`, or that share of what the dense model takes."""

    limit: float
    relative: bool

    @staticmethod
    def parse(text: str) -> Latency:
        """Read `12ms` or `80%`. Raises `BudgetError` when `text` is neither."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|%)", text.strip().replace(" ", ""))
        if match is None or float(match[1]) <= 0:
            raise BudgetError(
                f"latency {text!r} is not understood", "12ms (a token), 80% (of the dense model)", "write it so"
            )
        return Latency(float(match[1]) / (100 if match[2] == "%" else 1), match[2] == "%")
