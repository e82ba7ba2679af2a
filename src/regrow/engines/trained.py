"""Which weights a training of the model itself moves: all, or norms and what a cut has made smaller.

What this gives up: weights chosen by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from regrow.errors import SettingsError

Shapes = Mapping[str, tuple[int, ...]]  # of every parameter, by name

_LAYER = re.compile(r"\.\d+\.")


def cut_and_norms(model: Any, before: Shapes) -> set[str]:
    """Names of the model's norms and biases, and of matrices that are smaller than `before`.

    Layers are told apart by kind, not by number, since those that are left have moved up: of a dense model all have the
    same shapes. Raises `SettingsError` when nothing was cut.
    """
    whole = {_LAYER.sub(".*.", name): tuple(shape) for name, shape in before.items()}
    smaller = {
        name
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and whole.get(_LAYER.sub(".*.", name), tuple(weight.shape)) != tuple(weight.shape)
    }
    if not smaller:
        raise SettingsError(
            "recovery of what was cut alone, and no matrix is smaller than in the model before",
            "a model whose widths were cut, with that model as its teacher, or both in one run",
            "use method full or lora",
        )
    return smaller | {name for name, weight in model.named_parameters() if weight.ndim <= 1}


@contextmanager
def only(model: Any, names: Iterable[str] | None) -> Iterator[None]:
    """While open, of the model's weights only these require a gradient; None: as they are."""
    chosen, asked = None if names is None else set(names), {p: p.requires_grad for p in model.parameters()}
    try:
        if chosen is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in chosen)
        yield
    finally:
        for parameter, trains in asked.items():
            parameter.requires_grad_(trains)
