"""SPP on experts that are one parameter: every expert is adapted as a linear of its own would be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from models import ids, logits, make
from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.engines import adapters, spp_forward, spp_layers
from regrow.engines.inputs import FUSED
from regrow.engines.spp import SppConfig, mask_hash
from regrow.engines.spp_layers import Experts
from regrow.errors import SettingsError

KINDS = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
WIDTHS = {kind: {f"{word}intermediate_size": 24} for kind, word in (("mixtral", ""), ("qwen3_moe", "moe_"))}
RANK, SCALE = 2, 1.5  # kernels of 16 bits want rows of 8 numbers


def sparse(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose experts are 2:4 by magnitude, in 4 experts of 24 to 48 outputs."""
    model = make(kind, **WIDTHS[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(FUSED):
                for matrix in parameter:
                    matrix[lowest(matrix.abs(), Pattern.parse("2:4"), "row")] = 0.0
    return model.to(dtype)


def settings(model: Any, **changes: Any) -> SppConfig:
    usual = {"r": RANK, "spp_alpha": SCALE * RANK, "target_modules": adapters.adaptable(model, "spp")}
    return SppConfig(**{**usual, "task_type": "CAUSAL_LM", **changes})


def trained(model: Any, **changes: Any) -> Any:
    """Adapters as if trained, of experts alone unless said otherwise."""
    changes = {"target_modules": ["experts"], **changes}
    adapted = get_peft_model(model, settings(model, **changes)).eval()
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "spp_" in name:
                parameter.normal_(0, 0.5, generator=source)
    return adapted


def experts(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def by_hand(model: Any) -> Any:
    """A copy without adapters whose weights are adapted one expert, one row at a time."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for layer in experts(found):
            for part, (first, second) in layer.parts.items():
                alpha, beta = (getattr(layer, name)["default"] for name in (first, second))
                for weight, a, b in zip(layer.weight_of(part), alpha, beta, strict=True):
                    rows = len(weight)
                    for i in range(rows):
                        weight[i] += SCALE * weight[i] * a[i * len(a) // rows] * b[i]
    return found.unload()


def test_a_stack_is_each_of_its_weights() -> None:
    source = torch.Generator().manual_seed(0)
    weight, alpha, beta = (torch.randn(shape, generator=source) for shape in ((3, 8, 5), (3, 4, 5), (3, 8)))
    found = spp_forward.delta(weight, alpha, beta, SCALE)
    each = [spp_forward.delta(*three, SCALE) for three in zip(weight, alpha, beta, strict=True)]
    assert torch.equal(found, torch.stack(each))


@KINDS
def test_they_are_found_beside_the_linears(kind: str) -> None:
    model = sparse(kind)
    both, linears = adapters.adaptable(model, "spp"), adapters.layer_linears(model)
    assert set(both) - set(linears) == {f"model.layers.{i}.mlp.experts" for i in range(3)}
    adapted = adapters.add_adapters(model, "spp", rank=RANK, alpha=SCALE * RANK, dropout=0.0)
    assert len(experts(adapted)) == 3
    for layer in experts(adapted):
        for part, names in layer.parts.items():
            stack, rows, columns = layer.weight_of(part).shape
            shapes = [tuple(getattr(layer, name)["default"].shape) for name in names]
            assert shapes == [(stack, RANK, columns), (stack, rows)]
            assert float(getattr(layer, names[0])["default"].detach().abs().max()) <= columns**-0.5


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    model = sparse(kind, dtype)
    before = logits(model, ids())
    assert torch.equal(logits(get_peft_model(model, settings(model)).eval(), ids()), before)


@KINDS
def test_forward_and_gradients_are_those_of_the_formula(kind: str) -> None:
    """In fp64, which only the plain loop over experts computes in; gradients of alpha and beta against those of the
    adapted weights, added up by hand."""
    model = sparse(kind, torch.float64)
    model.set_experts_implementation("eager")
    adapted = trained(model).double()
    plain = by_hand(adapted).requires_grad_()
    expected, found = (model(input_ids=ids(), labels=ids()) for model in (plain, adapted))
    assert (found.logits - expected.logits).abs().max() < 1e-12 * expected.logits.abs().max()
    with adapted.disable_adapter():
        assert (found.logits - logits(adapted, ids())).abs().max() > 0.1
    found.loss.backward()
    expected.loss.backward()
    weights = dict(plain.named_parameters())
    for i, layer in enumerate(experts(adapted)):
        for part, (first, second) in layer.parts.items():
            weight, push = layer.weight_of(part), weights[f"model.layers.{i}.mlp.experts.{part}"].grad
            alpha, beta = (getattr(layer, name)["default"] for name in (first, second))
            pulled = SCALE * push * weight  # (E, m, n)
            spread = alpha.repeat_interleave(weight.shape[1] // RANK, 1)  # (E, m, n)
            assert torch.allclose(beta.grad, (pulled * spread).sum(2), rtol=1e-9, atol=1e-14)
            runs = (pulled * beta[..., None]).view(len(weight), RANK, -1, weight.shape[2])
            assert torch.allclose(alpha.grad, runs.sum(2), rtol=1e-9, atol=1e-14)
            assert bool(alpha.grad.any())
    assert all(p.grad is None for name, p in adapted.named_parameters() if "spp_" not in name)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_adapted_and_keeps_every_zero(kind: str, dtype: torch.dtype) -> None:
    adapted = trained(sparse(kind, dtype))
    before = {name: p.detach().clone() for name, p in sparse(kind, dtype).named_parameters()}
    expected = logits(adapted, ids())
    adapted.merge_adapter()
    assert torch.equal(logits(adapted, ids()), expected)
    adapted.unmerge_adapter()
    assert all(torch.equal(p, before[name.replace(".base_layer", "")]) for name, p in bare(adapted))
    assert all(not layer.kept for layer in experts(adapted))
    merged = adapted.merge_and_unload()
    assert torch.equal(logits(merged, ids()), expected)
    assert not experts(merged)
    found = dict(merged.named_parameters())
    assert found.keys() == before.keys()
    for name, weight in before.items():
        if name.endswith(FUSED):
            assert not torch.equal(found[name], weight)
            assert torch.equal(found[name] == 0, weight == 0)
            assert not bool(found[name].signbit()[weight == 0].any())
        else:
            assert torch.equal(found[name], weight), name


def bare(adapted: Any) -> list[tuple[str, Tensor]]:
    found = adapted.get_base_model().named_parameters()
    return [(name, p) for name, p in found if "spp_" not in name]


def test_the_proof_of_a_merge_sees_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: one stack is merged by a little less."""
    adapters.merge(trained(sparse("mixtral")))
    right = Experts.get_delta_weight

    def less(self: Experts, name: str, part: str) -> Tensor:
        return right(self, name, part) * (0.99 if part == "down_proj" and not torch.is_grad_enabled() else 1)

    adapted = trained(sparse("mixtral"))
    share = adapters.moved(adapted, torch.bfloat16)
    assert 0.9 < share <= 1
    merge = Experts.merge

    def wrong(*given: Any, **more: Any) -> None:
        monkeypatch.setattr(Experts, "get_delta_weight", less)
        merge(*given, **more)

    monkeypatch.setattr(Experts, "merge", wrong)
    with pytest.raises(Exception, match=r"merging the adapters of model\.layers\.0\.mlp\.experts moved its outputs"):
        adapters.merge(adapted)


def test_switched_off_saved_and_loaded(tmp_path: Path) -> None:
    model = sparse("mixtral")
    before = logits(model, ids())
    adapted = trained(model, target_modules=["experts", "q_proj"])
    expected = logits(adapted, ids())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids()), before)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(sparse("mixtral"), tmp_path).eval()
    assert torch.equal(logits(loaded, ids()), expected)
    assert loaded.peft_config["default"].mask_hash == mask_hash(loaded.base_model.model, "default")
    other = make("mixtral")
    names = [name for name, _ in other.named_parameters()]
    with pytest.raises(SettingsError, match="loaded on a model with zeros"):
        PeftModel.from_pretrained(other, tmp_path)
    assert [name for name, _ in other.named_parameters()] == names


def test_two_adapters_add_up() -> None:
    adapted = trained(sparse("mixtral"))
    adapted.add_adapter("two", settings(adapted, r=4, target_modules=["experts"]))
    one = logits(adapted, ids())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".two"):
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    assert torch.equal(logits(adapted, ids()), one)
    adapted.base_model.set_adapter(["default", "two"])
    both = logits(adapted, ids())
    assert (both - one).abs().max() > 0.1
    merged = adapted.merge_and_unload(adapter_names=["default", "two"])
    assert torch.equal(logits(merged, ids()), both)


def test_no_stack_lives_from_the_forward_to_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: without the repetition in the backward pass both stacks are kept."""
    layer = experts(trained(sparse("mixtral")))[0].train()
    weights = sum(layer.weight_of(part).numel() for part in layer.parts)
    given = torch.randn(3, 24), torch.tensor([[0, 1], [1, 2], [3, 0]]), torch.full((3, 2), 0.5)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def kept() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            assert layer(*given).requires_grad
        return sum(sizes.values())

    assert kept() < weights / 4
    monkeypatch.setattr(spp_layers, "checkpoint", lambda run, *args, **_: run(*args))
    assert kept() >= weights


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 5}, r"rank 5 on model\.layers\.0\.mlp\.experts\.down_proj, which has 24 outputs"),
        ({"spp_dropout": 0.1}, r"dropout 0\.1 on model\.layers\.0\.mlp\.experts, a stack of experts"),
        ({"target_modules": ["mlp"]}, r"SPP on model\.layers\.0\.mlp, a MixtralSparseMoeBlock"),
    ],
)
def test_bad_settings_leave_the_model_as_it_was(changes: dict[str, Any], match: str) -> None:
    model = make("mixtral")
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(SettingsError, match=match):
        get_peft_model(model, settings(model, **{"target_modules": ["experts"], **changes}))
    assert [name for name, _ in model.named_parameters()] == names
