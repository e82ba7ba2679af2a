"""The walk over blocks: what linears read, what the published loops give, and the same on models of experts."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import VOCAB, make
from regrow.artifacts import curvature
from regrow.artifacts.linear import SOLVERS
from regrow.artifacts.pattern import Pattern
from regrow.artifacts.share import ZERO_SPREADS, share
from regrow.artifacts.weight_sight import WEIGHT_CRITERIA
from regrow.engines import inputs as engine
from regrow.engines.bind import Subject, bind
from regrow.engines.inputs import Observer, Reading, matrices
from regrow.engines.perplexity import block_losses
from regrow.engines.removal import layer_arguments, run_layer
from regrow.engines.sparsify import Method, Pruned, layer_values, sparsify
from regrow.engines.texts import documents
from regrow.engines.tokens import blocks
from regrow.errors import BrokenModel, SettingsError, UnsupportedModel
from regrow.stages.load import load

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import plain

EXPERTS = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def sprout(sprout_dir: Path) -> Subject:
    return load(str(sprout_dir))


@pytest.fixture(scope="module")
def text(sprout: Subject) -> Tensor:  # (12, 96)
    return blocks(documents("demo", "calibration"), sprout.tokenizer, block=96, tokens=12 * 96, seed=0)


@pytest.fixture(scope="module")
def heldout(sprout: Subject) -> Tensor:
    return blocks(documents("demo", "heldout"), sprout.tokenizer, block=128, tokens=2048, seed=0)


def method(criterion: str, solver: str | None = None, **more: Any) -> Method:
    found = WEIGHT_CRITERIA.get(criterion)
    names = (solver or found.solver).split(",")
    return Method(found, tuple((SOLVERS.get(name), {}) for name in names), **more)


def cut(subject: Subject, text: Tensor | None, asked: Method, pattern: str, **more: Any) -> tuple[Any, list[Pruned]]:
    """A sparse copy of the model and what became of its matrices."""
    model = copy.deepcopy(subject.model)
    patterns = [Pattern.parse(pattern)] * subject.anatomy.sizes["L"]
    return model, sparsify(model, subject.anatomy, text, asked, patterns, **more)


def zeros(model: Any) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if "proj" in name}


def perplexity(model: Any, heldout: Tensor) -> float:
    return math.exp(block_losses(model, heldout).mean())


@pytest.mark.parametrize(
    ("pattern", "share", "keep", "of"), [("50%", 0.5, 0, 0), ("2:4", 0.5, 2, 4), ("2:8", 0.75, 2, 8)]
)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_the_published_loops(
    sprout: Subject, text: Tensor, heldout: Tensor, name: str, pattern: str, share: float, keep: int, of: int
) -> None:
    """Wanda to the bit, magnitude but for ties at its threshold, which the loop cuts all; SparseGPT, where rounding
    decides near ties, in perplexity."""
    ours, _ = cut(sprout, text, method(name), pattern)
    theirs = copy.deepcopy(sprout.model)
    plain.run(theirs, text, name, share, keep, of)
    if name == "sparsegpt":
        assert perplexity(ours, heldout) == pytest.approx(perplexity(theirs, heldout), rel=0.01)
        return
    for key, mask in zeros(ours).items():
        theirs_too = theirs.get_parameter(key) == 0
        if name == "magnitude" and not of:
            tied = sprout.model.get_parameter(key)[mask != theirs_too].abs()
            assert not (mask & ~theirs_too).any()
            assert len(tied.unique()) <= 1
        else:
            assert torch.equal(ours.get_parameter(key), theirs.get_parameter(key)), key


def test_a_trained_model_tells_methods_apart(sprout: Subject, text: Tensor, heldout: Tensor) -> None:
    found = {
        name: perplexity(cut(sprout, text, method(name), "2:4")[0], heldout)
        for name in ("magnitude", "wanda", "sparsegpt")
    }
    found["alps"] = perplexity(cut(sprout, text, method("wanda", "alps"), "2:4")[0], heldout)
    dense = perplexity(sprout.model, heldout)
    assert dense < found["alps"] < found["sparsegpt"] < found["wanda"] < found["magnitude"]


def test_half_of_a_trained_model_by_sparsegpt(sprout: Subject, text: Tensor, heldout: Tensor) -> None:
    dense = perplexity(sprout.model, heldout)
    halves = [perplexity(cut(sprout, text, method(n), "50%")[0], heldout) for n in ("sparsegpt", "magnitude")]
    assert dense < halves[0] < halves[1]


def test_kept_weights_are_bit_identical_and_the_rest_untouched(sprout: Subject, text: Tensor) -> None:
    model, done = cut(sprout, text, method("wanda"), "50%", leave=("o_proj", "layers.0.mlp.down_proj"))
    named = {item.name for item in done}
    assert len(named) == 6 * 6 - 1
    for name, parameter in model.named_parameters():
        before = sprout.model.get_parameter(name)
        if name.removesuffix(".weight") in named:
            assert torch.equal(parameter[parameter != 0], before[parameter != 0])
            assert float((parameter == 0).float().mean()) == 0.5
        else:
            assert torch.equal(parameter, before), name
    assert all(item.zeros * 2 == item.weights for item in done)


def test_the_same_text_twice_changes_nothing(sprout: Subject, text: Tensor) -> None:
    """But for rounding: sums of more numbers round otherwise, and a weight on the edge moves what later layers read.

    Of one linear in fp64 the solvers' tests hold it exactly.
    """
    for name in ("wanda", "sparsegpt"):
        once, twice = (zeros(cut(sprout, t, method(name), "2:4")[0]) for t in (text, torch.cat([text, text])))
        differ = {key: float((mask != twice[key]).float().mean()) for key, mask in once.items()}
        first = max(share for key, share in differ.items() if ".layers.0." in key)
        assert first < (1e-9 if name == "wanda" else 1e-3)
        assert max(differ.values()) < (1e-9 if name == "wanda" else 0.05)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_the_order_of_sequences_does_not_matter(sprout: Subject, text: Tensor, name: str) -> None:
    """But for rounding, as above."""
    one, other = (zeros(cut(sprout, t, method(name), "50%")[0]) for t in (text, text.flip(0)))
    differ = {key: float((mask != other[key]).float().mean()) for key, mask in one.items()}
    first = max(share for key, share in differ.items() if ".layers.0." in key)
    assert first < (1e-9 if name == "wanda" else 1e-3)
    assert max(differ.values()) < (1e-9 if name == "wanda" else 0.05)


def test_a_mask_of_sparsegpt_mended_by_swaps(sprout: Subject, text: Tensor) -> None:
    """Two solvers that read different things are both served. In the published code this start is the first half of
    the columns."""
    asked = method("sparsegpt", "dsnot")
    assert asked.sees == "all"
    found, start = (zeros(cut(sprout, text[:4], m, "50%")[0]) for m in (asked, method("sparsegpt", "none")))
    for key, mask in found.items():
        first = mask[:, : mask.shape[1] // 2]
        assert 0.35 < float(first.sum() / mask.sum()) < 0.65, key
        if ".layers.0." in key:  # reads the same
            assert torch.equal(mask.sum(1), start[key].sum(1)), key
    moved = sum(int((mask != start[key]).sum()) for key, mask in found.items())
    assert moved > 0.05 * sum(mask.numel() for mask in found.values())


def test_linears_with_one_input_share_a_factor(sprout: Subject, text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer: q, k and v; o; gate and up; down."""
    seen: list[int] = []
    right = curvature.inverse_root

    def root(gram: Tensor, found: Tensor) -> Tensor:
        if len(gram) in (128, 352):  # the whole, not a half of it
            seen.append(len(gram))
        return right(gram, found)

    monkeypatch.setattr(curvature, "inverse_root", root)
    cut(sprout, text[:2], method("sparsegpt"), "50%")
    assert seen == [128, 128, 128, 352] * 6


def test_fewer_tokens_than_inputs_without_damping(sprout: Subject, text: Tensor) -> None:
    """96 tokens leave a Gram matrix of 128 inputs singular: it is damped all the same, and that is said."""
    model, done = cut(sprout, text[:1], method("sparsegpt", damping=0.0), "50%")
    assert all(item.note.startswith("damping raised to") for item in done)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    other, _ = cut(sprout, None, method("magnitude"), "50%")
    assert not torch.equal(zeros(model)[name], zeros(other)[name])


def test_errors_are_those_of_the_outputs(sprout: Subject, text: Tensor) -> None:
    model, done = cut(sprout, text, method("sparsegpt"), "50%")
    layer, path = sprout.model.model.layers[0], "mlp.down_proj"
    seen: list[Tensor] = []
    linear = layer.get_submodule(path)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        sprout.model(text)
    handle.remove()
    x = torch.cat(seen).double()
    dense, sparse = linear.weight.double(), model.model.layers[0].get_submodule(path).weight.double()
    expected = ((sparse - dense) @ x.T).square().sum() / (dense @ x.T).square().sum()
    found = next(item for item in done if item.name == f"model.layers.0.{path}")
    assert found.error == pytest.approx(expected.item(), rel=1e-3)


def test_inputs_of_blocks(sprout: Subject, text: Tensor) -> None:
    """In one pass a block reads what the dense model gives it; `both` aims at the dense model's outputs."""
    few = behind(sprout.model)
    found = {
        kind: cut(sprout, text, method("wanda", "alps", inputs=kind), "2:4", leave=few)[0]
        for kind in ("pruned", "dense", "both")
    }
    first = [zeros(model)["model.layers.0.self_attn.q_proj.weight"] for model in found.values()]
    assert torch.equal(first[0], first[1])
    last = [zeros(model)["model.layers.1.mlp.down_proj.weight"] for model in found.values()]
    assert not torch.equal(last[0], last[1])
    queries = [model.model.layers[1].self_attn.q_proj.weight for model in found.values()]
    assert not torch.equal(queries[0], queries[2])


def test_one_pass_reads_what_the_dense_model_gives(sprout: Subject, text: Tensor) -> None:
    model, _ = cut(sprout, text, method("wanda", inputs="dense"), "50%")
    seen = list(sprout.model.model.layers)
    first, calls = layer_arguments(sprout.model, seen, text[:1])
    stream = torch.cat([layer_arguments(sprout.model, seen, row[None])[0] for row in text])
    with torch.no_grad():
        for layer, call in zip(seen[:-1], calls, strict=False):
            stream = torch.cat([run_layer(layer, row[None], *call) for row in stream])
        with Observer(seen[-1], "inputs") as observer:
            for row in stream:
                run_layer(seen[-1], row[None], *calls[-1])
    norm = observer.readings["mlp.gate_proj"].inputs(len(text)).squares.sqrt()
    scores = seen[-1].mlp.gate_proj.weight.abs() * norm
    gone = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(dim=1, stable=True)[:, :64], True)
    assert torch.equal(model.model.layers[-1].mlp.gate_proj.weight == 0, gone)
    assert first.shape == (1, 96, 128)


def test_zeros_that_are_there_stay(sprout: Subject, text: Tensor) -> None:
    half, _ = cut(sprout, text, method("magnitude"), "30%")
    subject = Subject(half, sprout.tokenizer, sprout.anatomy, sprout.source, sprout.store)
    few, before = behind(half), zeros(half)
    for name, solver in (("wanda", "none"), ("sparsegpt", "update"), ("wanda", "alps")):
        more = zeros(cut(subject, text, method(name, solver, keep_zeros=True), "50%", leave=few)[0])
        assert all(bool((more[k] | ~mask).all()) for k, mask in before.items())
    free = zeros(cut(subject, text, method("wanda", "alps"), "50%", leave=few)[0])
    assert not all(bool((free[k] | ~mask).all()) for k, mask in before.items())


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize(("solver", "inputs"), [("alps", "pruned"), ("mrp", "both"), ("dsnot", "pruned")])
def test_zeros_that_are_there_are_counted(
    sprout: Subject, text: Tensor, solver: str, inputs: str, pattern: str
) -> None:
    """A tenth is zero: the rest makes up for what is missing, in groups that have too many nothing more goes."""
    few = copy.deepcopy(sprout.model)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in few.named_parameters():
            if "proj" in name:
                weight.masked_fill_(torch.rand(weight.shape, generator=source) < 0.1, 0)
    subject = Subject(few, sprout.tokenizer, sprout.anatomy, sprout.source, sprout.store)
    asked = method("wanda", solver, inputs=inputs, keep_zeros=True)
    model, done = cut(subject, text[:4], asked, pattern, leave=behind(few))
    after, empty = zeros(model), zeros(few)
    for name, before in ((f"{item.name}.weight", empty[f"{item.name}.weight"]) for item in done):
        assert bool(after[name][before].all())
        if pattern == "50%":
            assert int(after[name].sum()) * 2 == before.numel()
        else:
            groups = before.view(-1, 4).sum(1).clamp_min(2)
            assert torch.equal(after[name].view(-1, 4).sum(1), groups), name


# ---- readings


def test_linears_with_one_input_share_a_reading(sprout: Subject, text: Tensor) -> None:
    layer = sprout.model.model.layers[0]
    with Observer(layer, "gram") as observer, torch.no_grad():
        sprout.model(text[:2])
    q, k, o, gate, up, down = (
        observer.readings[p]
        for p in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    )
    assert q is k
    assert gate is up
    assert len({id(r) for r in (q, o, gate, down)}) == 4
    assert q.tokens == 2 * 96


@pytest.mark.parametrize("columns", [5, 192, 400])
def test_sums_by_hand_and_in_any_cutting(columns: int) -> None:
    x = torch.randn(60, columns, generator=torch.Generator().manual_seed(0)) + 2
    whole, parts = Reading(columns, "gram", x.device), Reading(columns, "gram", x.device)
    moments = Reading(columns, "moments", x.device)
    whole.add(x)
    for part in torch.split(x, 17):
        parts.add(part)
        moments.add(part)
    gram = whole.take_gram()
    assert torch.allclose(gram, x.T @ x, rtol=1e-5)
    assert torch.allclose(gram, gram.T, rtol=1e-6)
    assert torch.allclose(parts.take_gram(), gram, rtol=1e-4)
    found = moments.inputs(3)
    assert torch.allclose(found.squares, x.square().sum(0) / 3, rtol=1e-5)
    assert torch.allclose(found.sums, x.sum(0) / 3, rtol=1e-5)
    assert torch.allclose(found.variance, x.var(0, correction=0), rtol=1e-4)
    assert torch.allclose(whole.inputs(3).squares, found.squares, rtol=1e-5)


def test_sums_do_not_hang_on_the_order_of_tokens() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(60, 40, generator=source) + 2
    one, other = Reading(40, "moments", x.device), Reading(40, "moments", x.device)
    for part in torch.split(x, 17):
        one.add(part)
    for part in torch.split(x[torch.randperm(60, generator=source)], 23):
        other.add(part)
    a, b = one.inputs(3), other.inputs(3)
    for name in ("squares", "sums", "variance"):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-4), name


@pytest.mark.parametrize("sees", ["inputs", "moments", "gram", "all"])
def test_rows_of_zeros_behind_the_tokens_say_nothing(sees: str) -> None:
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0)) + 2
    plain_one, padded = Reading(40, sees, x.device), Reading(40, sees, x.device)
    for part in torch.split(x, 17):
        plain_one.add(part)
        padded.add(torch.cat([part, torch.zeros(7, 40)]), rows=len(part))
    padded.add(torch.zeros(7, 40), rows=0)
    assert plain_one.tokens == padded.tokens == 60
    ours, theirs = padded.tensors(), plain_one.tensors()
    for name, value in theirs.items():
        assert torch.allclose(ours[name].double(), value.double(), rtol=1e-5), name
    if sees in ("moments", "all"):
        assert padded.inputs(1).variance.min() > 0.5, "else a wrong count would not show"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sees", ["inputs", "moments", "gram", "all"])
def test_inputs_of_16_bits_are_added_up_in_wider_ones(sees: str, dtype: torch.dtype) -> None:
    """Squares overflow fp16, and sums lose what they add in bf16; more tokens than are squared at a time."""
    x = (300 * torch.randn(2500, 8, generator=torch.Generator().manual_seed(0)) + 50).to(dtype)
    reading, exact = Reading(8, sees, x.device), x.double()
    reading.add(x)
    if reading.products is not None:
        assert torch.allclose(reading.take_gram().double(), exact.T @ exact, rtol=1e-5, atol=1e-5 * 300**2 * 2500)
    found = reading.inputs(1)
    assert torch.allclose(found.squares.double(), exact.square().sum(0), rtol=1e-5)
    if sees in ("moments", "all"):
        assert torch.allclose(found.sums.double(), exact.sum(0), rtol=1e-5)
        assert torch.allclose(found.variance.double(), exact.var(0, correction=0), rtol=1e-5)


def test_layers_are_valued_on_the_dense_model(sprout: Subject, text: Tensor) -> None:
    values = layer_values(sprout.model, sprout.anatomy, text, lambda s: float(sum(x.numel() for x in s())))
    assert values == [sprout.anatomy.sizes["C"] ** 2 * 3 + 3 * 128 * 352] * 6
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares[name] = squares.get(name, torch.zeros(())) + x.double().square().sum((0, 1))

    linears = {n: m for n, m in sprout.model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: add(n, args[0])) for n, m in linears.items()]
    with torch.no_grad():
        sprout.model(text)
    for handle in handles:
        handle.remove()
    expected = [0.0] * 6
    for name, linear in linears.items():
        norm = (squares[name] / len(text)).sqrt()
        expected[int(name.partition(".")[0])] += float((linear.weight.detach().abs() * norm).sum())
    values = layer_values(sprout.model, sprout.anatomy, text, lambda s: float(sum(x.sum() for x in s())))
    assert values == pytest.approx(expected, rel=1e-5)


def test_the_same_text_twice_shares_zeros_alike(sprout: Subject, text: Tensor) -> None:
    owl = ZERO_SPREADS.get("owl")
    once, twice = (layer_values(sprout.model, sprout.anatomy, t, owl.measure) for t in (text, torch.cat([text, text])))
    assert once == twice
    assert len(set(once)) > 1
    patterns = [share(Pattern.parse("70%"), values, [1] * 6, owl) for values in (once, twice)]
    assert patterns[0] == patterns[1] != [Pattern.parse("70%")] * 6


def test_a_layer_of_which_nothing_is_read_is_worth_nothing(sprout: Subject, text: Tensor) -> None:
    leave = ("layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj")
    leave += ("layers.1.self_attn.o_proj", *(f"layers.1.mlp.{end}_proj" for end in ("gate", "up", "down")))
    values = layer_values(sprout.model, sprout.anatomy, text[:2], lambda scores: float(len([*scores()])), leave=leave)
    assert [value == 0 for value in values] == [False, True, False, False, False, False]


# ---- experts


def expert_subject(kind: str, **changes: Any) -> tuple[Any, Any]:
    model = make(kind, **changes)
    return model, bind(model.config, model)


def tokens(rows: int = 6) -> Tensor:
    return torch.randint(3, VOCAB, (rows, 40), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize(
    ("criterion", "solver"), [("wanda", "none"), ("sparsegpt", "update"), ("moe-pruner", "none"), ("wanda", "alps")]
)
def test_every_matrix_of_an_expert_model_but_the_router(kind: str, criterion: str, solver: str) -> None:
    model, anatomy = expert_subject(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = sparsify(model, anatomy, tokens(), method(criterion, solver), [Pattern.parse("2:4")] * anatomy.sizes["L"])
    assert any("experts.gate_up_proj[0]" in item.name for item in done)
    for item in done:
        assert item.zeros * 2 == item.weights or item.note == "saw no token", item
    for name, parameter in model.named_parameters():
        if "proj" not in name:
            assert torch.equal(parameter, before[name]), name
        elif "experts" not in name and parameter.dim() == 2:
            assert bool(((parameter == 0).view(len(parameter), -1, 4).sum(2) == 2).all()), name


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_reads_its_own_tokens(kind: str) -> None:
    """Against a model of one expert chosen by hand: the same inputs, weighted by the router when asked."""
    model, anatomy = expert_subject(kind)
    layer = model.model.layers[0]
    taken: list[tuple[Tensor, ...]] = []
    handle = layer.mlp.experts.register_forward_pre_hook(lambda _, args: taken.append(args))
    readings = {}
    for routed in (False, True):
        with Observer(layer, "moments", routed) as observer, torch.no_grad():
            model(tokens())
        readings[routed] = observer.readings
    handle.remove()
    x, chosen, weight = taken[0]
    for expert in range(len(layer.mlp.experts.gate_up_proj)):
        rows, place = torch.where(chosen == expert)
        if not len(rows):
            continue
        gate, up = (x[rows] @ layer.mlp.experts.gate_up_proj[expert].T).chunk(2, -1)
        middle = layer.mlp.experts.act_fn(gate) * up
        for part, read in (("gate_up_proj", x[rows]), ("down_proj", middle)):
            name = f"mlp.experts.{part}[{expert}]"
            assert readings[False][name].tokens == len(rows)
            expected = read.square().sum(0)
            assert torch.allclose(readings[False][name].inputs(1).squares, expected, rtol=1e-4)
            expected = (read * weight[rows, place, None]).square().sum(0)
            assert torch.allclose(readings[True][name].inputs(1).squares, expected, rtol=1e-4)
            found, spread = readings[False][name].inputs(1), read.var(0, correction=0)
            assert torch.allclose(found.sums, read.sum(0), rtol=1e-4, atol=1e-5)
            assert torch.allclose(found.variance, spread, rtol=1e-4, atol=1e-6)
    assert anatomy.family.routers == ("mlp.gate",)


@pytest.mark.parametrize(("kind", "more"), [("mixtral", {}), ("qwen3_moe", {"norm_topk_prob": True})])
def test_a_router_that_chooses_one_weighs_nothing(kind: str, more: dict[str, Any]) -> None:
    """Its weight is 1, so MoE-Pruner is Wanda; with two experts a token it is not."""

    def masks(criterion: str, experts: int) -> dict[str, Tensor]:
        model, anatomy = expert_subject(kind, num_experts_per_tok=experts, **more)
        sparsify(model, anatomy, tokens(), method(criterion), [Pattern.parse("50%")] * anatomy.sizes["L"])
        return zeros(model)

    for experts in (1, 2):
        ours, plain_ones = masks("moe-pruner", experts), masks("wanda", experts)
        same = {name: torch.equal(mask, plain_ones[name]) for name, mask in ours.items() if ".layers.0." in name}
        assert {name for name, equal in same.items() if not equal} == {
            f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj") if experts == 2
        }


def test_an_expert_without_a_token_keeps_its_weights() -> None:
    model, anatomy = expert_subject("mixtral")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # ties: the first experts take all
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = sparsify(model, anatomy, tokens(), method("sparsegpt"), [Pattern.parse("50%")] * anatomy.sizes["L"])
    idle = [item for item in done if item.note == "saw no token"]
    assert idle
    for item in idle:
        name, _, index = item.name.removesuffix("]").partition("[")
        assert torch.equal(model.get_parameter(name)[int(index)], before[name][int(index)])
        assert item.zeros == 0


def test_experts_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = expert_subject("mixtral")
    monkeypatch.setattr(model.model.layers[0].mlp.experts, "act_fn", nn.Identity())
    own = type(model.model.layers[0].mlp.experts).forward

    def other(self: Any, *args: Tensor) -> Tensor:
        return 2 * own(self, *args)

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "forward", other)
    with pytest.raises(UnsupportedModel, match="computes something else"):
        sparsify(model, anatomy, tokens(), method("wanda"), [Pattern.parse("50%")] * anatomy.sizes["L"])


# ---- bad input


def test_bad_input_is_named(sprout: Subject, text: Tensor) -> None:
    with pytest.raises(SettingsError, match=r"3:7 on model\.layers\.0\.self_attn\.q_proj"):
        cut(sprout, text, method("wanda"), "3:7")
    broken = copy.deepcopy(sprout.model)
    with torch.no_grad():
        broken.model.layers[2].input_layernorm.weight[3] = math.inf
    subject = Subject(broken, sprout.tokenizer, sprout.anatomy, sprout.source, sprout.store)
    with pytest.raises(BrokenModel, match=r"inputs of model\.layers\.2\.self_attn\.q_proj"):
        cut(subject, text, method("wanda"), "50%")


def named(name: str) -> Method:
    """A criterion with its own solver, or a solver with its own start."""
    return method(name) if name in WEIGHT_CRITERIA.names() else method(SOLVERS.get(name).start, name)


def behind(model: Any) -> list[str]:
    """Every linear from the third layer on, to be left out where two layers are enough."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(r"layers\.[2-9]", n)]


@torch.no_grad()
def check_exact(model: Any, done: list[Pruned], pattern: str) -> None:
    assert len(done) == 2 * 7
    for item in done:
        empty = model.get_parameter(f"{item.name}.weight") == 0
        assert 2 * int(empty.sum()) == item.weights, item.name
        assert pattern != "2:4" or bool((empty.unflatten(1, (-1, 4)).sum(-1) == 2).all()), item.name
        assert math.isfinite(item.error or 0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert bool(model(torch.arange(10, 30)[None]).logits.isfinite().all())


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "dsnot"])
def test_a_channel_that_is_always_zero(sprout: Subject, text: Tensor, name: str, pattern: str) -> None:
    dead = copy.deepcopy(sprout.model)
    with torch.no_grad():
        for layer in dead.model.layers:
            layer.input_layernorm.weight[7] = 0
    subject = Subject(dead, sprout.tokenizer, sprout.anatomy, sprout.source, sprout.store)
    model, done = cut(subject, text[:4], named(name), pattern, leave=behind(dead))
    check_exact(model, done, pattern)
    if name != "dsnot":  # a swap for what adds nothing may mend a mean
        assert bool((model.model.layers[0].self_attn.q_proj.weight[:, 7] == 0).all())


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "dsnot", "alps", "mrp"])
def test_a_text_of_one_word(sprout: Subject, name: str) -> None:
    """All inputs of a linear are the same, so none has a variance."""
    constant = torch.full((4, 96), 50)
    model, done = cut(sprout, constant, named(name), "2:4", leave=behind(sprout.model))
    check_exact(model, done, "2:4")


def test_a_reading_that_misses_a_linear_is_seen(monkeypatch: pytest.MonkeyPatch, sprout: Subject, text: Tensor) -> None:
    """The mutation: inputs of one linear taken for another's; the masks are no longer Wanda's."""
    right, _ = cut(sprout, text, method("wanda"), "50%")
    whole: Callable[..., list[engine.Matrix]] = matrices

    def crossed(*given: Any) -> list[engine.Matrix]:
        found = whole(*given)
        return [engine.Matrix(m.name, m.weight, m.site.replace("o_proj", "q_proj")) for m in found]

    monkeypatch.setattr("regrow.engines.sparsify.matrices", crossed)
    wrong, _ = cut(sprout, text, method("wanda"), "50%")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(zeros(right)[name], zeros(wrong)[name])
