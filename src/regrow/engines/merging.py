"""Query heads that go are added into heads that stay, before anything is masked or sliced.

Minitron (arXiv:2407.14679, 2.3) prints `kept + (kept - gone)`, which moves away from the head that goes; LaCo's form is
`kept + (gone - kept)`, which for a single pair is the head that goes. Both act on the rows that make a head: of q, and
of k and v where every head has its own. What this gives up: the columns that read a head stay as they are, since no
paper says what becomes of them.
"""

from __future__ import annotations

from torch import Tensor

from regrow.artifacts.family import Unit
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.artifacts.shape import Tensor as Spec

AWAY = {"minitron": 1.0, "laco": -1.0}
"""The factor on `kept - gone`, which is added to what is kept."""


def merge(weight: Tensor, spec: Spec, anatomy: Anatomy, plan: Plan) -> Tensor:
    """A weight (rows, columns) or bias (rows,) of the intact model with the plan's heads merged, in their order.

    `weight` itself where none are; it is never changed.
    """
    pairs = next((layer.merged for layer in plan.layers if layer.index == spec.layer), ())
    head: Unit = "group" if anatomy.sizes["G"] == 1 else "head"
    cuts = [cut for unit, cut in spec.cuts if unit == head and cut.dim == 0 and cut.role != "span"]
    if not pairs or not cuts:
        return weight
    weight = weight.clone()
    for cut in cuts:
        width, heads = anatomy.width(cut), anatomy.units(head)
        run = weight.narrow(0, anatomy.offset(cut), heads * width).view(heads, width, -1)  # (H, D, columns or 1)
        for kept, gone in pairs:
            run[kept].add_(run[kept] - run[gone], alpha=AWAY[plan.merge])
    return weight
