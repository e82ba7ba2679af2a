"""What a run writes down of a model: where it is from, how it was made, and where its zeros lie.

What this gives up: anything about numbers that are measured; those are the report's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regrow.artifacts.pattern import Pattern
from regrow.artifacts.plan import Plan
from regrow.artifacts.report import Measure
from regrow.artifacts.shape import loss_by_axis
from regrow.artifacts.space import said as said_widths
from regrow.artifacts.sparsity import Sparsity
from regrow.engines import provenance
from regrow.engines.bind import Subject
from regrow.engines.hetero import Holder
from regrow.engines.zeros import of_model
from regrow.settings import Recipe

UNEVEN = 1.5  # how much slower a run may be than one before, or faster than what was saved, on a quiet machine


def origin_of(subject: Subject, held: Holder) -> dict[str, Any]:
    """A report's `model`: what is known of the source, and the class that holds the result."""
    known = {k: v for k, v in subject.source.items() if k != "path"}
    return {**known, "holder": held.kind, "holder_note": held.note}


def known(subject: Subject) -> tuple[str, ...]:
    """What a reader must know of the model that all began with."""
    note = subject.source.get("note")
    return (f"dense: {note}",) if note else ()


def zeros_of(subject: Subject, recipe: Recipe, *, always: bool) -> Sparsity | None:
    """The zeros of a model; None of a dense one, unless they are wanted `always`."""
    asked = recipe.sparsify.pattern if recipe.sparsify else subject.source.get("sparsity", {}).get("pattern")
    found = of_model(subject.model, subject.anatomy, None if asked is None else Pattern.parse(asked))
    return found if always or found.sparse else None


def sparse_sizes(subject: Subject, found: Sparsity | None) -> dict[str, Measure]:
    """`size/nonzero_weights` and what sparse storage would weigh, of a model that has zeros or gets them."""
    if found is None:
        return {}
    how = {"matrices": "inside decoder layers", "stored": "non-zero weights and one bit a position, or as it is"}
    stored = subject.anatomy.store_bytes
    size = min(found.bitmask_bytes(stored), found.weights * stored)
    return {
        "size/nonzero_weights": Measure(found.weights - found.zeros, "", "lower"),
        "size/bitmask_bytes": Measure(size, "bytes", "lower", how=how),
    }


def uneven(before: Mapping[str, Measure], after: Mapping[str, Measure]) -> tuple[str, ...]:
    """A note where reading a prompt became slower, or quicker than its operations explain: minutes lie between both
    measurements, and a machine that does other work meanwhile tells nothing."""
    name = "speed/prompt_ms/batch1"
    if name not in before or name not in after:
        return ()
    times, work = (after[n].value / before[n].value for n in (name, "size/flops_per_token"))
    if work / UNEVEN <= times <= UNEVEN:
        return ()
    what = f"a prompt took {times:.2f} of the time before, and {work:.2f} of the operations"
    return (f"{what}: the machine had other work before or after, so speeds cannot be compared",)


def by_layer(subject: Subject, kept: Sparsity | None, errors: Mapping[int, float]) -> tuple[dict[str, float], ...]:
    """Weights, zeros and error of each layer; nothing for a model that is not sparse."""
    if kept is None or not kept.sparse:
        return ()
    layer = {tensor.name: tensor.layer for tensor in subject.anatomy.tensors}
    rows = [{"weights": 0.0, "zeros": 0.0} for _ in range(subject.anatomy.sizes["L"])]
    for matrix in kept.matrices:
        place = layer[matrix.name]
        if place is not None:
            rows[place]["weights"] += matrix.weights
            rows[place]["zeros"] += matrix.zeros
    found = ({**row, **({"error": errors[i]} if i in errors else {})} for i, row in enumerate(rows))
    return tuple(row for row in found if row["weights"])


def notes_of_folder(subject: Subject, out: Path, recipe: Recipe, kept: Sparsity | None) -> dict[str, Any]:
    """What later steps need of where a model is from: `base_model` loads what all steps began with, which `base`
    describes; its zeros."""
    source = subject.source
    own = {k: v for k, v in source.items() if k not in ("path", "asked")}
    notes = {
        "id": out.name,
        "licence": source["licence"],
        "note": source["note"],
        "base_model": source.get("base_model", provenance.lasting(source.get("asked", "demo"))),
        "base": source.get("base", own),
    }
    if kept is not None and (kept.sparse or recipe.sparsify):
        asked = recipe.sparsify.pattern if recipe.sparsify else _pattern(source.get("sparsity", {}), kept)
        layers = [row["zeros"] / row["weights"] for row in by_layer(subject, kept, {})]
        notes["sparsity"] = {"pattern": asked, "share": kept.share, "layers": layers, "mask_hash": kept.mask_hash}
    return notes


def _pattern(before: Mapping[str, Any], kept: Sparsity) -> str | None:
    """The pattern that the model had and still has, or the groups that are found."""
    known = before.get("pattern")
    if before.get("mask_hash") == kept.mask_hash:
        return known  # whatever it is, spreads and layers that were left dense among it
    whole = known is not None and kept.share >= before["share"] and (":" not in known or kept.groups == known)
    return known if whole else kept.groups


STRUCTURED = {
    "keep", "shape", "learn", "search", "axes", "split", "criterion", "criteria", "options", "reduce", "spread",
    "uniform", "divisors", "rescale_norms", "merge_heads", "stages", "protect", "refit",
}  # fmt: skip
"""Keys of a recipe that say nothing when no unit goes."""


def made_by(recipe: Recipe, subject: Subject, plan: Plan) -> dict[str, Any]:
    """The recipe as it was run, with what was asked in words and what each axis really lost."""
    if recipe.cuts:
        split = loss_by_axis(subject.anatomy, plan.shape())
        budget = recipe.keep or said_widths(recipe.shape)
        said = {**recipe.model_dump(mode="json"), "budget": budget, "split_realised": split}
    else:
        said = recipe.model_dump(mode="json", exclude=STRUCTURED)
        asked = recipe.sparsify
        said["budget"] = None if asked is None else str(Pattern.parse(asked.pattern))
    return {**said, "recipe": recipe.name}
