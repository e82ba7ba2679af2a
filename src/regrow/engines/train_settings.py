"""How to train: numbers a user may set, checked when they are set, and the learning rate that follows from them.

Nothing here needs torch, so a command can refuse a bad value before anything is loaded. What this gives up: schedules
of their own for single groups of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from regrow.engines.mixture import Mixture
from regrow.errors import SettingsError

WSD_DECAY = 0.2  # share of the steps in which warmup-stable-decay decays
SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps after warm-up -> share of the peak rate
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda _: 1.0,
    "wsd": lambda done: min(1.0, (1 - done) / WSD_DECAY),
}
FREE = (
    "micro_batch", "checkpointing", "minutes", "until", "save_every", "log_every", "evaluate_every", "report_to",
    "resume",
)  # fmt: skip
"""Settings a resumed run may change: they decide how it runs, not where it ends, but for what dropout draws."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How to train. Raises `SettingsError` for a value that makes no sense."""

    tokens: int  # to train on, rounded up to whole steps; blocks repeat in a new order when they run out
    learning_rate: float = 1e-4  # the peak
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.05  # share of the steps
    floor: float = 0.0  # share of the peak rate that is left at the end
    batch: int = 16  # sequences a step, over all processes
    micro_batch: int = 4  # sequences in one pass of one process
    clip: float = 1.0  # largest norm of the gradient; 0 = no limit
    weight_decay: float = 0.0  # of matrices; vectors do not decay
    betas: tuple[float, float] = (0.9, 0.95)
    seed: int = 0  # order of the blocks, dropout
    checkpointing: bool = False  # recompute activations instead of keeping them: less memory, a third more time
    autocast: Literal["fp32", "bf16"] = "fp32"
    skip: int = 0  # steps at most that are left out because a loss or gradient is not finite
    divergence: float = 3.0  # nats a recorded loss may lie above the lowest one
    minutes: float | None = None  # stop after this long, with a checkpoint
    until: int | None = None  # tokens after which this call ends, with a checkpoint; the schedule is that of the whole
    save_every: int = 200  # steps; also at the end
    log_every: int = 10  # steps that one record averages
    evaluate_every: int = 100  # steps between losses on held-out text; also at the end
    patience: int | None = None  # evaluations without a lower held-out loss until it stops; the best state is kept
    report_to: tuple[str, ...] = ()  # trackers, by transformers' names
    mixture: Mixture | None = None  # of the text's domains; none: it is one

    def __post_init__(self) -> None:
        positive = ("tokens", "batch", "micro_batch", "save_every", "log_every", "evaluate_every")
        checks = {name: (getattr(self, name) >= 1, "a whole number, at least 1") for name in positive}
        checks |= {
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "schedule": (self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            "warmup": (0 <= self.warmup < 1, "a share of the steps, 0 <= warmup < 1"),
            "floor": (0 <= self.floor <= 1, "a share of the peak rate, 0 to 1"),
            "clip": (0 <= self.clip < math.inf, "0 (no limit) or more"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "betas": (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers, 0 <= beta < 1"),
            "seed": (0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            "autocast": (self.autocast in ("fp32", "bf16"), "fp32, bf16"),
            "skip": (self.skip >= 0, "0 or more steps"),
            "divergence": (self.divergence > 0, "above 0; inf = never stop"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1, or none"),
            "minutes": (self.minutes is None or self.minutes > 0, "above 0, or none"),
            "until": (self.until is None or self.until >= 1, "at least 1 token, or none"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise SettingsError(f"{name} = {getattr(self, name)!r}", allowed, f"change {name}")
        if self.batch % self.micro_batch:
            raise SettingsError(
                f"micro_batch = {self.micro_batch} does not divide batch = {self.batch}",
                f"a divisor of {self.batch}",
                "lower micro_batch until it divides batch",
            )

    def decisive(self) -> dict[str, Any]:
        """Settings that decide where a run ends."""
        free = set(FREE) - ({"evaluate_every"} if self.patience else set())
        return {name: value for name, value in asdict(self).items() if name not in free}

    def steps(self, block: int) -> int:
        """Steps that see at least `tokens` tokens in blocks of `block`."""
        return math.ceil(self.tokens / (self.batch * block))


def rate(settings: TrainSettings, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`, as a share of the peak.

    Warm-up rises evenly and reaches 1 in the first step after it; the schedule would reach `floor` at step `steps`.
    """
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(steps - warm, 1)
    return settings.floor + (1 - settings.floor) * SCHEDULES[settings.schedule](done)
