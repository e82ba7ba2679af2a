"""Sections of `docs/results.md` about sparse models, from the JSON of their benches; `render.py` puts them in place."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

Rows = dict[str, dict[str, Any]]
PATTERNS = ("50%", "2:4", "75%", "2:8")
CURVE = [
    "start, method",
    "rate",
    "trained numbers",
    "tokens",
    "perplexity",
    "gap closed",
    "held-out loss",
    "weights changed",
]
READ = (" tokens", " text")  # ends of rows of other calibrations
FAILED = ("alps, both (mend 1)",)  # docs/log.md has the reason
ARMS = ("spp", "lora-masked", "hira", "ia3", "full", "spp, teacher")


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread_of(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation; of fewer than three values, how many there are."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1)"
    few = "" if len(values) >= 3 else f" ({len(values)})"
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}{few}"


def by_method(rows: Rows) -> dict[tuple[str, str], dict[str, float]]:
    """Perplexities by (method, pattern), then by seed."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, row in rows.items():
        if " seed " in key:
            name, pattern = key.partition(" seed ")[0].rsplit(" ", 1)
            found.setdefault((name, pattern), {})[key.partition(" seed ")[2]] = row["perplexity"]
    return found


def choices(data: dict[str, Any]) -> str:
    """What defaults were chosen by."""
    found = by_method(data["rows"])
    body = [
        [name, *(spread_of(list(found.get((name, pattern), {}).values())) for pattern in PATTERNS[:2])]
        for name in sorted({name for name, _ in found})
    ]
    about = (
        f"Perplexity on held-out demo text, dense {data['rows']['dense']['perplexity']:.2f}; SparseGPT unless named. "
        "Mean ± standard deviation over calibration seeds (their number where fewer than 3).\n\n"
    )
    return about + table(["choice", *PATTERNS[:2]], body)


def quality(data: dict[str, Any]) -> str:
    """Perplexity of every method and pattern; beside ours, how far below SparseGPT's on the same seeds."""
    return f"{shown_by(data, plain=True)}\n\n{masks(data['rows'])}"


def shown_by(data: dict[str, Any], *, plain: bool) -> str:
    """With `plain`, the published loops too."""
    found = by_method(data["rows"])
    aside = () if plain else ("plain", *FAILED)
    names = [n for n in dict.fromkeys(name for name, _ in found) if not n.startswith(aside) and not n.endswith(READ)]
    firsts = {name: found.get((name, PATTERNS[0]), {"-": math.inf}) for name in names}
    body = []
    for name in sorted(names, key=lambda n: (n.startswith("plain"), -statistics.fmean(firsts[n].values()))):
        cells = []
        for pattern in PATTERNS:
            ours, base = found.get((name, pattern), {}), found.get(("sparsegpt", pattern), {})
            gains = [100 * (1 - ours[seed] / base[seed]) for seed in ours if seed in base]
            gain = statistics.fmean(gains) if gains else -math.inf
            shown = f" ({gain:+.1f} %)" if name != "sparsegpt" and gain > -100 else ""
            cells.append(spread_of(list(ours.values())) + shown)
        body.append([name, *cells])
    settings = data["settings"]["calibration"]
    about = (
        f"Perplexity without training; dense {data['rows']['dense']['perplexity']:.2f}. Calibration: "
        f"{settings['tokens']:,} tokens of {settings['text']} text in blocks of {settings['block']}; evaluation: "
        "WikiText-2 test, first 20,480 tokens, blocks of 2048. Mean ± standard deviation over calibration seeds "
        "(their number where fewer than 3). In brackets: how far below SparseGPT on the same seeds. "
    )
    loops = (
        "`plain` are the published loops, written from their specification in `bench/plain.py`; sums of squares are "
        "wider there than published."
    )
    parts = [about + (loops if plain else ""), table(["method", *PATTERNS], body), texts(found, settings)]
    return "\n\n".join(parts)


def texts(found: dict[tuple[str, str], dict[str, float]], usual: dict[str, Any]) -> str:
    """What SparseGPT at 2:4 makes of other calibrations, beside the usual one with the same seed."""
    base = found["sparsegpt", "2:4"]["0"]
    rows = {f"{usual['text']} text, {usual['tokens']:,} tokens": base} | {
        name.partition(", ")[2]: seeds["0"] for (name, _), seeds in found.items() if name.endswith(READ)
    }
    about = "SparseGPT at 2:4 with other calibrations, one run each; what is not named is as above.\n\n"
    body = [
        [name, f"{value:.1f}", "-" if value == base else f"{100 * (1 - value / base):+.1f} %"]
        for name, value in sorted(rows.items(), key=lambda row: -row[1])
    ]
    return about + table(["calibration", "perplexity", "below the usual"], body)


def gains(
    sparse: dict[str, Any] | None,
    spp: dict[str, Any] | None,
    speeds: dict[str, Any] | None,
    room: dict[str, Any] | None,
) -> str:
    """What choices gain and cost, in short."""
    parts = [shown_by(sparse, plain=False)] if sparse else []
    if speeds and room:
        parts.append(
            "What it costs, for whole runs over the first "
            f"{speeds['settings']['layers']} layers: times in SparseGPT's (medians), memory beyond the model in MB:\n\n"
            + prices(speeds["rows"], room["rows"])
        )
    curves = curve_rows(spp["rows"]) if spp else []
    if spp and any("trained" in row and "perplexity" in row for row in spp["rows"].values()):
        parts.append(f"With training. {trained_on(spp)}\n\n" + table(CURVE, curves))
    return "\n\n".join(parts) or "Not measured yet."


def prices(speeds: Rows, room: Rows) -> str:
    """Time and memory of each method and pattern, as far as they were measured."""
    patterns = PATTERNS[:2]
    found = {pattern: speeds.get(f"methods {pattern}", {}) for pattern in patterns}
    body = []
    for name in dict.fromkeys(key.rpartition(" ")[0] for key in room if not key.startswith(("step: ", "experts: "))):
        times = [
            "1" if name == "sparsegpt" else f"{found[p][name]['median']:.2f}" if name in found[p] else "-"
            for p in patterns
        ]
        rows = [room.get(f"{name} {p}") for p in patterns]
        body.append([name, *times, *(f"{row['bytes'] / 1e6:.0f}" if row else "-" for row in rows)])
    return table(["method", *(f"time, {p}" for p in patterns), *(f"memory, {p}" for p in patterns)], body)


def trained_on(spp: dict[str, Any]) -> str:
    settings = spp["settings"]
    tokens = settings["step"]["block"] * settings["step"]["batch"]
    return (
        f"SparseGPT's zeros and the demo's recovery text, seed 0; rank {settings['adapters']['rank']}, scale "
        f"{settings['adapters']['alpha'] // settings['adapters']['rank']}, no dropout; {tokens:,} tokens a step, "
        f"warm-up and then a constant rate, the best of {len(settings['rates'])} for each method on held-out text. "
        "Perplexity is that of WikiText-2; held-out loss, in nats, that of text like the one trained on (dense "
        f"{spp['rows']['dense']['heldout']:.3f})."
    )


def masks(rows: Rows) -> str:
    """In how many runs two methods that should agree left the same zeros in the whole model."""
    found = []
    for name in ("magnitude", "wanda"):
        pairs = [
            (row, rows[f"plain {key}"])
            for key, row in rows.items()
            if key.startswith(f"{name} ") and f"plain {key}" in rows
        ]
        both = [(a["mask"], b["mask"]) for a, b in pairs if "mask" in a and "mask" in b]
        found.append(f"{name} in {sum(a == b for a, b in both)} of {len(both)} runs")
    return f"The same zeros in the whole model as the plain loop: {', '.join(found)}."


def speed(data: dict[str, Any]) -> str:
    settings = data["settings"]
    about = (
        f"{settings['tokens']:,} tokens in blocks of {settings['block']}, the first {settings['layers']} blocks of the "
        f"model, {settings['repeats']} turns. `passes` are the forward passes that every block needs: two, and of the "
        "last block one where nobody reads what it gives. `beyond` is the time past them, `plain` the published loop "
        "(`bench/plain.py`), `floor` the passes and the operations of Grams, factors and updates at the speed of a "
        "matrix product measured in the same turn.\n\n"
    )
    return about + ratios(data)


def ratios(data: dict[str, Any]) -> str:
    rows = [
        [name, f"{row['median']:.2f}", f"{row['mean']:.2f} ± {row['std']:.2f}"]
        for name, row in data["rows"].get("summary", {}).items()
        if isinstance(row, dict)
    ]
    return table(["ratio of times", "median", "mean ± std"], rows)


def memory(data: dict[str, Any]) -> str:
    rows = []
    for key, row in data["rows"].items():
        stated = f"{row['stated'] / 1e6:.0f}" if "stated" in row else "-"
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        rows.append([key, f"{row['bytes'] / 1e6:.0f}", stated, ratio])
    about = (
        "Beyond the loaded model, in MB; `step` is a training step over the decoder blocks with 1,024 tokens, "
        "`experts` a random layer of eight experts.\n\n"
    )
    return about + table(["what", "measured", "stated by `estimate`", "ratio"], rows)


def steps(data: dict[str, Any]) -> str:
    about = (
        "Forward and backward over the decoder blocks, 1,024 tokens. `frozen`: forward and the input's gradient.\n\n"
    )
    return about + ratios(data)


def recovery(data: dict[str, Any]) -> str:
    """Curves of perplexity, then zero-shot tasks in pairs."""
    rows: Rows = data["rows"]
    dense = rows["dense"]["perplexity"]
    about = (
        f"Dense {dense:.2f}. {trained_on(data)} One run each; every zero kept, checked at every mark. Rates were "
        "chosen after 50k tokens; the evaluation text was not looked at before.\n\n"
    )
    trials = [
        [
            k.partition(" rate ")[0],
            f"{r['rate']:g}",
            f"{r['heldout']:.3f}" if "heldout" in r else f"broke: {r['broken']}",
        ]
        for k, r in rows.items()
        if " rate " in k and ("broken" in r or "perplexity" not in r)
    ]
    parts = [about + table(CURVE, curve_rows(rows)), table(["trial", "rate", "held-out loss after 50k tokens"], trials)]
    shown = answers(rows)
    return "\n\n".join([*parts, shown] if shown else parts)


def curve_rows(rows: Rows) -> list[list[str]]:
    """A line for each start, and for each mark that a training passed."""
    if "dense" not in rows:
        return []
    dense, body = rows["dense"]["perplexity"], []
    for start in ("2:4", "75%"):
        if f"{start} start" not in rows:
            continue
        begin = rows[f"{start} start"]["perplexity"]
        held = rows[f"{start} start"]["heldout"]
        body.append([f"{start}, untrained", "-", "-", "0", f"{begin:.1f}", "-", f"{held:.3f}", "-"])
        for arm in ARMS:
            trained = [r for k, r in rows.items() if k.startswith(f"{start} {arm} rate ") and "perplexity" in r]
            for row in sorted(trained, key=lambda r: r["tokens"]):
                closed = (begin - row["perplexity"]) / (begin - dense)
                body.append(
                    [
                        f"{start}, {arm}",
                        f"{row['rate']:g}",
                        f"{row['trained']:,}",
                        f"{row['tokens']:,}",
                        f"{row['perplexity']:.1f}",
                        f"{100 * closed:.0f} %",
                        f"{row['heldout']:.3f}",
                        f"{100 * row['changed']:.0f} %",
                    ]
                )
    return body


def answers(rows: Rows, beside: str = " spp at ") -> str:
    """Zero-shot accuracy by model and task; differences in pairs to the first model whose name holds `beside`, a
    verdict only beyond two standard errors."""
    models = list(dict.fromkeys(key.rpartition(": ")[0] for key, row in rows.items() if "correct" in row))
    tasks = list(dict.fromkeys(key.rpartition(": ")[2] for key, row in rows.items() if "correct" in row))
    if not models:
        return ""
    main = next((model for model in models if beside in model), models[0])
    body = []
    for model in models:
        mine = [rows.get(f"{model}: {task}") for task in tasks]
        cells = [f"{100 * share(row):.1f}" if row else "-" for row in mine]
        whole = [row for row in mine if row]
        bits = sum(sum(row["gold_bits"]) for row in whole) / sum(sum(row["gold_bytes"]) for row in whole)
        mean = f"{100 * statistics.fmean(share(row) for row in whole):.1f}" if len(whole) == len(tasks) else "-"
        body.append([model, *cells, mean, f"{bits:.3f}", verdict(rows, tasks, model, main)])
    return (
        "Zero-shot accuracy in percent, the same first 500 items of each task (all of ARC-c); last, the mean "
        f"difference to `{main}` over all items in pairs, ± two standard errors.\n\n"
        + table(["model", *tasks, "mean", "gold bits/byte", "difference"], body)
    )


def share(row: dict[str, Any]) -> float:
    right: str = row["correct"]
    return right.count("1") / len(right)


def verdict(rows: Rows, tasks: list[str], model: str, main: str) -> str:
    """Mean over tasks of the paired differences; errors of tasks add up as independent."""
    means, variances = [], []
    for task in tasks:
        mine, theirs = rows.get(f"{model}: {task}"), rows.get(f"{main}: {task}")
        if mine is None or theirs is None or model == main:
            return "-"
        gaps = [int(a) - int(b) for a, b in zip(mine["correct"], theirs["correct"], strict=True)]
        means.append(statistics.fmean(gaps))
        variances.append(statistics.variance(gaps) / len(gaps))
    gap, error = 100 * statistics.fmean(means), 100 * math.sqrt(sum(variances)) / len(tasks)
    word = "no verdict" if abs(gap) <= 2 * error else "better" if gap > 0 else "worse"
    return f"{gap:+.1f} ± {2 * error:.1f}, {word}"


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "sparse": ("Zeros in one shot", quality),
    "sparse_defaults": ("Choices of zeros in one shot", choices),
    "sparse_speed": ("Price of zeros in one shot", speed),
    "sparse_memory": ("Memory of sparse models' work", memory),
    "spp": ("Tuning that keeps zeros", recovery),
    "spp_speed": ("Price of an SPP step", steps),
}
