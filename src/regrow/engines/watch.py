"""Keeps the record of a training, and stops one that has gone wrong before it can spoil weights or checkpoints.

What this gives up: more than the newest checkpoints.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from regrow.engines.loop import Loop
from regrow.engines.resume import mark_complete, newest
from regrow.errors import BrokenModel

Progress = Callable[[int, int, str], None]
"""(tokens done, tokens in all, note), called after every step."""

TRACK = "train.jsonl"


class Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps the record, and stops a run that has gone wrong before it can spoil weights or checkpoints."""

    def __init__(self, trainer: Loop, progress: Progress | None) -> None:
        self.trainer, self.progress, self.settings = trainer, progress, trainer.settings
        self.track = Path(trainer.args.output_dir, TRACK)
        self.records: list[dict[str, float]] = []
        self.since: list[dict[str, float]] = []  # steps since the last record
        self.skipped = 0  # steps that were left out
        self.rate = 0.0
        self.stopped: str | None = None
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A resumed run takes back the record of its checkpoint and forgets what came after."""
        self.trainer.find_best()
        self.records = _taken_back(state)
        self.skipped = int(self.records[-1].get("skipped", 0)) if self.records else 0
        if state.is_world_process_zero:
            with self.trainer.room("record"):
                self.track.write_text("".join(map(line, self.records)), encoding="utf-8")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:  # noqa: ARG002
        means = self.trainer.step_means()
        self.since.append(means)
        self.trainer.average_beside()
        self.rate = optimizer.param_groups[0]["lr"]
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if why := _not_finite(means["loss"], [p.grad for p in moving]):
            self.skipped += 1
            if self.skipped > self.settings.skip:
                raise self._broken(state.global_step, why)
            self.since.pop()
            for p in moving:
                p.grad = None  # the step moves nothing

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """The trainer clears the gradients of the model alone."""
        if self.trainer.beside is not None:
            self.trainer.beside.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        step, settings = state.global_step, self.settings
        if step < state.max_steps and (why := self._enough(step)):
            control.should_training_stop = control.should_save = True
            self.stopped = f"{why} after step {step} of {state.max_steps}"
        evaluate = self.trainer.heldout is not None and (
            step % settings.evaluate_every == 0 or control.should_training_stop
        )
        weights = self.trainer.weights
        balance = weights is not None and (evaluate or weights.due(step))
        if step % settings.log_every == 0 or control.should_save or evaluate or balance:
            self._record(step, evaluate, balance, state.is_world_process_zero)
        if evaluate and settings.patience is not None:
            self._judge(state, control)
        if self.progress is not None and state.is_world_process_zero:
            each = settings.batch * self.trainer.block
            now = self.since[-1] if self.since else self.records[-1] if self.records else {}
            told = [
                f"{name} {now[name]:.3f}" for name in ("loss", *getattr(self.trainer.loss, "shown", ())) if name in now
            ]
            self.progress(step * each, state.max_steps * each, ", ".join(told))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = self.trainer.checkpoint(state.global_step)
            with self.trainer.room():
                self.trainer.save_beside(checkpoint)
                mark_complete(checkpoint)

    def _judge(self, state: Any, control: Any) -> None:
        """Keeps the state with the lowest held-out loss, and stops when it has not been beaten for long enough."""
        assert self.settings.patience is not None
        best, lowest, waited = self._waiting(self.records, state)
        if best != state.global_step and not waited:
            return  # stopped between two evaluations; the run that goes on judges as if it had not been
        if not waited:
            state.best_global_step, state.best_metric = state.global_step, lowest
            control.should_save = True
        elif waited >= self.settings.patience and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            self.stopped = _waited(best, lowest, waited)

    def enough(self, checkpoint: Path) -> str | None:
        """Why a run that has come as far as `checkpoint` has nothing left to do in this call; None where it has."""
        settings, state = self.settings, TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            return None
        best, lowest, waited = self._waiting(_taken_back(state), state)
        if settings.patience is not None and waited >= settings.patience:
            return _waited(best, lowest, waited)
        tokens = state.global_step * settings.batch * self.trainer.block
        enough = settings.until is not None and tokens >= settings.until
        return f"{tokens:,} tokens were seen after step {state.global_step} of {state.max_steps}" if enough else None

    def _waiting(self, records: Sequence[Mapping[str, float]], state: TrainerState) -> tuple[int, float, int]:
        """The step whose held-out loss is lowest, that loss, and how many evaluations there were since.

        What was measured because a call ended is no evaluation: one that goes on would judge by more than a whole run.
        """
        every, last = self.settings.evaluate_every, state.max_steps
        held = [x for x in records if "heldout_loss" in x and (x["step"] % every == 0 or x["step"] == last)]
        if not held:
            return 0, math.inf, 0
        place = min(range(len(held)), key=lambda i: held[i]["heldout_loss"])
        return int(held[place]["step"]), held[place]["heldout_loss"], len(held) - 1 - place

    def _enough(self, step: int) -> str | None:
        """Why this call ends before its last step."""
        tokens = step * self.settings.batch * self.trainer.block
        if self.settings.until is not None and tokens >= self.settings.until:
            return f"{tokens:,} tokens were seen"
        return f"{self.settings.minutes:g} minutes were up" if self._late() else None

    def _late(self) -> bool:
        """All processes must stop in the same step, so the first whose time is up decides for all."""
        if self.settings.minutes is None:
            return False
        late = time.perf_counter() - self.began > self.settings.minutes * 60
        accelerator = self.trainer.accelerator
        return bool(accelerator.gather(torch.tensor(late, device=accelerator.device)).any())

    def _record(self, step: int, evaluate: bool, balance: bool, write: bool) -> None:
        record: dict[str, float] = {"step": step, "tokens": step * self.settings.batch * self.trainer.block}
        for name in self.since[-1] if self.since else ():
            record[name] = sum(means[name] for means in self.since) / len(self.since)
        record["learning_rate"] = self.rate
        if self.skipped:
            record["skipped"] = self.skipped
        lowest = min((x["loss"] for x in self.records if "loss" in x), default=math.inf)
        if record.get("loss", lowest) > lowest + self.settings.divergence:
            raise self._broken(step - 1, f"the loss rose from {lowest:.3f} to {record['loss']:.3f}")
        if evaluate:
            record["heldout_loss"] = self.trainer.heldout_loss()
        if balance:
            record |= self.trainer.balance(step)
        self.since = []
        self.records.append(record)
        self.trainer.log(dict(record))
        if write:
            with self.trainer.room("record"), self.track.open("a") as file:
                file.write(line(record))

    def _broken(self, done: int, what: str) -> BrokenModel:
        good = newest(self.track.parent)
        tokens = (done + 1) * self.settings.batch * self.trainer.block
        return BrokenModel(
            f"training broke in step {done + 1} of {self.trainer.args.max_steps} ({tokens:,} tokens): {what}",
            f"finite losses at most {self.settings.divergence:g} nats above the lowest so far",
            (f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet")
            + "; lower learning_rate or lengthen warmup",
        )


def _not_finite(loss: float, grads: Sequence[Any]) -> str | None:
    """What is wrong with a step, if anything."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    norm = torch.nn.utils.get_total_norm(grads)
    return None if math.isfinite(getattr(norm, "full_tensor", lambda: norm)()) else "a gradient is not finite"


def _taken_back(state: TrainerState) -> list[dict[str, float]]:
    """Our records among all that the trainer has logged."""
    return [{k: v for k, v in x.items() if k != "epoch"} for x in state.log_history if "tokens" in x]


def _waited(best: int, lowest: float, waited: int) -> str:
    return f"held-out loss was lowest ({lowest:.3f}) after step {best}, and not in {waited} evaluations since"


def line(record: Mapping[str, float]) -> str:
    """As it stands in `TRACK`."""
    return json.dumps(record, sort_keys=True) + "\n"
