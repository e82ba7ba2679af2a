"""`regrow estimate`: what a run would take and leave, without loading weights."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regrow.cli import console
from regrow.cli import options as o
from regrow.cli.prune import present
from regrow.cli.run import laid


def estimate(
    model: o.Model,
    recipe: Annotated[str, typer.Option(help="a recipe's name or path")] = "llm-pruner",
    keep: o.Keep = None,
    criterion: Annotated[str | None, typer.Option(help="instead of the recipe's")] = None,
    axes: Annotated[str | None, typer.Option(help="of neuron,group,head,channel,layer")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="the same widths in every layer")] = False,
    recover_tokens: Annotated[int | None, typer.Option(help="tokens of recovery; 0 for none")] = None,
    override: o.Override = None,
    gflops: Annotated[
        float | None, typer.Option(help="speed to reckon with; measured for a second unless given")
    ] = None,
    _seed: o.NoSeed = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Dry run: resulting shape, peak memory, tokens and rough time. No weights are loaded."""
    from regrow.recipe_files import find_recipe, read_recipe
    from regrow.settings import parse

    main, others = o.criteria(criterion)
    data = read_recipe(find_recipe(recipe))
    sparse = data.get("sparsify") is not None
    flags = present(
        model=model,
        keep=keep,
        criterion=None if sparse else main,
        criteria=others or None,
        sparsify=(present(criterion=main) or None) if sparse else None,
        axes=o.names(axes),
        uniform=uniform or None,
        recover=present(tokens=recover_tokens) or None,
    )
    settings = parse(laid(data, flags, override), recipe)
    console.hush()
    from regrow.dryrun import dry_run

    found: dict[str, Any] = dry_run(settings, gflops=gflops, trust_remote_code=trust_remote_code)
    if not quiet:
        print(f"shape: {found['shape_text']}\nloads as: {found['loads_as']}")
        rows = [[k.replace("_", " "), f"{found['before'][k]:,}", f"{found['after'][k]:,}"] for k in found["before"]]
        console.table("", ["count", "before", "after"], rows)
        stages = [
            [s["stage"], f"{s['tokens']:,}", f"{s['minutes']:.1f}", f"{s['peak_gb']:.2f}"] for s in found["stages"]
        ]
        console.table(f"at {found['gflops']:.0f} GFLOP/s", ["stage", "tokens", "minutes", "peak GB"], stages)
        for note in found["notes"]:
            print(f"note: {note}")
    if as_json:
        console.emit(found)
