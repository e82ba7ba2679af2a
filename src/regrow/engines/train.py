"""One training loop for the whole house, on `transformers.Trainer`: FSDP, DeepSpeed, resume and trackers come with it.

It knows nothing of any paper. Steps follow from tokens, the order of the blocks from the seed. What this gives up: what
`loop` gives up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from regrow.engines.domains import check_domains
from regrow.engines.loop import Loop, arguments_of
from regrow.engines.objective import Loss, Objective, as_objective, groups_of, next_token
from regrow.engines.packed import Packed, as_packed
from regrow.engines.resume import fingerprint, open_run, step_of, weights_fingerprint
from regrow.engines.sharding import whole_again
from regrow.engines.train_settings import TrainSettings
from regrow.engines.watch import Progress, Watch

FORWARDS = ("forward", "_original_forward")  # what accelerate sets on a model under autocast


@dataclass(frozen=True, slots=True)
class TrainResult:
    steps: int
    tokens: int
    resumed: int  # of these, those that an earlier call had seen
    losses: tuple[dict[str, float], ...]  # step, tokens, loss (mean since the last), parts, learning_rate, heldout_loss
    seconds: float  # of this call
    stopped: str | None  # why it ended before all tokens were seen


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
    (nothing to learn, or nothing of a domain of `settings.mixture`), `BrokenModel` (loss not finite, or diverging; the
    last good checkpoint stays), `OutputError`.
    """
    objective = as_objective(loss)
    groups = groups_of(model, objective, settings.weight_decay)
    text, measured = as_packed(blocks), None if heldout is None else as_packed(heldout, "held-out text")
    if settings.mixture is not None:
        check_domains(settings.mixture, text, measured)
    began = time.perf_counter()
    with _as_it_was(model, settings.checkpointing), whole_again(model):
        arguments = arguments_of(settings, settings.steps(text.ids.shape[1]), folder, next(model.parameters()).device)
        start = open_run(folder, _identity(model, text, settings, groups, objective, measured), resume=resume)
        trainer = Loop(model, text, settings, objective, arguments)
        trainer.groups, trainer.heldout = groups, measured
        watch = Watch(trainer, progress)
        trainer.add_callback(watch)
        watch.stopped = None if start is None else watch.enough(start)
        if start is not None and watch.stopped is not None:
            trainer.take_up(start)
            watch.on_train_begin(arguments, trainer.state, trainer.control)
        else:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    steps, each = trainer.state.global_step, settings.batch * trainer.block
    resumed = 0 if start is None else step_of(start) * each
    seconds = time.perf_counter() - began
    if trainer.optimizer is not None:
        trainer.optimizer.state.clear()  # two numbers for every weight, which trainer and watch would hold for long
    return TrainResult(steps, steps * each, resumed, tuple(watch.records), seconds, watch.stopped)


def _identity(
    model: nn.Module,
    text: Packed,
    settings: TrainSettings,
    groups: list[dict[str, Any]],
    objective: Objective,
    heldout: Packed | None,
) -> dict[str, Any]:
    """What decides where a run ends."""
    loss, beside = objective.loss, objective.beside
    judged = settings.patience is not None or (settings.mixture is not None and settings.mixture.every > 0)
    return {
        **settings.decisive(),
        **({"micro_batch": settings.micro_batch} if getattr(objective.loss, "by_pass", False) else {}),
        "blocks": fingerprint(text.ids),
        "learnt": None if text.learn is None else fingerprint(text.learn),
        "domains": None if text.domain is None else fingerprint(text.domain),
        "heldout": fingerprint(heldout.ids) if judged and heldout is not None else None,
        "weights": weights_fingerprint(model),
        "trained weights": sum(p.numel() for group in groups for p in group["params"]),
        "beside": None if beside is None else weights_fingerprint(beside),
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
