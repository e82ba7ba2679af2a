"""Stage apply: the plan becomes a smaller model, proved equal to the intact one with the same units shut.

What this gives up: the intact model, and going on when the two differ, however little it might matter.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import torch

from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.engines import checkpoint
from regrow.engines.bind import Subject, bind
from regrow.engines.gates import Gates, from_plan, gated
from regrow.engines.hetero import Holder, build, holder
from regrow.engines.room import give_back
from regrow.engines.surgery import merged, slice_model

PROOF_LAYERS, PROOF_WORDS = 2, 256  # of the random model that stands in for one in 16 bits


@dataclass(slots=True)
class Cut:
    """A cut model with the class that holds it. `difference`: masked against sliced logits, relative."""

    subject: Subject
    holder: Holder
    difference: float


def apply(subject: Subject, plan: Plan, gates: Gates | None = None) -> Cut:
    """Cut the model; `subject.model` is consumed. Weights end rounded to the storage type.

    `gates` may be soft where the plan keeps units, and are folded; None: what stays stays as it is.

    Raises `IdentityError` when masked and sliced logits differ by more than 1e-5 of their scale. In 16 bits rounding
    hides more than that, so there a random fp32 model of the same class is cut first, and held to the same.
    """
    plan.check(subject.anatomy)
    if subject.model.dtype != torch.float32:
        prove(subject.model, subject.anatomy, plan)
    generation = subject.model.generation_config
    cut, found, difference = _sliced(subject.model, subject.anatomy, plan, gates)
    cut.generation_config = generation
    checkpoint.round_to(cut, subject.store)
    subject.model = cut
    gc.collect()
    give_back()
    return Cut(subject, found, difference)


def cut_copy(subject: Subject, plan: Plan) -> Subject:
    """The cut model as it would be stored, beside the intact one, which stays as it is."""
    plan.check(subject.anatomy)
    found = holder(subject.model.config, subject.anatomy, plan)
    small = build(found.config, dict(slice_model(subject.model, subject.anatomy, plan, consume=False)))
    small.generation_config = subject.model.generation_config
    checkpoint.round_to(small, subject.store)
    return replace(subject, model=small)


def prove(model: Any, anatomy: Anatomy, plan: Plan) -> float:
    """Cut a random fp32 model of the class of `model`, with its widths, `PROOF_LAYERS` layers and a few words.

    Returns the difference of masked and sliced logits; raises `IdentityError` above 1e-5 of their scale.
    """
    everything, few = Plan.everything(anatomy), plan.layers[:PROOF_LAYERS]
    whole = replace(everything, layers=tuple(everything.layers[layer.index] for layer in few))
    config = holder(model.config, anatomy, whole).config
    config.vocab_size, config.pad_token_id, config.dtype = PROOF_WORDS, None, torch.float32
    twin = _random(type(model), config)
    kept = replace(plan, layers=tuple(replace(layer, index=place) for place, layer in enumerate(few)))
    return _sliced(twin, bind(config), kept)[2]


def _random(kind: Any, config: Any) -> Any:
    """A model whose gains and biases are random too: fresh ones are 1 and 0, and hide what is done to them."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind(config).float().eval()
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * spread + (parameter if parameter.dim() == 1 else 0))
    return model


def _sliced(model: Any, anatomy: Anatomy, plan: Plan, gates: Gates | None = None) -> tuple[Any, Holder, float]:
    """The cut model, what holds it, and how far its logits are from those of the intact one, merged and masked."""
    ids, gates = checkpoint.probe(anatomy.sizes["V"]), from_plan(anatomy, plan) if gates is None else gates
    with merged(model, anatomy, plan), gated(model, anatomy, gates):
        masked = checkpoint.logits(model, ids)
    found = holder(model.config, anatomy, plan)
    cut = build(found.config, dict(slice_model(model, anatomy, plan, gates)))
    difference = checkpoint.check_equal("masked and sliced logits", masked, checkpoint.logits(cut, ids), model.dtype)
    return cut, found, difference
