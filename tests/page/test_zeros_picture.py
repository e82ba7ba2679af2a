"""The picture of a sparse model: what is zero in each layer is drawn and said, with errors where they are known."""

from __future__ import annotations

import re

from regrow.page.zeros import LEFT, NUMBERS, WIDTH, draw_zeros

LAYERS = ({"weights": 200.0, "zeros": 50.0, "error": 0.031}, {"weights": 100.0, "zeros": 100.0})


def widths(picture: str, kind: str) -> list[float]:
    return [float(found) for found in re.findall(rf'width="([\d.]+)" class="{kind}"', picture)]


def test_bars_are_as_long_as_what_is_left() -> None:
    picture = str(draw_zeros(LAYERS))
    full = WIDTH - NUMBERS - LEFT
    assert widths(picture, "kept") == [full * 0.75, 0.0]
    assert widths(picture, "cut") == [full, full]


def test_numbers_are_said() -> None:
    picture = str(draw_zeros(LAYERS))
    assert "50.0 % of the weights are zero" in picture
    assert "Layer 0: 50 of 200 weights are zero; its outputs on the calibration text are off by 3.1 %" in picture
    assert "Layer 1: 100 of 100 weights are zero<" in picture
    assert ">75.0 %<" in picture
    assert ">3.1 %<" in picture
    assert "error of outputs" in picture
    assert "error of outputs" not in str(draw_zeros(LAYERS[1:]))
