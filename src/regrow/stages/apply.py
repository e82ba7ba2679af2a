"""Stage apply: the plan becomes a smaller model, proved equal to the intact one with the same units shut.

What this gives up: the intact model, and going on when the two differ, however little it might matter.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

from regrow.artifacts.plan import Plan
from regrow.engines import checkpoint
from regrow.engines.bind import Subject
from regrow.engines.gates import from_plan, gated
from regrow.engines.hetero import Holder, build, holder
from regrow.engines.surgery import slice_model


@dataclass(slots=True)
class Cut:
    """A cut model with the class that holds it. `difference`: masked against sliced logits, relative."""

    subject: Subject
    holder: Holder
    difference: float


def apply(subject: Subject, plan: Plan) -> Cut:
    """Cut the model; `subject.model` is consumed. Weights end rounded to the storage type.

    Raises `IdentityError` when masked and sliced logits differ by more than 1e-5 of their scale (more in 16 bits).
    """
    plan.check(subject.anatomy)
    model, anatomy = subject.model, subject.anatomy
    ids = checkpoint.probe(anatomy.sizes["V"])
    with gated(model, anatomy, from_plan(anatomy, plan)):
        masked = checkpoint.logits(model, ids)
    found = holder(model.config, anatomy, plan)
    generation = model.generation_config
    cut = build(found.config, dict(slice_model(model, anatomy, plan)))
    cut.generation_config = generation
    difference = checkpoint.check_equal("masked and sliced logits", masked, checkpoint.logits(cut, ids), model.dtype)
    checkpoint.round_to(cut, subject.store)
    subject.model = cut
    gc.collect()
    return Cut(subject, found, difference)
