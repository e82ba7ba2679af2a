"""The comparison of masked and sliced must see every mistake: planted faults, one for each tensor and each rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Cut, anatomy_of, cut, difference, families, ids, logits, make, plan, soft
from regrow.artifacts.family import Unit
from regrow.artifacts.plan import LayerPlan, Plan
from regrow.engines import checkpoint
from regrow.engines.gates import Gates, from_plan
from regrow.engines.hetero import build, holder
from regrow.engines.surgery import slice_model
from regrow.errors import UnsupportedModel

EXACT = 1e-5
SEEN = 1e-3  # a fault must stand out a hundredfold
KINDS = [kind for kind, _ in families()]
ALL: tuple[Unit, ...] = ("layer", "group", "head", "neuron", "channel")


def slices(kind: str, kept: Plan, gates: Gates | None = None, **changes: Any) -> dict[str, Tensor]:
    model = make(kind, **changes)
    return dict(slice_model(model, anatomy_of(model), kept, gates))


def units(kind: str) -> tuple[Unit, ...]:
    return anatomy_of(make(kind)).supported


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_of_any_tensor_is_seen(kind: str) -> None:
    """Every gain, bias and weight of the first and last layer and outside them, moved by one along each dimension."""
    anatomy = anatomy_of(make(kind))
    found = cut(make(kind), plan(anatomy, units(kind), uniform=False))
    assert found.error() <= EXACT
    last = len(found.plan.layers) - 1
    inside = f"{anatomy.family.layers}."
    shifted = 0
    for name, parameter in found.model.named_parameters():
        if name.startswith(inside) and name.removeprefix(inside).partition(".")[0] not in ("0", str(last)):
            continue
        right = parameter.data.clone()
        for dim in range(parameter.dim()):
            if parameter.shape[dim] == 1:
                continue
            parameter.data.copy_(right.roll(1, dim))
            assert found.error() > SEEN, f"{name}, dimension {dim}"
            shifted += 1
        parameter.data.copy_(right)
    assert found.error() <= EXACT
    assert shifted >= 20


def _other_group(found: Cut, kind: str) -> None:
    """The key of a group that was to go, in the place of one that stays."""
    layer = found.plan.layers[0]
    gone = next(g for g in range(found.anatomy.sizes["K"]) if g not in layer.groups)
    groups = tuple(sorted((*layer.groups[1:], gone)))
    per = found.anatomy.sizes["G"]
    heads = tuple(h for g in groups for h in range(g * per, (g + 1) * per))
    whole = Plan.everything(found.anatomy)
    wrong = Plan(whole.channels, (LayerPlan(0, groups, heads, layer.neurons), *found.plan.layers[1:]))
    other = slices(kind, wrong)
    for name, parameter in found.model.named_parameters():
        if ".0.self_attn.k_proj" in name:
            parameter.data.copy_(other[name])


def _other_fused_key(found: Cut, kind: str) -> None:
    layer, size = found.plan.layers[0], found.anatomy.sizes
    gone = next(g for g in range(size["K"]) if g not in layer.groups)
    rows = make(kind).get_parameter("model.layers.0.self_attn.qkv_proj.weight")[size["H"] * size["D"] :]
    fused = found.model.get_parameter("model.layers.0.self_attn.qkv_proj.weight")
    start = len(layer.heads) * size["D"]
    fused.data[start : start + size["D"]] = rows[gone * size["D"] : (gone + 1) * size["D"]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_neox"])
def test_the_wrong_key_group_is_seen(kind: str) -> None:
    found = cut(make(kind), plan(anatomy_of(make(kind)), ("group",), uniform=True))
    assert found.error() <= EXACT
    (_other_fused_key if kind == "phi3" else _other_group)(found, kind)
    assert found.error() > SEEN


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt_neox"])
def test_a_gate_forgotten_on_the_embedding_is_seen(kind: str, tied: bool) -> None:
    model = make(kind, tie_word_embeddings=tied)
    anatomy = anatomy_of(model)
    kept = plan(anatomy, ("channel",), uniform=True)
    found = cut(model, kept, soft(anatomy, kept, ("channel",)))
    assert found.error() <= EXACT
    bare = make(kind, tie_word_embeddings=tied).get_parameter(f"{anatomy.family.embed}.weight")
    found.model.get_input_embeddings().weight.data.copy_(bare[:, list(kept.channels)])
    assert found.error() > SEEN


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_keep_their_old_cache_slot_are_seen(kind: str) -> None:
    """Without new `layer_idx`, the cache has holes: generation fails or differs."""
    found = cut(make(kind), plan(anatomy_of(make(kind)), ("layer",), uniform=True))
    whole = logits(found.model, ids())[:, -8:]
    assert difference(whole, checkpoint.cached_logits(found.model, ids(), 8)) <= EXACT
    for layer, kept in zip(found.model.get_submodule(found.anatomy.family.layers), found.plan.layers, strict=True):
        layer.get_submodule(found.anatomy.family.attention.module).layer_idx = kept.index
    with pytest.raises(IndexError):
        checkpoint.cached_logits(found.model, ids(), 8)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma2"])
def test_a_copied_layer_configuration_is_seen(kind: str) -> None:
    """A copy knows no attention implementation: attention falls back to eager without a mask, and looks ahead."""
    found = cut(make(kind), plan(anatomy_of(make(kind)), ("neuron",), uniform=False))
    assert found.holder.kind == "heterogeneous"
    config = found.model.config
    for index, layer in enumerate(found.model.get_submodule(found.anatomy.family.layers).children()):
        attention = layer.get_submodule(found.anatomy.family.attention.module)
        attention.config = copy.copy(config.per_layer_config[index])
        attention.config._attn_implementation = None
    assert found.error() > SEEN
    later = ids()
    later[:, -1] = 3 + (later[:, -1] - 2) % 60
    assert difference(logits(found.model, ids())[:, :-1], logits(found.model, later)[:, :-1]) > SEEN


# ---- the rules one by one


def test_a_plan_worked_by_hand() -> None:
    """Llama, soft gates everywhere, layer 0: which rows and columns stay and what multiplies them."""
    model = make("llama")
    anatomy = anatomy_of(model)
    whole, size = Plan.everything(anatomy), anatomy.sizes
    layer = LayerPlan(0, (1,), (2, 3), (0, 4, 19))
    kept = Plan((0, 2, 3), (layer, *whole.layers[1:]))
    gates = soft(anatomy, kept, ("group", "head", "neuron", "channel"))
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = dict(slice_model(model, anatomy, kept, gates))
    channels, neurons = [0, 2, 3], [0, 4, 19]
    rows = list(range(2 * size["D"], 4 * size["D"]))  # query heads 2 and 3
    attention = "model.layers.0.self_attn."
    assert torch.equal(found[attention + "q_proj.weight"], dense[attention + "q_proj.weight"][rows][:, channels])
    keys = list(range(size["D"], 2 * size["D"]))  # group 1
    assert torch.equal(found[attention + "k_proj.bias"], dense[attention + "k_proj.bias"][keys])
    first = gates.layers[0]
    assert first.group is not None
    assert first.head is not None
    assert first.neuron is not None
    assert gates.channel is not None
    hz = gates.channel[channels]
    across = (first.group[1] * first.head[[2, 3]]).repeat_interleave(size["D"])
    out = dense[attention + "o_proj.weight"][channels][:, rows] * hz[:, None] * across
    torch.testing.assert_close(found[attention + "o_proj.weight"], out)
    torch.testing.assert_close(found[attention + "o_proj.bias"], dense[attention + "o_proj.bias"][channels] * hz)
    down = dense["model.layers.0.mlp.down_proj.weight"][channels][:, neurons] * hz[:, None] * first.neuron[neurons]
    torch.testing.assert_close(found["model.layers.0.mlp.down_proj.weight"], down)
    assert torch.equal(found["model.norm.weight"], dense["model.norm.weight"][channels])
    torch.testing.assert_close(found["model.embed_tokens.weight"], dense["model.embed_tokens.weight"][:, channels] * hz)
    assert torch.equal(found["lm_head.weight"], dense["lm_head.weight"][:, channels])


def test_dropped_layers_close_the_ranks() -> None:
    kept = plan(anatomy_of(make("llama")), ("layer",), uniform=True)
    assert [layer.index for layer in kept.layers] == [0, 2]
    found, dense = slices("llama", kept), dict(make("llama").named_parameters())
    assert torch.equal(found["model.layers.1.self_attn.q_proj.weight"], dense["model.layers.2.self_attn.q_proj.weight"])
    assert not any(".layers.2." in name for name in found)


def test_the_model_is_consumed_as_it_is_cut() -> None:
    """At no time are there two models: what has been yielded is gone from the intact one."""
    model = make("llama")
    pieces = slice_model(model, anatomy_of(model), plan(anatomy_of(model), ("neuron",), uniform=True))
    name, _ = next(pieces)
    left = dict(model.named_parameters())
    assert left[name].numel() == 0
    assert sum(p.numel() == 0 for p in left.values()) == 1
    list(pieces)
    assert all(p.numel() == 0 for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gates_none_are_the_binary_gates_of_the_plan(kind: str) -> None:
    anatomy = anatomy_of(make(kind))
    kept = plan(anatomy, units(kind), uniform=False)
    for (name, ours), theirs in zip(
        slices(kind, kept).items(), slices(kind, kept, from_plan(anatomy, kept)).values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_two_cuts_in_a_row_equal_one() -> None:
    """Cutting neurons 0..19 to 12 and those to 6 is cutting to 6: plans compose."""
    anatomy = anatomy_of(make("llama"))
    whole = Plan.everything(anatomy)

    def neurons(kept: tuple[int, ...]) -> Plan:
        return Plan(whole.channels, tuple(LayerPlan(x.index, x.groups, x.heads, kept) for x in whole.layers))

    once = cut(make("llama"), neurons((1, 3, 5, 7, 9, 11)))
    step = cut(make("llama"), neurons(tuple(range(12)))).model
    twice = cut(step, neurons((1, 3, 5, 7, 9, 11)))
    assert difference(logits(once.model, ids()), logits(twice.model, ids())) == 0


Wrong = Callable[[dict[str, Tensor]], object]


def _drop(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.0.mlp.up_proj.weight"]


def _widen(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(99)


def _add(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.mlp.scale"] = torch.ones(3)


@pytest.mark.parametrize(("wrong", "says"), [(_drop, "up_proj"), (_widen, "norm.weight"), (_add, "mlp.scale")])
def test_tensors_that_do_not_fit_the_class_are_refused(wrong: Wrong, says: str) -> None:
    anatomy = anatomy_of(make("llama"))
    kept = plan(anatomy, ("neuron",), uniform=True)
    weights = slices("llama", kept)
    wrong(weights)
    with pytest.raises(UnsupportedModel, match=says) as caught:
        build(holder(make("llama").config, anatomy, kept).config, weights)
    assert "docs/families.md" in caught.value.todo
