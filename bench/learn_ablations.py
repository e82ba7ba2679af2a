"""Do gates that learn beat scores, and numerous teachers beat one: sprout, three seeds, equal weights, equal tokens.

    python bench/learn_ablations.py

Sprout (1.4 million parameters) loses 20, 35 and 50 % of its decoder weights. Every arm reads 204,800 tokens of demo
text: gates learn on the first 153,600 of them (600 steps of 2 x 128) with LoRA, and the cut model learns from the dense
one on the rest (all weights, forward KL, rate 1e-3, 4 x 128 a step); what is cut by scores recovers on all of them.
Gates begin in the order of Taylor scores (second order), as in the recipe; two arms have them begin alike, and one cuts
channels alone, with LoRA behind their writers (as PAT does, nearly). Every arm tries the same three rates, of what
learns beside the gates or of the recovery; the one with the lowest loss on the first half of the held-out text is
taken, and the loss on the other half is reported. What cuts channels makes the embedding smaller too, which counts in
all parameters and not in decoder weights. A seed is one of what is drawn, of the order of training and of
calibration. Several processes may work on it, and it goes on after an interruption.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutting import calibration
from halves import Halves
from ledger import Job, Ledger
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.goal import DIVERGENCES
from regrow.artifacts.plan import Plan
from regrow.artifacts.scores import Scores
from regrow.cache import cache_dir, drop
from regrow.engines.adapters import add_adapters, merge
from regrow.engines.bind import Subject
from regrow.engines.distil import FromTeacher
from regrow.engines.objective import Loss, next_token
from regrow.engines.packed import Packed
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.engines.train import train
from regrow.engines.train_settings import TrainSettings
from regrow.learned import planned
from regrow.learning import Learn
from regrow.recovery import Distil
from regrow.stages.apply import apply
from regrow.stages.learn import Target, learn
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

SPROUT = Path(__file__).parents[1] / "tests" / "sprout"
BLOCK = 128
LEARN, RECOVER = 600 * 2 * BLOCK, 100 * 4 * BLOCK
KEEPS = (80, 65, 50)  # per cent
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
AXES: tuple[Unit, ...] = ("neuron", "group", "channel")
FINE: Mapping[Unit, int] = {"neuron": 1, "channel": 1}  # the usual multiples are too coarse for a model this small
AFTER = 1e-3  # the rate of the distillation after gates


@dataclass(frozen=True)
class Arm:
    """Gates that learn as `words` of `Learn` say; or a `criterion` of `axes` with `spread`, then `how`."""

    words: Mapping[str, Any] | None = None
    criterion: str = ""
    axes: tuple[Unit, ...] = AXES
    how: str = "distil"
    wish: Mapping[str, Any] | None = None


ARMS = {
    "numerous teachers": Arm({}),
    "dense teacher": Arm({"teachers": "dense"}),
    "no teacher": Arm({"teachers": "none"}),
    "Taylor, then LoRA": Arm(criterion="taylor", axes=("neuron", "group"), how="lora", wish={"spread": "ends"}),
    "activation, then distillation": Arm(
        criterion="activation", axes=("neuron", "channel"), wish={"uniform": True, "divisors": FINE}
    ),
}
ALSO = {
    "numerous teachers, even start": Arm({"start": "even"}),
    "numerous teachers, even start, no unwinding": Arm({"start": "even", "unwind": 0.0}),
    "numerous teachers by gap": Arm({"choice": "gap"}),
    "numerous teachers, temperature 1": Arm({"distil": Distil()}),
    "numerous teachers, channels alone": Arm({"targets": ("o_proj", "down_proj"), "rank": 32}, axes=("channel",)),
}


def main() -> None:
    warnings.filterwarnings("ignore", message="lr_scheduler")
    bench = Bench()
    with sdpa_kernel(SDPBackend.MATH):  # torch's other kernel takes twice as long for a step of this small model
        bench.ledger.work(bench.jobs())


class Bench:
    def __init__(self) -> None:
        self.tokenizer = load(str(SPROUT)).tokenizer
        self.halves = Halves(self.tokenizer)
        self.text = documents("demo", "recovery")
        self.ledger = Ledger(
            "learn_ablations",
            __doc__ or "",
            model="sprout",
            keeps=list(KEEPS),
            tokens={"learn": LEARN, "recover": RECOVER},
            rates=list(RATES),
        )

    def jobs(self) -> list[Job]:
        """In the order of their worth."""
        arms = [
            self.arm(name, keep, rate, seed)
            for found, keeps in ((ARMS, KEEPS), (ALSO, KEEPS[-1:]))
            for seed in SEEDS
            for keep in keeps
            for name in found
            for rate in RATES
        ]
        return [self.ledger.job("dense", lambda: self.halves.losses(load(str(SPROUT)).model)), *arms]

    def arm(self, name: str, keep: int, rate: float, seed: int) -> Job:
        asked = {**ARMS, **ALSO}[name]

        def measure() -> dict[str, Any]:
            wish = Wish(budget=Budget.parse(f"{keep}%"), axes=asked.axes, rescale_norms=asked.words is not None)
            begin: Callable[..., Subject] = self.by_scores if asked.words is None else self.by_gates
            subject = begin(asked, replace(wish, **(asked.wish or {})), rate, seed)
            before, tokens = self.halves.losses(subject.model)["loss"], RECOVER
            if asked.words is None:
                tokens, after = LEARN + RECOVER, rate
            else:
                after = AFTER
            self.trained(subject, asked.how, after, seed, tokens)
            return {"before": before, **self.halves.losses(subject.model), "parameters": subject.model.num_parameters()}

        return self.ledger.job(f"{name} keep {keep} rate {rate:g} seed {seed}", measure)

    def by_scores(self, asked: Arm, wish: Wish, _: float, seed: int) -> Subject:
        subject = load(str(SPROUT))
        text = calibration(subject, tokens=8192, block=128, seed=seed)
        scores = score(subject, choose(asked.criterion, asked.axes, {}, {}), text, seed=seed)
        return apply(subject, make_plan(subject.anatomy, scores, wish)).subject

    def by_gates(self, asked: Arm, wish: Wish, rate: float, seed: int) -> Subject:
        subject = load(str(SPROUT))
        own = {"distil": Distil(options={"temperature": 2 / 3}), **(asked.words or {})}
        words = Learn(tokens=LEARN, block=BLOCK, batch=2, micro_batch=2, learning_rate=rate, tolerance=0.05, **own)
        share = 1 - wish.budget.target(subject.anatomy) / wish.budget.count(subject.anatomy, subject.anatomy.dense)

        def settle(scores: Scores, lost: Mapping[Unit, float]) -> Plan:
            return planned(subject.anatomy, wish, scores, lost)

        folder = scratch()
        target = Target(share, wish.axes, rescale_norms=True)
        if words.scored:
            text = calibration(subject, tokens=4096, block=128, seed=seed)
            target = replace(target, start=score(subject, choose("taylor-second", wish.axes, {}, {}), text, seed=seed))
        found = learn(
            subject, (Packed(self.training(LEARN, seed)), None), words, target, settle, folder=folder, seed=seed
        )
        drop(folder)
        return apply(subject, found.plan, found.gates).subject

    def trained(self, student: Subject, how: str, rate: float, seed: int, tokens: int) -> None:
        """Next token by LoRA, or all weights from the dense model."""
        goal: Loss = next_token
        model: Any = student.model
        if how == "lora":
            model = add_adapters(model, "lora", rank=8, alpha=16, dropout=0.05, seed=seed)
        else:
            goal = FromTeacher(load(str(SPROUT)).model, DIVERGENCES.get("forward-kl"))
        settings = TrainSettings(
            tokens=tokens, learning_rate=rate, batch=4, micro_batch=4, seed=seed, save_every=10**6, log_every=50
        )
        folder = scratch()
        train(model, self.training(tokens, seed), settings, folder=folder, loss=goal, resume=False)
        drop(folder)
        if how == "lora":
            student.model = merge(model)

    @cache  # noqa: B019
    def training(self, tokens: int, seed: int) -> Tensor:
        return blocks(self.text, self.tokenizer, block=BLOCK, tokens=tokens, seed=seed)


def scratch() -> Path:
    return Path(tempfile.mkdtemp(dir=cache_dir("bench-learn")))  # chance is seeded: other processes draw the same


if __name__ == "__main__":
    main()
