"""Tables of docs/results.md about gates that learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from render_distil import Rows, best, verdict
from render_sparse import ratios, spread_of, table

AGAINST = (
    ("numerous teachers are below the dense teacher", "numerous teachers", "dense teacher"),
    ("the dense teacher is below none", "dense teacher", "no teacher"),
    ("numerous teachers are below none", "numerous teachers", "no teacher"),
    ("learned gates are below Taylor, then LoRA", "numerous teachers", "Taylor, then LoRA"),
    ("learned gates are below activation, then distillation", "numerous teachers", "activation, then distillation"),
    ("by gap is below by count", "numerous teachers by gap", "numerous teachers"),
    ("temperature 1 is below 2/3", "numerous teachers, temperature 1", "numerous teachers"),
)
"""What is asked: which arm ends below which other."""


def at(rows: Rows, keep: int) -> Rows:
    """The rows of one size, with keys as those of any bench of arms."""
    mark = f" keep {keep} rate "
    return {key.replace(mark, " rate "): row for key, row in rows.items() if mark in key}


def ablations(data: dict[str, Any]) -> str:
    rows, asked = data["rows"], data["settings"]
    tokens, dense = asked["tokens"], rows.get("dense", {}).get("loss", float("nan"))
    parts = [
        f"Sprout, {tokens['learn'] + tokens['recover']:,} tokens in all ({tokens['learn']:,} while gates learn). Loss "
        f"in nats on held-out demo text; dense {dense:.3f}. Each arm at the best of its rates "
        f"({', '.join(f'{rate:g}' for rate in asked['rates'])}), chosen on the other half of that text; a seed counts "
        "once all of them were tried. `before`: as cut, before what recovers."
    ]
    for keep in asked["keeps"]:
        found = at(rows, keep)
        names = dict.fromkeys(key.partition(" rate ")[0] for key in found)
        chosen = {name: best(found, name, asked) for name in names}
        body = [
            [
                name,
                ", ".join(dict.fromkeys(runs[seed]["rate"] for seed in sorted(runs))),
                spread_of([row["before"] for row in runs.values()], 3),
                spread_of([row["loss"] for row in runs.values()], 3),
                f"{sum(row['parameters'] for row in runs.values()) / len(runs) / 1e6:.3f}",
            ]
            for name, runs in chosen.items()
            if runs
        ]
        if body:
            heads = [f"{100 - keep} % gone", "rate", "before", "after", "million parameters"]
            parts.append(table(heads, body))
    said = trends(rows, asked)
    return "\n\n".join([*parts, said] if said else parts)


def trends(rows: Rows, asked: dict[str, Any]) -> str:
    """By how much each thing holds, seed by seed, at each size."""
    body = []
    for claim, low, high in AGAINST:
        for keep in asked["keeps"]:
            found = at(rows, keep)
            ours, theirs = best(found, low, asked), best(found, high, asked)
            gaps = [theirs[seed]["loss"] - ours[seed]["loss"] for seed in ours if seed in theirs]
            if gaps:
                body.append([claim, f"{100 - keep} %", spread_of(gaps, 4), verdict(claim, gaps)])
    heads = ["what was asked", "gone", "by how much, same seed: mean ± standard deviation", "here"]
    return table(heads, body) if body else ""


def speed(data: dict[str, Any]) -> str:
    asked, rows = data["settings"], data["rows"]
    about = (
        f"SmolLM2, {asked['sequences']} x {asked['block']} tokens, LoRA on queries and values. `plain`: the dense "
        "model's forward, the student's forward and backward, its optimiser. `step`: gates on groups, neurons and "
        "channels, states of all blocks compared, and their optimisers too. `gates`: draws, size, gradients, "
        "optimiser.\n\n"
    )
    peaks = [
        [
            key.removeprefix("memory of "),
            *(f"{row[name] / 1e6:,.0f}" for name in ("plain", "step", "states")),
            f"{row['ratio']:.3f}",
        ]
        for key, row in rows.items()
        if key.startswith("memory of ")
    ]
    heads = ["tokens in a block", "plain, MB", "step, MB", "states compared, MB", "step without them / plain"]
    return about + ratios(data) + (f"\n\n{table(heads, peaks)}" if peaks else "")


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "learn_ablations": ("Gates that learn, and their teachers", ablations),
    "learn_speed": ("Price of a step of gates", speed),
}
