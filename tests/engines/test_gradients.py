"""Gradients for scoring: those of autograd on everything at once, and what they say about units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import anatomy_of, families, ids, make
from regrow.artifacts.shape import Tensor as Spec
from regrow.engines import gradients as engine
from regrow.engines.gates import Gates, LayerGates, gated
from regrow.engines.gradients import gradients, layers_run_again
from regrow.errors import BrokenModel

KINDS = [kind for kind, _ in families()]
BLOCKS = ids(3)


def everything(_: Spec) -> bool:
    return True


def collect(model: Any, *, squares: bool, wanted: Any = everything) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    found: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}

    def visit(spec: Spec, weight: Tensor, grad: Tensor, square: Tensor | None) -> None:
        assert spec.name not in found
        found[spec.name] = (weight, grad.clone(), square)

    gradients(model, anatomy_of(model), BLOCKS, visit, wanted=wanted, squares=squares)
    return found


def by_autograd(model: Any, blocks: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = model(input_ids=blocks, labels=blocks, use_cache=False).loss
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_means_equal_autograd_on_the_whole_batch(kind: str, tied: bool, squares: bool) -> None:
    model = make(kind, tie_word_embeddings=tied)
    expected = by_autograd(model, BLOCKS)
    found = collect(model, squares=squares)
    assert found.keys() == expected.keys()
    for name, (weight, grad, _) in found.items():
        assert torch.equal(weight, model.get_parameter(name))
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_layers_that_run_again_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = make(kind), []
    anatomy = anatomy_of(model)
    layers = list(model.get_submodule(anatomy.family.layers))
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    found = {}
    for share in (1e9, 0.0):
        monkeypatch.setattr(engine, "ACTIVATIONS", share)
        assert layers_run_again(anatomy, BLOCKS.shape[1]) == (0 if share else len(layers))
        runs.clear()
        found[share] = collect(model, squares=False)
        found_runs = len(runs) - 2 * len(layers)  # trying the head takes two passes
        assert found_runs == len(BLOCKS) * len(layers)  # hooks of a layer fire once: it is its forward that runs again
    for name, (_, grad, _) in found[0.0].items():
        assert torch.allclose(grad, found[1e9][name][1], rtol=1e-5, atol=1e-7), name
    assert all("forward" not in vars(layer) for layer in layers)


def test_more_tokens_more_layers_run_again() -> None:
    anatomy = anatomy_of(make("llama"))
    counts = [layers_run_again(anatomy, tokens) for tokens in (1, 2, 4, 8, 16, 10_000)]
    assert counts == sorted(counts)
    assert counts[-1] == anatomy.sizes["L"]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_squares_equal_a_loop_over_sequences(kind: str) -> None:
    """The mean over sequences of each one's squared gradient, not the square of their mean."""
    model = make(kind)
    each = [by_autograd(model, row[None]) for row in BLOCKS]
    for name, (_, grad, square) in collect(model, squares=True).items():
        assert square is not None
        expected = torch.stack([g[name].square() for g in each]).mean(0)
        torch.testing.assert_close(square, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
        assert bool((square >= grad.square() * 0.999).all())  # Jensen


def test_only_what_is_wanted_is_visited_and_held() -> None:
    model = make("llama")
    held: list[int] = []

    def visit(spec: Spec, *_: Any) -> None:
        assert spec.name.endswith("down_proj.weight")
        held.append(sum(p.requires_grad for p in model.parameters()))

    for squares in (False, True):
        gradients(
            model,
            anatomy_of(model),
            BLOCKS,
            visit,
            wanted=lambda spec: spec.name.endswith("down_proj.weight"),
            squares=squares,
        )
    assert held == [3, 3, 3, 1, 1, 1]  # with squares only a third of the layers at a time


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = make("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)

    def visit(*_: Any) -> None:
        if fails:
            raise KeyError("inside")

    try:
        gradients(model, anatomy_of(model), BLOCKS, visit, wanted=everything, squares=True)
    except KeyError:
        assert fails
    assert [p.requires_grad for p in model.parameters()] == [i % 2 == 0 for i in range(len(before))]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sixteen_bit_models_answer_in_fp32() -> None:
    model = make("llama")
    exact = collect(model, squares=True)
    for squares in (False, True):
        for name, found in collect(make("llama").bfloat16(), squares=squares).items():
            assert all(t is None or t.dtype == torch.float32 for t in found)
            assert torch.nn.functional.cosine_similarity(found[1].flatten(), exact[name][1].flatten(), 0) > 0.9, name


def test_progress_counts_every_pass() -> None:
    told: list[tuple[int, int]] = []
    for squares in (False, True):
        gradients(
            make("llama"),
            anatomy_of(make("llama")),
            BLOCKS,
            lambda *_: None,
            wanted=everything,
            squares=squares,
            progress=lambda *x: told.append(x),
        )
    assert told == [(i, 3) for i in range(1, 4)] + [(i, 9) for i in range(1, 10)]


@pytest.mark.parametrize("squares", [False, True])
def test_a_gradient_that_is_not_finite_is_named(squares: bool) -> None:
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BrokenModel, match=r"the gradient of model\.layers\.0\.self_attn\.q_proj\.weight") as caught:
        collect(model, squares=squares, wanted=lambda spec: spec.layer is not None)
    assert "without gradients" in caught.value.todo


# ---- what W * G means


def slope_by_gate(model: Any, unit: str, layer: int, size: int) -> Tensor:
    """d loss / d gate at 1, by autograd through the gates."""
    anatomy = anatomy_of(model)
    gate = torch.ones(size, requires_grad=True)
    layers = [LayerGates() for _ in range(anatomy.sizes["L"])]
    setattr(layers[layer], unit, gate)
    with gated(model, anatomy, Gates(layers)):
        loss = model(input_ids=BLOCKS, labels=BLOCKS, use_cache=False).loss
    return torch.autograd.grad(loss, gate)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_weight_times_gradient_is_the_derivative_by_the_gate(kind: str) -> None:
    """Sum of W*G over a neuron's column of the linear its gate stands before (methods note L5), and over a head's."""
    model = make(kind)
    anatomy = anatomy_of(model)
    family, size = anatomy.family, anatomy.sizes
    found = collect(model, squares=False, wanted=lambda spec: spec.layer == 1)

    def columns(site: str, width: int) -> Tensor:  # (units,)
        weight, grad, _ = found[f"{family.layers}.1.{site}.weight"]
        return (weight * grad).sum(0).view(-1, width).sum(1)

    slope = slope_by_gate(model, "neuron", 1, size["F"])
    torch.testing.assert_close(columns(family.mlp.site, 1), slope, rtol=1e-3, atol=1e-5)
    if "group" in anatomy.supported and kind != "olmo2":  # whose gates act on q and k as well
        slope = slope_by_gate(model, "head", 1, size["H"])
        torch.testing.assert_close(columns(family.attention.site, size["D"]), slope, rtol=1e-3, atol=1e-5)
        slope = slope_by_gate(model, "group", 1, size["K"])
        wide = columns(family.attention.site, size["D"] * size["G"])
        torch.testing.assert_close(wide, slope, rtol=1e-3, atol=1e-5)


def test_and_by_finite_difference() -> None:
    """The loss when a neuron's column of down_proj is scaled by 1 + h and 1 - h."""
    model = make("llama")
    weight, grad, _ = collect(model, squares=False)["model.layers.1.mlp.down_proj.weight"]
    column = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    for neuron in (0, 7, 19):
        losses = []
        for scale in (1.01, 0.99):
            with torch.no_grad():
                right = column[:, neuron].clone()
                column[:, neuron] *= scale
                losses.append(float(model(input_ids=BLOCKS, labels=BLOCKS, use_cache=False).loss))
                column[:, neuron] = right
        measured = (losses[0] - losses[1]) / 0.02
        assert float((weight * grad)[:, neuron].sum()) == pytest.approx(measured, rel=0.02, abs=5e-4)
