"""`transformers.Trainer` as this house uses it.

What this gives up: one process on several devices (start it with `torchrun` or `accelerate`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from regrow.engines import processes
from regrow.engines.domains import by_domain, mean_loss, stream_of
from regrow.engines.mixture import Weights
from regrow.engines.objective import Objective, next_token
from regrow.engines.packed import Packed, share
from regrow.engines.sharding import shard_teacher
from regrow.engines.text_loss import text_loss
from regrow.engines.train_settings import TrainSettings, rate
from regrow.errors import BrokenModel, OutputError, SettingsError

KEPT = 2  # checkpoints kept: one is complete while the next is written; the best is kept beside the newest
BESIDE, WEIGHTS = "beside.safetensors", "weights.json"


class Loop(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with our loss, order of blocks, optimiser and schedule."""

    groups: list[dict[str, Any]]
    heldout: Packed | None = None

    def __init__(
        self,
        model: nn.Module,
        text: Packed,
        settings: TrainSettings,
        objective: Objective,
        arguments: TrainingArguments,
    ) -> None:
        self.settings, self.loss = settings, objective.loss
        self.beside = None if objective.beside is None else objective.beside.to(arguments.device)
        self.block = int(text.ids.shape[1])
        self.sums: dict[str, Tensor | float] = {}  # means over one step, in the making
        self.weights = None if settings.mixture is None else Weights(settings.mixture)
        self.plain = next_token if settings.mixture is None else text_loss(model)  # what domains are weighed by
        stream = stream_of(text, settings, arguments.max_steps, self.weights)
        super().__init__(model, arguments, train_dataset=stream)
        shard_teacher(objective, self.accelerator)
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

        def constant(_: int) -> float:
            return 1.0

        optimizer = optimizer or self.optimizer
        shares: list[Callable[[int], float]] = [constant if group.get("constant") else share for group in self.groups]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
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

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        with self.room():
            super()._save_checkpoint(model, trial)

    @contextmanager
    def room(self, what: str = "checkpoint") -> Iterator[None]:
        """Says `OutputError` of a checkpoint, or something else of a step, that cannot be written."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if not (isinstance(error, OSError | SafetensorError) or _in_torch_save(error)):
                raise
            raise OutputError(
                f"the {what} of step {self.state.global_step} cannot be written: {str(error).splitlines()[0]}",
                "room for the weights and two numbers of the optimiser for each that is trained",
                "free some, and give the same command again: it goes on from the checkpoint before",
            ) from error

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises `BrokenModel` when a checkpoint lacks weights; tied ones are stored once."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if lost := sorted(set(load_result.missing_keys) - tied):
            raise BrokenModel(
                f"a checkpoint without {len(lost)} of the model's weights, such as {lost[0]}",
                "every weight that is trained",
                "start the training anew, and report it",
            )

    def save_beside(self, folder: Path) -> None:
        """What learns beside the model, and the weights of domains, into a checkpoint."""
        if self.weights is not None:
            (folder / WEIGHTS).write_text(json.dumps(self.weights.to_json()), encoding="utf-8")
        if self.beside is not None and (state := self.beside.state_dict()):
            save_file({name: value.contiguous() for name, value in state.items()}, folder / BESIDE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.beside is not None and self.beside.state_dict():
            self.beside.load_state_dict(load_file(Path(resume_from_checkpoint, BESIDE)))
        if self.weights is not None:
            self.weights.restore(json.loads(Path(resume_from_checkpoint, WEIGHTS).read_text(encoding="utf-8")))

    def take_up(self, checkpoint: Path) -> None:
        """The state of a checkpoint, for a run with nothing left to do."""
        self._load_from_checkpoint(str(checkpoint), self.model)
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self.find_best()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    def find_best(self) -> None:
        """Where the best checkpoint lies now: the folder may have moved since it was written."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.checkpoint(self.state.best_global_step))

    def checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir, f"checkpoint-{step}")

    def _load_best_model(self) -> None:
        """The state with the lowest held-out loss, by the way that a resumed run takes."""
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def average_beside(self) -> None:
        """What is beside the model is wrapped by nothing, so its gradients are averaged over processes here."""
        if self.beside is None or self.accelerator.num_processes == 1:
            return
        for parameter in (p for p in self.beside.parameters() if p.requires_grad):
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(mine, "mean")

    def floating_point_ops(self, inputs: Mapping[str, Tensor]) -> int:  # noqa: ARG002
        return 0  # counting them walks every parameter in every pass; costs are counted from shapes

    def step_means(self) -> dict[str, float]:
        """The loss of the step that ends, over all processes, and its parts on this one."""
        sums, self.sums = self.sums, {}
        loss = self.accelerator.gather(sums.pop("loss")).mean()
        return {"loss": float(loss), **{name: float(value) for name, value in sums.items()}}

    def heldout_loss(self) -> float:
        """Mean loss over what is learnt of the held-out blocks, without dropout; the first process's, on all."""
        assert self.heldout is not None
        mine = mean_loss(self.model_wrapped, self.loss, self.heldout, self.settings.micro_batch, self.args.device)
        if self.accelerator.num_processes == 1:
            return mine
        return float(self.accelerator.gather(torch.tensor([mine], device=self.args.device))[0])

    def balance(self, done: int) -> dict[str, float]:
        """Held-out loss of each domain and its weight, updated where that is due; the first process's, on all."""
        assert self.weights is not None
        assert self.heldout is not None
        size, device = self.settings.micro_batch, self.args.device
        mine = [by_domain(self.model_wrapped, self.plain, self.heldout, size, device)]
        losses: list[float] = self.accelerator.gather(torch.tensor(mine, device=device))[0].tolist()
        if self.weights.due(done):
            self.weights.update(done, losses)
        names = self.weights.mixture.names
        held = {f"heldout {name}": loss for name, loss in zip(names, losses, strict=True)}
        return held | {f"weight {name}": weight for name, weight in zip(names, self.weights.newest(), strict=True)}


def _in_torch_save(error: Exception) -> bool:
    """Its errors have no type of their own, and say whatever the stream said."""
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == "torch.serialization" for frame in frames)


def arguments_of(settings: TrainSettings, steps: int, folder: Path, device: torch.device) -> TrainingArguments:
    world = processes.count()
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
        ddp_timeout=3600 * processes.HOURS,
        save_steps=settings.save_every,
        save_total_limit=KEPT,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        report_to=list(settings.report_to) or "none",
    )
    args.load_best_model_at_end = settings.patience is not None  # which of them is best, the watch says
    args.metric_for_best_model, args.greater_is_better = "heldout_loss", False
    if args.n_gpu > 1:
        args._n_gpu = 1  # else Trainer would copy the model to every device in every pass
    return args
