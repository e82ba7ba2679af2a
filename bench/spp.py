"""SPP and its rivals on SmolLM2 after one-shot pruning: the same text, tokens and batches, every zero kept.

    python bench/spp.py --text PATH/wiki.test.raw

Start: SparseGPT at 2:4 and at 75 %, 8,192 calibration tokens, seed 0. Rank 16, scale 2, no dropout; 1,024 tokens a
step, warm-up and then a constant rate, so one run passes all marks. Every arm tries the same three rates for 50k tokens
from 2:4 and goes on with the one whose merged and rounded model has the lowest loss on held-out demo text; from 75 % it
takes that rate too, and SPP with a teacher takes SPP's. Perplexity: first 20,480 tokens of the text, blocks of 2048.
Tasks: the same first 500 items each. Rows and checkpoints are kept, so it can be stopped at any time, and several
processes may work on it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from answering import TASKS, answered
from cutting import calibration
from ledger import Job, Ledger
from regrow.artifacts.goal import DIVERGENCES
from regrow.cache import cache_dir, replacing
from regrow.engines import masks
from regrow.engines.adapters import add_adapters, merge, trainable_parameters
from regrow.engines.bind import Subject
from regrow.engines.checkpoint import round_to
from regrow.engines.distil import FromTeacher
from regrow.engines.objective import next_token
from regrow.engines.perplexity import block_losses
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks, text_blocks
from regrow.engines.train import train
from regrow.engines.train_settings import TrainSettings
from regrow.engines.zeros import of_model
from regrow.errors import BrokenModel
from regrow.settings import Sparsify
from regrow.stages import sparsify
from regrow.stages.load import load

BLOCK, BATCH, RANK = 256, 4, 16
STEP = BLOCK * BATCH  # tokens
TRIAL, SHORT, LONG, LONGEST = (steps * STEP for steps in (49, 98, 196, 392))
RATES = (1e-4, 1e-3, 1e-2)
ARMS = {"spp": "spp", "lora-masked": "lora", "hira": "hira", "ia3": "ia3", "full": None}
STARTS = {"2:4": LONG, "75%": SHORT}
ITEMS = 500
RIVAL = "best rival"


class Enough(Exception):
    """Training has passed its mark."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, required=True)
    bench = Bench(parser.parse_args().text.read_text())
    bench.ledger.work(bench.jobs())


class Bench:
    def __init__(self, text: str) -> None:
        self.ledger = Ledger(
            "spp",
            __doc__ or "",
            model="demo",
            step={"block": BLOCK, "batch": BATCH},
            adapters={"rank": RANK, "alpha": 2 * RANK, "dropout": 0.0},
            rates=list(RATES),
            evaluation={"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": 20480, "seqlen": 2048},
            items=ITEMS,
        )
        self.rows = self.ledger.data["rows"]
        tokenizer = load("demo").tokenizer
        self.text = text_blocks(text, tokenizer, seqlen=2048, max_tokens=20480)
        self.heldout = blocks(documents("demo", "heldout"), tokenizer, block=512, tokens=8192, seed=0)
        self.training = blocks(documents("demo", "recovery"), tokenizer, block=BLOCK, tokens=LONGEST, seed=0)

    def jobs(self) -> list[Job]:
        """In the order of their worth."""
        arms = [*ARMS, "spp, teacher"]
        both = ("spp", RIVAL)
        return [
            *(self.start(start) for start in ("dense", *STARTS)),
            *(self.trained("2:4", arm, rate, TRIAL) for arm in ARMS for rate in RATES),
            *(self.trained("75%", arm, None, SHORT) for arm in arms),
            *(self.answered(name, task) for name in ("dense", "2:4 start") for task in TASKS),
            *(job for arm in reversed(arms) for job in self.long(arm, LONG)),
            *(job for arm in both for job in self.long(arm, LONGEST)),
        ]

    def long(self, arm: str, mark: int) -> list[Job]:
        """A training from 2:4, and then what its model answers."""
        return [
            self.trained("2:4", arm, None, mark),
            *(self.answered(f"2:4 {arm} at {mark}", task) for task in TASKS),
        ]

    def start(self, start: str) -> Job:
        return self.ledger.job("dense" if start == "dense" else f"{start} start", lambda: self.measured(start))

    def trained(self, start: str, arm: str, rate: float | None, mark: int) -> Job:
        """A training until `mark`; without a rate, with the one that the trials chose."""

        def ready() -> bool:
            known = f"{start} start" in self.rows and (rate is not None or self.settled(arm))
            return known and (mark != LONGEST or over(LONG))  # which trains in the same folder

        def chosen(until: int) -> tuple[str, str, float, int]:
            named = self.rival() if arm == RIVAL else arm
            return start, named, self.rate(named) if rate is None else rate, until

        def over(until: int) -> bool:
            return self.reached(*chosen(until)) and not self.missed(f"{start} {chosen(until)[1]} at {until}")

        def done() -> bool:
            return ready() and over(mark)

        name = f"{start} {arm} rate {rate or 'chosen'} until {mark}"
        return Job(name, done, lambda: self.reach(*chosen(mark)), ready)

    def answered(self, name: str, task: str) -> Job:
        """Zero-shot answers of a model: `dense`, `2:4 start`, or what a training has left."""

        def ready() -> bool:
            return (RIVAL not in name or self.settled(RIVAL)) and (" at " not in name or place(real()).exists())

        def real() -> str:
            return name.replace(RIVAL, self.rival()) if RIVAL in name else name

        def done() -> bool:
            return ready() and f"{real()}: {task}" in self.rows

        return Job(f"{name}, {task}", done, lambda: self.answer(real(), task), ready)

    def settled(self, arm: str) -> bool:
        """Whether all rates of an arm were tried; of the rival, whether it is known who that is."""
        if arm == RIVAL:
            return all(self.settled(one) and self.reached("2:4", one, self.rate(one), LONG) for one in ARMS)
        return all(f"2:4 {arm.partition(',')[0]} rate {rate:g} at {TRIAL}" in self.rows for rate in RATES)

    def reached(self, start: str, arm: str, rate: float, mark: int) -> bool:
        key = f"{start} {arm} rate {rate:g} at "
        return f"{key}{mark}" in self.rows or "broken" in self.rows.get(f"{key}{TRIAL}", {})

    def broke(self, name: str) -> bool:
        """Whether a training ended before the model called `name`."""
        arm, _, mark = name.partition(" at ")
        ends = [(key.partition(" rate ")[0], key.rpartition(" at ")[2], row) for key, row in self.rows.items()]
        rows = [[row for name, tokens, row in ends if (name, tokens) == (arm, at)] for at in (mark, str(TRIAL))]
        return any(found and all("broken" in row for row in found) for found in rows)

    def missed(self, name: str) -> bool:
        """Whether a model that tasks are still to be asked is not, or no longer, in the cache."""
        asked = name.startswith("2:4") and name.endswith((f" at {LONG}", f" at {LONGEST}"))
        open_ = asked and not self.broke(name) and any(f"{name}: {task}" not in self.rows for task in TASKS)
        return open_ and not place(name).exists()

    def measured(self, start: str) -> dict[str, Any]:
        subject = started(start)
        found = of_model(subject.model, subject.anatomy)
        return {**self.losses(subject.model), "zeros": found.share, "mask_hash": found.mask_hash}

    def losses(self, model: Any) -> dict[str, float]:
        return {
            "perplexity": math.exp(block_losses(model, self.text).mean()),
            "heldout": float(block_losses(model, self.heldout).mean()),
        }

    def rate(self, arm: str) -> float:
        """The one with the lowest held-out loss after the trial; with a teacher, that of the arm without."""
        rows = {rate: self.rows[f"2:4 {arm.partition(',')[0]} rate {rate:g} at {TRIAL}"] for rate in RATES}
        return min(rows, key=lambda rate: rows[rate].get("heldout", math.inf))

    def rival(self) -> str:
        """SPP's best at equal tokens, by held-out loss."""

        def loss(arm: str) -> float:
            return float(self.rows.get(f"2:4 {arm} rate {self.rate(arm):g} at {LONG}", {}).get("heldout", math.inf))

        return min((arm for arm in ARMS if arm != "spp"), key=loss)

    def reach(self, start: str, arm: str, rate: float, mark: int) -> None:
        """Train until `mark`, measuring on the way at every mark that was not measured before."""

        def key(tokens: int) -> str:
            return f"{start} {arm} rate {rate:g} at {tokens}"

        subject = started(start)
        found = of_model(subject.model, subject.anatomy).mask_hash
        if found != self.rows[f"{start} start"]["mask_hash"]:
            sys.exit(
                f"the zeros of {start} are others now than when it was measured: drop its rows, all but the trials"
            )
        empty = masks.masks_of(subject.model, subject.anatomy)
        kind = ARMS[arm.partition(",")[0]]
        model: Any = subject.model
        if kind:
            model = add_adapters(model, kind, rank=RANK, alpha=2 * RANK, dropout=0.0, seed=0)
        goal = FromTeacher(load("demo").model, DIVERGENCES.get("forward-kl")) if "teacher" in arm else next_token
        trained = trainable_parameters(model)

        def watch(tokens: int, _total: int, _note: str) -> None:
            if tokens > mark:
                raise Enough
            lost = self.missed(f"{start} {arm} at {tokens}")
            if tokens in (TRIAL, SHORT, LONG, LONGEST) and (lost or key(tokens) not in self.rows):
                final = merged(model, subject, empty, bool(kind), strict=arm != "lora-masked")
                facts = {"rate": rate, "tokens": tokens, "trained": trained, **changed(final, started(start).model)}
                if tokens == TRIAL:  # no look at the evaluation text while the rate is open
                    self.ledger.row(
                        key(tokens), lambda: facts | {"heldout": float(block_losses(final, self.heldout).mean())}
                    )
                else:
                    self.ledger.row(key(tokens), lambda: facts | self.losses(final))
                if lost:
                    keep(final, f"{start} {arm} at {tokens}")

        settings = TrainSettings(
            tokens=LONGEST, learning_rate=rate, schedule="constant", warmup=12 * STEP / LONGEST, batch=BATCH,
            micro_batch=BATCH, seed=0, save_every=TRIAL // STEP,
        )  # fmt: skip
        folder = cache_dir("bench-spp", f"{start} {arm} {rate:g}".replace(":", "-").replace("%", ""))
        again = (
            self.missed(f"{start} {arm} at {mark}") and key(mark) in self.rows
        )  # checkpoints may lie behind the mark
        try:
            with masks.held(model, None if kind else empty):
                train(model, self.training, settings, folder=folder, loss=goal, resume=not again, progress=watch)
        except Enough:
            pass
        except BrokenModel as broken:
            why = broken.came
            self.ledger.row(key(mark), lambda: {"broken": why, "rate": rate})

    def answer(self, name: str, task: str) -> None:
        """Item by item."""

        def ask() -> dict[str, Any]:
            subject = kept(name) if " at " in name else started(name.removesuffix(" start"))
            return answered(subject, task, limit=ITEMS)

        self.ledger.row(f"{name}: {task}", ask)


def place(name: str) -> Path:
    return cache_dir("bench-spp") / f"{name.replace(':', '-').replace('%', '')}.safetensors"


def started(start: str) -> Subject:
    """The dense model, or what SparseGPT makes of it, rounded as it would be stored; made once."""
    subject = load("demo")
    if start == "dense":
        return subject
    path = place(f"{start} start")
    if not path.exists():
        text = calibration(subject, tokens=8192, block=512, seed=0)
        sparsify.apply(subject, Sparsify(pattern=start, criterion="sparsegpt"), text, seed=0)
        keep(subject.model, f"{start} start")
    return kept(f"{start} start")


def keep(model: Any, name: str) -> None:
    """Weights as they are stored: bf16."""
    tensors = {key: p.detach().to(torch.bfloat16).contiguous() for key, p in model.named_parameters()}
    with replacing(place(name)) as partial:
        save_file(tensors, partial)


@torch.no_grad()
def kept(name: str) -> Subject:
    subject = load("demo")
    tensors = load_file(place(name))
    for key, parameter in subject.model.named_parameters():
        parameter.copy_(tensors[key])
    return subject


def merged(model: Any, subject: Subject, empty: Any, adapted: bool, *, strict: bool) -> Any:
    """A copy of the model as it would be stored now; every zero is where it was."""
    final: Any = copy.deepcopy(model)
    final = merge(final) if adapted else final.eval()
    if strict:
        masks.check_kept(final, empty)
    masks.put_back(final, empty)
    round_to(final, subject.store)
    masks.check_kept(final, empty)
    return final


@torch.no_grad()
def changed(model: Any, before: Any) -> dict[str, float]:
    """Share of the non-zero weights of matrices inside decoder layers that are others now."""
    old = {name: p for name, p in before.named_parameters() if "proj" in name}
    new = dict(model.named_parameters())
    moved = sum(int((new[name] != p).sum()) for name, p in old.items())
    return {"changed": moved / sum(int((p != 0).sum()) for p in old.values())}


if __name__ == "__main__":
    main()
