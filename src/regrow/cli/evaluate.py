"""`regrow eval`: measure any model, ours or not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regrow.cli import console
from regrow.cli import options as o
from regrow.cli.prune import present
from regrow.errors import InputError


def evaluate(
    model: o.Model,
    text: Annotated[str | None, typer.Option(help="a text file, scored as it is, or demo (its held-out part)")] = None,
    seqlen: Annotated[int, typer.Option(help="tokens in a block")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="only the first so many tokens")] = None,
    tasks: o.Tasks = None,
    limit: o.Limit = None,
    speed: Annotated[bool, typer.Option("--speed", help="measure speed and memory too")] = False,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    trust_remote_code: o.Trust = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Perplexity and bits per byte of a text, zero-shot tasks, speed."""
    from regrow.recipe_files import overlay
    from regrow.settings import parse

    if text is None and tasks is None and not speed:
        raise InputError("nothing to measure", "--text, --tasks, --speed", "add --text FILE or --tasks piqa,arc_easy")
    asked = present(tasks=o.names(tasks), limit=limit, seqlen=seqlen) | {
        "text": text,
        "max_tokens": max_tokens,
        "speed": speed,
    }
    recipe = parse(
        overlay({"model": model, "evaluate": asked}, present(seed=seed, device=device, dtype=dtype)), "the command line"
    )
    with console.progress(quiet) as say:
        from regrow.engines import products
        from regrow.engines.clock import machine
        from regrow.stages.evaluate import check_asked
        from regrow.stages.evaluate import evaluate as measure
        from regrow.stages.load import read_model

        check_asked(recipe.evaluate)
        loaded, tokenizer, source = read_model(
            recipe.model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=trust_remote_code
        )
        with products.faster():
            found, where = measure(loaded, tokenizer, recipe.evaluate, progress=say), machine()
    if not quiet:
        rows = [[name, console.figure(m), str(m.samples or "")] for name, m in found.items()]
        console.table(str(source["id"]), ["measure", "value", "samples"], rows)
        if source["note"]:
            print(f"note: {source['note']}")
    if as_json:
        flat: dict[str, Any] = {}
        for name, measure_ in found.items():
            if name.startswith("text/"):
                flat |= {
                    name.rpartition("/")[2]: measure_.value,
                    "tokens": measure_.samples,
                    "record": dict(measure_.how),
                }
        measures = {name: m.to_json() for name, m in found.items()}
        console.emit({**flat, "model": source, "measures": measures, "seed": recipe.seed, "machine": where})
