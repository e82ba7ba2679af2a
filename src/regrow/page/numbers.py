"""Numbers as people read them: a few significant digits, thousands separators, bytes and shares in words.

One place decides, so that the page and the model card never disagree. What this gives up: locales; a point is the
decimal mark, a comma groups thousands, KB is 1000 bytes.
"""

from __future__ import annotations

import math
import re

SHARES = ("share", "fraction", "accuracy")  # units whose values lie in 0..1 and are shown as percentages
NONE = "–"
_BYTES = re.compile(r"^(?:bytes?|B)(?P<rest>\W.*)?$")
_STEPS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3))


def number(value: float, digits: int = 4) -> str:
    """`value` with `digits` significant digits; whole numbers and those above 1000 keep all their digits."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == int(value) or abs(value) >= 10 ** (digits - 1):
        return _fixed(value, 0)
    size = math.floor(math.log10(abs(value)))
    return f"{value:.{digits - 1}g}" if size < -4 else _fixed(value, digits - 1 - size)


def short(value: float) -> str:
    """A count in four digits: 134.5M, 1.236B."""
    scale, mark = _scale(value)
    return number(value / scale) + mark.replace("G", "B")


def human_bytes(value: float) -> str:
    scale, mark = _scale(value)
    return f"{number(value / scale)} {mark}B"


def percent(share: float | None) -> str:
    return NONE if share is None or not math.isfinite(share) else f"{_fixed(100 * share, 1)} %"


def times(ratio: float | None) -> str:
    return NONE if ratio is None or not math.isfinite(ratio) else f"×{number(ratio, 3)}"


def quantity(value: float, unit: str, stderr: float | None = None) -> str:
    """`value ± stderr`, rounded so that the error keeps two digits; bytes and shares carry their unit."""
    if _BYTES.match(unit):
        scale, mark = _scale(value)
        return f"{_spread(value, stderr, scale)} {mark}B"
    if unit in SHARES:
        return f"{_share(value, stderr)} %"
    return _spread(value, stderr, 1.0)


def unit_label(unit: str) -> str:
    """What is left to say of the unit beside a number written by `quantity`."""
    match = _BYTES.match(unit)
    if match:
        return (match["rest"] or "").replace("/", "per ").strip()
    return "" if unit in SHARES else unit


def _spread(value: float, stderr: float | None, scale: float) -> str:
    value = value / scale
    if not stderr or not math.isfinite(stderr) or not math.isfinite(value):
        return number(value)
    error = stderr / scale
    places = max(0, 1 - math.floor(math.log10(error)))
    return f"{_fixed(value, places)} ± {_fixed(error, places)}" if places <= 6 else f"{value:.3g} ± {error:.2g}"


def _share(value: float, stderr: float | None) -> str:
    """Percentages keep one digit after the point, as the papers do."""
    return _fixed(100 * value, 1) + (f" ± {_fixed(100 * stderr, 1)}" if stderr else "")


def _scale(value: float) -> tuple[float, str]:
    return next(((scale, mark) for mark, scale in _STEPS if abs(value) >= scale), (1.0, ""))


def _fixed(value: float, places: int) -> str:
    text = f"{value:,.{places}f}"
    return "−" + text[1:] if text.startswith("-") else text
