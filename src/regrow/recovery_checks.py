"""What can be refused of a recovery from the recipe alone: numbers, names, words that nobody would read.

What this gives up: what only texts, the teacher or the model tell; that is `prepare`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from regrow.artifacts.goal import DIVERGENCES, LIKENESSES
from regrow.engines.asked import as_train
from regrow.engines.trackers import check_trackers
from regrow.errors import SettingsError
from regrow.recovery import ADAPTED, WEIGHED, WHOLE, Distil, Recover
from regrow.settings import Recipe
from regrow.stages.recover import check_lesson


def check_recovery(recipe: Recipe) -> None:
    """Refuse a training that cannot be as it is asked for. Raises `InputError`."""
    asked = recipe.recover
    if asked is None or not asked.tokens:
        return
    as_train(asked, recipe.seed)
    check_trackers(asked.report_to)
    _check_place(recipe.device)
    DIVERGENCES.get(asked.loss).check(asked.distil.options)
    LIKENESSES.get(asked.distil.likeness).check(asked.distil.likeness_options)
    check_read(asked)
    if asked.teacher is not None:
        check_lesson(asked)
    _check_policy(asked)
    if recipe.dtype == "fp16":
        raise SettingsError(
            "recovery in fp16, where gradients of deep models vanish",
            "fp32 or bf16",
            "use --dtype bf16; weights are stored in the checkpoint's own type all the same",
        )
    if asked.method in WHOLE and recipe.dtype != "fp32":
        raise SettingsError(
            f"recovery of all weights in {recipe.dtype}",
            "fp32, where small updates are not rounded away",
            "use --dtype fp32, or adapters, such as recover.method=spp of a sparse model and lora of another",
        )


def check_read(asked: Recover, named: Collection[str] = ()) -> None:
    """Raise `SettingsError` for words that nobody would read: about a teacher without one, about adapters where there
    are none, of a text beside a mixture, of how fixed weights change.

    They count when they are not what they would be by themselves, since a recipe that was written down says all of
    them, and those `named` always. Raises `UnknownName` for a loss that nobody knows, which is told first.
    """
    DIVERGENCES.get(asked.loss)
    usual = Recover(method=asked.method)
    said = {*named, *(name for name in asked.model_fields_set if getattr(asked, name) != getattr(usual, name))}
    taught = {"loss": asked.loss} if "loss" in said else {}
    for name in Distil.model_fields:
        if (value := getattr(asked.distil, name)) != getattr(usual.distil, name):
            taught[f"distil.{name}"] = value
    if taught and asked.teacher is None:
        raise SettingsError(
            f"{_words(taught)} without a teacher, whom they are about",
            "recover.teacher, or no word of how to learn from one",
            "name the teacher, such as base, or say recover.loss=forward-kl and recover.distil={} as by default",
        )
    if asked.mixture and "text" in said:
        raise SettingsError(
            f"recover.text = {asked.text} beside recover.mixture, which would be read in its place",
            "one of them",
            "name the text among the sources of the mixture, or leave one out",
        )
    weighed = {name: getattr(asked, name) for name in WEIGHED if name in said}
    if weighed and asked.balance == "fixed":
        raise SettingsError(
            f"{_words(weighed)} of weights that follow the losses, and recover.balance = fixed keeps them",
            "recover.balance = dynamic, or no word of how weights change",
            "say recover.balance=dynamic, or leave it out",
        )
    adapted = {name: getattr(asked, name) for name in ADAPTED if name in said}
    if adapted and asked.method in WHOLE:
        raise SettingsError(
            f"{_words(adapted)} of adapters, and recover.method = {asked.method} has none",
            f"lora, spp and other adapters; of {', '.join(WHOLE)} nothing of the kind",
            "leave it out, or choose another method",
        )


def _words(said: Mapping[str, Any]) -> str:
    return ", ".join(f"recover.{name} = {value}" for name, value in said.items())


def _check_place(device: str) -> None:
    """Raise `SettingsError` for a GPU that the trainer would not take: it knows the first it sees."""
    number = device.removeprefix("cuda:")
    if number != device and number != "0":
        raise SettingsError(
            f"training on {device}",
            "auto, cpu, cuda, mps: the trainer takes the first GPU that it sees",
            f"show it no other: CUDA_VISIBLE_DEVICES={number} before the command, and --device cuda",
        )


def _check_policy(asked: Recover) -> None:
    """Raise `SettingsError` where text that the student writes would be taken for text that is right."""
    distil = asked.distil
    if asked.teacher is None or not distil.on_policy:
        return
    for name, value in (("text", distil.text), ("online_rate", distil.online_rate)):
        if value:
            raise SettingsError(
                f"recover.distil.{name} = {value:g} beside on_policy = {distil.on_policy:g}: the next token to learn "
                "would be the student's own",
                "one of them",
                "leave one out",
            )
