"""SmolLM2 cut to 80 % and regrown: from its teacher's predictions, and from the text's next token.

    python bench/distil.py --text PATH/wiki.test.raw

Start: Taylor (second order), neurons, ends kept whole; 4,096 calibration tokens, seed 0: the cut with the lowest loss
on held-out demo text among those of `bench/defaults.py`. All weights are trained on demo text, 1,024 tokens a step;
warm-up, a constant rate, and a decay over the last fifth, so one run of 400k tokens passes all marks; those before its
end are not decayed. Others decay at 200k: from the cut, also at the rate that was chosen for the next, and from the cut
with what reads its neurons refitted. Each arm tries the same three rates for 50k tokens and goes on with the one whose
rounded model has the lowest loss on held-out demo text. Perplexity: first 20,480 tokens of the text, blocks of 2048.
Tasks: the same first items each. It can be stopped at any time, and several processes may work on it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from answering import TASKS, answered
from criteria import BLOCK as BLOCK_OF_SCORES
from criteria import scores
from cutting import calibration
from ledger import Job, Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.goal import DIVERGENCES
from regrow.cache import cache_dir, replacing
from regrow.engines.bind import Subject
from regrow.engines.checkpoint import round_to
from regrow.engines.distil import FromTeacher
from regrow.engines.objective import Loss, next_token
from regrow.engines.perplexity import block_losses
from regrow.engines.refit import refit
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks, text_blocks
from regrow.engines.train import train
from regrow.engines.train_settings import TrainSettings
from regrow.errors import BrokenModel
from regrow.settings import Refit
from regrow.stages.apply import apply
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan

BLOCK, BATCH = 256, 4
STEP = BLOCK * BATCH  # tokens
MARKS = TRIAL, _, SHORT, LONG = tuple(steps * STEP for steps in (49, 98, 196, 392))
WARMUP = 12  # steps
RATES = (1e-4, 3e-4, 1e-3)
ARMS = {
    "forward-kl": ("start", "forward-kl"),
    "next-token": ("start", "next-token"),
    "forward-kl, refitted": ("refitted", "forward-kl, refitted"),
    "forward-kl, slower": ("start", "forward-kl, refitted"),
}
"""What each begins with, and whose trials chose its rate: the last tells what the other rate alone does."""
ITEMS = 500


class Enough(Exception):
    """A trial has passed its mark."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    bench = Bench(parser.parse_args().text.read_text())
    bench.ledger.work(bench.jobs())


class Bench:
    def __init__(self, text: str) -> None:
        tokenizer = load("demo").tokenizer
        self.text = text_blocks(text, tokenizer, seqlen=2048, max_tokens=20480)
        self.heldout = blocks(documents("demo", "heldout"), tokenizer, block=512, tokens=8192, seed=0)
        self.training = blocks(documents("demo", "recovery"), tokenizer, block=BLOCK, tokens=LONG, seed=0)
        self.ledger = Ledger(
            "distil",
            __doc__ or "",
            model="demo",
            keep="80%",
            step={"block": BLOCK, "batch": BATCH},
            training={"text": "demo", "tokens": self.training.numel()},
            rates=list(RATES),
            evaluation={"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": 20480, "seqlen": 2048},
            items=ITEMS,
        )
        self.rows = self.ledger.data["rows"]

    def jobs(self) -> list[Job]:
        """In the order of their worth."""
        first, second, third, fourth = ARMS
        return [
            *(self.ledger.job(name, partial(self.measured, name)) for name in ("dense", "start", "refitted")),
            *(self.trained(arm, rate, TRIAL) for arm in (first, second, third) for rate in RATES),
            self.trained(first, None, LONG),
            self.trained(second, None, LONG),
            self.trained(first, None, SHORT),
            self.trained(third, None, SHORT),
            *(self.answers(name, task) for name in ("dense", "start") for task in TASKS),
            *(self.answers(f"{arm} at {LONG} of {LONG}", task) for arm in (first, second) for task in TASKS),
            self.trained(fourth, None, SHORT),
            self.trained(third, None, LONG),
            *(self.answers(f"{third} at {LONG} of {LONG}", task) for task in TASKS),
        ]

    def measured(self, name: str) -> dict[str, float]:
        return self.losses(subject(name).model)

    def losses(self, model: Any) -> dict[str, float]:
        return {
            "perplexity": math.exp(block_losses(model, self.text).mean()),
            "heldout": float(block_losses(model, self.heldout).mean()),
        }

    def trained(self, arm: str, rate: float | None, tokens: int) -> Job:
        """A training for `tokens`, or a trial of a rate."""

        def done() -> bool:
            if rate is not None:
                return f"{arm} rate {rate:g}" in self.rows
            return f"{arm} at {tokens} of {tokens}" in self.rows

        def ready() -> bool:
            return ARMS[arm][0] in self.rows and (rate is not None or self.settled(arm))

        name = f"{arm} rate {rate or 'chosen'} for {tokens}"
        return Job(name, done, lambda: self.reach(arm, rate, tokens), ready)

    def settled(self, arm: str) -> bool:
        return all(f"{ARMS[arm][1]} rate {rate:g}" in self.rows for rate in RATES)

    def rate(self, arm: str) -> float:
        tried = {rate: self.rows[f"{ARMS[arm][1]} rate {rate:g}"] for rate in RATES}
        return min(RATES, key=lambda rate: float(tried[rate].get("heldout", math.inf)))

    def reach(self, arm: str, trial: float | None, tokens: int) -> None:
        """Train, measuring at every mark; a trial is the beginning of the long run."""
        whole = LONG if trial is not None else tokens
        rate = self.rate(arm) if trial is None else trial
        student, goal = subject(ARMS[arm][0]), arm.partition(",")[0]
        loss: Loss = next_token if goal == "next-token" else FromTeacher(load("demo").model, DIVERGENCES.get(goal))

        def row(key: str, measure: Callable[[Any], dict[str, Any]]) -> None:
            if key not in self.rows:
                final = stored(student)
                self.ledger.row(key, lambda: {"rate": rate, **measure(final)})

        def watch(seen: int, _total: int, _note: str) -> None:
            if trial is not None and seen >= TRIAL:  # no look at the evaluation text while the rate is open
                row(f"{arm} rate {rate:g}", lambda final: {"heldout": float(block_losses(final, self.heldout).mean())})
                raise Enough
            if trial is None and seen in MARKS:
                row(f"{arm} at {seen} of {whole}", self.losses)
            if trial is None and seen == whole:
                keep(stored(student), f"{arm} at {seen} of {whole}")

        settings = TrainSettings(
            tokens=whole, learning_rate=rate, schedule="wsd", warmup=WARMUP * STEP / whole, batch=BATCH,
            micro_batch=BATCH, seed=0, save_every=24,
        )  # fmt: skip
        folder = cache_dir("bench-distil", f"{arm} {rate:g} for {whole}")
        try:
            train(student.model, self.training, settings, folder=folder, loss=loss, progress=watch)
        except Enough:
            pass
        except BrokenModel as broken:
            key = f"{arm} rate {rate:g}" if trial is not None else f"{arm} at {tokens} of {tokens}"
            why = broken.came
            self.ledger.row(key, lambda: {"rate": rate, "broken": why})

    def answers(self, name: str, task: str) -> Job:
        return Job(
            f"{name}: {task}",
            lambda: f"{name}: {task}" in self.rows,
            lambda: self.ledger.row(f"{name}: {task}", lambda: answered(subject(name), task, limit=ITEMS)),
            lambda: name == "dense" or place(name).exists(),
        )


def place(name: str) -> Path:
    return cache_dir("bench-distil") / f"{name}.safetensors"


def subject(name: str) -> Subject:
    """The dense model, its cut, plain or refitted, or what a training has left of that."""
    found = load("demo")
    if name == "dense":
        return found
    wish = Wish(budget=Budget.parse("80%"), axes=("neuron",), spread="ends")
    plan = make_plan(found.anatomy, scores(found, "taylor-second", 0), wish)
    if name == "refitted" and not place(name).exists():
        asked = Refit()
        text = calibration(found, tokens=asked.tokens, block=BLOCK_OF_SCORES, seed=0)
        refit(found.model, found.anatomy, plan, text, damping=asked.damping)
    apply(found, plan)
    if name in {begun for begun, _ in ARMS.values()} and not place(name).exists():
        keep(found.model, name)
    tensors = load_file(place(name))
    with torch.no_grad():
        for key, parameter in found.model.named_parameters():
            parameter.copy_(tensors[key])
    return found


def keep(model: Any, name: str) -> None:
    """Weights as they are stored: bf16."""
    tensors = {key: p.detach().to(torch.bfloat16).contiguous() for key, p in model.named_parameters()}
    with replacing(place(name)) as partial:
        save_file(tensors, partial)


def stored(student: Subject) -> Any:
    """A copy of the model as it would be stored now."""
    final: Any = copy.deepcopy(student.model).eval()
    round_to(final, student.store)
    return final


if __name__ == "__main__":
    main()
