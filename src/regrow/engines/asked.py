"""What a recipe asks of a training, as the numbers of the loop.

What this gives up: numbers that no recipe names, such as how often it is saved; they follow from the length.
"""

from __future__ import annotations

from regrow.engines import processes
from regrow.engines.mixture import Mixture
from regrow.engines.train_settings import TrainSettings
from regrow.errors import SettingsError
from regrow.recovery import HELDOUT_TOKENS, Recover

OFTEN = 50  # steps between two updates of a mixture's weights, where nothing else is asked (Sheared LLaMA)


def as_train(settings: Recover, seed: int) -> TrainSettings:
    """The training loop's settings behind a recipe's `recover`. Raises `SettingsError`."""
    assert settings.learning_rate is not None  # the method's own where none was named
    step, held = settings.batch * settings.block, HELDOUT_TOKENS * len(settings.sources)
    often = settings.evaluate_every or max(settings.tokens // 20, held)
    return TrainSettings(
        tokens=settings.tokens,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        batch=settings.batch,
        micro_batch=min(settings.micro_batch, max(1, settings.batch // processes.count())),
        checkpointing=settings.checkpointing,
        seed=seed,
        floor=settings.floor,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        autocast=settings.autocast,
        patience=settings.patience,
        until=settings.until,
        report_to=settings.report_to,
        mixture=mixture_of(settings),
        evaluate_every=max(1, often // step),
        save_every=max(25, settings.tokens // step // 10),
        log_every=max(1, min(10, settings.tokens // step // 20)),
    )


def mixture_of(settings: Recover) -> Mixture | None:
    """Of several sources, or of one that is to be balanced, which is refused. Raises `SettingsError`."""
    dynamic = settings.balance == "dynamic"
    if not settings.mixture and not dynamic:
        return None
    names, told = settings.sources, settings.references
    if told and set(told) != set(names):
        raise SettingsError(
            f"references for {', '.join(sorted(told))}",
            f"one loss for each source of the mixture: {', '.join(names)}",
            "name each of them, or none and have them measured",
        )
    step = settings.batch * settings.block
    return Mixture(
        names=names,
        weights=tuple(settings.mixture.get(name, 1.0) for name in names),
        every=max(1, round((settings.balance_every or OFTEN * step) / step)) if dynamic else 0,
        references=tuple(told[name] for name in names) if told and dynamic else (),
        signed=not dynamic or settings.excess == "signed",
    )
