"""Counts from shapes alone: closed forms, published numbers, and a real model's own parameters."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, LlamaConfig

from regrow.artifacts.family import FAMILIES, evaluate
from regrow.artifacts.shape import MEASURES, Anatomy, LayerShape, Shape, alike, costs, count, even, tensor_size
from regrow.engines.bind import bind, empty_model

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_3_8B = {**LLAMA_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def llama(**settings: Any) -> Anatomy:
    return bind(LlamaConfig(**settings))


def inner(anatomy: Anatomy, low: int, high: int, groups: int, neurons: int) -> Shape:
    """LLM-Pruner's cut: layers low..high-1 lose `groups` and `neurons`, the others nothing."""
    dense = anatomy.dense.layers[0]
    cut = LayerShape(dense.groups - groups, dense.heads, dense.neurons - neurons)
    layers = tuple(cut if low <= i < high else dense for i in range(len(anatomy.dense.layers)))
    return Shape(anatomy.dense.channels, layers)


@pytest.mark.parametrize(
    ("settings", "dense", "cut", "after"),
    [
        (LLAMA_7B, 6_738_415_616, (4, 30, 8, 2752), 5_422_977_024),
        (LLAMA_3_8B, 8_030_261_248, (4, 30, 2, 3584), 6_612_586_496),
        (TINYLLAMA, 1_100_048_384, (4, 18, 1, 1408), 945_907_712),
    ],
    ids=["LLaMA-7B", "Llama-3-8B", "TinyLlama"],
)
def test_published_counts(settings: dict[str, Any], dense: int, cut: tuple[int, int, int, int], after: int) -> None:
    anatomy = llama(**settings)
    assert count(anatomy, anatomy.dense) == dense
    assert count(anatomy, inner(anatomy, *cut)) == after
    assert count(anatomy, inner(anatomy, cut[0], cut[1] - 1, *cut[2:])) > after


def test_prunable_weights_of_llama_7b() -> None:
    anatomy = llama(**LLAMA_7B)
    assert count(anatomy, anatomy.dense, decoder_only=True) == 6_476_005_376


def random_sizes(source: random.Random) -> dict[str, int]:
    groups, per_group, head = source.randint(1, 4), source.randint(1, 3), 2 * source.randint(1, 8)
    return {
        "L": source.randint(1, 5),
        "K": groups,
        "G": per_group,
        "H": groups * per_group,
        "D": head,
        "F": source.randint(1, 90),
        "C": groups * per_group * source.randint(1, 12),  # Llama wants a multiple of the heads
        "V": source.randint(2, 99),
    }


def config(sizes: dict[str, int], **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=sizes["C"],
        intermediate_size=sizes["F"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=sizes["H"],
        num_key_value_heads=sizes["K"],
        head_dim=sizes["D"],
        vocab_size=sizes["V"],
        **more,
    )


@pytest.mark.parametrize("seed", range(8))
def test_closed_form_for_random_shapes(seed: int) -> None:
    """2Vd + L(2dHD + 2dKD + 3df + 2d) + d, dense and with any uniform widths."""
    source = random.Random(seed)
    sizes = random_sizes(source)
    anatomy = bind(config(sizes))

    def closed(channels: int, layers: int, groups: int, heads: int, neurons: int) -> int:
        d, head = channels, sizes["D"]
        each = 2 * d * groups * heads * head + 2 * d * groups * head + 3 * d * neurons + 2 * d
        return 2 * sizes["V"] * d + layers * each + d

    dense = anatomy.dense
    assert count(anatomy, dense) == closed(sizes["C"], sizes["L"], sizes["K"], sizes["G"], sizes["F"])
    for _ in range(5):
        numbers = [source.randint(1, sizes[k]) for k in "CLKGF"]
        shape = Shape(numbers[0], (LayerShape(*numbers[2:]),) * numbers[1])
        assert count(anatomy, shape) == closed(*numbers)


@pytest.mark.parametrize("model_type", sorted(k for _, f in FAMILIES.items() for k in f.model_types))
@pytest.mark.parametrize("tied", [True, False])
def test_dense_count_is_what_the_model_has(model_type: str, tied: bool) -> None:
    kind = CONFIG_MAPPING[model_type]
    small = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6}
    own: dict[str, Any] = {} if model_type == "gpt_neox" else {"num_key_value_heads": 3, "head_dim": 8}
    made = kind(**small, **own, vocab_size=50, tie_word_embeddings=tied, pad_token_id=0)
    model = empty_model(made)
    anatomy = bind(made, model)
    assert anatomy.tied is tied
    assert count(anatomy, anatomy.dense) == sum(p.numel() for p in model.parameters())
    layers = model.get_submodule(anatomy.family.layers)
    assert count(anatomy, anatomy.dense, decoder_only=True) == sum(
        p.numel() for p in layers.parameters() if p.dim() > 1
    )


def test_a_tied_head_is_counted_once_and_a_bias_follows_its_weight() -> None:
    sizes = {"L": 2, "K": 2, "G": 2, "H": 4, "D": 4, "F": 20, "C": 16, "V": 30}
    apart, tied = bind(config(sizes)), bind(config(sizes, tie_word_embeddings=True))
    assert count(apart, apart.dense) - count(tied, tied.dense) == 30 * 16
    biased = bind(config(sizes, attention_bias=True, mlp_bias=True))
    shape = Shape(10, (LayerShape(1, 2, 7), LayerShape(2, 1, 20)))
    heads = [1 * 2, 2 * 1]
    biases = sum(4 * (h + 2 * k) + 10 + 2 * n + 10 for h, k, n in zip(heads, (1, 2), (7, 20), strict=True))
    assert count(biased, shape) - count(apart, shape) == biases
    assert count(biased, shape, decoder_only=True) == count(apart, shape, decoder_only=True)


def test_a_branch_that_is_gone_costs_nothing() -> None:
    sizes = {"L": 1, "K": 2, "G": 1, "H": 2, "D": 4, "F": 20, "C": 16, "V": 30}
    anatomy = bind(config(sizes))
    outside = 2 * 30 * 16 + 16
    assert count(anatomy, Shape(16, (LayerShape(0, 0, 20),))) == outside + 3 * 20 * 16 + 16
    assert count(anatomy, Shape(16, (LayerShape(2, 1, 0),))) == outside + 4 * 2 * 4 * 16 + 16


def test_costs_by_hand() -> None:
    """One layer, d=4, one head of width 2, 3 neurons, 5 tokens."""
    anatomy = bind(config({"L": 1, "K": 1, "G": 1, "H": 1, "D": 2, "F": 3, "C": 4, "V": 5}))
    found = costs(anatomy, anatomy.dense)
    matrices = 4 * 4 * 2 + 3 * 4 * 3  # q k v o, gate up down
    assert found.decoder_weights == matrices == 68
    assert found.parameters == 68 + 2 * 5 * 4 + 3 * 4
    assert found.flops_per_token == 2 * (68 + 5 * 4) + 4 * 1024 * 2
    assert found.kv_bytes_per_token == 2 * 2 * 2
    assert found.file_bytes == 2 * found.parameters
    assert set(found.to_json()) == {*MEASURES, "context"}


def test_a_model_stored_in_fp32_takes_four_bytes() -> None:
    sizes = {"L": 1, "K": 1, "G": 1, "H": 1, "D": 2, "F": 3, "C": 4, "V": 5}
    anatomy = bind(config(sizes, dtype="float32"))
    assert costs(anatomy, anatomy.dense).file_bytes == 4 * count(anatomy, anatomy.dense)


def test_every_tensor_of_a_cut_shape_shrinks_or_stays() -> None:
    anatomy = bind(config({"L": 2, "K": 3, "G": 2, "H": 6, "D": 4, "F": 20, "C": 24, "V": 30}))
    layer = LayerShape(1, 1, 5)
    for tensor in anatomy.tensors:
        size = tensor_size(anatomy, tensor, layer if tensor.layer is not None else None, 12)
        assert len(size) == len(tensor.shape)
        assert all(0 < new <= old for new, old in zip(size, tensor.shape, strict=True))
    by_name = {t.name: tensor_size(anatomy, t, layer, 12) for t in anatomy.tensors}
    assert by_name["model.layers.0.self_attn.q_proj.weight"] == (1 * 1 * 4, 12)
    assert by_name["model.layers.0.self_attn.k_proj.weight"] == (1 * 4, 12)
    assert by_name["model.layers.1.self_attn.o_proj.weight"] == (12, 1 * 1 * 4)
    assert by_name["model.layers.1.mlp.down_proj.weight"] == (12, 5)


def test_even_shares_totals_by_whole_units() -> None:
    anatomy = bind(config({"L": 4, "K": 3, "G": 2, "H": 6, "D": 4, "F": 20, "C": 24, "V": 30}))
    shape = even(anatomy, {"layer": 3, "group": 7, "neuron": 31, "channel": 10})
    assert shape == Shape(10, (LayerShape(3, 2, 11), LayerShape(2, 2, 10), LayerShape(2, 2, 10)))
    assert even(anatomy, {}) == anatomy.dense


def test_alike_names_the_first_equal_layer() -> None:
    anatomy = bind(config({"L": 3, "K": 1, "G": 1, "H": 1, "D": 2, "F": 3, "C": 4, "V": 5}))
    assert anatomy.alike == alike(anatomy.tensors, 3) == (0, 0, 0)


def test_shape_prints_and_travels() -> None:
    shape = Shape(10, (LayerShape(3, 2, 11), LayerShape(2, 2, 10)))
    assert str(shape) == "2 layers x (2..3 groups of 2 heads, 10..11 neurons), 10 channels"
    assert Shape.from_json(json.loads(json.dumps(shape.to_json()))) == shape
    assert not shape.uniform
    assert Shape(10, (LayerShape(3, 2, 11),) * 2).uniform
    assert not Shape(10, (LayerShape(0, 0, 11),) * 2).uniform


def test_expressions() -> None:
    sizes = {"H": 3, "D": 4, "K": 2}
    assert evaluate("H*D+K*D", sizes) == 20
    assert evaluate("3*D", sizes) == 12
    assert evaluate("0", sizes) == 0
