"""Stage sparsify: zeros in the weight matrices of the decoder layers, in one shot; shapes stay as they are.

What this gives up: speed and size; zeros in a dense checkpoint cost what other numbers cost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from regrow.artifacts.linear import SOLVERS, Solver
from regrow.artifacts.options import check_values
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.share import ZERO_SPREADS, share
from regrow.artifacts.sparsity import SPARSE, Sparsity
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA, WeightCriterion
from regrow.engines import checkpoint, masks, zeros
from regrow.engines.bind import Subject
from regrow.engines.inputs import named
from regrow.engines.readings import Readings
from regrow.engines.sparsify import Method, Pruned, layer_values, sparsify
from regrow.engines.trace import traces
from regrow.errors import BrokenModel, SettingsError, UnknownName
from regrow.settings import Sparsify

Progress = Callable[[str, int, int], None]

SCARCE = "a Gram matrix of so few says little of what they do together; read more text, or prune by wanda"


@dataclass(frozen=True, slots=True)
class Sparsified:
    """What was done, matrix by matrix, and what is zero now in the weights as they are stored."""

    asked: Pattern
    patterns: tuple[Pattern, ...]  # one a layer
    matrices: tuple[Pruned, ...]
    sparsity: Sparsity
    notes: tuple[str, ...]

    @property
    def errors(self) -> dict[int, float]:
        """Mean relative error of the outputs of each layer's matrices, where it is known."""
        found: dict[int, list[float]] = {}
        for matrix in self.matrices:
            if matrix.error is not None:
                found.setdefault(matrix.layer, []).append(matrix.error)
        return {layer: sum(errors) / len(errors) for layer, errors in found.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "pattern": self.asked.written,
            "pattern_text": str(self.asked),
            "layers": [str(pattern) for pattern in self.patterns],
            "sparsity": self.sparsity.to_json(),
            "errors": {m.name: m.error for m in self.matrices if m.error is not None},
            "notes": list(self.notes),
        }


def choose(settings: Sparsify) -> Method:
    """The method that settings name. Raises `UnknownName`, `SettingsError` for an option that nobody has."""
    criterion, solvers = _named(settings.criterion)
    if settings.solver:
        named = tuple(SOLVERS.get(name) for name in settings.solver)
        solvers = named if settings.criterion in WEIGHT_CRITERIA.names() else (*solvers, *named)
    known = {option for solver in solvers for option in solver.options}
    for option in settings.options:
        if option not in known:
            raise SettingsError(
                f"option {option!r} belongs to none of the solvers {', '.join(s.name for s in solvers)}",
                f"options: {', '.join(sorted(known)) or 'none'}",
                "leave it out, or correct its name",
            )
    for solver in solvers:
        check_values(f"solver {solver.name!r}", solver.options, settings.options, positive=solver.positive)
    if settings.keep_statistics and settings.also:
        raise SettingsError(
            f"keep_statistics with also = {', '.join(settings.also)}",
            "one of them: what is kept is read of the usual matrices",
            "keep no statistics, or name nothing else",
        )
    if settings.keep_statistics and settings.inputs != "dense":
        raise SettingsError(
            f"keep_statistics with inputs = {settings.inputs}",
            "inputs = dense: what a block reads behind pruned ones holds for one pattern only",
            "read dense inputs, or keep no statistics",
        )
    moves = partial(Solver.moves, adapts=criterion.adapts, groups=Pattern.parse(settings.pattern).of > 0)
    if solvers[0].within is not None:
        criterion = replace(criterion, within=solvers[0].within)
    return Method(
        criterion,
        tuple(_chain(solvers, settings.options, moves)),
        damping=settings.damping,
        inputs=settings.inputs,
        mend=settings.mend,
        keep_zeros=settings.existing == "keep",
        also=settings.also,
    )


def _chain(
    solvers: Sequence[Solver], options: Mapping[str, Any], moves: Callable[[Solver, Mapping[str, Any]], bool]
) -> Iterator[tuple[Solver, Mapping[str, Any]]]:
    """Each with its options; all but the first keep the mask that they are given.

    Raises `SettingsError` when one would leave nothing that the next takes up.
    """
    before: tuple[Solver, Mapping[str, Any]] | None = None
    for solver in solvers:
        own = {name: value for name, value in options.items() if name in solver.options}
        if before is not None and "hold" in solver.options:
            own["hold"] = True
        if before is not None and solver.takes == "mask" and not moves(*before):
            raise SettingsError(
                f"solver {before[0].name!r} before {solver.name!r}, which finds all weights anew",
                "solvers that go on with weights (refit, alps) after it, or one that moves the mask before",
                f"leave {before[0].name} out, or change their order",
            )
        before = (solver, own)
        yield before


def _named(name: str) -> tuple[WeightCriterion, tuple[Solver, ...]]:
    """A criterion with what it was published with, or a solver with the start it was published with."""
    if name in WEIGHT_CRITERIA.names():
        criterion = WEIGHT_CRITERIA.get(name)
        return criterion, (SOLVERS.get(criterion.solver),)
    if name in SOLVERS.names():
        solver = SOLVERS.get(name)
        return WEIGHT_CRITERIA.get(solver.start), (solver,)
    raise UnknownName("weight criterion", name, {*WEIGHT_CRITERIA.names(), *SOLVERS.names()})


def reads_text(settings: Sparsify) -> bool:
    return choose(settings).sees != "nothing" or ZERO_SPREADS.get(settings.spread).sees != "nothing"


def reads_kept(settings: Sparsify, kept: Readings) -> bool:
    """Whether `kept` spares the calibration."""
    method = choose(settings)
    return method.sees != "nothing" and kept.holds(method.sees, method.criterion.sees == "routed")


def check(subject: Subject, settings: Sparsify) -> Pattern:
    """Refuse now what would fail later: what `check_shapes` refuses, and a model sparse already."""
    pattern = check_shapes(subject.anatomy, settings)
    found = zeros.of_model(subject.model, subject.anatomy)
    if settings.existing == "refuse" and found.share >= SPARSE:
        raise SettingsError(
            f"{subject.source['id']} has {100 * found.share:.1f} % zeros already",
            f"fewer than {100 * SPARSE:g} %, or word of what becomes of them",
            "say --existing keep to leave every zero where it is, or start from the dense model",
        )
    return pattern


def check_shapes(anatomy: Anatomy, settings: Sparsify) -> Pattern:
    """Refuse a pattern that does not divide, and names of nothing. Raises `SettingsError`."""
    pattern = Pattern.parse(settings.pattern)
    names = zeros.prunable(anatomy)
    shapes = {tensor.name: tensor.shape for tensor in anatomy.tensors}
    wanted = [name for name in names if not named(name.removesuffix(".weight"), settings.leave)]
    for end in settings.leave:
        if not any(named(name.removesuffix(".weight"), (end,)) for name in names):
            raise SettingsError(
                f"leave = {end!r}, which names no linear inside a decoder layer",
                "ends of names: " + ", ".join(sorted({n.removesuffix(".weight").rpartition(".")[2] for n in names})),
                "correct it",
            )
    wanted += _others(anatomy, settings)
    if not wanted:
        raise SettingsError("every linear is left out", "at least one that may become sparse", "leave fewer out")
    for name in wanted:
        pattern.check(name, shapes[name][-1])
    return pattern


def _others(anatomy: Anatomy, settings: Sparsify) -> list[str]:
    """What `also` names. Raises `SettingsError` for what is not there, or cannot be judged by what it reads."""
    names = {name.removesuffix(".weight"): name for name in zeros.spared(anatomy)}
    for end in settings.also:
        if not any(named(name, (end,)) for name in names):
            raise SettingsError(
                f"also = {end!r}, which names no router, no embedding and no head of its own",
                "ends of names: " + ", ".join(sorted({name.rpartition(".")[2] for name in names})),
                "correct it; a head that is tied to the embedding is named as that",
            )
    if named(anatomy.family.embed, settings.also) and choose(settings).sees != "nothing":
        raise SettingsError(
            f"also = {anatomy.family.embed} with a method that looks at inputs: an embedding reads no numbers",
            "criteria that look at weights alone: magnitude",
            "make it sparse in a run of its own, with --existing keep",
        )
    return [name for plain, name in names.items() if named(plain, settings.also)]


def apply(
    subject: Subject,
    settings: Sparsify,
    blocks: Tensor | None,
    *,
    seed: int,
    kept: Readings | None = None,
    progress: Progress | None = None,
) -> Sparsified:
    """Make `subject.model` sparse in place; weights end rounded to the storage type. `blocks` (n, T) int64.

    `kept` holds readings of dense inputs, or will; it is for this model and these blocks.
    """
    asked, method = check(subject, settings), choose(settings)
    empty = None if settings.existing == "keep" else masks.masks_of(subject.model, subject.anatomy)
    patterns = spread(subject, settings, asked, blocks, seed=seed, kept=kept, progress=progress)
    say = None if progress is None else lambda done, total: progress("sparsify", done, total)
    model, anatomy = subject.model, subject.anatomy
    each = [*patterns, *([asked] if settings.also else [])]
    done = sparsify(model, anatomy, blocks, method, each, leave=settings.leave, kept=kept, progress=say)
    checkpoint.round_to(subject.model, subject.store)
    found = zeros.of_model(subject.model, subject.anatomy, asked)
    _check_finite(found, subject)
    notes = [*(f"{m.name}: {m.note}" for m in done if m.note), *_scarce(done), *_idle(settings, method)]
    asked_for = {re.sub(r"\[\d+\]$", "", m.name) for m in done}
    stored = {m.name.removesuffix(".weight"): m.zeros for m in found.matrices}
    made = sum(m.zeros for m in done if re.sub(r"\[\d+\]$", "", m.name) in stored)
    vanished = sum(zeros for name, zeros in stored.items() if name in asked_for) - made
    if vanished:
        notes.append(
            f"{vanished:,} kept weights are too small for {str(subject.store).removeprefix('torch.')}: zero too"
        )
    filled = 0 if empty is None else sum(masks.lost(model, empty).values())
    if filled:
        notes.append(f"{filled:,} zeros of matrices that were sparse before are filled; --existing keep leaves them")
    return Sparsified(asked, tuple(patterns), tuple(done), found, tuple(notes))


def warning(anatomy: Anatomy, settings: Sparsify, tokens: int) -> str | None:
    """What a user must know before `tokens` of text are read: of some matrix they are fewer than its inputs."""
    if not choose(settings).reads_gram:
        return None
    usual, share = set(zeros.prunable(anatomy)), anatomy.sizes.get("A", 1)
    read = {
        tensor: tokens * share // tensor.shape[0] if len(tensor.shape) > 2 else tokens
        for tensor in anatomy.tensors
        if tensor.name in usual and not named(tensor.name.removesuffix(".weight"), settings.leave)
    }
    worst = min(read, key=lambda tensor: read[tensor] / tensor.shape[-1], default=None)
    if worst is None or read[worst] >= worst.shape[-1]:
        return None
    each = " for each expert, on average," * (len(worst.shape) > 2)
    return f"{read[worst]:,} tokens{each} for {worst.shape[-1]:,} inputs of {worst.name}: {SCARCE}"


def _scarce(done: Sequence[Pruned]) -> tuple[str, ...]:
    """A note when Gram matrices were read of fewer tokens than they have rows."""
    found = [(matrix.scarce[0] / matrix.scarce[1], *matrix.scarce, matrix.name) for matrix in done if matrix.scarce]
    if not found:
        return ()
    _, tokens, inputs, name = min(found)
    many = f"{len(found):,} of {len(done):,} matrices met fewer tokens than they have inputs"
    return (f"{many}, {name} {tokens:,} for {inputs:,}: {SCARCE}",)


def _idle(settings: Sparsify, method: Method) -> tuple[str, ...]:
    """A note on settings that say nothing with this method."""
    usual = Sparsify()
    said = {
        "damping": settings.damping != usual.damping and not method.reads_gram,
        "inputs = both": settings.inputs == "both" and not method.mends,
        "mend": settings.mend != usual.mend and not method.mends,
    }
    idle = [name for name, is_idle in said.items() if is_idle]
    what = "a method that reads Gram matrices" + ", and inputs = both" * ("mend" in idle)
    return (f"nothing came of {' and '.join(idle)}: that takes {what}",) if idle else ()


def _check_finite(found: Sparsity, subject: Subject) -> None:
    """Raise `BrokenModel` for a weight that the type of storage cannot hold."""
    parameters = dict(subject.model.named_parameters())
    for matrix in found.matrices:
        if not bool(parameters[matrix.name].isfinite().all()):
            raise BrokenModel(
                f"{matrix.name} has weights beyond {str(subject.store).removeprefix('torch.')}",
                "weights that the checkpoint's type holds",
                "raise damping, or use a method that changes no weight, such as wanda",
            )


def spread(
    subject: Subject,
    settings: Sparsify,
    asked: Pattern,
    blocks: Tensor | None,
    *,
    seed: int,
    kept: Readings | None = None,
    progress: Progress | None = None,
) -> list[Pattern]:
    """A pattern for each layer."""
    how = ZERO_SPREADS.get(settings.spread)
    sizes = layer_sizes(subject, settings)
    say = None if progress is None else lambda done, total: progress(f"spread {how.name}", done, total)
    if how.sees == "nothing" or not any(sizes):
        values = [0.0] * len(sizes)
    elif how.sees == "trace":
        assert blocks is not None
        values = traces(subject.model, subject.anatomy, blocks, leave=settings.leave, seed=seed, progress=say)
    else:
        assert blocks is not None
        values = layer_values(
            subject.model, subject.anatomy, blocks, how.measure, leave=settings.leave, kept=kept, progress=say
        )
    return share(asked, values, sizes, how)


def layer_sizes(subject: Subject, settings: Sparsify) -> list[int]:
    """Weights of each layer that may become zero."""
    sizes = [0] * subject.anatomy.sizes["L"]
    names: Mapping[str, None] = dict.fromkeys(zeros.prunable(subject.anatomy))
    for tensor in subject.anatomy.tensors:
        if tensor.name in names and not named(tensor.name.removesuffix(".weight"), settings.leave):
            total = 1
            for size in tensor.shape:
                total *= size
            sizes[int(tensor.layer or 0)] += total
    return sizes
