"""One training loop for the whole house, on `transformers.Trainer`: FSDP, DeepSpeed, resume and trackers come with it.

It knows nothing of any paper. A loss is a function of (model, batch); what it trains is every weight that requires a
gradient, or the optimiser groups of an `Objective`. Steps follow from tokens, the order of the blocks from the seed.
What this gives up: weights that live outside the model, and one process on several devices (start it with `torchrun`
or `accelerate`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from regrow.engines.packed import Packed, Stream, as_packed, learnt, order, share
from regrow.engines.resume import fingerprint, mark_complete, newest, open_run, weights_fingerprint
from regrow.engines.train_settings import FREE, TrainSettings, rate
from regrow.errors import BrokenModel, SettingsError

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor | tuple[Tensor, dict[str, float]]]
"""(model, batch) -> mean loss, () fp32, alone or with named parts to record. `batch["input_ids"]`: (b, T) int64;
`batch["learn"]`: (b, T) bool, which of them are learnt, where not all are."""
Progress = Callable[[int, int, str], None]
"""(tokens done, tokens in all, note), called after every step."""

FORWARDS = ("forward", "_original_forward")  # what accelerate sets on a model under autocast
KEPT = 2  # checkpoints kept: one is complete while the next is written
TRACK = "train.jsonl"


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss with optimiser groups of its own, in AdamW's words: `params`, and perhaps `lr`, `maximize`, `betas` ...

    The schedule scales the rate of every group; weight decay is 0 where a group does not say. Every tensor must be a
    parameter of the model. What is in no group stays as it is.
    """

    loss: Loss
    groups: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainResult:
    steps: int
    tokens: int
    losses: tuple[dict[str, float], ...]  # step, tokens, loss (mean since the last), parts, learning_rate, heldout_loss
    seconds: float  # of this call
    stopped: str | None  # why it ended before all tokens were seen


def next_token(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token in nats, () fp32: the usual loss of a causal model.

    `input_ids` (b, T) int64, no padding; 0 where none of them is learnt. Logits are brought to fp32 once and shifted by
    moving the targets.
    """
    ids, mask = batch["input_ids"], learnt(batch)
    logits = model(input_ids=ids, use_cache=False).logits  # (b, T, V)
    following = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~mask, -100)
    targets = F.pad(following, (0, 1), value=-100)  # (b, T) nothing follows the last
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    return total / (targets >= 0).sum().clamp_min(1)


def train(
    model: nn.Module,
    blocks: Tensor | Packed,
    settings: TrainSettings,
    *,
    folder: Path,
    loss: Loss | Objective = next_token,
    heldout: Tensor | Packed | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> TrainResult:
    """Train `model` in place on `blocks` (n, T) int64 until `settings.tokens` tokens are seen, learnt or not.

    `folder` receives `train.jsonl` and checkpoints. With `resume`, and given the model as it was at the start, it
    continues from the newest complete one, bit for bit as if nothing had happened; else those found there are deleted.
    `heldout` (m, T) int64 is evaluated whole by every process. Weights train in the dtype they have: fp32.
    The model stays on the device it was trained on, in the mode it came in.

    Raises `SettingsError` (nothing to train, batch and processes do not fit, `folder` holds another run), `TextError`
    (nothing to learn), `BrokenModel` (loss not finite, or diverging; the last good checkpoint stays), `OutputError`.
    """
    groups = _groups(model, settings, loss)
    text, measured = as_packed(blocks), None if heldout is None else as_packed(heldout, "held-out text")
    goal = loss.loss if isinstance(loss, Objective) else loss
    began = time.perf_counter()
    with _as_it_was(model, settings.checkpointing):
        arguments = _arguments(settings, settings.steps(text.ids.shape[1]), folder, next(model.parameters()).device)
        start = open_run(folder, _identity(model, text, settings, groups, goal), resume=resume)
        trainer = _Loop(model, text, settings, goal, arguments)
        trainer.groups, trainer.heldout = groups, measured
        watch = _Watch(trainer, progress)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    tokens = trainer.state.global_step * settings.batch * trainer.block
    return TrainResult(
        trainer.state.global_step, tokens, tuple(watch.records), time.perf_counter() - began, watch.stopped
    )


class _Loop(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with our loss, order of blocks, optimiser and schedule."""

    groups: list[dict[str, Any]]
    heldout: Packed | None = None

    def __init__(
        self, model: nn.Module, text: Packed, settings: TrainSettings, loss: Loss, arguments: TrainingArguments
    ) -> None:
        self.settings, self.loss = settings, loss
        self.block = int(text.ids.shape[1])
        self.sums: dict[str, Tensor | float] = {}  # means over one step, in the making
        sequence = order(len(text.ids), arguments.max_steps * settings.batch, settings.seed)
        stream = Stream(text, sequence, settings.batch)
        super().__init__(model, arguments, train_dataset=stream)
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        loader = DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, shuffle=False)
        return cast("DataLoader[dict[str, Tensor]]", self.accelerator.prepare(loader))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:  # noqa: ARG002
        settings = self.settings
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=0.0, fused=True
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        def share(step: int) -> float:
            return rate(self.settings, step, num_training_steps)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], **_: Any) -> Tensor:
        answer = self.loss(model, inputs)
        loss, parts = answer if isinstance(answer, tuple) else (answer, {})
        counts = share(inputs)
        values: dict[str, Tensor | float] = {**parts, "loss": loss.detach()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + counts * value / self.args.gradient_accumulation_steps
        return counts * loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Under the names that weights have in memory; some formats have others, which are not read back."""
        model: Any = self.model
        if isinstance(model, PreTrainedModel):
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__dict__.pop("save_pretrained", None)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises `BrokenModel` when a checkpoint lacks weights; tied ones are stored once."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if lost := sorted(set(load_result.missing_keys) - tied):
            raise BrokenModel(
                f"a checkpoint without {len(lost)} of the model's weights, such as {lost[0]}",
                "every weight that is trained",
                "start the training anew, and report it",
            )

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> int:  # noqa: ARG002
        return 0  # counting them walks every parameter in every pass; costs are counted from shapes

    def step_means(self) -> dict[str, float]:
        """The loss of the step that ends, over all processes, and its parts on this one."""
        sums, self.sums = self.sums, {}
        loss = self.accelerator.gather(sums.pop("loss")).mean()
        return {"loss": float(loss), **{name: float(value) for name, value in sums.items()}}

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """Mean loss over what is learnt of the held-out blocks, without dropout."""
        assert self.heldout is not None
        model, total, size = self.model_wrapped.eval(), 0.0, self.settings.micro_batch
        targets = self.heldout.targets()  # (n,)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            batch = {name: value.to(self.args.device) for name, value in self.heldout.batch(rows).items()}
            answer = self.loss(model, batch)
            total += float(answer[0] if isinstance(answer, tuple) else answer) * int(targets[rows].sum())
        model.train()
        return total / int(targets.sum())


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Keeps the record, and stops a run that has gone wrong before it can spoil weights or checkpoints."""

    def __init__(self, trainer: _Loop, progress: Progress | None) -> None:
        self.trainer, self.progress, self.settings = trainer, progress, trainer.settings
        self.track = Path(trainer.args.output_dir, TRACK)
        self.records: list[dict[str, float]] = []
        self.since: list[dict[str, float]] = []  # steps since the last record
        self.rate = 0.0
        self.stopped: str | None = None
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A resumed run takes back the record of its checkpoint and forgets what came after."""
        self.records = [{k: v for k, v in x.items() if k != "epoch"} for x in state.log_history if "tokens" in x]
        if state.is_world_process_zero:
            self.track.write_text("".join(map(_line, self.records)), encoding="utf-8")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:  # noqa: ARG002
        means = self.trainer.step_means()
        self.since.append(means)
        self.rate = optimizer.param_groups[0]["lr"]
        if not math.isfinite(means["loss"]):
            raise self._broken(state.global_step, f"the loss is {means['loss']}")
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not math.isfinite(getattr(norm, "full_tensor", lambda: norm)()):
            raise self._broken(state.global_step, "a gradient is not finite")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        step, settings = state.global_step, self.settings
        if step < state.max_steps and self._late():
            control.should_training_stop = control.should_save = True
            self.stopped = f"{settings.minutes:g} minutes were up after step {step} of {state.max_steps}"
        evaluate = self.trainer.heldout is not None and (
            step % settings.evaluate_every == 0 or control.should_training_stop
        )
        if step % settings.log_every == 0 or control.should_save or evaluate:
            self._record(step, evaluate, state.is_world_process_zero)
        if self.progress is not None and state.is_world_process_zero:
            each = settings.batch * self.trainer.block
            loss = self.since[-1]["loss"] if self.since else self.records[-1]["loss"]
            self.progress(step * each, state.max_steps * each, f"loss {loss:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def _late(self) -> bool:
        """All processes must stop in the same step, so the first whose time is up decides for all."""
        if self.settings.minutes is None:
            return False
        late = time.perf_counter() - self.began > self.settings.minutes * 60
        accelerator = self.trainer.accelerator
        return bool(accelerator.gather(torch.tensor(late, device=accelerator.device)).any())

    def _record(self, step: int, evaluate: bool, write: bool) -> None:
        record: dict[str, float] = {"step": step, "tokens": step * self.settings.batch * self.trainer.block}
        for name in self.since[-1]:
            record[name] = sum(means[name] for means in self.since) / len(self.since)
        record["learning_rate"] = self.rate
        lowest = min((x["loss"] for x in self.records), default=math.inf)
        if record["loss"] > lowest + self.settings.divergence:
            raise self._broken(step - 1, f"the loss rose from {lowest:.3f} to {record['loss']:.3f}")
        if evaluate:
            record["heldout_loss"] = self.trainer.heldout_loss()
        self.since = []
        self.records.append(record)
        self.trainer.log(dict(record))
        if write:
            with self.track.open("a") as file:
                file.write(_line(record))

    def _broken(self, done: int, what: str) -> BrokenModel:
        good = newest(self.track.parent)
        tokens = (done + 1) * self.settings.batch * self.trainer.block
        return BrokenModel(
            f"training broke in step {done + 1} of {self.trainer.args.max_steps} ({tokens:,} tokens): {what}",
            f"finite losses at most {self.settings.divergence:g} nats above the lowest so far",
            (f"the last good checkpoint is {good}" if good else "no checkpoint had been written yet")
            + "; lower learning_rate or lengthen warmup",
        )


def _line(record: Mapping[str, float]) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def _arguments(settings: TrainSettings, steps: int, folder: Path, device: torch.device) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch % (settings.micro_batch * world):
        raise SettingsError(
            f"{world} processes of micro_batch = {settings.micro_batch} do not divide batch = {settings.batch}",
            f"a batch that is a multiple of {settings.micro_batch * world}",
            "change batch or micro_batch",
        )
    gpu = device.type == "cuda"
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=settings.batch // (settings.micro_batch * world),
        max_grad_norm=settings.clip,
        seed=settings.seed,
        bf16=settings.autocast == "bf16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=False,
        save_steps=settings.save_every,
        save_total_limit=KEPT,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=list(settings.report_to) or "none",
    )
    if args.n_gpu > 1:
        args._n_gpu = 1  # else Trainer would copy the model to every device in every pass
    return args


def _groups(model: nn.Module, settings: TrainSettings, loss: Loss | Objective) -> list[dict[str, Any]]:
    """AdamW's groups; raises `SettingsError` unless all are fp32 parameters of the model that require gradients."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if isinstance(loss, Objective):
        groups = [{**group, "params": list(group["params"])} for group in loss.groups]
    else:
        matrices, vectors = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors}]
    groups = [group for group in groups if group["params"]]
    tensors = [p for group in groups for p in group["params"]]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in tensors})
    if not tensors:
        came = "nothing to train: no weight requires a gradient"
    elif not {id(p) for p in tensors} <= {id(p) for p in trainable}:
        came = "an optimiser group holds a tensor that is not a trainable parameter of the model"
    elif dtypes != ["float32"]:
        came = f"weights to train in {', '.join(dtypes)}, where small updates are rounded away"
    else:
        return groups
    raise SettingsError(
        came, "float32 parameters of the model that require gradients", "cast the model, or add adapters"
    )


def _identity(
    model: nn.Module, text: Packed, settings: TrainSettings, groups: list[dict[str, Any]], loss: object
) -> dict[str, Any]:
    """What decides where a run ends."""
    return {
        **{name: value for name, value in asdict(settings).items() if name not in FREE},
        "blocks": fingerprint(text.ids),
        "learnt": None if text.learn is None else fingerprint(text.learn),
        "weights": weights_fingerprint(model),
        "trained weights": sum(p.numel() for group in groups for p in group["params"]),
        "loss": getattr(loss, "__name__", type(loss).__name__),
    }


@contextmanager
def _as_it_was(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Gives the model back in the mode, with the flags and without the autocast wrapper that training put on it."""
    config: Any = getattr(model, "config", None)
    cache, mode, verbosity = getattr(config, "use_cache", None), model.training, hf_logging.get_verbosity()
    own = {name: model.__dict__[name] for name in FORWARDS if name in model.__dict__}
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if checkpointing:
        _checkpointing(model, "enable")({"use_reentrant": False})
    try:
        yield
    finally:
        for name in FORWARDS:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)
        if checkpointing:
            _checkpointing(model, "disable")()
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        model.train(mode)
        if config is not None:
            config.use_cache = cache


def _checkpointing(model: Any, action: str) -> Callable[..., None]:
    """Enable or disable, by the name that this version of transformers uses."""
    named = [f"{kind}_checkpointing_{action}" for kind in ("activation", "gradient")]
    return cast(Callable[..., None], getattr(model, next(name for name in named if hasattr(model, name))))
