"""Options of named knowledge, checked before anything is loaded: of the kind that their defaults have, and in range.

What this gives up: options that are lists or tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regrow.errors import SettingsError


def check_values(
    what: str,
    defaults: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    positive: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Raise `SettingsError` for a value that is of another kind than the default of that name, below 0, 0 where it must
    be `positive`, or above 1 where it is a share. Names that `defaults` lacks are somebody else's."""
    for name in defaults.keys() & given.keys():
        kind, value = type(defaults[name]), given[name]
        wanted = (int, float) if kind is float else (kind,)
        most = 1 if name in shares else math.inf
        fits = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool) and 0 <= value <= most
        if not fits or value == math.inf or (name in positive and not value):
            least = "more than 0" if name in positive else "0 to 1" if name in shares else "0 or more"
            raise SettingsError(
                f"option {name}={value!r} of {what}",
                {bool: "true or false", int: f"a whole number, {least}"}.get(kind, f"a number, {least}"),
                "correct the value",
            )
