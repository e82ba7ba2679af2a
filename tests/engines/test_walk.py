"""The walk: statistics worked out again by hand, independent of how text is batched, and honest about NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import anatomy_of, families, ids, make
from regrow.artifacts.family import Unit
from regrow.artifacts.sight import Reduction
from regrow.engines.walk import Seen, _over_sequence, flow_sites, observe
from regrow.errors import BrokenModel

KINDS = [kind for kind, _ in families()]
BLOCKS = ids(5, 12)
HOW: tuple[Reduction, ...] = ("mean", "l2", "var")


def units(kind: str) -> tuple[Unit, ...]:
    return tuple(unit for unit in anatomy_of(make(kind)).supported if unit != "layer")


def seen(kind: str, *, batch: int = 1, **options: Any) -> Seen:
    model = make(kind)
    flow = {how: units(kind) for how in HOW}
    return observe(model, anatomy_of(model), BLOCKS, flow=flow, angles=True, batch=batch, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_do_not_hang_on_the_batch(kind: str) -> None:
    one, two = seen(kind), seen(kind, batch=3)
    assert (one.sequences, one.tokens) == (two.sequences, two.tokens) == (5, 60)
    torch.testing.assert_close(one.cosines(), two.cosines(), rtol=0, atol=1e-6)
    for how in HOW:
        assert one.flow[how].keys() == two.flow[how].keys()
        for site, sums in one.flow[how].items():
            torch.testing.assert_close(sums.total, two.flow[how][site].total, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(sums.squares, two.flow[how][site].squares, rtol=1e-5, atol=1e-6)


def test_reductions_by_hand() -> None:
    """Two sequences of three tokens and two channels, through a model whose down_proj we feed ourselves."""
    model = make("llama")
    anatomy = anatomy_of(model)
    first = torch.tensor([[3.0, 1.0], [-4.0, 1.0], [0.0, 1.0]])
    second = torch.tensor([[1.0, 0.0], [1.0, 6.0], [1.0, 0.0]])
    fed = torch.stack([first, second])  # (2, 3, 2)

    class Fed(torch.nn.Module):
        """An MLP that hands the same neurons to down_proj whatever comes in."""

        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Linear(2, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.down_proj(fed[: len(x)])
            return found

    for layer in model.model.layers:
        layer.mlp = Fed()
    found = observe(model, anatomy, ids(2, 3), flow=dict.fromkeys(HOW, ("neuron",)), batch=2)
    site = ("neuron", 1, "model.layers.1.mlp.down_proj")
    mean, length, var = (found.moments(how, site, 1) for how in HOW)  # type: ignore[arg-type]
    assert mean.sequences == 2
    torch.testing.assert_close(mean.total.flatten(), torch.tensor([7 / 3 + 1, 1 + 2]).double())
    torch.testing.assert_close(mean.squares.flatten(), torch.tensor([49 / 9 + 1, 1 + 4]).double())
    torch.testing.assert_close(length.squares.flatten(), torch.tensor([25.0 + 3, 3 + 36]).double())
    torch.testing.assert_close(length.reduce("l2").flatten(), torch.tensor([28.0, 39]).double().sqrt())
    torch.testing.assert_close(var.total.flatten(), torch.tensor([25 / 3 - 1 / 9, 0 + (36 / 3 - 4)]).double())
    torch.testing.assert_close(mean.reduce("mean").flatten(), torch.tensor([5 / 3, 3 / 2]).double())
    torch.testing.assert_close(mean.reduce("var").flatten(), torch.tensor([4 / 9, 1 / 4]).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_neither_overflow_nor_tie(dtype: torch.dtype) -> None:
    """128 tokens of 600 add up to more than fp16 holds; 1000 channels to more values than bf16 tells apart."""
    for how, expected in (("mean", 600.0), ("l2", 600 * 128**0.5)):
        found = _over_sequence(torch.full((1, 128, 2), -600.0, dtype=dtype), how)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.full((1, 2), expected))
    noise = torch.randn(1, 64, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len(_over_sequence(noise, "mean").unique()) > 900


@pytest.mark.parametrize("kind", KINDS)
def test_sites_are_where_gates_act(kind: str) -> None:
    """The recorded stream is the input of the linear that a gate multiplies, or what a norm gives out."""
    model = make(kind)
    anatomy = anatomy_of(model)
    sites = flow_sites(anatomy, units(kind))
    stored: dict[str, list[Tensor]] = {}
    for path, at_input in {(path, at_input) for (_, _, path), at_input in sites}:
        module = model.get_submodule(path)
        if at_input:
            module.register_forward_pre_hook(lambda _, args, p=path: stored.setdefault(p, []).append(args[0]))
        else:
            module.register_forward_hook(lambda _, __, y, p=path: stored.setdefault(p, []).append(y))
    with torch.no_grad():
        for row in BLOCKS:
            model(input_ids=row[None], use_cache=False)
    found = observe(make(kind), anatomy, BLOCKS, flow={"mean": units(kind)})
    assert len(found.flow["mean"]) == len(sites)
    for site, sums in found.flow["mean"].items():
        unit, layer, path = site
        assert f".{layer}." in path
        by_hand = torch.stack([x[0].abs().mean(0).double() for x in stored[path]])  # (n, width)
        torch.testing.assert_close(sums.total, by_hand.sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sums.squares, by_hand.square().sum(0), rtol=1e-5, atol=1e-6)
        width = {"neuron": 1, "channel": 1, "head": anatomy.sizes["D"]}.get(
            unit, anatomy.sizes["G"] * anatomy.sizes["D"]
        )
        assert found.moments("mean", site, width).total.shape == (anatomy.units(unit), width)


def test_channel_sites_by_family() -> None:
    def norms(kind: str) -> list[str]:
        sites = flow_sites(anatomy_of(make(kind)), ("channel",))
        return [path.rpartition(".")[2] for (_, layer, path), at_input in sites if layer == 0 and not at_input]

    assert norms("llama") == ["input_layernorm", "post_attention_layernorm"]
    assert norms("gemma2") == ["input_layernorm", "pre_feedforward_layernorm"]  # those that read the stream
    assert norms("olmo2") == ["post_attention_layernorm", "post_feedforward_layernorm"]  # it has no others


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_by_hand(kind: str) -> None:
    model = make(kind)
    streams: list[Tensor] = []
    layers = list(model.get_submodule(anatomy_of(model).family.layers))
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    layers[-1].register_forward_hook(lambda _, __, y: streams.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        model(input_ids=BLOCKS, use_cache=False)
    found = seen(kind).cosines()
    assert found.shape == (4, 4)
    for i, left in enumerate(streams):
        for j, right in enumerate(streams):
            mean = torch.nn.functional.cosine_similarity(left.double(), right.double(), dim=-1).mean()
            assert float(found[i, j]) == pytest.approx(float(mean), abs=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("gemma")])
def test_a_layer_that_does_nothing_does_not_turn_the_stream(kind: str) -> None:
    model = make(kind)
    family = anatomy_of(model).family
    for branch in (family.attention, family.mlp):
        for parameter in model.get_submodule(f"{family.layers}.1.{branch.end}").parameters():
            parameter.data.zero_()
    influence = 1 - observe(model, anatomy_of(model), BLOCKS, flow={}, angles=True).cosines().diagonal(1)
    assert abs(float(influence[1])) <= 1e-6
    assert min(float(influence[0]), float(influence[2])) > 1e-2


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_afterwards(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("gemma2")
    if fails:
        monkeypatch.setattr("regrow.engines.walk._over_sequence", lambda *_: 1 / 0)
    try:
        observe(model, anatomy_of(model), BLOCKS, flow={"mean": ("neuron",)}, angles=True)
    except ZeroDivisionError:
        assert fails
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_counts_sequences() -> None:
    told: list[tuple[int, int]] = []
    seen("llama", batch=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("unit", "named"),
    [("neuron", r"model\.layers\.1\.mlp\.down_proj"), ("group", r"model\.layers\.2\.self_attn\.o_proj")],
)
def test_activations_that_are_not_finite_are_named(unit: Unit, named: str) -> None:
    """A NaN born in the MLP of layer 1 is first met at its own site, or at the next attention."""
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(BrokenModel, match=f"activations at {named} are not finite") as caught:
        observe(model, anatomy_of(model), BLOCKS, flow={"mean": (unit,)})
    assert "fp32" in caught.value.todo


def test_streams_that_are_not_finite_are_named() -> None:
    model = make("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(BrokenModel, match=r"entering model\.layers\.2 are not finite"):
        observe(model, anatomy_of(model), BLOCKS, flow={}, angles=True)
    model = make("llama")
    model.model.layers[2].mlp.up_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(BrokenModel, match="leaving the last layer are not finite"):
        observe(model, anatomy_of(model), BLOCKS, flow={}, angles=True)
