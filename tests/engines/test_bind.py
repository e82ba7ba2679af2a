"""Binding: what is read from a configuration, what is refused, and that an unknown coupling never slips through."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from models import anatomy_of, config_of, cut, families, make, plan, randomise, without
from regrow.artifacts.family import FAMILIES, UNITS, Cut, Family
from regrow.artifacts.shape import LayerShape, Shape, costs, count
from regrow.engines.bind import Subject, bind, bind_any, empty_model, family_of, sizes_of, why_not
from regrow.errors import IdentityError, RegrowError, UnsupportedModel
from regrow.stages.apply import apply

KINDS = [kind for kind, _ in families()]


# ---- what is read


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_once(kind: str, tied: bool) -> None:
    model = make(kind, tie_word_embeddings=tied)
    anatomy = bind(model.config)
    assert anatomy == anatomy_of(model)  # with and without a model in memory
    assert {t.name: t.shape for t in anatomy.tensors} == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert anatomy.tied == tied
    assert count(anatomy, anatomy.dense) == sum(p.numel() for p in model.parameters())


def test_binding_takes_no_memory() -> None:
    model = empty_model(LlamaConfig())  # 7 billion weights
    assert {p.device.type for p in model.parameters()} == {"meta"}
    anatomy = bind(LlamaConfig())
    assert count(anatomy, anatomy.dense) == 6_738_415_616


def test_sizes_by_hand() -> None:
    wanted = {"L": 3, "K": 3, "G": 2, "H": 6, "D": 6, "F": 20, "C": 24, "V": 64}
    assert sizes_of(config_of("llama")) == wanted
    assert sizes_of(config_of("phi3")) == {**wanted, "D": 4}  # no head_dim: width / heads
    assert sizes_of(config_of("gpt_neox")) == {**wanted, "K": 6, "G": 1, "D": 4}  # no key/value heads


def test_owners_by_hand() -> None:
    anatomy = bind(config_of("llama"))
    owners = {t.name: {(unit, cut.dim, cut.role) for unit, cut in t.cuts} for t in anatomy.tensors}
    first = "model.layers.0."
    assert owners[first + "self_attn.q_proj.weight"] == {
        ("group", 0, "select"),
        ("head", 0, "select"),
        ("channel", 1, "select"),
    }
    assert owners[first + "self_attn.q_proj.bias"] == {("group", 0, "select"), ("head", 0, "select")}
    assert owners[first + "self_attn.o_proj.bias"] == {("channel", 0, "write")}
    assert owners[first + "mlp.down_proj.weight"] == {("neuron", 1, "fold"), ("channel", 0, "write")}
    assert owners["model.embed_tokens.weight"] == {("channel", 1, "embed")}
    branches = {t.name: t.branch for t in anatomy.tensors}
    assert branches[first + "input_layernorm.weight"] == "attention"
    assert branches[first + "mlp.down_proj.bias"] == branches[first + "post_attention_layernorm.weight"] == "mlp"
    assert branches["model.norm.weight"] is None


def test_norms_over_one_head_belong_to_no_unit() -> None:
    anatomy = bind(config_of("qwen3"))
    norms = [t for t in anatomy.tensors if "q_norm" in t.name or "k_norm" in t.name]
    assert len(norms) == 6
    assert all(not t.cuts and t.branch == "attention" for t in norms)


def test_layers_that_look_alike_are_counted_once() -> None:
    assert bind(config_of("gemma2")).alike == (0, 0, 0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (None, 2)])
def test_bytes_a_weight_takes(dtype: torch.dtype | None, size: int) -> None:
    assert bind(config_of("llama", dtype=dtype)).store_bytes == size


# ---- what is refused


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "mamba"])
def test_a_model_type_that_nobody_declared(kind: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        bind(CONFIG_MAPPING[kind]())
    assert repr(kind) in caught.value.came
    for declared in KINDS:
        assert declared in caught.value.allowed
    assert "docs/families.md" in caught.value.todo


def test_why_a_unit_cannot_be_cut() -> None:
    neox, llama = family_of(config_of("gpt_neox")), family_of(config_of("llama"))
    sizes = sizes_of(config_of("llama"))
    assert "hidden_size / num_attention_heads" in str(why_not(neox, sizes_of(config_of("gpt_neox")), "group"))
    assert why_not(neox, sizes_of(config_of("gpt_neox")), "neuron") is None
    assert [why_not(llama, sizes, unit) for unit in UNITS] == [None] * 5
    assert "cut groups" in str(why_not(llama, {**sizes, "G": 1}, "head"))
    assert "one layer" in str(why_not(llama, {**sizes, "L": 1}, "layer"))
    assert bind(config_of("llama", num_key_value_heads=6)).supported == ("layer", "group", "neuron", "channel")
    assert bind(config_of("gpt_neox")).supported == ("layer", "neuron")


def test_a_layout_that_lacks_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FAMILIES.get("llama")
    wrong = replace(llama, cuts={**llama.cuts, "neuron": (Cut("mlp.fc1", 0), Cut("mlp.down_proj", 1, role="fold"))})
    monkeypatch.setitem(FAMILIES._items, "llama", wrong)
    with pytest.raises(UnsupportedModel, match=r"neurons in 'mlp\.fc1'") as caught:
        bind(config_of("llama"))
    assert "docs/families.md" in caught.value.todo


def test_a_cut_that_runs_out_of_its_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused gate_up declared for a model that has them apart: 40 rows are declared, 20 are there."""
    llama = FAMILIES.get("llama")
    fused = (Cut("mlp.up_proj", 0), Cut("mlp.up_proj", 0, offset="F"), Cut("mlp.down_proj", 1, role="fold"))
    monkeypatch.setitem(FAMILIES._items, "llama", replace(llama, cuts={**llama.cuts, "neuron": fused}))
    with pytest.raises(UnsupportedModel, match=r"mlp\.up_proj\.weight has shape \[20, 24\].* up to 40 in dimension 0"):
        bind(config_of("llama"))


# ---- a coupling that nobody declared


def subject(model: Any) -> Subject:
    return Subject(model, None, anatomy_of(model), {}, torch.float32)


class ScaledMLP(modeling_llama.LlamaMLP):  # type: ignore[misc]
    """A Llama MLP with one more number a neuron, under a name no declaration knows."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.per_neuron = nn.Parameter(torch.ones(config.intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        found: Tensor = self.down_proj(hidden * self.per_neuron)
        return found


class RoutedAttention(modeling_llama.LlamaAttention):  # type: ignore[misc]
    """A Llama attention with one more number a key/value head."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.per_group = nn.Parameter(torch.ones(config.num_key_value_heads))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = super().forward(hidden_states, *args, **kwargs)
        return output * self.per_group.mean(), weights


class MixedMLP(modeling_llama.LlamaMLP):  # type: ignore[misc]
    """Neurons that see the mean of all neurons: no tensor is extra, but units are coupled."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        found: Tensor = self.down_proj(hidden - hidden.mean(-1, keepdim=True))
        return found


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A model that calls itself Llama and has a surprise inside."""
    name, surprise = request.param
    monkeypatch.setattr(modeling_llama, name, surprise)
    model = LlamaForCausalLM(config_of("llama")).eval()
    randomise(model, gains=1.0)
    return model


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "differing"])
@pytest.mark.parametrize(
    ("odd", "unit", "error", "names"),
    [
        (("LlamaMLP", ScaledMLP), "neuron", UnsupportedModel, "per_neuron"),
        (("LlamaAttention", RoutedAttention), "group", UnsupportedModel, "per_group"),
        (("LlamaMLP", MixedMLP), "neuron", IdentityError, "masked and sliced"),
    ],
    indirect=["odd"],
    ids=["one more vector of neurons", "one more vector of groups", "neurons that mix"],
)
def test_an_unknown_coupling_is_never_cut_in_silence(
    odd: Any, unit: Any, error: type[RegrowError], names: str, uniform: bool
) -> None:
    found = subject(odd)
    with pytest.raises(error, match=names):
        apply(found, plan(found.anatomy, (unit,), uniform=uniform))


@pytest.mark.parametrize("odd", [("LlamaMLP", ScaledMLP)], indirect=True)
def test_what_the_surprise_does_not_touch_can_still_be_cut(odd: Any) -> None:
    found = subject(odd)
    assert apply(found, plan(found.anatomy, ("group",), uniform=True)).difference <= 1e-5


# ---- models that were cut before


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_is_sized_also_one_whose_layers_differ(kind: str) -> None:
    anatomy = anatomy_of(make(kind))
    kept = plan(anatomy, anatomy.supported, uniform=False)
    found = cut(make(kind), kept)
    assert found.holder.kind == "heterogeneous"
    again, shape = bind_any(found.model.config)
    assert shape == kept.shape()
    assert count(again, shape) == count(anatomy, shape) == sum(p.numel() for p in found.model.parameters())
    whole, dense = bind_any(make(kind).config)
    assert (whole, dense) == (anatomy, anatomy.dense)


def test_branches_that_are_gone_are_sized_too() -> None:
    anatomy = anatomy_of(make("llama"))
    found = cut(make("llama"), without(anatomy, 1, attention=True, mlp=True))
    again, shape = bind_any(found.model.config)
    full = LayerShape(3, 2, 20)
    assert shape == Shape(24, (full, LayerShape(0, 0, 0), full))
    assert count(again, shape) == sum(p.numel() for p in found.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_layers_differ_is_not_cut_again(kind: str) -> None:
    anatomy = anatomy_of(make(kind))
    found = cut(make(kind), plan(anatomy, ("neuron",), uniform=False))
    with pytest.raises(UnsupportedModel, match="cut before") as caught:
        bind(found.model.config)
    assert "base model" in caught.value.todo


def test_two_families_of_one_type_would_be_ambiguous() -> None:
    declared = [kind for _, family in FAMILIES.items() for kind in family.model_types]
    assert len(declared) == len(set(declared))
    assert all(isinstance(family, Family) for _, family in FAMILIES.items())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_operations_of_experts_are_those_a_token_meets(kind: str) -> None:
    """Half of four experts: what is left out is two operations a weight of the other half; all of them, nothing."""
    two, all_four = (bind(config_of(kind, num_experts_per_tok=met)) for met in (2, 4))
    stacks = sum(math.prod(t.shape) for t in two.tensors if len(t.shape) == 3)
    found = [costs(anatomy, anatomy.dense) for anatomy in (two, all_four)]
    assert stacks > 0
    assert found[0].parameters == found[1].parameters
    assert found[1].flops_per_token - found[0].flops_per_token == 2 * stacks // 2
