"""Every error a user can meet, in one tree; each says what came, what is allowed, what to do next.

    RegrowError
    ├── InputError            what the user typed or gave
    │   ├── UnknownName       a name nobody registered (did you mean ...)
    │   ├── SettingsError     a recipe or option with a bad key or value
    │   ├── BudgetError       a budget that cannot be met (names the nearest that can)
    │   └── TextError         text that is missing, too short or from the wrong part
    ├── ModelError            the model that was given
    │   ├── UnsupportedModel  no family declares this layout, or not this unit of it
    │   ├── QuantisedModel    weights are not plain floating point
    │   ├── BrokenModel       truncated, corrupt, NaN, or a tokenizer that does not fit
    │   └── MissingDemo       the demo wheels are not installed
    ├── IdentityError         masked and sliced, or memory and disk, disagree: nothing is written
    └── OutputError           the output cannot be written: exists, read-only, full

What this gives up: error codes. The command line exits with 2 for `InputError` and 1 for the rest.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

PLURALS = {
    "criterion": "criteria",
    "weight criterion": "weight criteria",
    "axis": "axes",
    "loss": "losses",
    "spread of zeros": "spreads of zeros",
    "kind of list": "kinds of list",
}


def guess(name: str, known: Iterable[str]) -> str:
    """`, did you mean 'neuron'?` when a known name is near, else a full stop."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    return f", did you mean {' or '.join(repr(n) for n in near)}?" if near else "."


class RegrowError(Exception):
    """The root: `came` is what was found, `allowed` what would do, `todo` the next step."""

    exit_code = 1

    def __init__(self, came: str, allowed: str, todo: str) -> None:
        self.came, self.allowed, self.todo = came, allowed, todo
        super().__init__(f"{came}\n  allowed: {allowed}\n  next:    {todo}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.came, self.allowed, self.todo)


class RegrowWarning(UserWarning):
    """What a user must hear before a run goes on."""


class InputError(RegrowError):
    exit_code = 2


class UnknownName(InputError):
    """A name that is not registered; `noun` says what kind of thing it should have been."""

    def __init__(self, noun: str, name: str, names: Iterable[str], todo: str = "") -> None:
        known = sorted(names)
        plural = PLURALS.get(noun, re.sub("([^aeiou])y$", r"\1ie", noun) + "s")
        super().__init__(
            f"unknown {noun} {name!r}{guess(name, known)}",
            f"{plural}: {', '.join(known)}",
            todo or "pick one of them; `regrow ls` prints them all with one line each",
        )
        self.noun, self.name, self.names = noun, name, known

    def __reduce__(self) -> tuple[Any, ...]:
        return UnknownName, (self.noun, self.name, self.names, self.todo)


class SettingsError(InputError):
    pass


class BudgetError(InputError):
    pass


class TextError(InputError):
    pass


class ModelError(RegrowError):
    pass


class UnsupportedModel(ModelError):
    pass


class QuantisedModel(ModelError):
    pass


class BrokenModel(ModelError):
    pass


class MissingDemo(ModelError):
    pass


class IdentityError(RegrowError):
    pass


class OutputError(RegrowError):
    pass
