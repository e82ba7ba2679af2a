"""`regrow ls`: what there is, one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from regrow.cli import console
from regrow.cli import options as o
from regrow.errors import UnknownName

Rows = list[list[str]]


def ls(
    kind: Annotated[
        str, typer.Argument(help="criteria, families, recipes, solvers ...; all of them by default")
    ] = "all",
    _seed: o.NoSeed = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """List criteria, families, spreads, recipes, tasks, units, and what sparse models are made with."""
    kinds = {
        "criteria": (["criterion", "scores", "sees", "what", "paper"], criteria),
        "families": (["family", "model types", "cannot cut"], families),
        "recipes": (["recipe", "what", "paper"], recipes),
        "spreads": (["spread", "what"], spreads),
        "tasks": (["task", "chance"], tasks),
        "units": (["unit", "what is removed as a whole"], units),
        "weight-criteria": (["criterion of weights", "competes within", "solver", "what", "paper"], weight_criteria),
        "solvers": (["solver", "sees", "starts from", "options", "what", "paper"], solvers),
        "zero-spreads": (["spread of zeros", "what", "paper"], zero_spreads),
        "ramps": (["ramp", "what", "paper"], ramps),
        "losses": (["loss", "of", "options", "what", "paper"], losses),
    }
    if kind != "all" and kind not in kinds:
        raise UnknownName("kind of list", kind, [*kinds, "all"], "name one of them")
    chosen = kinds if kind == "all" else {kind: kinds[kind]}
    found = {name: (columns, rows()) for name, (columns, rows) in chosen.items()}
    if as_json:
        console.emit(
            {n: [dict(zip(columns, row, strict=True)) for row in rows] for n, (columns, rows) in found.items()}
        )
    elif not quiet:
        for name, (columns, rows) in found.items():
            console.table(name, columns, rows)


def criteria() -> Rows:
    from regrow.artifacts.sight import CRITERIA

    return [[c.name, " ".join(c.units), c.sees, c.about, c.paper] for _, c in CRITERIA.items()]


def weight_criteria() -> Rows:
    from regrow.artifacts.weight_sight import WEIGHT_CRITERIA

    return [[c.name, c.within, c.solver, c.about, c.paper] for _, c in WEIGHT_CRITERIA.items()]


def solvers() -> Rows:
    from regrow.artifacts.linear import SOLVERS

    return [
        [s.name, s.sees, s.start, ", ".join(f"{k}={v}".lower() for k, v in s.options.items()), s.about, s.paper]
        for _, s in SOLVERS.items()
    ]


def zero_spreads() -> Rows:
    from regrow.artifacts.share import ZERO_SPREADS

    return [[s.name, s.about, s.paper] for _, s in ZERO_SPREADS.items()]


def ramps() -> Rows:
    from regrow.artifacts.ramp import RAMPS

    return [[r.name, r.about, r.paper] for _, r in RAMPS.items()]


def losses() -> Rows:
    from regrow.artifacts.goal import DIVERGENCES, LIKENESSES, Measured

    both: list[tuple[str, Measured]] = [("logits", d) for _, d in DIVERGENCES.items()]
    both += [(found.of, found) for _, found in LIKENESSES.items()]
    return [[d.name, of, ", ".join(f"{n}={v}" for n, v in d.options.items()), d.about, d.paper] for of, d in both]


def families() -> Rows:
    from regrow.artifacts.family import FAMILIES

    return [[f.name, " ".join(f.model_types), " ".join(f.refuses) or "-"] for _, f in FAMILIES.items()]


def recipes() -> Rows:
    from regrow.recipe_files import find_recipe, read_recipe, recipe_names
    from regrow.settings import parse

    found = [parse(read_recipe(find_recipe(name)), name) for name in recipe_names()]
    return [[r.name, r.about, r.paper] for r in found]


def spreads() -> Rows:
    from regrow.artifacts.ask import SPREADS

    return [[s.name, s.about] for _, s in SPREADS.items()]


def tasks() -> Rows:
    from regrow.engines.tasks import TASKS

    return [[name, f"{task.chance:g}"] for name, task in sorted(TASKS.items())]


def units() -> Rows:
    return [
        ["layer", "a decoder layer"],
        ["group", "a key/value head with its query heads"],
        ["head", "a query head inside its group; every group of a layer loses as many"],
        ["neuron", "an MLP neuron"],
        ["channel", "a hidden channel, in the whole model"],
    ]
