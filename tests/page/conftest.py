"""A made-up run over a real model's proportions (30 layers, 3 groups of 3 heads, 1536 neurons), the same every time.

What this gives up: the numbers mean nothing; they only look like a run's.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from regrow.artifacts.plan import LayerPlan, Plan
from regrow.artifacts.report import Measure, Report

LAYERS, GROUPS, HEADS, NEURONS, CHANNELS = 30, 3, 3, 1536, 576
NOTE = "dense is a dequantised 4-bit (Q4_1) checkpoint, so its own losses are part of the baseline"
RECIPE = """\
# Minitron's road at the price of an afternoon
model: demo
budget: 80%
score: {criterion: activations, text: demo, tokens: 262144}
plan: {spread: global, layers: 1}
recover: {loss: forward-kl, tokens: 12582912, lr: 3.0e-4}
evaluate: {text: wikitext-2, tasks: [arc_easy, piqa]}
"""
SAMPLES = (
    {
        "prompt": "The old gardener looked at the apple tree and",
        "before": " shook his head. It had not borne fruit for three years, and the roots lay bare in the thin soil.",
        "after": ' said that it would have to be cut back before winter. "It will grow again," he told the children.',
    },
    {
        "prompt": "def fibonacci(n):",
        "before": "\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)",
        "after": "\n    if n <= 1:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)",
    },
)
TASKS: dict[str, tuple[float, float, int, float]] = {  # before, after, questions, chance
    "arc_challenge": (0.2961, 0.2799, 1172, 0.25),
    "arc_easy": (0.5884, 0.5480, 2376, 0.25),
    "boolq": (0.6009, 0.5896, 3270, 0.6217),
    "hellaswag": (0.4307, 0.3950, 10042, 0.25),
    "openbookqa": (0.3220, 0.3080, 500, 0.25),
    "piqa": (0.6806, 0.6643, 1838, 0.5),
    "winogrande": (0.5241, 0.5193, 1267, 0.5),
}


def share_error(value: float, samples: int) -> float:
    return math.sqrt(value * (1 - value) / samples)


def measures(side: int) -> dict[str, Measure]:
    """Side 0 is before, 1 after."""
    text = {"text": "wikitext-2 raw", "split": "test", "block": 2048, "stride": 2048, "bos": True, "tokens": 335872}
    harness = {"harness": "lm_eval 0.4.13", "shots": 0, "batch": 8, "limit": None}
    clock = {"threads": 2, "prompt_tokens": 512, "warm_up": 3, "repeats": 20, "dtype": "bfloat16"}

    def of(values: tuple[float, float], unit: str, better: str, **more: Any) -> Measure:
        return Measure(values[side], unit, better, **more)

    found = {
        "text/perplexity": of((17.203, 18.944), "perplexity", "lower", stderr=0.112, samples=164, how=text),
        "text/bits_per_byte": of((0.8413, 0.8701), "bits/byte", "lower", stderr=0.0029, samples=164, how=text),
    }
    for name, (before, after, samples, chance) in TASKS.items():
        value = (before, after)[side]
        metrics = ("acc",) if name in ("boolq", "winogrande") else ("acc_norm", "acc")
        for metric in metrics:
            shown = value - (0.011 if metric != metrics[0] else 0.0)
            found[f"task/{name}/{metric}"] = Measure(
                shown, "accuracy", "higher", share_error(shown, samples), samples, chance, harness
            )
        gold = (1.31 - before, 1.34 - after)[side]
        found[f"task/{name}/gold_bits_per_byte"] = Measure(
            gold, "bits/byte", "lower", 0.31 / math.sqrt(samples), samples, None, harness
        )
    return found | {
        "size/parameters": of((134515008, 112967232), "", "lower"),
        "size/decoder_weights": of((106168320, 84922368), "", "lower"),
        "size/file_bytes": of((269060552, 225964800), "bytes", "lower"),
        "size/flops_per_token": of((282066944, 238231552), "FLOPs", "lower", how={"context": 1024}),
        "speed/prompt": of((412.4, 486.9), "tokens/s", "higher", stderr=3.1, samples=20, how=clock),
        "speed/generate": of((38.61, 39.02), "tokens/s", "higher", stderr=0.34, samples=20, how=clock),
        "speed/first_token_ms": of((1241.8, 1051.6), "ms", "lower", stderr=9.4, samples=20, how=clock),
        "memory/peak_bytes": of((611319808, 541065216), "bytes", "lower", stderr=1.2e6, samples=5, how=clock),
        "memory/kv_bytes_per_token": of((23040, 19968), "bytes per token", "lower"),
    }


def kept_counts() -> list[tuple[int, int]]:
    """Groups and neurons of every layer that stays; layer 21 is gone."""
    rows = []
    for i in range(LAYERS):
        arch = math.sin(math.pi * i / (LAYERS - 1))
        rows.append((2 if i in (11, 14, 17, 22, 25) else 3, int(1520 - 480 * arch) // 16 * 16))
    return rows


@pytest.fixture(name="scores")
def make_scores() -> dict[str, list[list[float]]]:
    dice = random.Random(7)
    return {
        "group": [[dice.lognormvariate(i / 20, 0.4) for _ in range(GROUPS)] for i in range(LAYERS)],
        "neuron": [[dice.lognormvariate(-2 + i / 10, 0.9) for _ in range(NEURONS)] for i in range(LAYERS)],
        "channel": [[dice.lognormvariate(0, 0.5) for _ in range(CHANNELS)]],
        "layer": [[dice.lognormvariate(0, 0.6) + 2 * (i in (0, 1, LAYERS - 1)) for i in range(LAYERS)]],
    }


@pytest.fixture(name="plan")
def make_plan(scores: dict[str, list[list[float]]]) -> Plan:
    layers = []
    for i, (groups, neurons) in enumerate(kept_counts()):
        if i == 21:
            continue
        best_groups = sorted(sorted(range(GROUPS), key=lambda g: -scores["group"][i][g])[:groups])
        best = sorted(sorted(range(NEURONS), key=lambda n: -scores["neuron"][i][n])[:neurons])
        heads = tuple(HEADS * g + h for g in best_groups for h in range(HEADS))
        layers.append(LayerPlan(i, tuple(best_groups), heads, tuple(best)))
    return Plan(tuple(range(CHANNELS)), tuple(layers))


@pytest.fixture(name="report")
def make_report(plan: Plan) -> Report:
    dice = random.Random(3)
    training = []
    for step in range(1, 769):
        row = {
            "step": float(step),
            "tokens": 16384.0 * step,
            "loss": 0.42 + 2.1 * math.exp(-step / 60) + dice.gauss(0, 0.05),
        }
        if step % 64 == 0:
            row["eval_loss"] = 0.45 + 2.0 * math.exp(-step / 62)
        training.append(row)
    return Report(
        model={
            "id": "HuggingFaceTB/SmolLM2-135M",
            "note": NOTE,
            "licence": "apache-2.0",
            "fingerprint": "9f2c61d07ab3",
        },
        made_by={
            "recipe": "minitron",
            "budget": "80%",
            "seed": 17,
            "spread": "global",
            "criteria": {"group": "activations", "neuron": "activations", "layer": "block-influence"},
        },
        shape={
            "before": {"channels": CHANNELS, "layers": [[GROUPS, HEADS, NEURONS]] * LAYERS},
            "after": plan.shape().to_json(),
        },
        before=measures(0),
        after=measures(1),
        samples=SAMPLES,
        machine={
            "cpu": "AMD EPYC 7763",
            "cores": 2,
            "memory": "24 GiB",
            "threads": 2,
            "python": "3.11.9",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "lm_eval": "0.4.13", "regrow": "0.1.0"},
        },
        notes=(
            "boolq is below the share of its most frequent answer before any cut: it says nothing here.",
            "Texts for calibration, recovery and evaluation do not overlap.",
        ),
        stages={
            "load": 3.2,
            "score": {"seconds": 214.7, "tokens": 262144},
            "plan": 0.4,
            "apply": 1.9,
            "recover": {"seconds": 9412.0, "tokens": 12582912},
            "evaluate": {"seconds": 2731.5, "tokens": 4718592},
        },
        training=tuple(training),
    )


@pytest.fixture(name="recipe")
def make_recipe() -> str:
    return RECIPE
