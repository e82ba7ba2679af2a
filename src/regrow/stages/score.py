"""Stage score: how much each unit matters, for every axis at once.

Criteria that read activations share one forward pass, whatever the axes; gradients and removals cost what they cost.
What this gives up: one criterion a unit kind in a run; two opinions on the same axis are two runs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import Tensor

from regrow.artifacts.family import Cut, Unit
from regrow.artifacts.scores import Scores
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.shape import Tensor as Spec
from regrow.artifacts.sight import CRITERIA, Criterion, Reduction, Sight
from regrow.engines.bind import Subject
from regrow.engines.gradients import gradients
from regrow.engines.removal import loss_without_layers
from regrow.engines.room import give_back
from regrow.engines.runs import wrong_without
from regrow.engines.walk import Seen, flow_sites, observe
from regrow.errors import InputError, SettingsError

Progress = Callable[[str, int, int], None]
Row = tuple[Unit, int]  # unit kind and layer (-1: the whole model)

REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda stack: stack.sum(0),
    "mean": lambda stack: stack.mean(0),
    "max": lambda stack: stack.amax(0),
    "prod": lambda stack: stack.prod(0),
    "first": lambda stack: stack[0],
}
"""How the tensors of a unit are put together: (tensors, units) -> (units,). LLM-Pruner's default is the sum."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The criterion of one unit kind with its options."""

    criterion: Criterion
    options: Mapping[str, Any]

    @property
    def asked(self) -> dict[str, Any]:
        """Every option, with what it is."""
        return {**self.criterion.options, **self.options}

    def __call__(self, sight: Sight) -> Tensor:
        return self.criterion.score(sight, **self.options)


def choose(
    name: str, axes: Sequence[Unit], overrides: Mapping[Unit, str], options: Mapping[str, Any]
) -> dict[Unit, Choice]:
    """A criterion for each axis: `overrides`, else `name`, else what `name` says scores layers.

    Raises `InputError` when a criterion cannot score a unit, `SettingsError` for an unknown option.
    """
    main = CRITERIA.get(name)
    for unit in overrides:
        if unit not in axes:
            raise SettingsError(
                f"a criterion for {unit}s, which are not among the axes of this cut",
                f"axes: {', '.join(axes)}",
                f"add {unit} to axes, or leave its criterion out",
            )
    named = {unit: CRITERIA.get(other) for unit, other in overrides.items()}
    chosen: dict[Unit, Choice] = {}
    for unit in axes:
        criterion = named.get(unit, main)
        if unit == "layer" and "layer" not in criterion.units and unit not in named:
            criterion = CRITERIA.get(criterion.layers_by)
        if unit not in criterion.units:
            fits = [n for n, c in CRITERIA.items() if unit in c.units]
            raise InputError(
                f"criterion {criterion.name!r} cannot score {unit}s",
                f"for {unit}s: {', '.join(fits)}",
                f"choose one of them, for this axis alone with --criterion {name},{unit}={fits[0]}",
            )
        chosen[unit] = Choice(criterion, {k: v for k, v in options.items() if k in criterion.options})
    known = {k for c in chosen.values() for k in c.criterion.options}
    used = dict.fromkeys(c.criterion.name for c in chosen.values())
    for option in options:
        if option not in known:
            raise SettingsError(
                f"option {option!r} belongs to none of the criteria {', '.join(used)}",
                f"options: {', '.join(sorted(known)) or 'none'}",
                "leave it out, or correct its name",
            )
    for choice in chosen.values():
        _check_options(choice)
    return chosen


def _check_options(choice: Choice) -> None:
    """Raise `SettingsError` for a value that the criterion's annotation does not allow."""
    hints = get_type_hints(choice.criterion.score)
    for name, value in choice.options.items():
        allowed = get_args(hints[name]) or (hints[name],)
        kinds = tuple(a for a in allowed if isinstance(a, type)) + ((int,) if float in allowed else ())
        if value not in allowed and not isinstance(value, kinds):
            raise SettingsError(
                f"option {name}={value!r} of criterion {choice.criterion.name!r}",
                ", ".join(getattr(a, "__name__", str(a)) for a in allowed),
                "correct the value",
            )


def score(
    subject: Subject,
    chosen: Mapping[Unit, Choice],
    blocks: Tensor | None,  # (n, T) int64; None when no criterion reads text
    *,
    seed: int = 0,
    reduce: str = "sum",
    depths: Sequence[int] = (),
    progress: Progress | None = None,
    made_by: Mapping[str, Any] | None = None,
) -> Scores:
    """Score every unit of the chosen kinds. Deterministic for equal inputs.

    `depths`: how many layers may go, for criteria that a task answers; runs of other lengths have no score (NaN).
    """
    bench = _Bench(subject, chosen, seed)
    seers: dict[str, Callable[[Tensor, Progress | None], None]] = {
        "flow": bench.flow,
        "angles": bench.flow,
        "grad": bench.grads,
        "fisher": bench.grads,
        "removal": bench.removal,
    }
    bench.still()
    needs = {c.criterion.sees for c in chosen.values()}
    runs = list(dict.fromkeys(seers[n] for n in ("flow", "angles", "grad", "fisher", "removal") if n in needs))
    if runs and blocks is None:
        raise ValueError("these criteria read text: pass blocks")
    for run in runs:
        assert blocks is not None
        run(blocks, progress)
    if "task" in needs:
        bench.task(depths, progress)
    anatomy = subject.anatomy
    table = {unit: _stack(bench.rows, unit, anatomy, REDUCE[reduce]) for unit in chosen}
    criteria = {
        unit: {"name": c.criterion.name, "comparable": c.criterion.comparable, "options": dict(c.options)}
        for unit, c in chosen.items()
    }
    return Scores(table, {**(made_by or {}), "criteria": criteria, "seed": seed, "reduce": reduce})


def reads_text(chosen: Mapping[Unit, Choice]) -> bool:
    return any(c.criterion.sees not in ("nothing", "weight", "task") for c in chosen.values())


class _Bench:
    """Rows of scores as they come in: (unit, layer) -> one (units,) vector a tensor or stream."""

    def __init__(self, subject: Subject, chosen: Mapping[Unit, Choice], seed: int) -> None:
        self.subject, self.model = subject, cast("Any", subject.model)
        self.anatomy, self.chosen, self.seed = subject.anatomy, chosen, seed
        self.rows: dict[Row, list[Tensor]] = {}

    def add(self, row: Row, sight: Sight) -> None:
        self.rows.setdefault(row, []).append(self.chosen[row[0]](sight).float().cpu())

    def still(self) -> None:
        """Criteria that need no text."""
        for unit, choice in self.chosen.items():
            if choice.criterion.sees == "nothing":
                for layer in range(self.anatomy.sizes["L"] if unit != "channel" else 1):
                    row = (unit, -1 if unit == "channel" else layer)
                    count = 1 if unit == "layer" else self.anatomy.units(unit)
                    self.add(row, Sight(unit, count, seed=_mix(self.seed, unit, layer)))
            elif choice.criterion.sees == "weight":
                with torch.no_grad():
                    for spec in self.anatomy.tensors:
                        self.tensor(unit, spec, self.model.get_parameter(spec.name).float(), None, None)

    def tensor(self, unit: Unit, spec: Spec, weight: Tensor, grad: Tensor | None, fisher: Tensor | None) -> None:
        """Show one tensor to the criterion of `unit`, once for every run of units in it."""
        layer = -1 if unit == "channel" else spec.layer
        if layer is None:
            return
        for cut in _runs(unit, spec):
            views = [None if t is None else _view(self.anatomy, unit, cut, t) for t in (weight, grad, fisher)]
            assert views[0] is not None
            sight = Sight(unit, len(views[0]), weight=views[0], grad=views[1], fisher=views[2])
            self.add((unit, layer), sight)
        give_back()

    def flow(self, blocks: Tensor, progress: Progress | None) -> None:
        wanted: dict[Reduction, tuple[Unit, ...]] = {}
        for unit, choice in self.chosen.items():
            if choice.criterion.sees == "flow":
                how: Reduction = choice.asked["sequence"]
                wanted[how] = (*wanted.get(how, ()), unit)
        angles = any(c.criterion.sees == "angles" for c in self.chosen.values())
        say = partial(progress, "activations") if progress else None
        seen = observe(self.model, self.anatomy, blocks, flow=wanted, angles=angles, progress=say)
        for how, units in wanted.items():
            self._read(seen, how, units)
        for unit, choice in self.chosen.items():
            if choice.criterion.sees == "angles":
                self.add((unit, -1), Sight(unit, self.anatomy.sizes["L"], angles=seen.cosines()))

    def _read(self, seen: Seen, how: Reduction, units: Sequence[Unit]) -> None:
        sizes = self.anatomy.sizes
        widths: dict[Unit, int] = {"neuron": 1, "channel": 1, "head": sizes["D"], "group": sizes["G"] * sizes["D"]}
        for site, _ in flow_sites(self.anatomy, units):
            unit, layer, _ = site
            moments = seen.moments(how, site, widths[unit])
            self.add((unit, -1 if unit == "channel" else layer), Sight(unit, len(moments.total), flow={how: moments}))

    def grads(self, blocks: Tensor, progress: Progress | None) -> None:
        units = [u for u, c in self.chosen.items() if c.criterion.sees in ("grad", "fisher")]

        def wanted(spec: Spec) -> bool:
            return any(_runs(unit, spec) and (unit == "channel" or spec.layer is not None) for unit in units)

        def visit(spec: Spec, weight: Tensor, grad: Tensor, fisher: Tensor | None) -> None:
            for unit in units:
                self.tensor(unit, spec, weight, grad, fisher)

        gradients(
            self.model,
            self.anatomy,
            blocks,
            visit,
            wanted=wanted,
            squares=any(c.criterion.sees == "fisher" for c in self.chosen.values()),
            progress=partial(progress, "gradients") if progress else None,
        )

    def removal(self, blocks: Tensor, progress: Progress | None) -> None:
        say = partial(progress, "removals") if progress else None
        whole, without = loss_without_layers(self.model, self.anatomy, blocks, progress=say)
        for unit, choice in self.chosen.items():
            if choice.criterion.sees == "removal":
                self.add((unit, -1), Sight(unit, len(without), removal=(without - whole).float()))

    def task(self, depths: Sequence[int], progress: Progress | None) -> None:
        say = partial(progress, "runs of layers") if progress else None
        for unit, choice in self.chosen.items():
            if choice.criterion.sees == "task":
                task, limit = choice.asked["task"], choice.asked["limit"]
                found = wrong_without(self.subject, depths, task=task, limit=limit, progress=say)
                self.add((unit, -1), Sight(unit, self.anatomy.sizes["L"], runs={task: found}))


def _mix(seed: int, unit: Unit, layer: int) -> int:
    """A seed of its own for each row, equal for equal runs."""
    return zlib.crc32(f"{seed}/{unit}/{layer}".encode())


def _runs(unit: Unit, spec: Spec) -> list[Cut | None]:
    """The runs of units in a tensor; a whole layer owns each of its tensors outright."""
    if unit == "layer":
        return [None] if spec.layer is not None else []
    return [cut for owner, cut in spec.cuts if owner == unit]


def _view(anatomy: Anatomy, unit: Unit, cut: Cut | None, tensor: Tensor) -> Tensor:
    """(units, width, rest): units first, then a unit's own rows, then the rest of each row."""
    if cut is None:
        return tensor.reshape(1, 1, -1)
    units, width = anatomy.units(unit), anatomy.width(cut)
    run = tensor.narrow(cut.dim, anatomy.offset(cut), units * width).movedim(cut.dim, 0)
    return run.reshape(units, width, -1)


def _stack(
    rows: Mapping[Row, list[Tensor]], unit: Unit, anatomy: Anatomy, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """group (L,K), head (L,H), neuron (L,F), channel (C,), layer (L,) or, for runs of layers, (L,L+1)."""
    if (unit, -1) in rows:
        return reduce(torch.stack(rows[unit, -1]))
    table = torch.stack([reduce(torch.stack(rows[unit, layer])) for layer in range(anatomy.sizes["L"])])
    return table.squeeze(1) if unit == "layer" else table
