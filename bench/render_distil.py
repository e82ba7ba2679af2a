"""Tables of docs/results.md about learning from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from render_sparse import ratios


def steps(data: dict[str, Any]) -> str:
    asked = data["settings"]
    about = (
        f"SmolLM2 cut to {asked['keep']} (neurons) learns from SmolLM2, {asked['sequences']} sequences of "
        f"{asked['block']} tokens, optimiser left out. `parts`: the teacher's forward, and the student's forward and "
        "backward on whole logits and the next token, each alone. `pieces` makes logits a few tokens at a time, "
        "`whole` all at once.\n\n"
    )
    return about + ratios(data)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "distil_speed": ("Price of a step from a teacher", steps),
}
