"""Makes `docs/results.md` and tables of `README.md` and `docs/sparse.md` from the JSON in `bench/results/`.

No number is typed by hand.

python bench/render.py            writes them
python bench/render.py --check    exits with 1 when they are not what the JSON says
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import render_distil
import render_learn
import render_sparse
from render_sparse import spread_of, table

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- results: written by bench/render.py -->", "<!-- end of results -->"
NOTE = "Dense is SmolLM2-135M-Instruct as a dequantised 4-bit (Q4_1) checkpoint, so its own losses are in the baseline."
SPREADS = ("uniform", "ends", "across")
AXES = ("neuron", "neuron+group")
SEEDS = (0, 1, 2)

Rows = dict[str, dict[str, Any]]


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def measured(data: dict[str, Any]) -> str:
    """How a table was made, under it."""
    machine, versions = data["machine"], data["machine"]["versions"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in data["rows"].values()))
    return (
        f"\n`{data['command']}`, commit {commits}, {machine['cpu']}, {machine['cores']} cores, "
        f"torch {versions['torch']}, transformers {versions['transformers']}.\n"
    )


def criteria(data: dict[str, Any]) -> str:
    rows: Rows = data["rows"]
    names = list(dict.fromkeys(key.split()[0] for key in rows if key != "dense"))
    columns = [(axes, spread) for axes in AXES for spread in SPREADS]
    body = []
    for name in names:
        cells = []
        for axes, spread in columns:
            found = [r["perplexity"] for k, r in rows.items() if k.startswith(f"{name} {axes} {spread} seed")]
            cells.append(spread_of(found))
        body.append([name, *cells])
    dense = rows["dense"]["perplexity"]
    calibration = data["settings"]["calibration"]
    text = (
        f"Perplexity at 80 % of the decoder weights, no recovery; dense {dense:.2f}. {NOTE} WikiText-2 test, first "
        f"20,480 tokens, blocks of 2048. Calibration: {calibration['tokens']:,} tokens of demo text in blocks of "
        f"{calibration['block']}. Mean ± standard deviation over calibration seeds (their number "
        "where fewer than 3).\n\n"
    )
    return text + table(["criterion", *(f"{a}, {s}" for a, s in columns)], body)


def distances(data: dict[str, Any]) -> str:
    """How far every criterion is below random, in standard deviations."""
    rows: Rows = data["rows"]
    columns = [(axes, spread) for axes in AXES for spread in SPREADS]
    names = [n for n in dict.fromkeys(key.split()[0] for key in rows if key != "dense") if n != "random"]
    body = []
    for name in names:
        cells = []
        for axes, spread in columns:
            ours, chance = (
                [r["perplexity"] for k, r in rows.items() if k.startswith(f"{n} {axes} {spread} seed")]
                for n in (name, "random")
            )
            star = "*" if ours and chance and max(ours) < min(chance) else ""
            nats = distance(*([math.log(x) for x in y] for y in (chance, ours)))
            cells.append(f"{distance(chance, ours)} / {nats}{star}")
        body.append([name, *cells])
    text = (
        "How far each is below random: difference of the means over the root of the summed variances, in perplexity "
        "and, after the stroke, in nats; positive is better than chance. A star: every seed is below every seed of "
        "random.\n\n"
    )
    return text + table(["criterion", *(f"{a}, {s}" for a, s in columns)], body)


def distance(first: list[float], second: list[float]) -> str:
    """First minus second in standard deviations; of one value alone the variance counts as nothing."""
    if not second or len(first) < 2:
        return "-"
    variances = [statistics.variance(values) for values in (first, second) if len(values) > 1]
    return f"{(statistics.fmean(first) - statistics.fmean(second)) / math.sqrt(sum(variances)):.1f}"


def outliers(data: dict[str, Any]) -> str:
    rows = [[key, f"{row['perplexity']:.1f}"] for key, row in data["rows"].items() if "perplexity" in row]
    ranks = [
        f"- {key}: above {', '.join(map(str, row['below']))} of {row['of']} groups (seeds {', '.join(map(str, SEEDS))})"
        for key, row in data["rows"].items()
        if "below" in row
    ]
    text = (
        "Why chance is so uneven, and where first-order Taylor falls. Same model, text and calibration as above, 80 % "
        "of the decoder weights where not said otherwise; kept units go above all others, and others go in their "
        "place.\n\n"
    )
    return text + table(["what was cut", "perplexity"], rows) + "\n\n" + "\n".join(ranks)


def defaults(data: dict[str, Any]) -> str:
    rows = [[key, f"{row['perplexity']:.2f}"] for key, row in data["rows"].items()]
    return f"What the defaults were chosen by: perplexity on held-out demo text. {NOTE}\n\n" + table(
        ["criterion, axes, spread, calibration tokens x block", "perplexity"], rows
    )


def refitted(data: dict[str, Any]) -> str:
    """What was tried on held-out text, then what the defaults win on the evaluation text."""
    rows, asked = data["rows"], data["settings"]
    about = (
        f"Perplexity at {asked['keep']} of the decoder weights, no training, as cut and with what reads the cut "
        f"heads and neurons fitted anew on {asked['defaults']['tokens']:,} tokens of calibration text, damped by "
        f"what does best between its halves; ends kept whole; dense {rows['dense']['perplexity']:.2f}. Error: "
        "relative, of the outputs of those linears on that text, mean.\n\n"
    )
    gains = []
    for name in dict.fromkeys(key.partition(" seed ")[0] for key in rows if " seed " in key):
        own = [row for key, row in rows.items() if key.startswith(f"{name} seed ")]
        error = [statistics.fmean(row["errors"][i] for row in own) for i in (0, 1)]
        shown = [spread_of([row[when] for row in own], 1) for when in ("as_cut", "refitted")]
        gains.append([name, *shown, f"{error[0]:.3f} -> {error[1]:.3f}"])
    tried = [
        [f"{int(key.split()[2]):,}", key.split()[-1], f"{row['as_cut']:.2f}", f"{row['refitted']:.2f}"]
        for key, row in rows.items()
        if key.startswith("held out")
    ]
    chosen = (
        f"Taylor (second order), neurons, on held-out demo text (dense {rows['dense']['heldout']:.2f}), by which the "
        "defaults were chosen:\n\n"
    )
    gained = table(["criterion, axes", "as cut", "refitted", "error"], gains) if gains else "Not measured yet."
    return about + gained + "\n\n" + chosen + table(["tokens", "damping", "as cut", "refitted"], tried)


def scoring_time(data: dict[str, Any]) -> str:
    rows = [[key, f"{row['ratio']:.3f}", f"± {row['std']:.3f}"] for key, row in data["rows"].items()]
    return "Time against plain forward passes over the same tokens, medians of runs taken in turns.\n\n" + table(
        ["work", "ratio", "spread"], rows
    )


def memory(data: dict[str, Any]) -> str:
    rows = [[key, f"{row['copies']:.3f}", f"{row['bytes'] / 1e6:,.0f} MB"] for key, row in data["rows"].items()]
    return (
        "Peak anonymous memory of `regrow prune` above importing the libraries, in copies of the fp32 model. The first "
        "rows are one batch of activations alone.\n\n" + table(["criterion", "copies of the model", "bytes"], rows)
    )


def latency(data: dict[str, Any]) -> str:
    rows = []
    for key, row in data["rows"].items():
        prompt, decode, (low, high) = row["prompt_ms"], row["decode_ms_per_token"], row["prompt_gain_quartiles"]
        rows.append(
            [
                key,
                f"{100 * row['promised_gain']:.0f} %",
                f"{100 * row['prompt_gain']:.0f} % ({100 * low:.0f} to {100 * high:.0f})",
                f"{row['share_of_promise']:.2f}",
                f"{prompt[0]:.0f} -> {prompt[1]:.0f}",
                f"{100 * row['decode_gain']:.0f} %",
                f"{decode[0]:.1f} -> {decode[1]:.1f}",
            ]
        )
    about = (
        f"Gain over dense for prompts of {data['settings']['prompt']} tokens, batch 1; median (quartiles) of many runs."
    )
    return f"{about}\n\n" + table(
        ["cut", "promised by FLOPs", "prompt gain", "share of promise", "prompt ms", "decode gain", "decode ms/token"],
        rows,
    )


def startup(data: dict[str, Any]) -> str:
    return table(["what", "seconds"], [[key, f"{row['seconds']:.2f}"] for key, row in data["rows"].items()])


def libraries(data: dict[str, Any]) -> str:
    rows, summary = [], data["rows"]["summary"]
    for what, name in (("read", "reading"), ("train", "training")):
        row = summary[what]
        rows.append([name, f"{row['median']:.2f}", f"{row['mean']:.2f} ± {row['std']:.2f}"])
    about = (
        f"Seconds with what torch takes by itself over seconds with {summary['library']}; "
        f"{data['settings']['tokens']:,} tokens, {data['settings']['turns']} turns. Largest difference of a logit, "
        f"over the largest: {summary['largest difference of logits']:.0e}.\n\n"
    )
    return about + table(["work", "median", "mean ± std"], rows)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "criteria": ("Criteria, spreads and axes", lambda data: f"{criteria(data)}\n\n{distances(data)}"),
    "outliers": ("The few units that carry most", outliers),
    "defaults": ("Defaults", defaults),
    "refit": ("Refitting what a cut leaves", refitted),
    "latency": ("Speed of cut models", latency),
    "scoring_time": ("Price of scoring", scoring_time),
    "memory": ("Memory", memory),
    "products": ("Faster products of fp32 matrices", libraries),
    "startup": ("Start-up and demo", startup),
    **render_sparse.SECTIONS,
    **render_distil.SECTIONS,
    **render_learn.SECTIONS,
}


def results() -> str:
    parts = ["# Results\n\nWritten by `python bench/render.py` from `bench/results/*.json`; do not edit.\n"]
    for name, (title, draw) in SECTIONS.items():
        data = load(name)
        if data is not None:
            parts.append(f"## {title}\n\n{draw(data)}\n{measured(data)}")
    return "\n".join(parts)


def with_block(page: str, block: str) -> str:
    """A page with what stands between the marks replaced."""
    text = (ROOT / page).read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main() -> int:
    criteria_data = load("criteria")
    pages = {
        ROOT / "docs" / "results.md": results(),
        ROOT / "README.md": with_block("README.md", criteria(criteria_data) if criteria_data else "Not measured yet."),
        ROOT / "docs" / "sparse.md": with_block(
            "docs/sparse.md", render_sparse.gains(*map(load, ("sparse", "spp", "sparse_speed", "sparse_memory")))
        ),
    }
    if "--check" in sys.argv:
        stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]
        print(f"stale: {', '.join(stale)}" if stale else "results are what the JSON says")
        return 1 if stale else 0
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
