"""Refitting behind a cut: the best weights for what the cut model reads, by hand, by orthogonality, and by loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import VOCAB, anatomy_of, cut, families, make, plan
from regrow.artifacts.budget import Budget
from regrow.artifacts.family import Unit
from regrow.artifacts.least_squares import onto, onto_by_halves
from regrow.artifacts.plan import Plan
from regrow.engines.perplexity import block_losses
from regrow.engines.refit import INSIDE, refit, said
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.errors import BrokenModel, SettingsError, TextError
from regrow.stages.apply import apply
from regrow.stages.load import load
from regrow.stages.plan import Wish, make_plan
from regrow.stages.score import choose, score

KINDS = [kind for kind, _ in families()]
HEADS: tuple[Unit, ...] = ("group", "head")


def text(rows: int = 24, seed: int = 3) -> Tensor:  # (rows, 16) int64
    return torch.randint(VOCAB, (rows, 16), generator=torch.Generator().manual_seed(seed))


def some(kind: str, *units: Unit) -> Plan:
    anatomy = anatomy_of(make(kind))
    return plan(anatomy, [unit for unit in units if unit in anatomy.supported], uniform=False)


def test_by_hand() -> None:
    """y = x1 + x2, and x2 is always 2 x1: without x2, y = 3 x1. A third input, apart from both, is left as it was."""
    inputs = torch.tensor([[1.0, 2.0, 0.0], [-2.0, -4.0, 0.0], [0.0, 0.0, 5.0]])  # (N, n)
    weight, kept, gram = torch.tensor([[1.0, 1.0, 7.0]]), torch.tensor([True, False, True]), inputs.T @ inputs
    assert torch.allclose(onto(weight, gram, kept, 0.0), torch.tensor([[3.0, 0.0, 7.0]]))
    halfway = onto(weight, gram, kept, 5.0)  # x1 has squares of 5 in all: as much pull as there is to see
    assert torch.allclose(halfway, torch.tensor([[2.0, 0.0, 7.0]]))
    assert torch.allclose(onto(weight, gram, kept, 1e9), weight * kept)


def test_inputs_that_say_the_same_twice() -> None:
    """Singular but for damping; what is left out costs nothing then."""
    inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).repeat(1, 2)  # (40, 6)
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([True, True, True, True, False, False])
    found = onto(weight, inputs.T @ inputs, kept, 1e-4)
    assert torch.allclose(inputs @ found.T, inputs @ weight.T, atol=1e-3)
    assert not found[:, 4:].any()
    with pytest.raises(BrokenModel, match="singular"):
        onto(weight[:, :2], torch.full((2, 2), torch.nan), torch.tensor([True, False]), 0.0)


def test_where_nothing_comes_in_nothing_is_fitted() -> None:
    """As where values are dead: the plain cut is exact."""
    weight, kept = torch.randn(3, 4), torch.tensor([True, True, False, True])
    found, share = onto_by_halves(weight, [torch.zeros(4, 4)] * 2, kept, None)
    assert torch.equal(found, weight * kept)
    assert share == math.inf


def test_how_far_weights_may_go_is_found() -> None:
    """Little where inputs that stay say much of those that go; where they say nothing, all stays as it was."""
    source = torch.Generator().manual_seed(0)
    weight, kept = torch.randn(8, 40, generator=source), torch.arange(40) < 30

    def halves(related: float, tokens: int) -> list[Tensor]:
        mix = torch.randn(40, 40, generator=source) * related + torch.eye(40)
        rows = [torch.randn(tokens, 40, generator=source) @ mix for _ in range(2)]
        return [x.T @ x for x in rows]

    _, much = onto_by_halves(weight, halves(1.0, 2000), kept, None)
    _, some = onto_by_halves(weight, halves(1.0, 60), kept, None)
    plain, none = onto_by_halves(weight, halves(0.0, 20), kept, None)
    assert much < some < none
    assert none == math.inf
    assert torch.equal(plain, weight * kept)
    assert onto_by_halves(weight, halves(1.0, 60), kept, 0.7)[1] == 0.7


def test_a_neuron_that_has_a_twin_is_not_missed() -> None:
    """Its twin takes over what it did: the cut model is the intact one."""
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[10:] = linear.weight[:10]
                linear.bias[10:] = linear.bias[:10]
    anatomy, ids = anatomy_of(model), text()
    kept = Plan.everything(anatomy)
    first = tuple(range(10))
    halved = Plan(kept.channels, tuple(type(x)(x.index, x.groups, x.heads, first) for x in kept.layers))
    expected = model(ids).logits
    plain = cut(copy.deepcopy(model), halved).model(ids).logits
    found = refit(model, anatomy, halved, ids, damping=1e-6)
    fitted = cut(model, halved).model(ids).logits
    assert (fitted - expected).abs().max() < 1e-3 < 0.1 < (plain - expected).abs().max()
    assert all(x.after < 1e-6 < 0.05 < x.before for x in found)


@contextmanager
def entering(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What modules are given, all tokens together."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("kind", "units"),
    [
        ("llama", ("neuron",)),
        ("llama", ("layer", "group", "head", "neuron")),
        ("qwen2", ("group", "neuron")),
        ("gemma2", ("head", "neuron")),
        ("llama", ("neuron", "channel")),
        ("gemma2", ("neuron", "channel")),
    ],
)
def test_no_weights_fit_better(kind: str, units: tuple[Unit, ...]) -> None:
    """In every layer what is left of the error is orthogonal to what the *cut* model reads there."""
    whole = make(kind)
    kept, ids = some(kind, *units), text(64)
    fitted = copy.deepcopy(whole)
    refit(fitted, anatomy_of(whole), kept, ids, damping=1e-8)
    small = cut(fitted, kept).model
    checked, left = 0, list(kept.channels)
    for place, layer in enumerate(kept.layers):
        if not layer.neurons or len(layer.neurons) == anatomy_of(whole).sizes["F"]:
            continue
        mine, dense = small.model.layers[place].mlp, whole.model.layers[layer.index].mlp
        with entering({"mlp": mine, "down": mine.down_proj}) as seen, torch.no_grad():
            small(ids)
            wide = torch.zeros(*seen["mlp"].shape[:-1], anatomy_of(whole).sizes["C"])
            wide[..., left] = seen["mlp"]
            error = (dense(wide)[..., left] - mine(seen["mlp"])).flatten(0, 1)  # (N, channels kept)
            inputs = seen["down"].flatten(0, 1)  # (N, kept)
            stale = (dense.down_proj.weight[left][:, list(layer.neurons)] - mine.down_proj.weight).norm()
        assert stale > 1e-2
        assert error.norm() > 1e-2
        cosine = (error.T @ inputs).abs().max() / (error.norm() * inputs.norm())
        assert cosine < 1e-4, f"layer {layer.index}"
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind: str) -> None:
    """Fitted, then proved and sliced as any other cut; errors fall, and what is not behind the cut stays."""
    model, units = make(kind), ["group", "head", "neuron", "channel", "layer"]
    if kind == "olmo2":
        units = ["neuron", "channel", "layer"]
    kept = some(kind, *units)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    anatomy = anatomy_of(model)
    found = refit(model, anatomy, kept, text(64))
    assert found
    assert all(0 <= x.after <= x.before for x in found)
    assert sum(x.after < x.before for x in found) > len(found) / 2
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{x.name}.weight" for x in found}
    assert cut(model, kept).error() <= 1e-5


def test_what_is_whole_stays(capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    model = make("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert refit(model, anatomy_of(model), Plan.everything(anatomy_of(model)), text(), damping=0.01) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "nothing was fitted" in said([])[0]


def test_it_regains_a_part_of_the_loss(sprout_dir: Path) -> None:
    """On held-out text, at several seeds of the calibration."""
    for seed in (0, 1):
        subject = load(str(sprout_dir))
        ids = blocks(documents("demo", "calibration"), subject.tokenizer, block=128, tokens=8192, seed=seed)
        held = blocks(documents("demo", "heldout"), subject.tokenizer, block=128, tokens=4096, seed=0)
        scores = score(subject, choose("activation", ("neuron",), {}, {}), ids, seed=seed)
        kept = make_plan(subject.anatomy, scores, Wish(budget=Budget.parse("70%"), axes=("neuron",)))
        losses = [float(block_losses(subject.model, held).mean())]
        for fits in (False, True):
            subject = load(str(sprout_dir))
            if fits:
                refit(subject.model, subject.anatomy, kept, ids)
            apply(subject, kept)
            losses.append(float(block_losses(subject.model, held).mean()))
        dense, plain, fitted = losses
        assert fitted < plain - 0.1 * (plain - dense)


def test_heads_behind_a_norm_over_all_of_them() -> None:
    with pytest.raises(SettingsError, match="refit of heads in a olmo2"):
        refit(make("olmo2"), anatomy_of(make("olmo2")), some("olmo2", "head"), text(), damping=0.01)


def test_inputs_that_are_not_finite() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(BrokenModel, match=r"layers\.0\.mlp\.down_proj"):
        refit(model, anatomy_of(model), some("llama", "neuron"), text(), damping=0.01)


def test_one_block_has_no_halves() -> None:
    with pytest.raises(TextError, match="refit on one block"):
        refit(make("llama"), anatomy_of(make("llama")), some("llama", "neuron"), text(1))


def test_both_branches_are_known() -> None:
    assert {unit for _, units in INSIDE for unit in units} == {"group", "head", "neuron"}
