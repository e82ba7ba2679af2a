"""`regrow search`: choose a shape inside a budget by trial, cut the model to it, and keep the record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regrow.cli import options as o
from regrow.cli.prune import measured_text, present
from regrow.cli.run import laid
from regrow.errors import InputError


def search(
    model: o.Model,
    out: Annotated[Path | None, typer.Option(help="the folder to make; must not exist")] = None,
    method: Annotated[str | None, typer.Option(help="grid or random")] = None,
    keep: o.Keep = None,
    params: o.Params = None,
    also: Annotated[str | None, typer.Option(help="more budgets, with commas: kv=75%,flops=80%")] = None,
    latency: Annotated[str | None, typer.Option(help="a token written alone, on this machine: 12ms, or 80%")] = None,
    axes: Annotated[str | None, typer.Option(help="of layer,group,head,neuron,channel")] = None,
    criterion: Annotated[str | None, typer.Option(help="NAME, or NAME,AXIS=OTHER; see `regrow ls criteria`")] = None,
    candidates: Annotated[int | None, typer.Option(help="shapes that are scored as cut")] = None,
    top: Annotated[int | None, typer.Option(help="how many of them are trained")] = None,
    rank_tokens: Annotated[int | None, typer.Option(help="tokens each is trained on; 0 = none")] = None,
    recover_tokens: Annotated[int | None, typer.Option(help="tokens the best is trained on afterwards")] = None,
    storage: Annotated[str | None, typer.Option(help="of the study, to share it: a file or a database's URL")] = None,
    worker: Annotated[bool, typer.Option("--worker", help="only help another search; writes no folder")] = False,
    train_text: o.TrainText = None,
    calibration: o.Calibration = None,
    calibration_tokens: o.CalibrationTokens = None,
    text: o.Text = None,
    tasks: o.Tasks = None,
    limit: o.Limit = None,
    speed: o.Speed = False,
    override: o.Override = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score many shapes inside a budget, train the best a little, cut the model to the best of these."""
    from regrow.cli.finish import finish, help_out
    from regrow.recipe_files import find_recipe, read_recipe
    from regrow.settings import parse

    main, others = o.criteria(criterion)
    flags: dict[str, Any] = present(
        name="search",
        model=model,
        keep=o.budget(keep, params),
        axes=o.names(axes),
        criterion=main,
        criteria=others or None,
        search=present(
            method=method,
            also=o.names(also),
            latency=latency,
            candidates=candidates,
            top=top,
            rank_tokens=rank_tokens,
            storage=storage,
        ),
        recover={"tokens": recover_tokens or 0, **present(text=train_text)},
        calibration=present(text=calibration, tokens=calibration_tokens) or None,
        evaluate={"tasks": o.names(tasks) or [], "speed": speed, **present(limit=limit), **measured_text(text)},
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    recipe = parse(laid(read_recipe(find_recipe("minitron")), flags, override), "the command line")
    if worker and out is not None:
        raise InputError(
            f"--out {out} and --worker, which writes no folder",
            "one of them",
            "leave --out out here; the search that is helped writes its folder",
        )
    if worker:
        help_out(recipe, as_json=as_json, quiet=quiet)
    elif out is None:
        raise InputError("a search without --out", "a folder to make, or --worker", "name one with --out DIR")
    else:
        finish(recipe, out, as_json=as_json, quiet=quiet)
