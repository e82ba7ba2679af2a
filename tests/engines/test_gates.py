"""Gates: laid out along weights as declared, acting only inside the block, equal to zeroing by hand, differentiable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import anatomy_of, difference, families, ids, logits, make, plan, without
from regrow.artifacts.family import Cut
from regrow.artifacts.plan import Plan
from regrow.artifacts.shape import Anatomy
from regrow.engines.gates import Gates, LayerGates, expand, from_plan, gated
from regrow.errors import UnsupportedModel

KINDS = [kind for kind, _ in families()]


def layers(anatomy: Anatomy, **first: Any) -> Gates:
    """Gates on layer 0 alone."""
    return Gates([LayerGates(**first), *(LayerGates() for _ in range(anatomy.sizes["L"] - 1))])


def under(model: Any, gates: Gates) -> Tensor:
    with gated(model, anatomy_of(model), gates):
        return logits(model, ids())


def test_expand_by_hand() -> None:
    """Phi-3's fused q, k, v with K=3, G=2, D=4: 24 rows of q, 12 of k, 12 of v."""
    anatomy = anatomy_of(make("phi3"))
    gate = torch.tensor([2.0, 3.0, 5.0])
    fused = [cut for cut in anatomy.family.cuts["group"] if cut.dim == 0]
    q, k, v = (expand(anatomy, cut, gate, 48) for cut in fused)
    assert q.tolist() == [2.0] * 8 + [3.0] * 8 + [5.0] * 8 + [1.0] * 24
    assert k.tolist() == [1.0] * 24 + [2.0] * 4 + [3.0] * 4 + [5.0] * 4 + [1.0] * 12
    assert v.tolist() == [1.0] * 36 + [2.0] * 4 + [3.0] * 4 + [5.0] * 4
    assert expand(anatomy, Cut("any", 1), gate, 3).tolist() == [2.0, 3.0, 5.0]


def test_gates_of_a_plan_by_hand() -> None:
    anatomy = anatomy_of(make("llama"))
    kept = without(anatomy, 1, attention=True, mlp=True)
    gates = from_plan(anatomy, Plan((0, 2), (kept.layers[0], kept.layers[1]), rescale_norms=True))
    assert gates.channel is not None
    assert gates.channel.nonzero().flatten().tolist() == [0, 2]
    assert gates.rescale_norms
    assert gates.layers[0] == LayerGates()  # all open
    for gone in gates.layers[1:]:  # a layer that keeps nothing and one that is dropped
        assert gone.group is gone.head is gone.neuron is None
        assert gone.attention is not None
        assert gone.mlp is not None
        assert float(gone.attention) == float(gone.mlp) == 0.0
    cut = from_plan(anatomy, plan(anatomy, ("group", "neuron"), uniform=True))
    assert cut.channel is None
    assert cut.layers[0].neuron is not None
    assert int(cut.layers[0].neuron.sum()) == 12
    assert cut.layers[0].group is not None
    assert cut.layers[0].group.tolist().count(1.0) == 2


@pytest.mark.parametrize("unit", ["group", "channel"])
def test_a_plan_for_units_the_family_cannot_cut(unit: str) -> None:
    """Such a plan would be ignored: there is no tensor it names."""
    anatomy = anatomy_of(make("gpt_neox"))
    whole = Plan.everything(anatomy)
    fewer = tuple(replace(layer, groups=(0, 1), heads=(0, 1)) for layer in whole.layers)
    wrong = replace(whole, layers=fewer) if unit == "group" else replace(whole, channels=(0, 1))
    with pytest.raises(UnsupportedModel, match=f"2 of .* {unit}s of a gpt_neox model") as caught:
        from_plan(anatomy, wrong)
    assert caught.value.allowed.startswith("layer, neuron")
    assert unit in caught.value.todo


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_change_nothing(kind: str) -> None:
    model = make(kind)
    size = anatomy_of(model).sizes
    open_gates = layers(
        anatomy_of(model),
        neuron=torch.ones(size["F"]),
        attention=torch.ones(()),
        mlp=torch.ones(()),
    )
    before = logits(model, ids())
    assert torch.equal(under(model, from_plan(anatomy_of(model), Plan.everything(anatomy_of(model)))), before)
    assert torch.equal(under(model, open_gates), before)


@pytest.mark.parametrize("fails", [False, True], ids=["well", "with an error"])
def test_everything_is_as_it_was_after_the_block(fails: bool) -> None:
    model = make("gemma2")
    anatomy = anatomy_of(model)
    before = logits(model, ids())
    gates = from_plan(anatomy, plan(anatomy, anatomy.supported, uniform=False))
    try:
        with gated(model, anatomy, gates):
            assert difference(before, logits(model, ids())) > 0.1
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert torch.equal(logits(model, ids()), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def zeroed(model: Any, path: str, dim: int, where: slice | list[int]) -> None:
    weight = model.get_parameter(path).data
    (weight if dim == 0 else weight.T)[where] = 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("olmo2", "gpt_neox")])
def test_shut_heads_and_neurons_equal_zeroed_columns(kind: str) -> None:
    """The gate acts at the input of o_proj and down_proj, so shutting it is zeroing columns there."""
    model = make(kind)
    anatomy = anatomy_of(model)
    size, d = anatomy.sizes, anatomy.sizes["D"]
    head, neuron = torch.ones(size["H"]), torch.ones(size["F"])
    head[3] = neuron[7] = 0
    by_gates = under(model, layers(anatomy, head=head, neuron=neuron))
    zeroed(model, "model.layers.0.self_attn.o_proj.weight", 1, slice(3 * d, 4 * d))
    zeroed(model, "model.layers.0.mlp.down_proj.weight", 1, [7])
    assert difference(by_gates, logits(model, ids())) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_shut_branch_takes_its_biases_along(kind: str) -> None:
    """Shutting every neuron leaves the bias of the last linear; shutting the branch does not."""
    model = make(kind)
    anatomy = anatomy_of(model)
    none = torch.zeros(anatomy.sizes["F"])
    units_shut = under(model, layers(anatomy, neuron=none))
    branch_shut = under(model, layers(anatomy, mlp=torch.zeros(())))
    down = model.get_submodule(f"{anatomy.family.layers}.0.{anatomy.family.mlp.site}")
    if down.bias is None:
        assert difference(units_shut, branch_shut) <= 1e-6
    else:
        assert difference(units_shut, branch_shut) > 1e-3


def test_a_shut_group_also_leaves_the_statistics_of_a_norm_over_all_heads() -> None:
    """OLMo 2: gating o_proj alone is another function, since q and k of the group still count in their norms."""
    model = make("olmo2")
    anatomy = anatomy_of(model)
    size = anatomy.sizes
    group = torch.tensor([1.0, 0.0, 1.0])
    by_gates = under(model, layers(anatomy, group=group))
    width = size["G"] * size["D"]
    zeroed(model, "model.layers.0.self_attn.o_proj.weight", 1, slice(width, 2 * width))
    assert difference(by_gates, logits(model, ids())) > 1e-2


class Mean(nn.Module):
    """An RMS norm without a gain, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_statistics_are_over_the_kept_channels() -> None:
    """The first norm of a gated Llama equals the norm of the kept channels alone, to the last digit but one."""
    model = make("llama")
    anatomy = anatomy_of(model)
    kept = Plan(tuple(range(0, 24, 3)), Plan.everything(anatomy).layers)
    seen: list[Tensor] = []
    norm = model.model.layers[0].input_layernorm
    with gated(model, anatomy, from_plan(anatomy, kept)):
        norm.register_forward_hook(lambda _, __, y: seen.append(y))  # after the gates' own
        logits(model, ids())
    x = model.model.embed_tokens(ids())[..., list(kept.channels)]
    torch.testing.assert_close(seen[0][..., list(kept.channels)], Mean()(x) * norm.weight[list(kept.channels)])
    assert not seen[0][..., 1].any()  # what is gone stays zero


@pytest.mark.parametrize("unit", ["group", "head", "neuron", "attention", "mlp"])
def test_gradients_flow_to_gates(unit: str) -> None:
    """Central differences of the loss agree with the gradient by the gate."""
    model = make("qwen3").double()
    anatomy = anatomy_of(model)
    shape = {"group": (3,), "head": (6,), "neuron": (20,)}.get(unit, ())
    gate = torch.ones(shape, dtype=torch.float64, requires_grad=True)

    def loss(value: Tensor) -> Tensor:
        with gated(model, anatomy, layers(anatomy, **{unit: value})):
            found: Tensor = model(input_ids=ids(), labels=ids(), use_cache=False).loss
        return found

    (slope,) = torch.autograd.grad(loss(gate), gate)
    for index in range(slope.numel())[:6]:
        step = torch.zeros(slope.numel(), dtype=torch.float64)
        step[index] = 3e-3  # norms and the loss are fp32, so no smaller
        step = step.view(shape)
        with torch.no_grad():
            measured = float(loss(gate + step) - loss(gate - step)) / 6e-3
        assert float(slope.flatten()[index]) == pytest.approx(measured, rel=1e-2, abs=1e-3)
    assert all(p.grad is None for p in model.parameters())
