"""What matters when a cut model is distilled: sprout, three seeds, equal parameters, equal tokens.

    python bench/distil_ablations.py

Sprout (1.4 million parameters) is cut to the size of four of its six layers, and trained on demo text for 131,072
tokens, 512 a step, cosine. Every arm tries the same three rates; the one with the lowest loss on the first half of the
held-out text is taken, and the loss on the other half is reported. A seed is one of calibration, of the order of
training and of what is drawn by lot. Arms `scratch` begin with random weights, learn from the text, and go on for more
tokens, each number of them with a schedule of its own, at the rate that was best for the fewest; for eight times as
many the rates beside it are tried once. Width and depth go on too, since their order may hang on how long they are
trained. Several processes may work on it, and it goes on after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from cutting import calibration
from halves import Halves
from ledger import Job, Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.goal import DIVERGENCES
from regrow.artifacts.shape import Shape, count
from regrow.artifacts.space import Widths, drawn, inside, space_of, totals_of, unbeaten
from regrow.cache import cache_dir, drop
from regrow.engines.bind import Subject, bind
from regrow.engines.distil import FromTeacher
from regrow.engines.objective import Loss, next_token
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.engines.train import train
from regrow.engines.train_settings import TrainSettings
from regrow.stages.apply import cut_copy
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan, realise
from regrow.stages.score import choose, score

SPROUT = Path(__file__).parents[1] / "tests" / "sprout"
BLOCK, BATCH = 128, 4
TOKENS = 256 * BLOCK * BATCH
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
WIDTH: tuple[Unit, ...] = ("neuron", "channel")
DIVISORS: dict[Unit, int] = {"neuron": 8, "channel": 8}
AGGREGATES = [(batch, sequence) for sequence in ("mean", "l2", "var") for batch in ("l2", "mean", "var")]
FACTORS = (1, 2, 4, 8, 16, 32, 64)  # times the tokens, from scratch
MANY, AROUND = 8, (1e-3, 1e-2)  # times the tokens for which rates beside the chosen one are tried too, once
LONGER = (2, 4, 8)  # times the tokens, for width against depth
SHAPES, SHORT = 8, 8  # shapes whose order is asked for, and the part of the tokens that ranks them
FIXED = 1e-3  # the rate of that ranking


def main() -> None:
    bench = Bench()
    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernel takes twice as long for a step of this small model
        bench.ledger.work(bench.jobs())


class Bench:
    def __init__(self) -> None:
        tokenizer = load(str(SPROUT)).tokenizer
        self.halves = Halves(tokenizer)
        self.text = documents("demo", "recovery")
        self.tokenizer = tokenizer
        self.ledger = Ledger(
            "distil_ablations",
            __doc__ or "",
            model="sprout",
            step={"block": BLOCK, "batch": BATCH},
            tokens=TOKENS,
            rates=list(RATES),
            parameters=size(),
            epoch=blocks(self.text, tokenizer, block=BLOCK, tokens=None, seed=0).numel(),
        )
        self.rows = self.ledger.data["rows"]

    def jobs(self) -> list[Job]:
        """In the order of their worth."""
        job = self.ledger.job
        arms = [
            *(self.arm(arm, rate, seed) for seed in SEEDS for arm in ARMS for rate in RATES),
            *(self.cut_only(pair, seed) for seed in SEEDS for pair in AGGREGATES),
            *(self.shape(place, seed) for seed in SEEDS for place in range(SHAPES)),
            *(self.scratch(1, rate, seed) for seed in SEEDS for rate in RATES),
            *(self.scratch(MANY, rate, SEEDS[0]) for rate in AROUND),
            *(self.longer("scratch", factor, seed) for seed in SEEDS for factor in FACTORS[1:]),
            *(self.longer(arm, factor, seed) for seed in SEEDS for factor in LONGER for arm in ("cut", "depth")),
        ]
        return [job("dense", lambda: self.halves.losses(load(str(SPROUT)).model)), *arms]

    def arm(self, arm: str, rate: float, seed: int) -> Job:
        start, loss = ARMS[arm]

        def measure() -> dict[str, Any]:
            student = start(seed)
            before = self.halves.losses(student.model)["loss"]
            after = self.trained(student, loss, rate, seed, TOKENS)
            return {"before": before, **after, "parameters": student.model.num_parameters()}

        return self.ledger.job(f"{arm} rate {rate:g} seed {seed}", measure)

    def cut_only(self, pair: tuple[str, str], seed: int) -> Job:
        batch, sequence = pair
        return self.ledger.job(
            f"cut by ({batch}, {sequence}) seed {seed}",
            lambda: self.halves.losses(cut(seed, options={"batch": batch, "sequence": sequence}).model),
        )

    def shape(self, place: int, seed: int) -> Job:
        """A shape as cut, trained a little, and trained in full."""

        def measure() -> dict[str, Any]:
            widths = candidates(seed)[place]
            found: dict[str, Any] = {"widths": dict(widths)}
            student = shaped(seed, widths)
            found["as_cut"] = self.halves.losses(student.model)["loss"]
            found["parameters"] = student.model.num_parameters()
            found["short"] = self.trained(student, "forward-kl", FIXED, seed, TOKENS // SHORT, schedule="constant")[
                "loss"
            ]
            found["full"] = self.trained(shaped(seed, widths), "forward-kl", FIXED, seed, TOKENS)["loss"]
            return found

        return self.ledger.job(f"shape {place} seed {seed}", measure)

    def scratch(self, factor: int, rate: float, seed: int) -> Job:
        """Random weights of the width cut's shape."""
        key = f"scratch x{factor} rate {rate:g} seed {seed}"
        return self.ledger.job(
            key, lambda: {"rate": rate, **self.trained(fresh(seed), "next-token", rate, seed, factor * TOKENS)}
        )

    def longer(self, arm: str, factor: int, seed: int) -> Job:
        """An arm with more tokens, at the rate that was best for it."""
        start, loss = ARMS.get(arm, (fresh, "next-token"))
        few = arm if arm in ARMS else f"{arm} x1"
        tried = {rate: f"{few} rate {rate:g} seed {seed}" for rate in RATES}
        key = f"{arm} x{factor} seed {seed}"

        def measure() -> dict[str, Any]:
            rate = min(RATES, key=lambda each: float(self.rows[tried[each]]["chosen_by"]))
            return {"rate": rate, **self.trained(start(seed), loss, rate, seed, factor * TOKENS)}

        def ready() -> bool:
            return all(each in self.rows for each in tried.values())

        return Job(key, lambda: key in self.rows, lambda: self.ledger.row(key, measure), ready)

    def trained(
        self, student: Subject, loss: str, rate: float, seed: int, tokens: int, schedule: Any = "cosine"
    ) -> dict[str, Any]:
        """Losses after a training."""
        goal: Loss = next_token if loss == "next-token" else FromTeacher(load(str(SPROUT)).model, DIVERGENCES.get(loss))
        settings = TrainSettings(
            tokens=tokens, learning_rate=rate, schedule=schedule, batch=BATCH, micro_batch=BATCH, seed=seed,
            save_every=10**6, log_every=50,
        )  # fmt: skip
        folder = cache_dir("bench-ablations", f"{id(student)}-{torch.randint(2**62, ()).item()}")
        train(student.model, self.training(tokens, seed), settings, folder=folder, loss=goal, resume=False)
        drop(folder)
        return {**self.halves.losses(student.model), "tokens": tokens}

    @cache  # noqa: B019
    def training(self, tokens: int, seed: int) -> Tensor:
        return blocks(self.text, self.tokenizer, block=BLOCK, tokens=tokens, seed=seed)


@cache
def size() -> int:
    """Parameters of sprout with four of its six layers."""
    anatomy = load(str(SPROUT)).anatomy
    return count(anatomy, Shape(anatomy.dense.channels, anatomy.dense.layers[:4]))


def wish(axes: tuple[Unit, ...], parameters: int) -> Wish:
    return Wish(
        budget=Budget.parse(f"params={parameters}"), axes=axes, uniform=True,
        divisors={unit: DIVISORS[unit] for unit in axes if unit in DIVISORS},
    )  # fmt: skip


def cut(
    seed: int,
    criterion: str = "activation",
    axes: tuple[Unit, ...] = WIDTH,
    options: dict[str, Any] | None = None,
    stages: int = 1,
) -> Subject:
    """Sprout at the size; in several stages, scores are taken anew before each."""
    subject = load(str(SPROUT))
    whole = subject.model.num_parameters()
    for stage in range(1, stages + 1):
        asked = wish(axes, whole - (whole - size()) * stage // stages)
        text = calibration(subject, tokens=8192, block=256, seed=seed)
        scores = score(subject, choose(criterion, axes, {}, options or {}), text, seed=seed)
        small = cut_copy(subject, make_plan(subject.anatomy, scores, asked))
        subject = replace(small, anatomy=bind(small.model.config))
    return subject


@cache
def candidates(seed: int) -> list[Widths]:
    """Shapes of the size, the same number of layers or fewer, narrower or wider."""
    anatomy = load(str(SPROUT)).anatomy
    space = space_of(anatomy, ("layer", *WIDTH), {"layer": (6, 5, 4)}, DIVISORS)
    points = inside(anatomy, space, [Budget.parse(f"params={size()}")], 0.03)
    return drawn(unbeaten(points), SHAPES, seed)


def shaped(seed: int, widths: Widths) -> Subject:
    subject = load(str(SPROUT))
    axes = tuple(widths)
    text = calibration(subject, tokens=8192, block=256, seed=seed)
    scores = score(subject, choose("activation", axes, {}, {}), text, seed=seed)
    return cut_copy(subject, realise(subject.anatomy, scores, wish(axes, size()), totals_of(subject.anatomy, widths)))


def fresh(seed: int) -> Subject:
    """Random weights in the shape of the width cut."""
    subject = cut(0)
    torch.manual_seed(seed)
    return replace(subject, model=AutoModelForCausalLM.from_config(subject.model.config).float())


ARMS: dict[str, tuple[Callable[[int], Subject], str]] = {
    "cut": (cut, "forward-kl"),
    "cut, next token": (cut, "next-token"),
    "random cut": (partial(cut, criterion="random"), "forward-kl"),
    "random weights": (fresh, "forward-kl"),
    "depth": (partial(cut, criterion="perplexity", axes=("layer",)), "forward-kl"),
    "two stages": (partial(cut, stages=2), "forward-kl"),
    "four stages": (partial(cut, stages=4), "forward-kl"),
    "by (mean, mean)": (partial(cut, options={"batch": "mean", "sequence": "mean"}), "forward-kl"),
    "by (l2, l2)": (partial(cut, options={"batch": "l2", "sequence": "l2"}), "forward-kl"),
    "by (var, var)": (partial(cut, options={"batch": "var", "sequence": "var"}), "forward-kl"),
    "reverse-kl": (cut, "reverse-kl"),
}


if __name__ == "__main__":
    main()
