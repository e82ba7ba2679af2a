"""Losses without a layer: equal to gates that shut it, cheap as promised, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import LENGTH, WINDOW, anatomy_of, families, ids, make
from regrow.engines.gates import Gates, LayerGates, gated
from regrow.engines.removal import layer_arguments, loss_without_layers
from regrow.errors import BrokenModel

KINDS = [kind for kind, _ in families()]
BLOCKS = ids(3)


@torch.no_grad()
def mean_loss(model: Any) -> float:
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in BLOCKS]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_gates_that_shut_the_layer(kind: str) -> None:
    """The text is longer than the sliding window, so a layer called with its neighbour's mask would differ."""
    assert LENGTH > WINDOW
    model = make(kind)
    anatomy = anatomy_of(model)
    whole, without = loss_without_layers(model, anatomy, BLOCKS)
    assert whole == pytest.approx(mean_loss(model), rel=1e-5)
    shut = torch.zeros(())
    for index in range(anatomy.sizes["L"]):
        layers = [LayerGates() for _ in range(anatomy.sizes["L"])]
        layers[index] = LayerGates(attention=shut, mlp=shut)
        with gated(model, anatomy, Gates(layers)):
            assert float(without[index]) == pytest.approx(mean_loss(model), rel=1e-5), index
    assert without.dtype == torch.float64
    assert float((without - whole).abs().min()) > 1e-3


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "qwen2", "qwen3"])
def test_each_layer_gets_its_own_arguments(kind: str) -> None:
    """With the first layer's mask for all, the losses are others: the test above can fail."""
    model = make(kind)
    layers = list(model.model.layers)
    _, calls = layer_arguments(model, layers, BLOCKS[:1])
    masks = [kwargs["attention_mask"] for _, kwargs in calls]
    assert masks[0] is not None  # the sliding window; the full mask may be left out for a kernel that knows it
    assert masks[1] is None or not torch.equal(masks[0], masks[1])
    assert masks[1] is masks[2]
    right, _ = loss_without_layers(model, anatomy_of(model), BLOCKS[:1])
    for layer in layers[1:]:
        original = layer.forward
        layer.forward = lambda x, *a, original=original, **k: original(x, *a, **{**k, "attention_mask": masks[0]})
    with torch.no_grad():
        wrong = float(model(input_ids=BLOCKS[:1], labels=BLOCKS[:1], use_cache=False).loss)
    assert abs(wrong - right) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_half_the_price(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """L(L-1)/2 layers for the removals and L for the stream, where one pass a removal would take L(L-1) + L."""
    model = make(kind)
    anatomy = anatomy_of(model)
    layer = type(next(iter(model.get_submodule(anatomy.family.layers))))
    original, calls = layer.forward, []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", counting)
    loss_without_layers(model, anatomy, BLOCKS)
    count = anatomy.sizes["L"]
    assert len(calls) == len(BLOCKS) * (count * (count - 1) // 2 + count)


def test_arguments_come_from_the_models_own_forward() -> None:
    model = make("llama")
    layers = list(model.model.layers)
    stream, calls = layer_arguments(model, layers, BLOCKS[:1])
    assert torch.equal(stream, model.model.embed_tokens(BLOCKS[:1]))
    assert len(calls) == len(layers)
    assert all("position_embeddings" in kwargs for _, kwargs in calls)


@pytest.mark.parametrize("fails", [False, True])
def test_layers_are_themselves_again(fails: bool) -> None:
    model = make("llama")
    before = mean_loss(model)
    if fails:
        with pytest.raises(IndexError):
            layer_arguments(model, list(model.model.layers), torch.full((1, 4), 10_000))
    else:
        loss_without_layers(model, anatomy_of(model), BLOCKS)
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    assert mean_loss(model) == before


def test_a_layer_that_does_nothing_is_not_missed() -> None:
    model = make("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        for parameter in model.get_submodule(f"model.layers.1.{name}").parameters():
            parameter.data.zero_()
    whole, without = loss_without_layers(model, anatomy_of(model), BLOCKS)
    assert float(without[1]) == pytest.approx(whole, abs=1e-6)


def test_progress_counts_sequences() -> None:
    told: list[tuple[int, int]] = []
    loss_without_layers(make("llama"), anatomy_of(make("llama")), BLOCKS, progress=lambda *x: told.append(x))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_what_is_not_finite_is_named() -> None:
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BrokenModel, match=r"activations leaving model\.layers\.1 are not finite"):
        loss_without_layers(model, anatomy_of(model), BLOCKS)
