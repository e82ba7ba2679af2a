"""Pictures as text: one function that writes an SVG element with every attribute and text escaped.

Inline SVG takes its colours from the page's style sheet, so one picture serves light, dark and paper.
What this gives up: charts beyond rectangles, lines and words.
"""

from __future__ import annotations

from markupsafe import Markup, escape


def tag(name: str, *inside: str, **attributes: str | float | None) -> Markup:
    """`<name attributes>inside</name>`; `class_` means class, underscores become hyphens, None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{''.join(escape(part) for part in inside)}</{name}>")


def picture(width: float, height: float, label: str, *inside: str, class_: str = "") -> Markup:
    """An `<svg>` of this size in pixels, with a label for readers who cannot see it."""
    box = f"0 0 {width:g} {height:g}"
    named = {"role": "img", "aria_label": label, "class_": class_ or None}
    return tag("svg", *inside, width=width, height=height, viewBox=box, **named)


def title(text: str) -> Markup:
    """What shows when the pointer rests on the element."""
    return tag("title", text)


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
