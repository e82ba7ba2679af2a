"""`regrow run`: a recipe by name or path; flags override what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from regrow.cli import options as o
from regrow.cli.prune import measured_text, present
from regrow.errors import InputError


def run(
    recipe: Annotated[str, typer.Argument(help="a recipe's name (`regrow ls recipes`) or a path to a .yaml")],
    out: o.Out,
    model: Annotated[str | None, typer.Option(help="a hub id, a local folder, or demo")] = None,
    keep: o.Keep = None,
    params: o.Params = None,
    shape: o.ExactShape = None,
    learn_tokens: Annotated[
        int | None, typer.Option(help="tokens that gates learn on, in recipes that have gates")
    ] = None,
    recover_tokens: Annotated[int | None, typer.Option(help="tokens of recovery; 0 for none")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="tokens that scores are measured on")] = None,
    resume: o.Resume = None,
    text: o.Text = None,
    tasks: o.Tasks = None,
    limit: o.Limit = None,
    override: o.Override = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Run a whole recipe: score, cut, recover, measure, write. Run it again to go on after an interruption."""
    from regrow.cli.finish import finish
    from regrow.recipe_files import find_recipe, overlay, read_recipe
    from regrow.settings import parse

    flags: dict[str, Any] = present(
        model=model,
        keep=o.budget(keep, params),
        shape=o.widths(shape) or None,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code or None,
        learn=present(tokens=learn_tokens) or None,
        recover=present(tokens=recover_tokens) or None,
        calibration=present(tokens=calibration_tokens) or None,
        evaluate=(present(tasks=o.names(tasks), limit=limit) | measured_text(text)) or None,
    )
    path = find_recipe(recipe)
    data = read_recipe(path)
    if learn_tokens is not None and not data.get("learn"):
        raise InputError(
            f"--learn-tokens of recipe {path.stem}, which has no gates that learn",
            "nuteprune, sheared-llama, policy-gradient, or a recipe with `learn`",
            "leave it out, or name another recipe",
        )
    if resume is not None:
        for part in ("learn", "recover"):
            if data.get(part):
                flags = overlay(flags, {part: {"resume": resume}})
    finish(parse(laid(data, flags, override), path.name), out, as_json=as_json, quiet=quiet)


def laid(data: Mapping[str, Any], flags: Mapping[str, Any], override: Sequence[str] | None) -> dict[str, Any]:
    """A recipe with flags on top, and on top of these what `--set` says."""
    from regrow.recipe_files import exact, of_method, overlay

    words, changes = [assignment(word) for word in override or ()], dict(flags)
    for path, value in words:
        changes = put(changes, path, value)
    laid = overlay(of_method(data, changes), flags)
    for path, value in words:
        laid = put(laid, path, value)
    return exact(laid, changes.keys())


def assignment(item: str) -> tuple[list[str], Any]:
    """`a.b=1` -> ([a, b], 1); the value is YAML, so a list is `[piqa, boolq]` and nothing is `null`."""
    import yaml

    from regrow.recipe_files import read_yaml

    key, equals, text = item.partition("=")
    if not equals or not key:
        raise InputError(f"--set {item}", "KEY=VALUE, such as recover.rank=16", f"write --set {key or 'KEY'}=VALUE")
    try:
        return key.split("."), read_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {item}: {text!r} is not YAML", "a number, a word, [a, b]", "quote it") from error


def put(data: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """`data` with `value` at the place that `path` names."""
    key, *rest = path
    below = data.get(key)
    inner = below if isinstance(below, Mapping) else {}
    return {**data, key: put(inner, rest, value) if rest else value}
