"""Adapters change nothing until trained, and merging them changes nothing after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from models import make
from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.engines.adapters import KINDS, add_adapters, check_same, layer_linears, merge, moved, trainable_parameters
from regrow.errors import IdentityError, SettingsError

IDS = torch.arange(24).reshape(2, 12)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class NoAttention(nn.Module):
    """Stands where a layer's attention was."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


def tiny(*, layers: int = 2, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def uneven() -> LlamaForCausalLM:
    """Layer 0 has a narrow MLP, layer 1 no attention, layer 2 no MLP."""
    model = tiny(layers=3)
    narrow = LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 20})
    model.model.layers[0].mlp = LlamaMLP(narrow)
    model.model.layers[1].self_attn = NoAttention()
    model.model.layers[2].mlp = NoMLP()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def disturb(model: nn.Module, scale: float = 0.2) -> None:
    """What training would do: B is no longer zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=scale)


@pytest.mark.parametrize("make", [tiny, lambda: tiny(tied=True), uneven])
def test_fresh_adapters_change_nothing(make: Any) -> None:
    model = make()
    before = logits(model)
    assert torch.equal(logits(add_adapters(model).eval()), before)


@pytest.mark.parametrize("make", [tiny, lambda: tiny(tied=True), uneven])
def test_merged_equals_adapted(make: Any) -> None:
    model = make()
    names = set(model.state_dict())
    base = logits(model)
    adapted = add_adapters(model)
    disturb(adapted)
    expected = logits(adapted.eval())
    assert (expected - base).abs().max() > 0.1 * base.abs().max(), "the adapters must matter for this test to see"
    merged = merge(adapted.train())
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert type(merged) is type(model)
    assert set(merged.state_dict()) == names
    assert not hasattr(merged, "peft_config")
    assert not merged.training
    assert all(p.requires_grad for p in merged.parameters())


def test_merged_model_saves_as_a_plain_one(tmp_path: Any) -> None:
    adapted = add_adapters(tiny())
    disturb(adapted)
    merged = merge(adapted)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_a_layer_that_answers_otherwise_is_refused() -> None:
    before = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    check_same("here", before, before * (1 + 1e-6))
    for other in (before + 1e-3, before * 0, torch.full_like(before, torch.nan)):
        with pytest.raises(IdentityError, match="merging the adapters of here moved its outputs"):
            check_same("here", before, other)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_itself_refuses(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Planted: a weight of one layer is off in the last digits that count."""
    adapted = add_adapters(tiny(), kind, rank=2, dropout=0.0)
    disturb(adapted)
    kind_of = type(adapted.base_model)
    whole = kind_of.merge_and_unload

    def off(self: Any) -> Any:
        merged = whole(self)
        with torch.no_grad():
            merged.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
        return merged

    monkeypatch.setattr(kind_of, "merge_and_unload", off)
    with pytest.raises(IdentityError, match=r"adapters of model\.layers\.1\.mlp\.down_proj moved its outputs"):
        merge(adapted)


def test_a_model_that_makes_much_of_a_rounding_is_merged_all_the_same() -> None:
    """A mean that every norm takes away, ten thousand times what it leaves: logits move by much more than rounding,
    outputs of layers do not."""
    model = make("gpt_neox")
    with torch.no_grad():
        model.gpt_neox.embed_in.weight.add_(1e4)
    adapted = add_adapters(model, "lora", rank=2, dropout=0.0)
    disturb(adapted)
    expected = logits(adapted.eval())
    merged = merge(adapted)
    assert float((logits(merged) - expected).abs().max()) > 1e-5 * float(expected.abs().max())


def test_half_precision_merges_in_fp32() -> None:
    model = tiny().to(torch.bfloat16)
    adapted = add_adapters(model)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    disturb(adapted)
    assert {p.dtype for p in merge(adapted).parameters()} == {torch.float32}


def test_every_layer_linear_and_nothing_else() -> None:
    adapted = add_adapters(tiny())
    held = {n.split(".lora_A")[0].rpartition(".")[2] for n, p in adapted.named_parameters() if "lora_A" in n}
    assert held == set(PROJECTIONS)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n]
    assert not [n for n, _ in adapted.named_parameters() if "lora_" in n and ("lm_head" in n or "embed" in n)]


def test_count_by_hand() -> None:
    """rank * (in + out) a linear: q, o 32+32; k, v 32+16; gate, up, down 32+48."""
    by_layer = 2 * 64 + 2 * 48 + 3 * 80
    assert trainable_parameters(add_adapters(tiny(), rank=4)) == 2 * 4 * by_layer
    assert trainable_parameters(add_adapters(tiny(), rank=4, targets=("q_proj", "v_proj"))) == 2 * 4 * (64 + 48)


def test_uneven_layers_get_adapters_of_their_own_width() -> None:
    model = uneven()
    adapted = add_adapters(model, rank=4)
    widths = {n: tuple(p.shape) for n, p in adapted.named_parameters() if p.requires_grad}
    inside = {n.split("layers.")[1].replace(".default.weight", ""): shape for n, shape in widths.items()}
    assert inside["0.mlp.down_proj.lora_A"] == (4, 20)
    assert inside["1.mlp.down_proj.lora_A"] == (4, 48)
    assert not [n for n in inside if n.startswith(("1.self_attn", "2.mlp"))]
    assert len(inside) == 2 * (7 + 3 + 4)


def test_linears_of_a_layer_list_only() -> None:
    found = layer_linears(uneven())
    assert len(found) == 14
    assert all(name.startswith("model.layers.") for name in found)


def test_equal_seeds_give_equal_adapters() -> None:
    def first(seed: int) -> Tensor:
        model = tiny()
        before = torch.get_rng_state()
        adapted = add_adapters(model, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return next(p.detach() for n, p in adapted.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank = 0"),
        ({"alpha": 0}, "alpha = 0"),
        ({"dropout": 1.0}, "dropout = 1"),
        ({"targets": ("q_proj", "lm_head")}, "'lm_head' is no linear inside"),
        ({"targets": ("proj",)}, "'proj' is no linear inside"),
        ({"targets": ()}, "no adapter targets"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        add_adapters(tiny(), **options)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(SettingsError, match="no linear to adapt"):
        add_adapters(nn.Sequential(nn.Linear(2, 2)))


# --- every kind


KEEPING = ("hira", "ia3", "spp")


def sparse() -> LlamaForCausalLM:
    """Every linear inside a layer 2:4 by magnitude."""
    model = tiny()
    with torch.no_grad():
        for name in layer_linears(model):
            weight = model.get_submodule(name).weight
            weight[lowest(weight.abs(), Pattern.parse("2:4"), "row")] = 0.0
    return model


def merged_with(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the linears before, and after random adapters were merged into them."""
    model = sparse()
    names = layer_linears(model)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    adapted = add_adapters(model, kind)
    disturb(adapted)
    merged = merge(adapted)
    return before, {name: merged.get_submodule(name).weight.detach() for name in names}


@pytest.mark.parametrize("make", [tiny, sparse, uneven])
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_of_every_kind_change_nothing(kind: str, make: Any) -> None:
    model = make()
    before = logits(model)
    adapted = add_adapters(model, kind, rank=4).eval()
    assert torch.equal(logits(adapted), before)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and f"{kind}_" not in n]
    disturb(adapted)
    expected = logits(adapted)
    assert (expected - before).abs().max() > 0.01 * before.abs().max(), "trained adapters must matter"
    assert (logits(merge(adapted)) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KEEPING)
def test_adapters_that_scale_weights_keep_every_zero(kind: str) -> None:
    before, after = merged_with(kind)
    for name, weight in before.items():
        assert torch.equal(after[name] == 0, weight == 0), name
    others = {name.rpartition(".")[2] for name in before if not torch.equal(after[name], before[name])}
    assert others == ({"k_proj", "v_proj", "down_proj"} if kind == "ia3" else set(PROJECTIONS))


@pytest.mark.parametrize("scale", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_merge_will_change_is_foretold(kind: str, scale: float) -> None:
    """To the weight, as it is stored; asking changes nothing."""
    model = sparse()
    names = [n for n in layer_linears(model) if kind != "ia3" or n.endswith(("k_proj", "v_proj", "down_proj"))]
    before = {name: model.get_submodule(name).weight.detach().bfloat16() for name in names}
    adapted = add_adapters(model, kind)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    said = moved(adapted, torch.bfloat16)
    assert moved(adapted, torch.bfloat16) == said <= moved(adapted, torch.float32)
    merged = merge(adapted)
    after = {name: merged.get_submodule(name).weight.detach().bfloat16() for name in names}
    changed = sum(int(((after[n] != w) & (w != 0)).sum()) for n, w in before.items())
    assert said == changed / sum(int((w != 0).sum()) for w in before.values())
    assert (said == 0) is (scale == 0)


def test_plain_lora_fills_zeros() -> None:
    """Planted: what the test above must not pass."""
    before, after = merged_with("lora")
    assert all(not bool((after[name][weight == 0] == 0).any()) for name, weight in before.items())


def test_every_kind_is_lora_or_keeps_zeros() -> None:
    assert set(KINDS) == {"lora", *KEEPING}


@pytest.mark.parametrize(("kind", "meant"), [("lorra", "lora"), ("hirra", "hira"), ("SPP", None)])
def test_unknown_kinds(kind: str, meant: str | None) -> None:
    with pytest.raises(SettingsError, match=f"adapters of kind '{kind}'") as caught:
        add_adapters(tiny(), kind)
    assert caught.value.allowed == "lora, hira, ia3, spp"
    assert meant is None or f"did you mean '{meant}'" in caught.value.came


def test_settings_reach_the_adapters() -> None:
    """Rank of hira and spp, scale of spp; ia3 has neither."""
    adapted = add_adapters(tiny(), "spp", rank=4, alpha=6, dropout=0, targets=("q_proj",))
    found = adapted.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert tuple(found.spp_alpha["default"].shape) == (4, 32)
    assert found.scaling["default"] == 1.5
    assert trainable_parameters(adapted) == 2 * (4 * 32 + 32)
    assert trainable_parameters(add_adapters(tiny(), "hira", rank=4, targets=("q_proj",))) == 2 * 4 * 64
    assert trainable_parameters(add_adapters(tiny(), "ia3")) == 2 * (16 + 16 + 48)


def test_ia3_scales_only_what_it_knows() -> None:
    with pytest.raises(SettingsError, match="ia3 adapters on o_proj, q_proj"):
        add_adapters(tiny(), "ia3", targets=("q_proj", "o_proj"))
    adapted = add_adapters(tiny(), "ia3", targets=("q_proj", "v_proj"))
    assert trainable_parameters(adapted) == 2 * 16


def test_spp_names_ranks_that_fit() -> None:
    with pytest.raises(SettingsError, match="SPP of rank 5 on ") as caught:
        add_adapters(tiny(), "spp", rank=5)
    assert "1, 2, 4, 8, 16" in caught.value.allowed
