"""Which share of the weights goes, and in what arrangement: `50%` zeros anywhere, or `2:4`, kept of every so many.

A percentage counts zeros, N:M counts what is kept; every print says both. Groups of M are neighbouring inputs of one
output, as NVIDIA's 2:4 has them. What this gives up: blocks, channels and other arrangements that are structure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from regrow.errors import SettingsError

ALLOWED = "a percentage of zeros such as 50%, or kept of every so many such as 2:4"


@dataclass(frozen=True, slots=True)
class Pattern:
    """`zeros` of all weights go; with `of`, exactly `of - keep` in every `of` neighbours of a row."""

    zeros: Fraction
    keep: int = 0
    of: int = 0

    @staticmethod
    def parse(text: str) -> Pattern:
        """`50%` or `2:4`. Raises `SettingsError`."""
        share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
        groups = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if share and 0 <= Fraction(share[1]) < 100:
            return Pattern(Fraction(share[1]) / 100)
        if groups and 0 < int(groups[1]) < int(groups[2]):
            return Pattern.groups(int(groups[1]), int(groups[2]))
        raise SettingsError(f"pattern {text!r}", ALLOWED, "write 50%, say, or 2:4; 75% zeros in groups of eight is 2:8")

    @staticmethod
    def groups(keep: int, of: int) -> Pattern:
        return Pattern(1 - Fraction(keep, of), keep, of)

    def __str__(self) -> str:
        share = f"{float(100 * self.zeros):g} % zeros"
        return f"{share} ({self.keep} of {self.of} kept)" if self.of else share

    @property
    def written(self) -> str:
        """As the user would write it."""
        return f"{self.keep}:{self.of}" if self.of else f"{float(100 * self.zeros):g}%"

    def count(self, weights: int) -> int:
        """How many of `weights` go; rounded down."""
        return int(weights * self.zeros)

    def check(self, name: str, inputs: int) -> None:
        """Raise `SettingsError` when a row of `inputs` weights does not divide into groups."""
        if self.of and inputs % self.of:
            raise SettingsError(
                f"pattern {self.written} on {name}, whose rows have {inputs} weights",
                f"groups that divide {inputs}",
                "choose another pattern, or leave this module out",
            )
