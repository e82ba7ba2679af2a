"""`regrow recover`: train a cut or sparse model, and write it with as many zeros as it had."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regrow.cli import options as o
from regrow.cli.prune import measured_text, present


def recover(
    model: o.Model,
    out: o.Out,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="lora (the default), spp (the default of a sparse model), lora-masked, hira, ia3, full, cut or ast"
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens to train on")] = None,
    rank: Annotated[int | None, typer.Option(help="of the adapters")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="adapters are scaled by alpha / rank; twice the rank unless named")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="before the adapters")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="the peak; the method's own unless named")] = None,
    train_text: o.TrainText = None,
    template: Annotated[str | None, typer.Option(help="how instructions are written: alpaca or chat")] = None,
    learn: Annotated[str | None, typer.Option(help="of instructions: all, or answers alone")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="learn from this model's predictions: a hub id, a folder, demo, base")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="how far from the teacher; see `regrow ls losses`")] = None,
    resume: o.Resume = None,
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
    """Train a model on recovery text. Run it again to go on after an interruption."""
    from regrow.cli.finish import finish
    from regrow.cli.run import assignment, put
    from regrow.recovery_checks import check_read
    from regrow.settings import parse

    data: dict[str, Any] = present(
        name="recover",
        model=model,
        recover=present(
            method=adapter,
            tokens=tokens,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            learning_rate=learning_rate,
            text=train_text,
            template=template,
            learn=learn,
            teacher=teacher,
            loss=loss,
            resume=resume,
        ),
        evaluate=present(tasks=o.names(tasks), limit=limit, speed=speed) | measured_text(text),
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    data["keep"] = None
    for item in override or []:
        data = put(data, *assignment(item))
    recipe = parse(data, "the command line")
    if recipe.recover is not None:
        check_read(recipe.recover, present(rank=rank, alpha=alpha, dropout=dropout, loss=loss, text=train_text))
    finish(recipe, out, as_json=as_json, quiet=quiet)
