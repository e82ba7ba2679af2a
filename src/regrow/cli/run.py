"""`regrow run`: a recipe by name or path; flags override what it says."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regrow.cli import options as o
from regrow.cli.prune import measured_text, present
from regrow.settings import find_recipe, overlay, parse, read_recipe


def run(
    recipe: Annotated[str, typer.Argument(help="a recipe's name (`regrow ls recipes`) or a path to a .yaml")],
    out: o.Out,
    model: Annotated[str | None, typer.Option(help="a hub id, a local folder, or demo")] = None,
    keep: o.Keep = None,
    recover_tokens: Annotated[int | None, typer.Option(help="tokens of recovery; 0 for none")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="tokens that scores are measured on")] = None,
    text: Annotated[str | None, typer.Option(help="text to measure on: a file, demo, or none")] = None,
    tasks: Annotated[str | None, typer.Option(help="zero-shot tasks to measure, with commas")] = None,
    limit: Annotated[int | None, typer.Option(help="items of each task")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, such as recover.rank=16; repeatable")
    ] = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a whole recipe: score, cut, recover, measure, write. Run it again to go on after an interruption."""
    from regrow.cli.finish import finish

    flags: dict[str, Any] = present(
        model=model,
        keep=keep,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code or None,
        recover=present(tokens=recover_tokens) or None,
        calibration=present(tokens=calibration_tokens) or None,
        evaluate=(present(tasks=o.names(tasks), limit=limit) | measured_text(text)) or None,
    )
    path = find_recipe(recipe)
    data = overlay(read_recipe(path), flags)
    for item in override or []:
        data = overlay(data, nested(item))
    if text == "none":
        data["evaluate"]["text"] = None
    finish(parse(data, path.name), out, as_json=as_json, quiet=quiet)


def nested(item: str) -> dict[str, Any]:
    """`a.b=1` -> {a: {b: 1}}."""
    (key, value), *_ = o.pairs(item, "--set").items()
    found: Any = o.scalar(value)
    for part in reversed(key.split(".")):
        found = {part: found}
    return dict(found)
