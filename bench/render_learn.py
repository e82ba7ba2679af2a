"""Tables of docs/results.md about gates that learn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from render_distil import Rows, best, verdict
from render_sparse import answers, ratios, share, spread_of, table

AGAINST = (
    ("numerous teachers are below the dense teacher", "numerous teachers", "dense teacher"),
    ("the dense teacher is below none", "dense teacher", "no teacher"),
    ("numerous teachers are below none", "numerous teachers", "no teacher"),
    ("learned gates are below Taylor, then LoRA", "numerous teachers", "Taylor, then LoRA"),
    ("learned gates are below activation, then distillation", "numerous teachers", "activation, then distillation"),
    ("a start by scores is below an even one", "numerous teachers", "numerous teachers, even start"),
    (
        "multipliers that let go are below those that do not",
        "numerous teachers, even start",
        "numerous teachers, even start, no unwinding",
    ),
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


def levels(data: dict[str, Any]) -> str:
    rows, asked = data["rows"], data["settings"]
    dense = rows.get("dense", {}).get("loss", float("nan"))
    rates = ", ".join(f"{rate:g}" for rate in asked["rates"])
    about = (
        f"Sprout to 75 % zeros (SparseGPT), SPP on {asked['tokens']:,} tokens. Loss in nats on held-out demo text; "
        f"dense {dense:.3f}. Each arm at the best of its rates ({rates}), chosen "
        "on the other half of that text; a seed counts once all of them were tried."
    )
    chosen = {name: best(rows, name, asked) for name in dict.fromkeys(k.partition(" rate ")[0] for k in rows)}
    base = chosen.get("at once, dense teacher", {})
    body = [
        [
            name,
            ", ".join(dict.fromkeys(runs[seed]["rate"] for seed in sorted(runs))),
            spread_of([row["loss"] for row in runs.values()], 3),
            spread_of([runs[seed]["loss"] - base[seed]["loss"] for seed in runs if seed in base], 4),
        ]
        for name, runs in chosen.items()
        if runs
    ]
    heads = ["arm", "rate", "loss", "above `at once, dense teacher`, same seed"]
    claims = (
        ("levels are below at once, dense teacher", "levels, dense teacher", "at once, dense teacher"),
        ("numerous teachers are below the dense one, levels", "levels, numerous teachers", "levels, dense teacher"),
    )
    gaps = {
        claim: [chosen[high][seed]["loss"] - chosen[low][seed]["loss"] for seed in chosen[low] if seed in chosen[high]]
        for claim, low, high in claims
        if low in chosen and high in chosen
    }
    said = [[claim, spread_of(found, 4), verdict(claim, found)] for claim, found in gaps.items() if found]
    parts = [about] + ([table(heads, body)] if body else [])
    more = ["what was asked", "by how much, same seed: mean ± standard deviation", "here"]
    return "\n\n".join([*parts, table(more, said)] if said else parts)


PAPER = {"80%": 97.17, "75%": 95.07}


def smollm2(data: dict[str, Any]) -> str:
    """What was kept of SmolLM2, three ways to say it, beside the paper's."""
    rows, asked = data["rows"], data["settings"]
    dense, tokens = rows["dense"], asked["tokens"]
    about = (
        f"SmolLM2, {tokens['learn'] + tokens['recover']:,} tokens of demo text an arm, which recover alike; `learned` "
        f"spends {tokens['learn']:,} of them while gates learn. Dense: {dense['perplexity']:.2f}. "
        "Retention over seven tasks: mean accuracy over the dense model's (raw, as the paper counts), the same above "
        "chance, and gold-answer bits per byte (dense over cut). One run an arm; the paper cut LLaMA-7B.\n\n"
    )
    body = []
    for key, row in rows.items():
        arm, at, keep = key.partition(" at ")
        if not at or keep not in asked["keeps"]:
            continue
        gone = ", ".join(f"{100 * share:.1f} % of {unit}s" for unit, share in row["gone"].items() if share)
        body.append(
            [
                arm,
                keep,
                gone,
                f"{row['perplexity']:.2f}",
                f"{row['perplexity'] / dense['perplexity']:.2f}",
                f"{row['heldout']:.3f}",
                *retained(rows, key),
                f"{PAPER[keep]:.2f}" if arm != "scores" else "-",
            ]
        )
    heads = ["arm", "kept", "gone", "perplexity", "of dense", "held-out loss", "raw, %", "above chance, %"]
    parts = [table([*heads, "gold bits, %", "paper (raw), %"], body)]
    for keep in asked["keeps"]:
        own = {key: row for key, row in rows.items() if key.startswith("dense") or f" at {keep}" in key}
        if shown := answers(own, beside=f"scores at {keep}"):
            parts.append(shown)
    return about + "\n\n".join(parts)


def retained(rows: Rows, name: str) -> list[str]:
    """Raw, above chance, by gold bits; of models with all tasks of the dense one."""
    asked = [key.removeprefix("dense: ") for key in rows if key.startswith("dense: ")]
    pairs = [(rows[f"dense: {task}"], rows.get(f"{name}: {task}")) for task in asked]
    if not pairs or any(cut is None for _, cut in pairs):
        return ["-"] * 3
    both = [(was, now) for was, now in pairs if now is not None]
    before, after = (statistics.fmean(share(pair[i]) for pair in both) for i in (0, 1))
    chance = statistics.fmean(was["chance"] for was, _ in both)
    bits = [sum(sum(pair[i]["gold_bits"]) for pair in both) for i in (0, 1)]
    return [f"{100 * x:.2f}" for x in (after / before, (after - chance) / (before - chance), bits[0] / bits[1])]


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
    "learn": ("Gates that learn on SmolLM2", smollm2),
    "levels": ("Levels of zeros, and their teachers", levels),
    "learn_speed": ("Price of a step of gates", speed),
}
