"""SmolLM2 without 20 and 25 % of its decoder weights: gates that learned what goes, and scores in one shot.

    python bench/learn.py --text PATH/wiki.test.raw

Every arm is `regrow run` and reads 401,408 tokens of demo text. `learned` is recipe nuteprune with 204,800 tokens while
gates learn (800 steps of 2 x 128), and then a recovery of the rest. `scores` is the best one-shot way of
`bench/distil.py`: Taylor (second order), neurons, ends kept whole, what reads them refitted; all tokens are recovery.
`learned on 512` has 600 steps of 1 x 512 and a recovery of what is left. It was added when `learned` was seen (by hand,
on held-out demo text) to equal `scores` in blocks of 128 and to be worse in longer ones: is its text too short?
All recover alike: all weights, forward KL from the dense model, 1,024 tokens a step, the rate that `bench/distil.py`
chose on held-out demo text. Perplexity: first 20,480 tokens of the text, blocks of 2048. Tasks: those of the paper, the
first 500 items each, all of ARC-c. One run an arm. It can be stopped at any time, and several processes may share it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

from answering import answered
from ledger import Job, Ledger
from regrow.cache import cache_dir
from regrow.cli.finish import pages
from regrow.engines.bind import Subject
from regrow.engines.perplexity import block_losses
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks, text_blocks
from regrow.recipe_files import find_recipe, overlay, read_recipe
from regrow.run import run
from regrow.settings import Recipe, parse
from regrow.stages.load import load, read_model

KEEPS = ("80%", "75%")
LEARN, RECOVER = 800 * 2 * 128, 192 * 4 * 256
LONG = 600 * 512
RECOVERY = {
    "method": "full", "teacher": "base", "loss": "forward-kl", "learning_rate": 1e-4, "schedule": "wsd",
    "warmup": 0.03, "batch": 4, "micro_batch": 4, "block": 256,
}  # fmt: skip
QUICK: dict[str, Any] = {"text": None, "tasks": [], "speed": False, "samples": []}
GATES = {"learn": {"tokens": LEARN}, "recover": {**RECOVERY, "tokens": RECOVER}}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("nuteprune", GATES),
    "scores": (
        "",
        {
            "criterion": "taylor-second", "axes": ["neuron"], "spread": "ends", "refit": {},
            "recover": {**RECOVERY, "tokens": LEARN + RECOVER},
        },
    ),
    "learned on 512": (
        "nuteprune",
        {
            "learn": {"tokens": LONG, "block": 512, "batch": 1, "micro_batch": 1},
            "recover": {**RECOVERY, "tokens": LEARN + RECOVER - LONG},
        },
    ),
}  # fmt: skip
"""A recipe that is built in, or none, and what is laid over it."""
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
ITEMS = 500


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
        self.ledger = Ledger(
            "learn",
            __doc__ or "",
            model="demo",
            keeps=list(KEEPS),
            tokens={"learn": LEARN, "recover": RECOVER},
            evaluation={"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": 20480, "seqlen": 2048},
            items=ITEMS,
        )

    def jobs(self) -> list[Job]:
        """In the order of their worth."""
        asked = [(arm, keep) for keep in KEEPS for arm in ARMS]
        found = [self.ledger.job("dense", lambda: self.losses(load("demo")))]
        for arm, keep in asked:
            found.append(self.ledger.job(f"{arm} at {keep}", partial(self.reach, arm, keep)))
            found += [self.answers(f"{arm} at {keep}", task) for task in TASKS]
        return [*found, *(self.answers("dense", task) for task in TASKS)]

    def losses(self, subject: Subject) -> dict[str, Any]:
        return {
            "perplexity": math.exp(block_losses(subject.model, self.text).mean()),
            "heldout": float(block_losses(subject.model, self.heldout).mean()),
            "parameters": subject.model.num_parameters(),
        }

    def reach(self, arm: str, keep: str) -> dict[str, Any]:
        """Run the recipe to its end, and measure what it left."""
        name, changes = ARMS[arm]
        out = place(f"{arm} at {keep}")
        if not out.exists():
            run(asked(name, changes, keep), out, page=pages, progress=said(f"{arm} at {keep}"))
        return {**self.losses(subject(f"{arm} at {keep}")), **shape(out)}

    def answers(self, name: str, task: str) -> Job:
        return Job(
            f"{name}: {task}",
            lambda: f"{name}: {task}" in self.ledger.data["rows"],
            lambda: self.ledger.row(f"{name}: {task}", lambda: answered(subject(name), task, limit=ITEMS)),
            lambda: name == "dense" or place(name).exists(),
        )


def asked(name: str, changes: dict[str, Any], keep: str) -> Recipe:
    """The recipe of an arm; its recovery is ours, whole."""
    data = overlay(read_recipe(find_recipe(name)) if name else {}, {**changes, "keep": keep, "evaluate": QUICK})
    return parse({**data, "recover": changes["recover"]})


def subject(name: str) -> Subject:
    """The dense model, or what an arm has left, with the anatomy of what it came from."""
    found = load("demo")
    if name != "dense":
        found.model, found.tokenizer, found.source = read_model(str(place(name)), trust_remote_code=True)
    return found


def shape(out: Path) -> dict[str, Any]:
    """What of each kind stayed."""
    found = json.loads((out / "report.json").read_text())
    seconds = {stage: facts["seconds"] for stage, facts in found["stages"].items()}
    return {"gone": found["made_by"].get("split_realised", {}), "seconds": seconds, "notes": found["notes"]}


def place(name: str) -> Path:
    return cache_dir("bench-learn-smollm2") / name.replace(" ", "-").replace(",", "").replace("%", "")


def said(name: str) -> Any:
    """A line now and then for the log."""

    def say(what: str, done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            print(f"{name}: {what} {done} of {total}", flush=True)

    return say


if __name__ == "__main__":
    main()
