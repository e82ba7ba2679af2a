"""`regrow learn`: let gates learn what to cut, and cut it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regrow.cli import options as o
from regrow.cli.prune import measured_text, present
from regrow.cli.run import laid
from regrow.errors import SettingsError, guess

RECIPES = {"hard-concrete": "nuteprune", "sheared": "sheared-llama", "policy-gradient": "policy-gradient"}


def learn(
    model: o.Model,
    out: o.Out,
    method: Annotated[str, typer.Option(help="hard-concrete, sheared or policy-gradient")] = "hard-concrete",
    keep: o.Keep = None,
    params: o.Params = None,
    shape: o.ExactShape = None,
    axes: Annotated[str | None, typer.Option(help="of neuron,group,head,channel,layer")] = None,
    learn_tokens: Annotated[int | None, typer.Option(help="tokens that gates learn on")] = None,
    teachers: Annotated[str | None, typer.Option(help="numerous, dense or none")] = None,
    recover_tokens: Annotated[
        int | None, typer.Option(help="tokens that the cut model is trained on afterwards")
    ] = None,
    resume: o.Resume = None,
    train_text: o.TrainText = None,
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
    """Train gates until as much is shut as the budget asks for, then cut. Run again to go on after an interruption."""
    from regrow.cli.finish import finish
    from regrow.recipe_files import find_recipe, read_recipe
    from regrow.settings import parse

    if method not in RECIPES:
        raise SettingsError(f"method {method!r}{guess(method, RECIPES)}", ", ".join(RECIPES), "name one of them")
    flags: dict[str, Any] = present(
        name="learn",
        model=model,
        keep=o.budget(keep, params),
        shape=o.widths(shape) or None,
        axes=o.names(axes),
        learn=present(tokens=learn_tokens, teachers=teachers, text=train_text, resume=resume) or None,
        recover={"tokens": recover_tokens or 0, **present(text=train_text, resume=resume)},
        evaluate={"tasks": o.names(tasks) or [], "speed": speed, **present(limit=limit), **measured_text(text)},
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    recipe = parse(laid(read_recipe(find_recipe(RECIPES[method])), flags, override), "the command line")
    finish(recipe, out, as_json=as_json, quiet=quiet)
