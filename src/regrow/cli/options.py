"""Options that several commands share, and how their text becomes settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regrow.errors import InputError, SettingsError

Model = Annotated[str, typer.Argument(help="a hub id, a local folder, or demo")]
Json = Annotated[bool, typer.Option("--json", help="the last line of output is one JSON document")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no table; with --json the document alone")]
Seed = Annotated[int | None, typer.Option(help="of every random choice")]
NoSeed = Annotated[int | None, typer.Option("--seed", help="accepted everywhere; nothing here is random")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps")]
Dtype = Annotated[str | None, typer.Option(help="what to compute in: fp32, bf16, fp16")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
Out = Annotated[Path, typer.Option(help="the folder to make; must not exist")]
Text = Annotated[str | None, typer.Option(help="text to measure on: a file, demo, or none")]
Tasks = Annotated[str | None, typer.Option(help="zero-shot tasks to measure, with commas")]
Limit = Annotated[int | None, typer.Option(help="items of each task")]
Speed = Annotated[bool, typer.Option(help="measure speed and memory")]
Calibration = Annotated[str | None, typer.Option(help="text: demo, demo:DOMAIN, a file, or hub:OWNER/NAME")]
TrainText = Annotated[str | None, typer.Option("--train", help="text: demo, demo:DOMAIN, a file, or hub:OWNER/NAME")]
CalibrationTokens = Annotated[int | None, typer.Option(help="tokens of it")]
CalibrationBlock = Annotated[int | None, typer.Option(help="tokens in a sequence")]
Override = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, such as recover.batch=16; repeatable")]
Keep = Annotated[str | None, typer.Option(help="budget: 80%, 108M, 220MB, kv=75%, flops=70%")]

ExactShape = Annotated[
    str | None, typer.Option(help="exact widths instead of a budget: layer=24,group=3,neuron=1024,channel=512")
]
Resume = Annotated[bool | None, typer.Option(help="go on with what was interrupted; the default")]
Params = Annotated[str | None, typer.Option(help="budget in parameters, such as 113M; instead of --keep")]


def budget(keep: str | None, params: str | None) -> str | None:
    """One way to say it. Raises `InputError` for both."""
    if keep and params:
        raise InputError(f"--keep {keep} and --params {params}", "one budget", "leave one of them out")
    return f"params={params}" if params else keep


def names(text: str | None) -> list[str] | None:
    """`a,b` -> [a, b]."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def pairs(text: str | None, what: str) -> dict[str, str]:
    """`a=1,b=2` -> {a: 1, b: 2}. Raises `InputError`."""
    found = {}
    for part in names(text) or []:
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"{what} {part!r}", f"{what} as NAME=VALUE, several with commas", f"write {part}=VALUE")
        found[name.strip()] = value.strip()
    return found


def numbers(text: str | None, what: str) -> dict[str, float]:
    found = {}
    for name, value in pairs(text, what).items():
        try:
            found[name] = float(value)
        except ValueError as error:
            raise SettingsError(f"{what} {name}={value}", "a number", f"write {name}=0.5, say") from error
    return found


def widths(text: str | None) -> dict[str, int]:
    """`layers=24,neuron=1024` -> {layer: 24, neuron: 1024}; the plural is welcome. Raises `InputError`."""
    found = {}
    for name, value in pairs(text, "shape").items():
        if not value.isdigit():
            raise InputError(f"shape {name}={value}", "whole numbers", f"write {name}=24, say")
        found[name.removesuffix("s")] = int(value)
    return found


def criteria(text: str | None) -> tuple[str | None, dict[str, str]]:
    """`activation,layer=perplexity` -> (activation, {layer: perplexity})."""
    parts = names(text) or []
    plain = [part for part in parts if "=" not in part]
    if len(plain) > 1:
        raise InputError(
            f"criteria {', '.join(plain)}",
            "one for all axes, others as AXIS=NAME",
            f"write {plain[0]},layer={plain[1]}, say",
        )
    return (plain[0] if plain else None), pairs(",".join(part for part in parts if "=" in part) or None, "criterion")


def scalar(text: str) -> Any:
    """A value of an option: int, float, bool or text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
