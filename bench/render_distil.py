"""Tables of docs/results.md about learning from a teacher."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from render_sparse import answers, ratios, spread_of, table

Row = dict[str, Any]
Rows = dict[str, Row]

SPROUT = Path(__file__).parents[1] / "tests" / "sprout" / "regrow.json"


def steps(data: dict[str, Any]) -> str:
    asked = data["settings"]
    about = (
        f"SmolLM2 cut to {asked['keep']} (neurons) learns from SmolLM2, {asked['sequences']} sequences of "
        f"{asked['block']} tokens, optimiser left out. `parts`: the teacher's forward, and the student's forward and "
        "backward on whole logits and the next token, each alone. `pieces` makes logits a few tokens at a time, "
        "`whole` all at once.\n\n"
    )
    return about + ratios(data)


def reached(row: Row, dense: Row) -> list[str]:
    """Perplexity, over the dense model's, and the loss on held-out text."""
    return [f"{row['perplexity']:.2f}", f"{row['perplexity'] / dense['perplexity']:.2f}", f"{row['heldout']:.3f}"]


def regrown(data: dict[str, Any]) -> str:
    """Perplexity on the way, then tasks."""
    rows, asked = data["rows"], data["settings"]
    dense = rows["dense"]
    tokens = asked["step"]["block"] * asked["step"]["batch"]
    about = (
        f"SmolLM2 at {asked['keep']} of the decoder weights, neurons only (Taylor, ends kept whole), all weights "
        f"trained on demo text, {tokens:,} tokens a step; dense {dense['perplexity']:.2f}. One run each. `of`: the "
        "tokens that a run's schedule is made for; it decays over its last fifth, so marks before are not decayed. "
        "Rates were chosen on held-out demo text.\n\n"
    )
    marks = [
        [
            key.partition(" at ")[0],
            f"{row['rate']:g}",
            f"{int(key.split()[-3]):,} of {int(key.split()[-1]):,}",
            *reached(row, dense),
        ]
        for key, row in rows.items()
        if " at " in key and "perplexity" in row
    ]
    marks.sort(
        key=lambda line: (line[0], int(line[2].split()[2].replace(",", "")), int(line[2].split()[0].replace(",", "")))
    )
    begun = {"as cut": rows["start"], "as cut, refitted": rows.get("refitted")}
    starts = [[what, "-", "0", *reached(row, dense)] for what, row in begun.items() if row]
    body = [*starts, *marks]
    heads = ["goal", "rate", "tokens", "perplexity", "of dense", f"held-out loss (dense {dense['heldout']:.3f})"]
    trials = [
        [key.partition(" rate ")[0], f"{row['rate']:g}", f"{row['heldout']:.3f}" if "heldout" in row else "broke"]
        for key, row in rows.items()
        if " rate " in key
    ]
    parts = [about + table(heads, body), table(["trial of 50k tokens", "rate", "held-out loss"], trials)]
    shown = answers(rows, beside="start")
    return "\n\n".join([*parts, shown] if shown else parts)


def ablations(data: dict[str, Any]) -> str:
    """What matters, in tables: arms, aggregations, ranking, tokens from scratch."""
    rows, asked = data["rows"], data["settings"]
    dense = rows.get("dense", {}).get("loss", math.nan)
    about = (
        f"Sprout cut to {asked['parameters'] / 1e6:.2f} million parameters, {asked['tokens']:,} tokens of training, "
        f"seeds: {len({key.partition(' seed ')[2] for key in rows if ' seed ' in key})}. Loss in nats on held-out demo "
        f"text; dense {dense:.3f}. Each arm at the best of its rates "
        f"({', '.join(f'{rate:g}' for rate in asked['rates'])}), chosen on the other half of that text; a seed counts "
        "once all of them were tried.\n\n"
    )
    tables = (aggregates(rows), rankings(rows), lengths(rows, asked), saved(rows, asked), trends(rows, asked))
    parts = [about + arms(rows, asked), *tables]
    return "\n\n".join(part for part in parts if part)


def best(rows: Rows, arm: str, asked: dict[str, Any]) -> dict[str, Row]:
    """By seed, the run with the rate that was best on the text that chooses; seeds for which all rates were tried."""
    tried: dict[str, list[Row]] = {}
    for key, row in rows.items():
        name, _, rest = key.partition(" rate ")
        rate, _, seed = rest.partition(" seed ")
        if name == arm and seed:
            tried.setdefault(seed, []).append({**row, "rate": rate})
    return {
        seed: min(found, key=lambda row: float(row["chosen_by"]))
        for seed, found in tried.items()
        if len(found) == len(asked["rates"])
    }


def arms(rows: Rows, asked: dict[str, Any]) -> str:
    names = [n for n in dict.fromkeys(k.partition(" rate ")[0] for k in rows if " rate " in k) if "scratch" not in n]
    base, body = best(rows, "cut", asked), []
    for name in names:
        found = best(rows, name, asked)
        if not found:
            continue
        gaps = [found[seed]["loss"] - base[seed]["loss"] for seed in found if seed in base]
        body.append(
            [
                name,
                ", ".join(dict.fromkeys(found[seed]["rate"] for seed in sorted(found))),
                spread_of([row["before"] for row in found.values()], 3),
                spread_of([row["loss"] for row in found.values()], 3),
                "-" if name == "cut" else spread_of(gaps, 3),
            ]
        )
    return table(["arm", "rate", "before", "after", "above `cut`, same seed"], body) if body else ""


def by_aggregate(rows: Rows) -> dict[str, dict[str, float]]:
    """Losses as cut, by how activations are put together, then by seed."""
    found: dict[str, dict[str, float]] = {}
    for key, row in rows.items():
        if key.startswith("cut by "):
            name, _, seed = key.removeprefix("cut by ").partition(" seed ")
            found.setdefault(name, {})[seed] = row["loss"]
    return found


def aggregates(rows: Rows) -> str:
    found = sorted(by_aggregate(rows).items(), key=lambda x: statistics.fmean(x[1].values()))
    body = [[name, spread_of(list(losses.values()), 3)] for name, losses in found]
    return table(["as cut by (over sequences, within a sequence)", "loss"], body) if body else ""


def ranked(rows: Rows, what: str) -> list[tuple[float, float]]:
    """Of each seed with all its shapes: Kendall's tau of the order by `what` to that after the whole training, and by
    how much the shape that `what` picks ends above the best."""
    by_seed: dict[str, list[Row]] = {}
    for key, row in rows.items():
        if key.startswith("shape "):
            by_seed.setdefault(key.partition(" seed ")[2], []).append(row)
    most = max(map(len, by_seed.values()), default=0)
    found = []
    for _, shapes in sorted(by_seed.items()):
        if len(shapes) == most > 1:
            full = [row["full"] for row in shapes]
            picked = min(shapes, key=lambda row: float(row[what]))
            found.append((tau([row[what] for row in shapes], full), picked["full"] - min(full)))
    return found


def rankings(rows: Rows) -> str:
    """How well losses as cut, and after a short training, foretell the order after the whole one."""
    body = []
    for what, name in (("as_cut", "as cut"), ("short", "after an eighth of the tokens")):
        if found := ranked(rows, what):
            orders, lost = [order for order, _ in found], [above for _, above in found]
            hits = f"{sum(above == 0 for above in lost)} of {len(lost)}"
            body.append([name, spread_of(orders, 2), hits, spread_of(lost, 4)])
    heads = [
        "shapes ranked",
        "Kendall's tau to the order after all tokens",
        "picks the best",
        "loss of its pick above it",
    ]
    return table(heads, body) if body else ""


def tau(first: list[float], second: list[float]) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(first, second).statistic)


def lengths(rows: Rows, asked: dict[str, Any]) -> str:
    """Width and depth by the tokens that they are trained with."""
    losses: dict[int, dict[str, list[float]]] = {}
    for arm in ("cut", "depth"):
        losses.setdefault(1, {})[arm] = [row["loss"] for row in best(rows, arm, asked).values()]
        for key, row in rows.items():
            if key.startswith(f"{arm} x"):
                factor = int(key.removeprefix(f"{arm} x").partition(" ")[0])
                losses.setdefault(factor, {}).setdefault(arm, []).append(row["loss"])
    body = [
        [f"{factor * asked['tokens']:,}", *(spread_of(found.get(arm, []), 3) for arm in ("cut", "depth"))]
        for factor, found in sorted(losses.items())
    ]
    return table(["tokens", "width (`cut`)", "depth"], body) if len(body) > 1 else ""


def saved(rows: Rows, asked: dict[str, Any]) -> str:
    """Tokens from scratch that reach what cutting and distilling reach."""
    reached = best(rows, "cut", asked)
    curves: dict[str, dict[int, float]] = {}
    for key, row in rows.items():
        if key.startswith("scratch x") and " rate " not in key:
            factor, _, seed = key.removeprefix("scratch x").partition(" seed ")
            curves.setdefault(seed, {})[int(factor)] = row["loss"]
    for seed, row in best(rows, "scratch x1", asked).items():
        curves.setdefault(seed, {})[1] = row["loss"]
    if not curves:
        return ""
    factors = sorted({factor for curve in curves.values() for factor in curve})
    losses = {f: [curve[f] for curve in curves.values() if f in curve] for f in factors}
    body = [
        [f"x{f}", f"{f * asked['tokens']:,}", f"{f * asked['tokens'] / asked['epoch']:.1f}", spread_of(losses[f], 3)]
        for f in factors
    ]
    said = [
        _needed(curve, reached[seed]["loss"], asked["tokens"])
        for seed, curve in sorted(curves.items())
        if seed in reached
    ]
    ours = spread_of([row["loss"] for row in reached.values()], 3)
    parent = json.loads(SPROUT.read_text())["training"]["tokens"]
    tried = {
        row["rate"]: row["loss"] for key, row in rows.items() if key.startswith("scratch x8 ") and key.endswith(" 0")
    }
    rates = ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in sorted(tried.items()))
    return (
        f"From random weights, next token. Cut and distilled: {ours} with "
        f"{asked['tokens']:,} tokens (its parent was trained on {parent:,}). The fewest tokens from scratch that reach "
        f"that, by seed: {', '.join(said) or 'not measured yet'}."
        + (f" Rates are those that were best at x1; at x8, seed 0: {rates}." if len(tried) > 1 else "")
        + "\n\n"
        + table(["from scratch", "tokens", "epochs of the text", "loss"], body)
    )


def _needed(curve: dict[int, float], goal: float, tokens: int) -> str:
    """Of the numbers of tokens that were tried, as multiples of `tokens`."""
    enough = [factor for factor in sorted(curve) if curve[factor] <= goal]
    return (
        f"{enough[0] * tokens:,} (x{enough[0]})"
        if enough
        else f"> x{max(curve)} tokens (lowest {min(curve.values()):.3f})"
    )


AGAINST = (
    ("after training, forward KL is below the next token", "loss", "cut", "cut, next token"),
    ("after training, a cut by activations is below one by lot", "loss", "cut", "random cut"),
    ("after training, a cut is below random weights", "loss", "cut", "random weights"),
    ("as cut, depth is below width", "before", "depth", "cut"),
    ("after training, width is below depth", "loss", "cut", "depth"),
    *((f"after training, one stage is no worse than {n}", "loss", "cut", f"{n} stages") for n in ("two", "four")),
    *((f"after training, (l2, mean) is no worse than {how}", "loss", "cut", f"by {how}")
      for how in ("(mean, mean)", "(l2, l2)", "(var, var)")),
)  # fmt: skip
"""What papers say: of which loss, which arm is below which other."""
ALIKE = 0.01  # nats by which what is no worse may be above


def trends(rows: Rows, asked: dict[str, Any]) -> str:
    """By how much each thing that papers say holds here, seed by seed."""
    gaps: dict[str, list[float]] = {}
    for claim, key, low, high in AGAINST:
        ours, theirs = best(rows, low, asked), best(rows, high, asked)
        gaps[claim] = [theirs[seed][key] - ours[seed][key] for seed in ours if seed in theirs]
    found = by_aggregate(rows)
    ours_as_cut = found.pop("(l2, mean)", {})
    for name, losses in found.items():
        shared = [seed for seed in ours_as_cut if seed in losses]
        gaps[f"as cut, (l2, mean) is no worse than {name}"] = [losses[seed] - ours_as_cut[seed] for seed in shared]
    pairs = list(zip(ranked(rows, "short"), ranked(rows, "as_cut"), strict=True))
    gaps["a short training ranks shapes better than losses as cut (tau)"] = [a[0] - b[0] for a, b in pairs]
    gaps["the pick of a short training loses less than the pick as cut"] = [b[1] - a[1] for a, b in pairs]
    body = [[claim, spread_of(values, 4), verdict(claim, values)] for claim, values in gaps.items() if values]
    heads = ["what papers say", "by how much, same seed: mean ± standard deviation", "here"]
    about = f"What is no worse may be above by {ALIKE:g} nats; what is below must be so by more than the deviation.\n\n"
    return about + table(heads, body) if body else ""


def verdict(claim: str, gaps: list[float]) -> str:
    """Above 0 is as said; a mean within the standard deviation says nothing, and neither does one seed."""
    if len(gaps) < 2:
        return "within noise (one seed)"
    mean = statistics.fmean(gaps)
    if "no worse" in claim:
        return "held" if mean > -ALIKE else "not held"
    if abs(mean) <= statistics.stdev(gaps):
        return "within noise"
    return "held" if mean > 0 else "not held"


def memory(data: dict[str, Any]) -> str:
    rows = data["rows"]
    peaks: dict[str, list[float]] = {}
    for key, row in rows.items():
        if key.startswith("vocabulary "):
            peaks.setdefault(key.split()[1], []).append(row["peak_bytes"] / 1e6)
    body = [
        [f"{int(words):,}", f"{statistics.median(found):,.0f}", f"{min(found):,.0f} to {max(found):,.0f}"]
        for words, found in peaks.items()
    ]
    grown, parts = rows.get("growth"), [table(["words", "peak, MB (median)", "from, to"], body)]
    if grown:
        parts.append(
            f"Grown by {grown['bytes'] / 1e6:,.0f} MB; the student's embedding, its gradient, two numbers of the "
            f"optimiser and the teacher's embedding are {grown['due'] / 1e6:,.0f} MB: {grown['ratio']:.3f}."
        )
    if waited := rows.get("waiting"):
        parts.append(
            f"SmolLM2 at 80 % from SmolLM2, {waited['tokens']:,} tokens: the loop waits for batches "
            f"{100 * waited['waiting']:.2f} % of the time; tokenising and packing them took "
            f"{100 * waited['packing']:.2f} % as long as the training."
        )
    return "\n\n".join(parts)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "distil": ("Cut to 80 % and regrown", regrown),
    "distil_ablations": ("What matters when a cut model is distilled", ablations),
    "distil_speed": ("Price of a step from a teacher", steps),
    "distil_memory": ("Memory and waiting of learning from a teacher", memory),
}
