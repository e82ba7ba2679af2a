"""`regrow prune`: cut a model, without recovery."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regrow.cli import options as o


def prune(
    model: o.Model,
    out: o.Out,
    keep: o.Keep = None,
    params: o.Params = None,
    criterion: Annotated[str | None, typer.Option(help="NAME, or NAME,AXIS=OTHER; see `regrow ls criteria`")] = None,
    option: Annotated[str | None, typer.Option(help="options of the criterion: NAME=VALUE,...")] = None,
    axes: Annotated[str | None, typer.Option(help="of neuron,group,head,channel,layer")] = None,
    split: Annotated[
        str | None, typer.Option(help="how much each axis loses, as AXIS=SHARE,... (1 unless named)")
    ] = None,
    spread: Annotated[str | None, typer.Option(help="uniform, across or ends")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="the same widths in every layer")] = False,
    divisors: Annotated[
        str | None, typer.Option(help="widths are multiples; with --uniform neuron=32,channel=64 unless named")
    ] = None,
    rescale_norms: Annotated[
        bool, typer.Option("--rescale-norms", help="norms keep statistics over the old width")
    ] = False,
    reduce: Annotated[
        str | None, typer.Option(help="how tensors of a unit add up: sum, mean, max, prod, first")
    ] = None,
    refit: Annotated[
        int | None, typer.Option(help="tokens to fit what reads the cut units anew by least squares; 16384 is a start")
    ] = None,
    calibration: o.Calibration = None,
    calibration_tokens: o.CalibrationTokens = None,
    calibration_block: o.CalibrationBlock = None,
    text: o.Text = None,
    tasks: o.Tasks = None,
    limit: o.Limit = None,
    speed: o.Speed = True,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Cut a model to a budget and write a folder that stock tools load."""
    from regrow.cli.finish import finish
    from regrow.settings import parse

    main, others = o.criteria(criterion)
    data: dict[str, Any] = {
        "name": "prune",
        "model": model,
        "keep": o.budget(keep, params),
        "criterion": main,
        "criteria": others or None,
        "options": {k: o.scalar(v) for k, v in o.pairs(option, "option").items()} or None,
        "axes": o.names(axes),
        "split": o.numbers(split, "split") or None,
        "spread": spread,
        "uniform": uniform,
        "divisors": o.numbers(divisors, "divisor") or None,
        "rescale_norms": rescale_norms,
        "reduce": reduce,
        "refit": None if refit is None else {"tokens": refit},
        "calibration": present(text=calibration, tokens=calibration_tokens, block=calibration_block),
        "evaluate": present(tasks=o.names(tasks), limit=limit, speed=speed) | measured_text(text),
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    finish(parse(present(**data), "the command line"), out, as_json=as_json, quiet=quiet)


def present(**values: Any) -> dict[str, Any]:
    """What was said; the rest keeps its default."""
    return {name: value for name, value in values.items() if value is not None}


def measured_text(text: str | None) -> dict[str, Any]:
    return {} if text is None else {"text": None if text == "none" else text}
