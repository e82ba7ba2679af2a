"""Expected sizes: published numbers of LLaMA-7B, true counts where nothing is left to chance, brute force elsewhere."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from models import anatomy_of, config_of, families, make, plan
from regrow.artifacts.shape import Anatomy, count
from regrow.engines.bind import bind
from regrow.engines.expected import dense_weights, expected_weights
from regrow.engines.gates import from_plan
from regrow.engines.hard_concrete import LIMIT, keep, logit

KINDS = [kind for kind, _ in families()]


def llama_7b() -> Anatomy:
    return bind(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32))


def alike(anatomy: Anatomy, group: float, neuron: float, channel: float) -> dict[Any, torch.Tensor]:
    size = anatomy.sizes
    return {
        "group": keep(torch.full((size["L"], size["K"]), group, dtype=torch.float64)),
        "neuron": keep(torch.full((size["L"], size["F"]), neuron, dtype=torch.float64)),
        "channel": keep(torch.full((size["C"],), channel, dtype=torch.float64)),
    }


@pytest.mark.parametrize(
    ("a", "sparsity"),
    [((10, logit(0.99), 10), 0.0013744), ((LIMIT,) * 3, 0.0040314), ((-LIMIT,) * 3, 0.997779)],
)
def test_published_sparsities_of_llama_7b(a: tuple[float, float, float], sparsity: float) -> None:
    anatomy = llama_7b()
    assert dense_weights(anatomy) == 6_476_005_376
    found = 1 - expected_weights(anatomy, alike(anatomy, *a)) / dense_weights(anatomy)
    assert float(found) == pytest.approx(sparsity, abs=1e-6)


def test_groups_count_with_their_keys_and_values() -> None:
    """Mistral-7B: 6,710,886,400 weights that NutePrune's code may remove and 268,435,456 keys and values that it never
    does; here all of them count, since a group goes whole."""
    config = MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                           num_key_value_heads=8)  # fmt: skip
    assert dense_weights(bind(config)) == 6_710_886_400 + 268_435_456


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_left_to_chance_it_is_the_true_count(kind: str) -> None:
    anatomy = anatomy_of(make(kind))
    axes = [unit for unit in anatomy.supported if unit != "layer"]
    cut = plan(anatomy, axes, uniform=False)
    gates, size = from_plan(anatomy, cut), anatomy.sizes

    def rows(unit: str, units: int) -> torch.Tensor:
        each = [getattr(layer, unit) for layer in gates.layers]
        return torch.stack([torch.ones(units) if gate is None else gate for gate in each])

    chances: dict[Any, torch.Tensor] = {
        "group": rows("group", size["K"]),
        "head": rows("head", size["H"]),
        "neuron": rows("neuron", size["F"]),
        "channel": torch.ones(size["C"]) if gates.channel is None else gates.channel,
    }
    assert int(expected_weights(anatomy, chances)) == count(anatomy, cut.shape(), decoder_only=True)
    assert dense_weights(anatomy) == count(anatomy, anatomy.dense, decoder_only=True)


def test_layers_that_may_go() -> None:
    anatomy = anatomy_of(make("llama"))
    each = dense_weights(anatomy) / anatomy.sizes["L"]
    assert float(expected_weights(anatomy, {"layer": torch.tensor([1.0, 0.5, 0.0])})) == pytest.approx(1.5 * each)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_against_brute_force(kind: str) -> None:
    """The chance of every element of every matrix, added up; chances of their own for every unit."""
    anatomy = bind(config_of(kind, attention_bias=False, mlp_bias=False), make(kind))
    size, source = anatomy.sizes, torch.Generator().manual_seed(5)
    shapes = {"layer": ("L",), "group": ("L", "K"), "head": ("L", "H"), "neuron": ("L", "F"), "channel": ("C",)}
    chances: dict[Any, torch.Tensor] = {
        unit: torch.rand([size[s] for s in names], generator=source, dtype=torch.float64)
        for unit, names in shapes.items()
    }
    total = 0.0
    for tensor in (t for t in anatomy.tensors if t.layer is not None and t.matrix):
        assert tensor.layer is not None
        dims = []
        for dim, length in enumerate(tensor.shape):
            values = torch.ones(length, dtype=torch.float64)
            for (unit, cut), index in product(tensor.cuts, range(length)):
                unit_of = (index - anatomy.offset(cut)) // anatomy.width(cut)
                if cut.dim == dim and 0 <= unit_of < anatomy.units(unit):
                    own = chances[unit]
                    values[index] *= own[unit_of] if own.dim() == 1 else own[tensor.layer, unit_of]
            dims.append(values)
        total += float(chances["layer"][tensor.layer] * torch.einsum("i,j->", *dims))
    assert float(expected_weights(anatomy, chances)) == pytest.approx(total, rel=1e-9)


def test_it_can_be_descended() -> None:
    anatomy = anatomy_of(make("llama"))
    chances = {"neuron": torch.full((3, anatomy.sizes["F"]), 0.5, requires_grad=True)}
    expected_weights(anatomy, chances).backward()  # type: ignore[arg-type]
    grad = chances["neuron"].grad
    assert grad is not None
    assert torch.equal(grad, torch.full_like(grad, 3 * anatomy.sizes["C"]))  # a row of gate and up, a column of down
