"""The zeros of a sparse model as a picture: one bar a layer, with the relative error of its outputs where known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from regrow.page.numbers import percent
from regrow.page.svg import picture, tag, title

WIDTH, LEFT, NUMBERS, HEAD = 1000.0, 40.0, 150.0, 24.0  # pixels: whole, row names, numbers, top


def draw_zeros(layers: Sequence[Mapping[str, float]]) -> Markup:
    """What is left of each layer's weights, filled, beside its zeros, hatched; and errors on the calibration text."""
    row = min(22.0, max(9.0, 720 / len(layers)))
    total = sum(layer["zeros"] for layer in layers) / sum(layer["weights"] for layer in layers)
    heads = [tag("text", "layer", x=LEFT - 10, y=HEAD - 10, class_="axis", text_anchor="end")]
    heads.append(tag("text", "weights that are not zero", x=LEFT, y=HEAD - 10, class_="axis"))
    if any("error" in layer for layer in layers):
        heads.append(tag("text", "error of outputs", x=WIDTH, y=HEAD - 10, class_="axis", text_anchor="end"))
    every = 1 if row >= 12 else 5
    rows = [_row(i, layer, HEAD + i * row, row, i % every == 0) for i, layer in enumerate(layers)]
    return picture(WIDTH, HEAD + len(layers) * row + 4, f"{percent(total)} of the weights are zero", *heads, *rows)


def _row(index: int, layer: Mapping[str, float], y: float, row: float, numbered: bool) -> Markup:
    full, share = WIDTH - NUMBERS - LEFT, 1 - layer["zeros"] / layer["weights"]
    words = f"Layer {index}: {layer['zeros']:,.0f} of {layer['weights']:,.0f} weights are zero"
    error = layer.get("error")
    if error is not None:
        words += f"; its outputs on the calibration text are off by {percent(error)} of their power"
    box = {"y": y + 1.5, "height": row - 3, "rx": 2.0}
    parts = [title(words), tag("rect", x=0, y=y, width=WIDTH, height=row, class_="hit")]
    parts.append(tag("rect", x=LEFT, width=full, class_="cut", **box))
    parts.append(tag("rect", x=LEFT, width=full * share, class_="kept", **box))
    if numbered:
        base = y + row / 2 + 3.5
        parts.append(tag("text", str(index), x=LEFT - 10, y=base, class_="count", text_anchor="end"))
        parts.append(tag("text", percent(share), x=LEFT + full + 50, y=base, class_="count", text_anchor="end"))
        if error is not None:
            parts.append(tag("text", percent(error), x=WIDTH, y=base, class_="count", text_anchor="end"))
    return tag("g", *parts, class_="layer")
