"""SPP adapters start at nothing, keep every zero when merged, and give equal numbers in all three forms.

Formulas are held against plain autograd of y = W x + b + s (A beta W) x, files against what PEFT makes of them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForSequenceClassification

from models import config_of, ids, logits, make
from regrow.artifacts.mask import lowest
from regrow.artifacts.pattern import Pattern
from regrow.engines import adapters, spp_forward
from regrow.engines.spp import TINY, SppConfig, mask_hash
from regrow.engines.spp_layers import Linear
from regrow.errors import IdentityError, SettingsError

M, N, R, SCALE = 24, 20, 4, 1.5
FORMS = ("checkpointed", "lean", "folded")
AWAY = ("embed", "lm_head", "norm")


def settings(**changes: Any) -> SppConfig:
    usual = {"r": 2, "spp_alpha": 3.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return SppConfig(**{**usual, **changes})


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(form: str = "auto", *, r: int = R, dropout: float = 0.0, bias: bool = True) -> Linear:
    """One fp64 linear with half of its weights zero and an adapter that is trained already."""
    base = nn.Linear(N, M, bias=bias, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(draw(M, N, seed=1) * (draw(M, N, seed=2) > 0))
    if bias:
        base.bias.copy_(draw(M, seed=8))
    made = Linear(base, "default", "here", SppConfig(r=r, spp_alpha=SCALE * r, spp_dropout=dropout, form=form))
    with torch.no_grad():
        made.spp_alpha["default"].copy_(draw(r, N, seed=3))
        made.spp_beta["default"].copy_(draw(M, seed=4))
    return made


def plain(x: Tensor, dropped: Tensor, made: Linear, alpha: Tensor, beta: Tensor) -> Tensor:
    """The paper's formula, written out for autograd."""
    weight = made.base_layer.weight
    spread = alpha.repeat_interleave(M // len(alpha), 0)  # (m, n)
    added = made.scaling["default"] * spread * beta[:, None] * weight
    y = x @ weight.T + dropped @ added.T
    return y if made.base_layer.bias is None else y + made.base_layer.bias


def sparse(kind: str = "llama") -> Any:
    """A model whose decoder linears are 2:4 by magnitude."""
    model = make(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not any(word in name for word in AWAY):
                parameter[lowest(parameter.abs(), Pattern.parse("2:4"), "row")] = 0.0
    return model


def trained(model: Any, *, spread: float = 1.5, **changes: Any) -> Any:
    """An adapted model whose adapter is as if trained; many factors 1 + s alpha beta are below 0."""
    adapted = get_peft_model(model, settings(**changes)).eval()
    disturb(adapted, spread=spread)
    return adapted


def disturb(adapted: Any, *, spread: float = 1.5, seed: int = 7, adapter: str = "default") -> None:
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "spp_" in name and name.endswith(adapter):
                parameter.normal_(0, spread, generator=source)


def layers(model: nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() == 0 for n, p in model.named_parameters() if p.dim() == 2 and not any(w in n for w in AWAY)}


def intact(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Every zero where it was, none new, all of them +0, and two of every four kept."""
    found = dict(model.named_parameters())
    return all(
        torch.equal(found[name] == 0, empty)
        and not bool(found[name].signbit()[empty].any())
        and bool(((found[name] != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())
        for name, empty in before.items()
    )


# --- what is added


def test_delta_by_hand() -> None:
    weight = torch.tensor([[1.0, 2], [0, 4]])
    one = spp_forward.delta(weight, torch.tensor([[10.0, 100]]), torch.tensor([1.0, 2]), 0.5)
    assert torch.equal(one, torch.tensor([[5.0, 100], [0, 400]]))
    two = spp_forward.delta(weight, torch.tensor([[10.0, 100], [1000, -1]]), torch.tensor([1.0, 2]), 0.5)
    assert torch.equal(two, torch.tensor([[5.0, 100], [0, -4]]))


def test_neighbouring_rows_share_a_row_of_alpha() -> None:
    found = spp_forward.delta(torch.ones(6, 1), torch.tensor([[1.0], [10]]), torch.arange(1.0, 7), 1.0)
    assert found.flatten().tolist() == [1, 2, 3, 40, 50, 60]


def test_merge_by_hand() -> None:
    base = nn.Linear(2, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2], [0, 4]]))
    made = Linear(base, "default", "here", SppConfig(r=1, spp_alpha=0.5))
    with torch.no_grad():
        made.spp_alpha["default"].copy_(torch.tensor([[10.0, 100]]))
        made.spp_beta["default"].copy_(torch.tensor([1.0, 2]))
    made.merge()
    assert base.weight.tolist() == [[6, 102], [0, 404]]


# --- before training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_a_fresh_adapter_changes_no_bit(kind: str, form: str, dtype: torch.dtype) -> None:
    """With biases in the linears too, in the type the model computes in."""
    model = make(kind).to(dtype)
    before = logits(model, ids())
    adapted = get_peft_model(model, settings(form=form)).eval()
    found = layers(adapted).values()
    assert all(bool((x.spp_alpha["default"] != 0).all()) and not bool(x.spp_beta["default"].any()) for x in found)
    assert torch.equal(logits(adapted, ids()), before)
    disturb(adapted, spread=0.5)
    assert not torch.equal(logits(adapted, ids()), before)


def test_alpha_starts_as_in_the_paper() -> None:
    base = nn.Linear(400, 8)
    made = Linear(base, "default", "here", SppConfig(r=8))
    alpha = made.spp_alpha["default"].detach()
    assert float(alpha.abs().max()) == pytest.approx(1 / 20, rel=0.01)
    assert float(alpha.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_step_moves_beta_alone(form: str) -> None:
    adapted = get_peft_model(make("llama"), settings(form=form))
    tokens = ids()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    for name, found in layers(adapted).items():
        alpha, beta = found.spp_alpha["default"].grad, found.spp_beta["default"].grad
        assert alpha is not None, name
        assert beta is not None, name
        assert not bool(alpha.any()), name
        assert bool(beta.any()), name


# --- the three forms


def gradients(made: Linear, x: Tensor, push: Tensor, *, plainly: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """y and the gradients of all that can be trained, of the layer or of the formula."""
    alpha, beta = (p["default"].detach().clone().requires_grad_() for p in (made.spp_alpha, made.spp_beta))
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    if plainly:
        p = made.dropout["default"]
        y = plain(x, F.dropout(x, p) if p else x, made, alpha, beta)
    else:
        alpha, beta = made.spp_alpha["default"], made.spp_beta["default"]
        alpha.grad = beta.grad = None
        y = made(x)
    (y * push).sum().backward()
    found = {"y": y, "alpha": alpha.grad, "beta": beta.grad, "x": x.grad}
    return {name: value.detach() for name, value in found.items() if value is not None}


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, of each tensor's largest value."""
    assert ours.keys() == theirs.keys() == {"y", "alpha", "beta", "x"}
    assert all(ours[name].shape == theirs[name].shape for name in ours)
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in ours)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(9, N), (3, 7, N)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("r", [1, R, M])
@pytest.mark.parametrize("form", FORMS)
def test_forms_equal_plain_autograd(form: str, r: int, shape: tuple[int, ...], bias: bool) -> None:
    made, x, push = layer(form, r=r, bias=bias), draw(*shape, seed=5), draw(*shape[:-1], M, seed=6)
    assert apart(gradients(made, x, push), gradients(made, x, push, plainly=True)) < 1e-12


@pytest.mark.parametrize("form", ["checkpointed", "lean"])
def test_forms_equal_plain_autograd_under_dropout(form: str) -> None:
    """Only the residual's input is dropped, and the same of it in the forward pass and its repetition."""
    made, x, push = layer(form, dropout=0.4), draw(3, 7, N, seed=5), draw(3, 7, M, seed=6)
    assert apart(gradients(made, x, push), gradients(made, x, push, plainly=True)) < 1e-12
    assert apart(gradients(made, x, push), gradients(made, x, push, seed=1)) > 0.01
    made.eval()
    undropped = gradients(layer(form), x, push)
    assert apart(gradients(made, x, push), undropped) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_form_is_seen(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Planted: rows take the alpha of another run."""
    right = spp_forward.FORMS[form]

    def turned(*given: Any) -> Tensor:
        x, dropped, weight, bias, alpha, beta, scale = given
        return right(x, dropped, weight, bias, alpha.roll(1, 0), beta, scale)

    monkeypatch.setitem(spp_forward.FORMS, form, turned)
    made, x, push = layer(form), draw(9, N, seed=5), draw(9, M, seed=6)
    assert apart(gradients(made, x, push), gradients(made, x, push, plainly=True)) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_that_is_trained_gets_its_gradient(form: str) -> None:
    made, push = layer(form), draw(3, 7, M, seed=6)
    made.base_layer.bias.requires_grad_()
    (made(draw(3, 7, N, seed=5)) * push).sum().backward()
    assert torch.allclose(made.base_layer.bias.grad, push.sum((0, 1)))


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str) -> None:
    """Weights and adapters in fp32, products in bf16: gradients stay near those of fp32."""
    made, x, push = layer(form).float(), draw(3, 7, N, seed=5).float(), draw(3, 7, M, seed=6).float()
    exact = gradients(made, x, push, plainly=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(made, x, push)
    assert apart({name: value.float() for name, value in found.items()}, exact) < 0.03


def test_forms_have_one_gradient_under_autocast() -> None:
    """Products in bf16 are the same in all; what comes after them is made in the type of the factors."""
    x, push = draw(3, 7, N, seed=5).float(), draw(3, 7, M, seed=6).float()
    found = {}
    for form in FORMS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = gradients(layer(form).float(), x, push)
        found[form] = torch.cat([grads[name].float().flatten() for name in ("alpha", "beta")])
    scale = found["checkpointed"].abs().max()
    assert float((found["folded"] - found["checkpointed"]).abs().max() / scale) < 0.01


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_narrow_under_autocast(form: str) -> None:
    made, x = layer(form).float(), draw(3, 7, N).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == made.base_layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
def test_one_token_without_a_batch(form: str) -> None:
    made, x, push = layer(form), draw(N), draw(M, seed=1)
    alone, batched = gradients(made, x, push), gradients(made, x[None], push[None])
    assert apart({name: value.view_as(batched[name]) for name, value in alone.items()}, batched) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_autocast_of_the_forward_pass_alone(form: str) -> None:
    """As the trainer has it: the backward pass runs outside."""
    adapted = trained(make("llama"), form=form, spread=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adapted(input_ids=ids(), labels=ids()).loss
    loss.backward()
    held = [p for x in layers(adapted).values() for p in (x.spp_alpha["default"], x.spp_beta["default"])]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in held)


# --- memory, and which form runs


def kept(made: Linear, x: Tensor, forward: Any = None) -> int:
    """Numbers kept from the forward to the backward pass, each storage once, the frozen weight not counted."""
    sizes: dict[int, int] = {}
    weight = made.base_layer.weight.untyped_storage()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != weight.data_ptr():
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = (forward or made)(x)
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("form", FORMS)
def test_nothing_as_large_as_the_weight_is_kept(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    tokens, small = 5, R * N + 2 * M  # alpha, beta and s * beta
    made, x = layer(form), draw(5, N, seed=5).requires_grad_()
    assert tokens * (N + M) + small < M * N, "else the test could not tell"
    assert tokens * N <= kept(made, x) <= tokens * N + small

    def naive(x: Tensor) -> Tensor:
        return F.linear(x, made.base_layer.weight + made.get_delta_weight("default"))

    assert kept(made, x, naive) >= M * N
    monkeypatch.setattr(spp_forward, "checkpoint", lambda function, *given, **_: function(*given))
    assert (kept(made, x) >= M * N) == (form == "checkpointed")


def test_the_lean_form_keeps_no_stream_as_wide_as_the_outputs() -> None:
    """Under dropout what is left of x, else x; a plain product by runs keeps as much again, m wide."""
    small, x = R * N + 2 * M, draw(50, N, seed=5).requires_grad_()
    for dropout in (0.0, 0.4):
        made = layer("lean", dropout=dropout)
        mask = 2 * x.numel() if dropout else 0  # dropout's own: what it drew, and its input
        assert x.numel() <= kept(made, x) <= x.numel() + mask + small
        assert kept(made, x, lambda x, made=made: plain_runs(x, made)) >= 50 * (N + M)


def plain_runs(x: Tensor, made: Linear) -> Tensor:
    alpha, beta, weight = made.spp_alpha["default"], made.spp_beta["default"], made.base_layer.weight
    added = torch.cat([F.linear(x * a, w) for a, w in zip(alpha, weight.chunk(len(alpha)), strict=True)], -1)
    return F.linear(x, weight) + made.scaling["default"] * beta * added


class Largest(TorchDispatchMode):
    """The most numbers in one storage that an operation returned, but for the storage of `own`."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.own, self.numbers = own.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.own:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


@pytest.mark.parametrize(
    ("form", "dropout", "small"),
    [("lean", 0.0, True), ("lean", 0.4, True), ("folded", 0.0, False), ("checkpointed", 0.0, False)],
)
def test_the_lean_form_makes_nothing_as_large_as_the_weight(form: str, dropout: float, small: bool) -> None:
    """Not even for a moment; the other two do in both passes."""
    made, x = layer(form, dropout=dropout), draw(3, N, seed=5).requires_grad_()
    with Largest(made.base_layer.weight) as forward:
        y = made(x)
    with Largest(made.base_layer.weight) as backward:
        y.sum().backward()
    assert x.grad is not None
    assert all(0 < seen.numbers < M * N if small else seen.numbers >= M * N for seen in (forward, backward))


class Alive(TorchDispatchMode):
    """The most numbers alive at once in storages that operations returned, but for the storage of `own`."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.own, self.numbers = own.untyped_storage().data_ptr(), 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() != self.own:
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes() // tensor.element_size()
        self.alive = {at: (storage, n) for at, (storage, n) in self.alive.items() if not storage.expired()}
        self.numbers = max(self.numbers, sum(n for _, n in self.alive.values()))
        return found


@pytest.mark.parametrize(
    ("form", "dropout", "small"),
    [("lean", 0.0, True), ("lean", 0.4, True), ("folded", 0.0, False), ("checkpointed", 0.0, False)],
)
def test_all_that_the_lean_form_holds_at_once_is_less_than_half_the_weight(
    form: str, dropout: float, small: bool
) -> None:
    base = nn.Linear(128, 256, bias=False, dtype=torch.float64).requires_grad_(False)
    made = Linear(base, "default", "here", SppConfig(r=32, spp_dropout=dropout, form=form))
    x = draw(3, 128, seed=5).requires_grad_()
    with Alive(base.weight) as forward:
        y = made(x)
    with Alive(base.weight) as backward:
        y.sum().backward()
    assert all((seen.numbers < 256 * 128 / 2) is small for seen in (forward, backward))


@pytest.mark.parametrize(
    ("dropout", "tokens", "form"),
    [(0.0, spp_forward.FEW, "folded"), (0.0, spp_forward.FEW - 1, "lean"), (0.1, 1000, "lean")],
)
def test_the_cheapest_form_runs(monkeypatch: pytest.MonkeyPatch, dropout: float, tokens: int, form: str) -> None:
    ran: list[str] = []
    for name, right in list(spp_forward.FORMS.items()):
        monkeypatch.setitem(spp_forward.FORMS, name, lambda *a, name=name, right=right: ran.append(name) or right(*a))
    weight = torch.empty(M, N, device="meta")
    assert spp_forward.choose(dropout, tokens, weight) == form
    made = layer(dropout=dropout)
    made(draw(1, tokens, N))
    assert ran == [form]
    made.eval()
    made(draw(1, tokens, N))
    assert ran[1] == spp_forward.choose(0.0, tokens, weight)


def test_a_matrix_that_is_large_for_the_device_is_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(1024, 1024)  # two of them take 8 MB in fp32
    for memory, form in ((600e6, "folded"), (500e6, "lean")):
        monkeypatch.setattr(spp_forward, "memory_of", lambda _, memory=memory: memory)
        assert spp_forward.choose(0.0, 1000, weight) == form


def test_a_config_serves_many_models() -> None:
    """The zeros that an adapter belongs to are noted in its own copy."""
    config = settings(target_modules=["q_proj"])
    first = get_peft_model(sparse(), config)
    second = get_peft_model(make("llama"), config)
    assert config.mask_hash is None
    assert first.peft_config["default"].mask_hash != second.peft_config["default"].mask_hash


# --- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_merging_keeps_every_zero(kind: str, dtype: torch.dtype) -> None:
    model = sparse(kind).to(dtype)
    before, old = zeros(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert intact(model, before)
    adapted = trained(model)
    for found in layers(adapted).values():
        factors = 1 + found.get_delta_weight("default") / found.base_layer.weight
        assert bool((factors < 0).any()), "else no sign could turn"
    merged = adapted.merge_and_unload()
    assert intact(merged, before)
    assert all(not torch.equal(merged.get_parameter(name), old[name]) for name in before)


def test_the_check_of_zeros_sees_signs_and_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a merge by multiplication, then one that fills a zero."""
    model = sparse()
    before = zeros(model)
    adapted = trained(model)
    with torch.no_grad():
        for found in layers(adapted).values():
            factor = 1 + SCALE * found.spp_beta["default"][:, None] * found.spp_alpha["default"][:1]
            found.base_layer.weight.mul_(factor)
    assert not intact(adapted.unload(), before)
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, *names: right(self, *names) + 1e-3)
    assert not intact(trained(sparse()).merge_and_unload(), before)


@pytest.mark.parametrize("form", FORMS)
def test_merged_equals_adapted(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    model = sparse()
    base = logits(model, ids())
    adapted = trained(model, form=form, spread=0.5)
    expected = logits(adapted, ids())
    assert (expected - base).abs().max() > 0.1 * base.abs().max(), "the adapters must matter for this test to see"
    merged = adapters.merge(adapted)
    assert (logits(merged, ids()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not layers(merged)
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, *names: 0.99 * right(self, *names))
    with pytest.raises(IdentityError, match="nothing was written"):
        adapters.merge(trained(sparse(), form=form, spread=0.5))


@pytest.mark.parametrize(("form", "dropout"), [*((form, 0.0) for form in FORMS), ("lean", 0.1)])
def test_merged_equals_adapted_in_16_bits(form: str, dropout: float) -> None:
    """Within the rounding of products and sums; the folded form makes the very weights that are merged."""
    made, x = layer(form, dropout=dropout).bfloat16().eval(), draw(50, N, seed=5).bfloat16()
    made.spp_alpha.float()
    made.spp_beta.float()
    y = made(x)
    made.merge()
    merged, weight = made(x), made.base_layer.weight.double()
    if form == "folded":
        assert torch.equal(y, merged)
    bound = 8 * torch.finfo(torch.bfloat16).eps * (x.double().abs() @ weight.abs().T + 1)
    assert bool(((y - merged).abs() <= bound).all())
    made.base_layer.weight.data.mul_(0.9)
    assert bool(((y - made(x)).abs() > bound).any()), "the bound is narrow"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unmerging_is_exact(dtype: torch.dtype) -> None:
    adapted = trained(sparse().to(dtype), spread=3)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    expected = logits(adapted, ids())
    adapted.merge_adapter()
    assert any(not torch.equal(p, before[n]) for n, p in adapted.named_parameters())
    adapted.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in adapted.named_parameters())
    assert all(not x.kept and not x.merged for x in layers(adapted).values())
    assert torch.equal(logits(adapted, ids()), expected)


def test_a_merge_that_is_not_finite_is_refused_and_leaves_the_weight() -> None:
    made = layer()
    before = made.base_layer.weight.clone()
    with torch.no_grad():
        made.spp_beta["default"][3] = torch.inf
    with pytest.raises(ValueError, match="into here gives weights that are not finite"):
        made.merge(safe_merge=True)
    assert torch.equal(made.base_layer.weight, before)
    assert not made.kept
    assert not made.merged


def test_negative_zeros_become_plain_ones() -> None:
    """A mask that was multiplied leaves -0; and what underflows in the merge is no -0 either."""
    made = layer(r=1).half()
    made.spp_alpha.float()
    made.spp_beta.float()
    weight = made.base_layer.weight
    with torch.no_grad():
        weight[weight == 0] = -0.0
        weight[0] = -(2.0**-24)  # the smallest number there is
        made.spp_alpha["default"].fill_(-0.9 / SCALE)
        made.spp_beta["default"].fill_(1.0)
    made.merge()
    assert int((weight == 0).sum()) > 100
    assert bool((weight[0] == 0).all())
    assert not bool(weight.signbit()[weight == 0].any())


def test_the_zeros_of_an_adapter_are_those_before_any_merge() -> None:
    """A factor of exactly 0 empties a weight in the merge."""
    adapted = get_peft_model(sparse(), settings(spp_alpha=2.0))
    found = layers(adapted)["base_model.model.model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        found.spp_alpha["default"].fill_(-1.0)
        found.spp_beta["default"].fill_(1.0)
    adapted.merge_adapter()
    assert not bool(found.base_layer.weight.any())
    assert mask_hash(adapted.base_model.model, "default") == adapted.peft_config["default"].mask_hash
    found.kept.clear()
    assert mask_hash(adapted.base_model.model, "default") != adapted.peft_config["default"].mask_hash


# --- what PEFT users do


def test_disabled_adapters_are_not_there() -> None:
    model = sparse()
    before = logits(model, ids())
    adapted = trained(model)
    expected = logits(adapted, ids())
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids()), before)
    assert torch.equal(logits(adapted, ids()), expected)
    adapted.merge_adapter()
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, ids()), before)
    assert torch.equal(logits(adapted, ids()), expected)


def double(form: str = "auto") -> Any:
    """Adapters `one` on all linears and `two`, of another rank, on queries."""
    adapted = get_peft_model(sparse(), settings(form=form), adapter_name="one").eval()
    adapted.add_adapter("two", settings(r=4, form="lean", target_modules=["q_proj"]))
    for seed, name in enumerate(("one", "two")):
        disturb(adapted, spread=0.5, seed=seed, adapter=name)
    return adapted


@pytest.mark.parametrize("form", FORMS)
def test_adapters_add_up_and_switch(form: str) -> None:
    adapted = double(form)
    base: Any = sparse()

    def by_hand(*names: str) -> Tensor:
        model = sparse()
        with torch.no_grad():
            for path, found in layers(adapted).items():
                weight = model.get_parameter(path.removeprefix("base_model.model.") + ".weight")
                for name in set(names) & set(found.spp_alpha):
                    weight += found.get_delta_weight(name)
        return logits(model, ids())

    seen = []
    for names in (["one"], ["two"], ["one", "two"]):
        adapted.base_model.set_adapter(names)
        found = logits(adapted, ids())
        assert (found - by_hand(*names)).abs().max() <= 1e-5 * found.abs().max()
        assert all((found - other).abs().max() > 1e-2 for other in (*seen, logits(base, ids())))
        held = {n.rpartition(".")[2] for n, p in adapted.named_parameters() if p.requires_grad}
        assert held == set(names)
        seen.append(found)
    before = zeros(base)
    merged = adapted.merge_and_unload(adapter_names=["one", "two"])
    assert (logits(merged, ids()) - seen[-1]).abs().max() <= 1e-5 * seen[-1].abs().max()
    assert intact(merged, before)


def test_merged_one_after_another_they_add_up_too() -> None:
    """The second is added to the weight, but made of the weight before any merge."""
    adapted = double()
    adapted.base_model.set_adapter(["one", "two"])
    expected = logits(adapted, ids())
    adapted.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        adapted.merge_adapter(["two"])
    assert (logits(adapted, ids()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted, ids()), expected)


def test_what_carries_an_adapter_is_frozen() -> None:
    """Whichever came first, and whether the adapter is at work or waits; the second goes on linears of its own."""
    adapted = get_peft_model(sparse(), settings(target_modules=["q_proj"]), adapter_name="one")
    adapted.add_adapter("two", settings(target_modules=["up_proj"]))
    for name in ("one", "two"):
        adapted.set_adapter(name)
        trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in adapted.named_parameters() if n.endswith(f".{name}")} != set()
    assert not any(made.base_layer.weight.requires_grad for made in layers(adapted).values())


def test_an_adapter_can_be_deleted() -> None:
    adapted = double()
    expected = logits(adapted, ids())
    adapted.delete_adapter("two")
    assert not [n for n, _ in adapted.named_parameters() if n.endswith("two")]
    assert torch.equal(logits(adapted, ids()), expected)


def test_saved_and_loaded(tmp_path: Path) -> None:
    adapted = trained(sparse(), r=4, spp_alpha=5.0, spp_dropout=0.1, form="lean", target_modules=["q_proj", "up_proj"])
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(sparse(), tmp_path).eval()
    assert torch.equal(logits(loaded, ids()), logits(adapted, ids()))
    ours, theirs = adapted.peft_config["default"], loaded.peft_config["default"]
    for name in ("r", "spp_alpha", "spp_dropout", "form", "target_modules", "mask_hash", "peft_type"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert isinstance(theirs, SppConfig)
    assert layers(loaded).keys() == layers(adapted).keys()
    assert len(layers(loaded)) == 2 * 3


def test_each_of_two_adapters_is_saved_for_itself(tmp_path: Path) -> None:
    adapted = double()
    adapted.save_pretrained(tmp_path)
    for name in ("one", "two"):
        adapted.set_adapter(name)
        loaded = PeftModel.from_pretrained(sparse(), tmp_path / name).eval()
        assert torch.equal(logits(loaded, ids()), logits(adapted, ids()))
    loaded = PeftModel.from_pretrained(sparse(), tmp_path / "two", adapter_name="two")
    loaded.load_adapter(tmp_path / "one", "one")
    adapted.base_model.set_adapter(["one", "two"])
    loaded.base_model.set_adapter(["one", "two"])
    assert torch.equal(logits(loaded.eval(), ids()), logits(adapted, ids()))


def test_zeros_elsewhere_are_another_model(tmp_path: Path) -> None:
    """One zero more under the adapter is noticed, zeros that it does not touch are not."""
    trained(sparse(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    other, elsewhere = sparse(), sparse()
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight[0] = 0.0
        elsewhere.model.layers[1].self_attn.k_proj.weight[0] = 0.0
    PeftModel.from_pretrained(elsewhere, tmp_path)
    with pytest.raises(SettingsError, match="loaded on a model with zeros"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    trained(sparse(), target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path)
    other = make("llama")
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    with pytest.raises(SettingsError, match="loaded on a model with zeros"):
        PeftModel.from_pretrained(other, tmp_path)
    after = dict(other.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(SettingsError, match="rank 7"):
        get_peft_model(other, settings(r=7))
    assert dict(other.named_parameters()).keys() == before.keys()
    PeftModel.from_pretrained(sparse(), tmp_path)


def test_zeros_elsewhere_are_refused_for_a_second_adapter(tmp_path: Path) -> None:
    trained(sparse(), target_modules=["q_proj", "up_proj"]).save_pretrained(tmp_path)
    adapted = trained(make("llama"), target_modules=["up_proj"])
    before, names = logits(adapted, ids()), [name for name, _ in adapted.named_parameters()]
    with pytest.raises(SettingsError, match="loaded on a model with zeros"):
        adapted.load_adapter(tmp_path, "second")
    assert [name for name, _ in adapted.named_parameters()] == names
    assert torch.equal(logits(adapted, ids()), before)
    adapted.add_adapter("second", settings(target_modules=["q_proj"]))


def test_loading_on_a_merged_model_is_no_other_mask(tmp_path: Path) -> None:
    adapted = trained(sparse(), spread=0.5)
    adapted.save_pretrained(tmp_path)
    PeftModel.from_pretrained(adapted.merge_and_unload(), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_another_type_flushes_is_no_other_mask(tmp_path: Path, dtype: torch.dtype) -> None:
    """fp16 makes zeros of weights that bf16 holds, and rounds others."""
    base = sparse().to(torch.bfloat16)
    with torch.no_grad():
        for kept, tiny in enumerate((1e-8, 3e-8, 5e-8, 7e-8, 9e-8, 1.2e-7, *(k * 2.0**-24 for k in (127, 129, 130)))):
            row = base.model.layers[1].self_attn.q_proj.weight[kept]
            row[(row != 0).nonzero()[0]] = tiny
    trained(copy.deepcopy(base), target_modules=["q_proj"]).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base.to(dtype), tmp_path)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_what_is_tiny_is_tiny_in_every_type(narrow: torch.dtype) -> None:
    """However the fp32 weight was rounded. The mutation: half a step of fp16 above zero, which bf16 holds."""
    edge = torch.tensor(TINY).view(torch.int32) + torch.arange(-200_000, 200_000, dtype=torch.int32)
    wide = edge.view(torch.float32)
    assert torch.equal(wide < TINY, wide.to(narrow).float() < TINY)
    assert torch.equal(wide.to(narrow) < TINY, wide.to(torch.bfloat16).to(torch.float16) < TINY)
    low = 1.5 * 2.0**-24
    near = (torch.tensor(low).view(torch.int32) + torch.arange(-999, 999, dtype=torch.int32)).view(torch.float32)
    assert torch.equal(near < low, near.to(narrow).float() < low) == (narrow == torch.float16)


def classifier(seed: int) -> Any:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config_of("llama", num_labels=3)).eval()


def test_a_head_of_classes_is_trained_and_saved(tmp_path: Path) -> None:
    """As under LoRA, which does it for every task but language models."""
    adapted = get_peft_model(classifier(0), settings(task_type="SEQ_CLS"))
    trains = [n for n, p in adapted.named_parameters() if p.requires_grad and "spp_" not in n]
    assert trains == ["base_model.model.score.modules_to_save.default.weight"]
    disturb(adapted, spread=0.5)
    with torch.no_grad():
        adapted.get_parameter(trains[0]).normal_()
    adapted.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(0), tmp_path).eval()
    expected = logits(adapted, ids())
    assert torch.equal(logits(loaded, ids()), expected)
    assert torch.allclose(logits(adapted.merge_and_unload(), ids()), expected, atol=1e-5)


def test_some_layers_alone() -> None:
    adapted = get_peft_model(make("llama"), settings(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]))
    assert sorted({name.split("layers.")[1][0] for name in layers(adapted)}) == ["0", "2"]


def test_a_refused_adapter_freezes_nothing(tmp_path: Path) -> None:
    """Nor does a head that it would have trained stay wrapped."""
    saved = get_peft_model(sparse(), settings(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    saved.save_pretrained(tmp_path)
    model = make("llama")
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(SettingsError, match="loaded on a model with zeros"):
        PeftModel.from_pretrained(model, tmp_path)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert type(model.lm_head) is nn.Linear


def test_weights_that_are_not_loaded() -> None:
    with pytest.raises(SettingsError, match="weights are not loaded"):
        get_peft_model(make("llama").to("meta"), settings())


# --- settings


@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_rank_is_real(r: int) -> None:
    """Unlike in the paper's code, where it only changes the scale."""
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    adapted = get_peft_model(make("llama"), settings(r=r, spp_alpha=6.0, target_modules=targets))
    assert len(layers(adapted)) == 4 * 3
    for found in layers(adapted).values():
        m, n = found.base_layer.weight.shape
        assert tuple(found.spp_alpha["default"].shape) == (r, n)
        assert tuple(found.spp_beta["default"].shape) == (m,)
        assert found.scaling["default"] == 6.0 / r
    held = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert held == sum(
        r * x.base_layer.weight.shape[1] + x.base_layer.weight.shape[0] for x in layers(adapted).values()
    )


def test_a_rank_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"rank 5 on model\.layers\.0\.mlp\.down_proj, which has 24") as caught:
        get_peft_model(make("llama"), settings(r=5, target_modules=["down_proj"]))
    assert caught.value.allowed.endswith(": 1, 2, 3, 4, 6, 8, 12")


def test_ranks_that_are_offered_divide_every_linear() -> None:
    """Outputs are 36, 18, 24 and 20; queries would take 4, keys 9, and no other either."""
    with pytest.raises(SettingsError, match=r"rank 4 on model\.layers\.0\.self_attn\.k_proj, which has 18") as caught:
        get_peft_model(make("llama"), settings(r=4))
    assert caught.value.allowed.endswith("of every linear: 1, 2")
    adapted = get_peft_model(make("llama"), settings(r=2), adapter_name="one")
    with pytest.raises(SettingsError, match=r"rank 4 on model\.layers\.0\.self_attn\.k_proj, which has 18") as caught:
        adapted.add_adapter("two", settings(r=4, target_modules=["q_proj", "k_proj"]))
    assert caught.value.allowed.endswith("of every linear: 1, 2, 3, 6, 9")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 0}, "r = 0"),
        ({"r": 4.0}, "r = 4.0"),
        ({"r": True}, "r = True"),
        ({"r": "4"}, "r = '4'"),
        ({"spp_alpha": 0.0}, "spp_alpha = 0"),
        ({"spp_alpha": -3.0}, "spp_alpha = -3"),
        ({"spp_alpha": float("nan")}, "spp_alpha = nan"),
        ({"spp_dropout": 1.0}, "spp_dropout = 1"),
        ({"spp_dropout": -0.1}, "spp_dropout = -0.1"),
        ({"form": "fast"}, "form = fast"),
        ({"form": "folded", "spp_dropout": 0.1}, "form = folded with spp_dropout"),
    ],
)
def test_bad_settings(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        settings(**changes)


class Quantised(nn.Linear):
    """As libraries make them: a linear by class, whole numbers inside."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((100 * linear.weight).to(torch.int8), requires_grad=False)


class InPieces(nn.Linear):
    """What a rank holds of a linear whose weights lie in many places."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(torch.empty(0))


@pytest.mark.parametrize("kind", [Quantised, InPieces])
def test_weights_that_are_not_whole_numbers_of_the_model(kind: type[Quantised | InPieces]) -> None:
    """Refused, and linears before it are as they were."""
    model = make("llama")
    model.model.layers[1].mlp.up_proj = kind(model.model.layers[1].mlp.up_proj)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(SettingsError, match=rf"model\.layers\.1\.mlp\.up_proj, a {kind.__name__}"):
        get_peft_model(model, settings())
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for name, p in model.named_parameters() if "layers.1.mlp.up_proj" not in name)


def test_whatever_goes_wrong_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    before = [(name, type(module)) for name, module in model.named_modules()]

    def fail(*_: object) -> str:
        raise MemoryError

    monkeypatch.setattr("regrow.engines.spp.mask_hash", fail)
    with pytest.raises(MemoryError):
        get_peft_model(model, settings())
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_only_linears() -> None:
    with pytest.raises(SettingsError, match=r"SPP on model\.embed_tokens, a Embedding"):
        get_peft_model(make("llama"), settings(target_modules=["embed_tokens"]))
